"""Whatever is asked, nodes and participants answer what their OpenAPI documents describe: no 500, and no trace."""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from coordinator.codec import JSON_TYPE, MSGPACK_TYPE
from participants.server import Participant
from tests.fuzz import HUNT, examples
from tests.fuzz.mutations import altered, as_json, damaged, pack
from tests.support.nodes import RunningNode
from tests.support.schemas import Described

DOCS = Path(__file__).parents[2] / "docs"
NODE = Described(DOCS / "openapi.json")
PARTICIPANT = Described(DOCS / "openapi-participant.json")
GIDS = [
    "test-1-1",
    "test-1-2",
    "test-1-999999999999",
    "test-9999999-1",
    "other-1-1",
    "x",
    "%00",
    "%ff",
    "..",
    "test-1-1%0a",
]
NAMES = ["null", "spare", "a" * 65, "A", "%20", "%F0%9F%98%80", "null%00"]
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/transactions"): {
        "protocol": "2pc", "branches": [{"participant": "null", "branch": "b", "payload": {"a": [1, None]}}],
        "timeout_s": 0.2, "wait": "none",
    },
    ("POST", "/v1/transactions/begin"): {"protocol": "2pc", "timeout_s": 0.2},
    ("POST", "/v1/transactions/{gid}/branches"): {"participant": "null", "branch": "b"},
    ("POST", "/v1/transactions/{gid}/commit"): {"branches": ["b"], "wait": "none"},
    ("POST", "/v1/transactions/{gid}/abort"): {},
    ("POST", "/v1/transactions/{gid}/resolve"): {"branch": "b", "outcome": "abort", "note": "by hand"},
    ("POST", "/v1/transactions/{gid}/acknowledge"): {},
    ("PUT", "/v1/participants/{name}"): {"url": "http://127.0.0.1:1", "batch": True},
    ("PUT", "/v1/reconciliation"): {"without": "null"},
    ("POST", "/v1/restore"): {"no": "copy"},
}  # fmt: skip
MESSAGE = {"gid": "shop-1-1", "branch": "b", "epoch": 1, "floor": None, "payload": {"a": 1}, "deadline_ms": 1000}
ITEM = {**MESSAGE, "call": "prepare", "coordinators": ["http://127.0.0.1:1"]}
WAITS = [
    "?wait=none",
    "?wait=decided&timeout_s=0.01",
    "?wait=x",
    "?timeout_s=nan",
    "?timeout_s=1e999&wait=ended",
    "?%ff",
]
LISTS = [
    "?state=active",
    "?state=x",
    "?limit=0",
    "?limit=1&after=test-1-1",
    "?after=x",
    "?limit=%D9%A1",
    "?heuristic=1",
]
WORDS = ["", "x", "\xe9", "x" * 300, "0", "-1", "9" * 12, "gzip", "text/plain", "Bearer x", "application/msgpack"]
Send = Callable[..., Any]


@st.composite
def requests(draw: st.DrawFn, document: Described) -> tuple[str, str, str, dict[str, str], bytes | None]:
    """Method, path as described, target, headers, body."""
    method, path = draw(st.sampled_from(sorted(document.routes() - {("GET", "/v1/backup")})))
    target = path.replace("{gid}", draw(st.sampled_from(GIDS))).replace("{name}", draw(st.sampled_from(NAMES)))
    headers: dict[str, str] = {}
    if draw(st.integers(0, 3)) == 0:
        names = ["Idempotency-Key", "Outlast-Wait-Ms", "Content-Type", "Content-Encoding", "Authorization", "Range"]
        headers[draw(st.sampled_from(names))] = draw(st.sampled_from(WORDS))
    if path == "/v1/transactions/{gid}":
        target += draw(st.sampled_from(["", *WAITS]))
    if (method, path) == ("GET", "/v1/transactions"):
        target += draw(st.sampled_from(["", *LISTS]))
    if path == "/branches":
        target += draw(st.sampled_from(["", "?gid=shop-1-1", "?gid=x", "?before=shop-1-9", "?gid=a-1-1&gid=b-1-1"]))
    if path == "/v1/restore":
        target += draw(st.sampled_from(["", "?above_epoch=5", "?above_epoch=x", "?more=1"]))
    body = None
    if method in ("POST", "PUT"):
        if path == "/batch":
            valid, write = [ITEM, {**ITEM, "call": "commit"}], draw(st.sampled_from([as_json, pack]))
        else:
            valid, write = BODIES.get((method, path), MESSAGE), as_json
        headers.setdefault("Content-Type", MSGPACK_TYPE if write is pack else JSON_TYPE)
        body = draw(altered(st.just(valid)).map(write) | damaged(st.just(write(valid))) | st.just(write(valid)))
    return method, path, target, headers, body


