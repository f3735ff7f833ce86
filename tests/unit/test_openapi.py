"""The OpenAPI documents describe each route that is served, and nothing else; and answers are as they say."""

import copy
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from participants.null import NullManager
from participants.server import start
from tests.support.schemas import Described

DOCS = Path(__file__).parents[2] / "docs"
NODE = Described(DOCS / "openapi.json")
PARTICIPANT = Described(DOCS / "openapi-participant.json")


def served(app: web.Application) -> set[tuple[str, str]]:
    return {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }


def application_of(runner: Any) -> web.Application:
    (app,) = [value for value in vars(runner).values() if isinstance(value, web.AppRunner)]
    return app.app


def check(document: Described, method: str, path: str, reply: Any) -> None:
    """An answer is one that the document knows."""
    status, content_type, value = reply
    schema = document.schema_of(method, path, status, content_type)
    if schema is None:
        assert value is None
        return
    assert document.complaints(value, schema) == [], (method, path)


async def test_every_route_of_a_node_is_described(node):
    """A route that is missing belongs into `paths` of docs/openapi.json, with its answers."""
    assert served(application_of(node.node)) == NODE.routes()


async def test_every_route_of_a_participant_is_described():
    participant = await start(NullManager())
    try:
        assert served(application_of(participant)) == PARTICIPANT.routes()
    finally:
        await participant.stop()


def test_every_code_is_described():
    codes = set(re.findall(r"^\| `([a-z_]+)` \| \d+ \|", (DOCS / "API.md").read_text(), re.MULTILINE))
    assert set(NODE.document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]) == codes


@pytest.mark.parametrize("document", [NODE, PARTICIPANT], ids=["node", "participant"])
def test_references_lead_somewhere(document):
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert document.resolved(value)
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    walk(document.document)
    names = [operation["operationId"] for path in document.document["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)


CALLS: list[tuple[str, str, str, Any, int]] = [
    ("PUT", "/v1/participants/{name}", "/v1/participants/spare", {"url": "http://127.0.0.1:1"}, 200),
    ("GET", "/v1/participants/{name}", "/v1/participants/spare", None, 200),
    ("GET", "/v1/participants/{name}", "/v1/participants/none", None, 404),
    ("GET", "/v1/participants", "/v1/participants", None, 200),
    ("DELETE", "/v1/participants/{name}", "/v1/participants/spare", None, 204),
    ("POST", "/v1/transactions", "/v1/transactions", {"branches": [{"participant": "null"}], "wait": "ended"}, 200),
    ("POST", "/v1/transactions", "/v1/transactions", {"branches": [{"participant": "null"}], "wait": "none"}, 200),
    ("POST", "/v1/transactions", "/v1/transactions", {"branches": []}, 422),
    ("GET", "/v1/transactions", "/v1/transactions?limit=2", None, 200),
    ("GET", "/v1/transactions/{gid}", "/v1/transactions/{gid}?wait=ended", None, 200),
    ("GET", "/v1/outcomes/{gid}", "/v1/outcomes/{gid}", None, 200),
    ("POST", "/v1/transactions/begin", "/v1/transactions/begin", {"timeout_s": 30}, 200),
    ("POST", "/v1/transactions/{gid}/branches", "/v1/transactions/{gid}/branches", {"participant": "null"}, 200),
    ("GET", "/v1/transactions/{gid}", "/v1/transactions/{gid}", None, 200),
    ("POST", "/v1/transactions/{gid}/commit", "/v1/transactions/{gid}/commit", {"branches": ["null"]}, 200),
    ("POST", "/v1/transactions/{gid}/abort", "/v1/transactions/{gid}/abort", None, 200),
    (
        "POST", "/v1/transactions/{gid}/resolve", "/v1/transactions/{gid}/resolve",
        {"branch": "null", "outcome": "abort"}, 409,
    ),
    ("POST", "/v1/transactions/{gid}/acknowledge", "/v1/transactions/{gid}/acknowledge", None, 409),
    ("GET", "/v1/cluster", "/v1/cluster", None, 200),
    ("GET", "/v1/backup", "/v1/backup", None, 200),
    ("POST", "/v1/restore", "/v1/restore", {"no": "copy"}, 409),
    ("GET", "/v1/reconciliation", "/v1/reconciliation", None, 200),
    ("PUT", "/v1/reconciliation", "/v1/reconciliation", {"without": "null"}, 409),
    ("GET", "/healthz", "/healthz", None, 200),
    ("GET", "/readyz", "/readyz", None, 200),
    ("GET", "/metrics", "/metrics", None, 200),
]  # fmt: skip
"""Method, path as it is described, path, body, status. {gid} is the last transaction's."""


async def test_a_node_answers_as_described(node, null):
    await node.register("null", null.url, batch=True)
    gid = ""
    for method, path, target, body, status in CALLS:
        reply = await node.call(method, target.replace("{gid}", gid), body)
        assert reply.status == status, (method, target, reply.raw[:300])
        text = reply.raw.decode() if "text/plain" in reply.headers.get("Content-Type", "") else None
        value = reply.json if reply.raw and text is None else text
        if reply.status != 204:
            check(NODE, method, path, (reply.status, reply.headers["Content-Type"], value))
        if isinstance(value, dict) and "gid" in value:
            gid = value["gid"]
    tried = {(method, path) for method, path, *_ in CALLS}
    assert tried == NODE.routes(), "each of them was tried"


async def test_a_participant_answers_as_described(null):
    message = {"gid": "shop-1-1", "branch": "b", "epoch": 1}
    calls: list[tuple[str, str, Any, int]] = [
        ("POST", "/prepare", {**message, "payload": {}, "deadline_ms": 1000}, 200),
        ("GET", "/branches", None, 200),
        ("POST", "/commit", message, 200),
        ("POST", "/abort", {**message, "gid": "no"}, 400),
        ("POST", "/abort", {**message, "gid": "shop-1-2"}, 200),
        ("POST", "/batch", [{**message, "call": "commit"}, 7], 200),
        ("GET", "/branches?gid=shop-1-1", None, 200),
        ("GET", "/branches?before=shop-1-9", None, 200),
        ("GET", "/healthz", None, 200),
        ("GET", "/metrics", None, 200),
    ]
    async with aiohttp.ClientSession() as session:
        for method, target, body, status in calls:
            async with session.request(method, null.url + target, json=body) as response:
                assert response.status == status, await response.text()
                content_type = response.headers["Content-Type"]
                value = await response.json(content_type=None) if "json" in content_type else await response.text()
            check(PARTICIPANT, method, target.partition("?")[0], (status, content_type, value))
    assert {(method, target.partition("?")[0]) for method, target, *_ in calls} == PARTICIPANT.routes()


def test_another_answer_than_described_is_found():
    schema = NODE.schema_of("GET", "/v1/outcomes/{gid}", 200, "application/json")
    assert schema is not None
    assert NODE.complaints({"outcome": "committed"}, schema) == []
    for wrong in ({}, {"outcome": "perhaps"}, {"outcome": None}, {"outcome": "aborted", "more": 1}, [], None):
        assert NODE.complaints(wrong, schema) != []
    strange = copy.deepcopy(NODE.resolved(schema)) | {"oneOf": []}
    with pytest.raises(AssertionError, match="not understood"):
        NODE.complaints({"outcome": "committed"}, strange)
