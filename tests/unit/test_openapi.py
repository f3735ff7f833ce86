"""The OpenAPI documents describe each route that is served, and nothing else; and answers are as they say."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from coordinator.api import KEY_HEADER, WAIT_HEADER, problem
from coordinator.codec import Malformed, request_from_wire
from coordinator.config import Limits, valid_name
from coordinator.errors import OutlastError
from coordinator.parsing import idempotency_key, resolution
from participants.null import NullManager
from participants.server import _UNAVAILABLE, start
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


def headers(document: Described) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Schemas of the headers that can be sent, by method, path and name."""
    return {
        (method.upper(), path, each["name"]): each["schema"]
        for path, methods in document.document["paths"].items()
        for method, operation in methods.items()
        for each in operation.get("parameters", ())
        if each["in"] == "header"
    }


def taken(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OutlastError, Malformed):
        return False
    return True


def test_the_limits_described_are_those_of_the_code():
    keys = [schema for (*_, name), schema in headers(NODE).items() if name == KEY_HEADER]
    assert len(keys) == 2
    schemas, messages = (each.document["components"]["schemas"] for each in (NODE, PARTICIPANT))
    note = schemas["Resolution"]["properties"]["note"]
    name = schemas["Submission"]["properties"]["branches"]["items"]["properties"]["participant"]
    message = {"gid": "shop-1-1", "epoch": 1}
    limits: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
        *((key, lambda text: taken(lambda: idempotency_key(text, Limits()))) for key in keys),
        (note, lambda text: taken(lambda: resolution({"branch": "b", "outcome": "commit", "note": text}))),
        (name, valid_name),
        *(
            (messages[kind]["properties"]["branch"], partial(_is_branch, call, message))
            for kind, call in (("Prepare", "prepare"), ("Decision", "abort"))
        ),
    ]
    for schema, takes in limits:
        lengths = range(600)
        described = [length for length in lengths if not NODE.complaints("a" * length, schema)]
        assert described == [length for length in lengths if takes("a" * length)], schema


def _is_branch(call: str, message: dict[str, Any], text: str) -> bool:
    return taken(lambda: request_from_wire(call, {**message, "branch": text}))


def test_the_headers_that_nodes_go_by_are_described():
    assert {name for *_, name in headers(NODE)} == {KEY_HEADER, WAIT_HEADER}
    waits = {(method, path) for method, path, name in headers(NODE) if name == WAIT_HEADER}
    assert waits == {
        ("POST", "/v1/transactions"),
        ("GET", "/v1/transactions/{gid}"),
        ("POST", "/v1/transactions/{gid}/commit"),
        ("POST", "/v1/transactions/{gid}/abort"),
    }, "those that wait for something of the transaction's"


def test_a_problem_says_when_to_come_back_as_described():
    participant = _UNAVAILABLE.response()
    node = problem(503, "", "", code="unknown", retry_after_s=0.2)
    for document, response in ((NODE, node), (PARTICIPANT, participant)):
        ((name, described),) = document.document["components"]["responses"]["Problem"]["headers"].items()
        assert document.complaints(int(response.headers[name]), described["schema"]) == []


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


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [0, -1], ["0", 1.5, None, True]),
        ({"type": ["string", "null"]}, ["", None], [0]),
        ({"enum": ["a", None]}, ["a", None], ["b"]),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ["", 1], [None]),
        ({"pattern": "^a+$"}, ["aa"], ["ab"]),
        ({"minimum": 1}, [1, 1.5], [0.5, -1]),
        ({"exclusiveMinimum": 0}, [0.1, 1], [0, -0.1]),
        ({"minLength": 1}, ["a"], [""]),
        ({"maxLength": 2}, ["", "ab"], ["abc"]),
        ({"minItems": 1}, [[0]], [[]]),
        ({"items": {"minimum": 1}}, [[1, 2]], [[1, 0]]),
        (
            {"format": "date-time"},
            ["2026-01-31T12:00:00.004Z", "2026-01-31T12:00:00+01:00"],
            ["2026-01-31", "2026-13-31T12:00:00Z", "2026-01-31T12:00:00", "soon", ""],
        ),
        ({"required": ["a"]}, [{"a": 1}], [{}]),
        ({"properties": {"a": {"type": "null"}}}, [{"a": None}, {}], [{"a": 1}]),
        ({"properties": {}, "additionalProperties": False}, [{}], [{"a": 1}]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_a_schema_forbids_is_found(schema, good, bad):
    """Each keyword that the documents use, alone."""
    for value in good:
        assert NODE.complaints(value, schema) == []
    for value in bad:
        assert NODE.complaints(value, schema) != [], value


def test_a_format_that_nobody_checks_is_no_format():
    with pytest.raises(KeyError, match="email"):
        NODE.complaints("a", {"format": "email"})