async def ask(session: aiohttp.ClientSession, url: str, request: Any) -> tuple[int, str, bytes]:
    method, _path, target, headers, body = request
    async with session.request(
        method, URL(url + target, encoded=True), headers=headers, data=body, timeout=aiohttp.ClientTimeout(total=60)
    ) as response:
        return response.status, response.headers.get("Content-Type", ""), await response.read()


def judge(document: Described, request: Any, reply: tuple[int, str, bytes]) -> None:
    """Whether the document allows this answer."""
    method, path, target, _headers, _body = request
    status, content_type, raw = reply
    assert status != 500, (method, target, raw[:300])
    assert b"Traceback" not in raw
    described = document.document["paths"][path][method.lower()]["responses"]
    if status >= 400 and str(status) not in described:
        assert content_type.startswith("application/problem+json"), (method, target, status, content_type)
    schema = document.schema_of(method, path, status, content_type) if raw else None
    if schema is not None and "json" in content_type:
        assert document.complaints(json.loads(raw), schema) == [], (method, target, raw[:300])


async def fuzzed(document: Described, url: str, count: int, caplog: pytest.LogCaptureFixture) -> set[int]:
    """Hypothesis is not made for coroutines: it runs on a thread, and what it makes is sent from here."""
    seen: set[int] = set()
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(auto_decompress=False) as session:

        @examples(count)
        @given(requests(document))
        def run(request: Any) -> None:
            reply = asyncio.run_coroutine_threadsafe(ask(session, url, request), loop).result()
            seen.add(reply[0])
            judge(document, request, reply)

        await asyncio.to_thread(run)
    defects = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not defects, "what clients send is no defect of a node"
    return seen


async def test_a_node_answers_as_described_whatever_is_asked(
    node: RunningNode, null: Participant, caplog: pytest.LogCaptureFixture
) -> None:
    await node.register("null", null.url, batch=True)
    seen = await fuzzed(NODE, node.url, 150, caplog)
    assert {200, 400, 404, 422} <= seen
    await node.register("null", null.url, batch=True)
    assert (await node.submit("null")).status == 200, "and it works on"


async def test_a_participant_answers_as_described_whatever_is_asked(
    null: Participant, caplog: pytest.LogCaptureFixture
) -> None:
    assert {200, 400} <= await fuzzed(PARTICIPANT, null.url, 100, caplog)


async def test_a_careless_server_is_found() -> None:
    """It trusts that a body is an object with a participant."""

    async def careless(request: web.Request) -> web.Response:
        name = (await request.json())["participant"]
        return web.json_response({"outcome": name})

    app = web.Application()
    for method, path in NODE.routes():
        app.router.add_route(method, path, careless)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    loop = asyncio.get_running_loop()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as session:

            @HUNT
            @given(requests(NODE))
            def hunt(request: Any) -> None:
                judge(NODE, request, asyncio.run_coroutine_threadsafe(ask(session, url, request), loop).result())

            with pytest.raises(AssertionError):
                await asyncio.to_thread(hunt)
    finally:
        await runner.cleanup()
