"""The HTTP API of a real node: every call, every documented error, and input that no one should send."""

import asyncio
import gzip
import io
import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import rendering
from coordinator.codec import MAX_NESTING, nested_too_deeply
from coordinator.config import Limits, Timing
from coordinator.levels import NEWEST
from participants.server import Participant
from tests.support.clocks import FakeClock
from tests.support.logs import Replicas
from tests.support.nodes import QUICK, RunningNode, configs, running
from tests.support.participants import ScriptedParticipant, hang, honest, http, on, refusing
from tests.support.waiting import eventually

TOKEN = "a-token-of-enough-length"


@pytest.fixture
async def shop(node: RunningNode, null: Participant) -> RunningNode:
    """A node with two registered participants, one of them taking batches."""
    await node.register("stock", null.url)
    await node.register("money", null.url, batch=True)
    return node


def body(*participants: str, **fields: Any) -> dict[str, Any]:
    return {"branches": [{"participant": name} for name in participants or ("stock", "money")], **fields}


# ------------------------------------------------------------------------------------------------ transactions


async def test_a_transaction_commits_and_looks_as_documented(shop: RunningNode) -> None:
    reply = await shop.submit("stock", "money", wait="ended")
    assert reply.status == 200
    txn = reply.json
    assert set(txn) == {
        *("gid", "protocol", "state", "decision", "reason", "retryable", "epoch", "branches"),
        *("started_at", "decided_at", "ended_at"),
    }
    assert (txn["protocol"], txn["state"], txn["decision"], txn["reason"]) == ("2pc", "committed", "commit", None)
    assert txn["gid"] == f"test-{txn['epoch']}-0"
    assert txn["started_at"] <= txn["decided_at"] <= txn["ended_at"]
    assert [branch["branch"] for branch in txn["branches"]] == ["stock", "money"]
    for branch in txn["branches"]:
        assert branch == {
            "branch": branch["participant"],
            "participant": branch["participant"],
            "state": "committed",
            "reason": None,
        }
    assert await shop.show(txn["gid"]) == txn


async def test_a_refusal_aborts_with_its_reason(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = refusing("out_of_stock", retryable=True)
    await shop.register("picky", scripted.url)
    reply = await shop.submit("money", "picky", wait="ended")
    assert reply.status == 200
    txn = reply.json
    assert (txn["state"], txn["decision"], txn["retryable"]) == ("aborted", "abort", True)
    assert txn["reason"] == "picky refused: out_of_stock"
    branch = txn["branches"][1]
    assert (branch["state"], branch["reason"], branch["retryable"]) == ("refused", "out_of_stock", True)


async def test_a_vote_may_carry_a_result(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    result = {"left": 7, "text": "ä\ud800", "big": 2**70}
    scripted.rule = on("prepare", lambda _: http(200, {"vote": "prepared", "result": result}))
    await shop.register("telling", scripted.url)
    txn = (await shop.submit("telling", wait="ended")).json
    assert txn["branches"][0]["result"] == result


async def test_wait_none_returns_at_once(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = hang
    await shop.register("slow", scripted.url)
    reply = await shop.submit("slow", wait="none")
    assert reply.status == 200
    assert (reply.json["state"], reply.json["decision"]) == ("preparing", None)
    assert reply.json["branches"][0]["state"] == "preparing"


async def test_what_is_not_decided_when_the_wait_ends_is_202(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = hang
    await shop.register("slow", scripted.url)
    reply = await shop.call("POST", "/v1/transactions", body("slow"), headers={"Outlast-Wait-Ms": "1"})
    assert reply.status == 202
    assert reply.json["decision"] is None
    reply = await shop.call(
        "GET", f"/v1/transactions/{reply.json['gid']}?wait=decided", headers={"Outlast-Wait-Ms": "1"}
    )
    assert reply.status == 202


async def test_what_is_decided_but_not_ended_is_202_to_who_waits_for_the_end(
    shop: RunningNode, scripted: ScriptedParticipant
) -> None:
    scripted.rule = on("commit", hang)
    await shop.register("slow", scripted.url)
    reply = await shop.submit("slow", wait="decided")
    assert (reply.status, reply.json["state"]) == (200, "committing")
    path = f"/v1/transactions/{reply.json['gid']}?wait=ended"
    reply = await shop.call("GET", path, headers={"Outlast-Wait-Ms": "1"})
    assert (reply.status, reply.json["state"]) == (202, "committing")
    scripted.rule = honest
    scripted.cut()
    reply = await shop.call("GET", path)
    assert (reply.status, reply.json["state"]) == (200, "committed")


async def test_the_timeout_aborts_and_the_wait_sees_it(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    await shop.register("slow", scripted.url)
    reply = await shop.submit("stock", "slow", timeout_s=0.05)
    assert reply.status == 200
    assert (reply.json["decision"], reply.json["retryable"]) == ("abort", True)
    assert reply.json["reason"] == "timeout: no vote from slow"


async def test_many_branches_at_one_participant(shop: RunningNode) -> None:
    branches = [{"participant": "stock", "branch": f"b{n}", "payload": n} for n in range(32)]
    reply = await shop.call("POST", "/v1/transactions", {"branches": branches, "wait": "ended"})
    assert reply.json["state"] == "committed"


async def test_an_abort_is_answered_with_the_decision(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    await shop.register("slow", scripted.url)
    gid = (await shop.submit("slow", wait="none")).json["gid"]
    reply = await shop.call("POST", f"/v1/transactions/{gid}/abort")
    assert reply.status == 200
    assert (reply.json["decision"], reply.json["reason"]) == ("abort", "requested by a client")
    again = await shop.call("POST", f"/v1/transactions/{gid}/abort")
    assert again.json["decision"] == "abort"


async def test_an_abort_that_comes_too_late_is_told_the_commit(shop: RunningNode) -> None:
    gid = (await shop.submit("stock")).json["gid"]
    reply = await shop.call("POST", f"/v1/transactions/{gid}/abort")
    assert (reply.status, reply.json["decision"]) == (200, "commit")


async def test_an_abort_that_is_not_decided_in_time_is_503() -> None:
    replicas = Replicas()
    async with running(configs()[0], replicas.logs["n1"], ready=False) as node:
        replicas.lead("n1")
        await eventually(lambda: node.node.driver.leading)
        async with ScriptedParticipant(hang) as slow:
            await node.register("slow", slow.url)
            gid = (await node.submit("slow", wait="none")).json["gid"]
            replicas.hold = True
            reply = await node.call("POST", f"/v1/transactions/{gid}/abort", headers={"Outlast-Wait-Ms": "1"})
            assert (reply.status, reply.code) == (503, "not_known_yet")
            replicas.hold = False
            replicas.commit()
            assert (await node.show(gid))["decision"] == "abort"


# ------------------------------------------------------------------------------------------------ lists


async def test_pages_newest_first_with_a_filter(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = refusing()
    await shop.register("picky", scripted.url)
    gids = []
    for number in range(7):
        reply = await shop.submit("picky" if number % 3 == 0 else "stock", wait="ended")
        gids.append(reply.json["gid"])
    newest_first = gids[::-1]

    found, after = [], ""
    while True:
        page = (await shop.call("GET", f"/v1/transactions?limit=3{after}")).json
        assert len(page["transactions"]) <= 3
        found += [txn["gid"] for txn in page["transactions"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert found == newest_first

    aborted = (await shop.call("GET", "/v1/transactions?state=aborted")).json
    assert [txn["gid"] for txn in aborted["transactions"]] == [gids[6], gids[3], gids[0]]
    assert aborted["next"] is None
    assert (await shop.call("GET", "/v1/transactions?state=preparing")).json == {"transactions": [], "next": None}


async def test_others_get_their_turn_while_a_long_page_is_made(
    shop: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    gids = [(await shop.submit("stock")).json["gid"] for _ in range(5)]
    whole = (await shop.call("GET", "/v1/transactions")).json
    turns, rendered = [0], []
    render = rendering.transaction

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    def noted(*arguments: Any) -> dict[str, Any]:
        rendered.append(turns[0])
        return render(*arguments)

    monkeypatch.setattr("coordinator.api._ROWS_AT_ONCE", 2)
    monkeypatch.setattr(rendering, "transaction", noted)
    counting = asyncio.create_task(count())
    page = (await shop.call("GET", "/v1/transactions")).json
    counting.cancel()
    assert [txn["gid"] for txn in page["transactions"]] == [txn["gid"] for txn in whole["transactions"]] == gids[::-1]
    assert len(set(rendered)) == 3


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("state=lost", "invalid"),
        ("limit=0", "invalid"),
        ("limit=-1", "invalid"),
        ("limit=1e3", "invalid"),
        ("limit=1001", "invalid"),
        ("limit=%D9%A3", "invalid"),
        ("limit=000000000199999", "invalid"),
        ("limit=0000000001" + "9" * 6000, "invalid"),
        ("after=elsewhere-1-1", "invalid"),
        ("after=%00", "invalid"),
        ("sort=asc", "unknown_field"),
    ],
)
async def test_listing_refuses_nonsense(shop: RunningNode, query: str, code: str) -> None:
    reply = await shop.call("GET", f"/v1/transactions?{query}")
    assert (reply.status, reply.code) == (422, code)


# ------------------------------------------------------------------------------------------------ outcomes


async def test_outcomes(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = refusing()
    await shop.register("picky", scripted.url)
    committed = (await shop.submit("stock")).json["gid"]
    aborted = (await shop.submit("picky")).json["gid"]
    scripted.rule = hang
    undecided = (await shop.submit("picky", wait="none")).json["gid"]
    assert (await shop.call("GET", f"/v1/outcomes/{committed}")).json == {"outcome": "committed"}
    assert (await shop.call("GET", f"/v1/outcomes/{aborted}")).json == {"outcome": "aborted"}
    reply = await shop.call("GET", f"/v1/outcomes/{undecided}")
    assert (reply.status, reply.code) == (503, "not_known_yet")
    for absent in ("test-1-999999", "elsewhere-1-1", "nonsense", "test-01-1", "%ff", "test-1-" + "9" * 5000):
        reply = await shop.call("GET", f"/v1/outcomes/{absent}")
        assert (reply.status, reply.code) == (404, "not_found"), absent


async def test_unknown_and_foreign_gids(shop: RunningNode) -> None:
    for gid in ("test-1-7", "elsewhere-1-1", "nonsense", "%F0%9F%92%A9", "..%2f..%2fetc", "%00", "%ff%fe"):
        for method, path in (("GET", ""), ("POST", "/abort")):
            reply = await shop.call(method, f"/v1/transactions/{gid}{path}")
            assert (reply.status, reply.code) == (404, "not_found"), (method, gid)


async def test_what_a_later_leader_began_is_not_said_to_be_missing(shop: RunningNode) -> None:
    """A leader that was deposed, and has not noticed, cannot know."""
    for method, path in (("GET", ""), ("POST", "/abort")):
        reply = await shop.call(method, f"/v1/transactions/test-999-7{path}")
        assert (reply.status, reply.code) == (503, "not_known_yet"), method


async def test_a_long_foreign_gid_is_cut_within_its_quotes(shop: RunningNode) -> None:
    reply = await shop.call("GET", f"/v1/transactions/{'x' * 300}")
    assert reply.json["detail"] == f"'{'x' * 100}' is not a gid of cluster test"


async def test_forgotten_gids_are_gone(null: Participant) -> None:
    clock = FakeClock()
    config = configs(limits=Limits(retention_s=900))[0]
    async with running(config, clock=clock) as node:
        await node.register("stock", null.url)
        gid = (await node.submit("stock", wait="ended", key="k")).json["gid"]
        clock.pass_s(901)
        await eventually(lambda: len(node.node.ledger) == 0)
        for method, path in (
            ("GET", f"/v1/transactions/{gid}"),
            ("POST", f"/v1/transactions/{gid}/abort"),
            ("GET", f"/v1/outcomes/{gid}"),
        ):
            reply = await node.call(method, path)
            assert (reply.status, reply.code) == (410, "forgotten")
        assert (await node.submit("stock", key="k")).json["gid"] != gid, "the key went with its transaction"


# ------------------------------------------------------------------------------------------------ idempotency


async def test_one_key_one_body_one_transaction(shop: RunningNode) -> None:
    first = await shop.submit("stock", "money", key="order-1", wait="ended")
    again = await shop.submit("stock", "money", key="order-1")
    assert again.status == 200
    assert again.json == first.json


async def test_another_wait_is_no_other_body(shop: RunningNode) -> None:
    first = await shop.submit("stock", key="order-1", wait="none", timeout_s=10)
    again = await shop.submit("stock", key="order-1", wait="ended", timeout_s=10.0)
    assert again.json["gid"] == first.json["gid"]


async def test_a_key_with_another_body_is_refused(shop: RunningNode) -> None:
    first = await shop.submit("stock", key="order-1")
    for other in (("money",), ("stock", "money")):
        reply = await shop.submit(*other, key="order-1")
        assert (reply.status, reply.code) == (422, "idempotency_key_reused")
        assert first.json["gid"] in reply.json["detail"]


async def test_a_key_in_flight_waits_for_the_same_transaction(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    released = asyncio.Event()

    async def when_released(heard: Any) -> bytes:
        await released.wait()
        return honest(heard)

    scripted.rule = when_released
    await shop.register("slow", scripted.url)
    tries = [asyncio.create_task(shop.submit("slow", key="order-1")) for _ in range(8)]
    await eventually(lambda: scripted.heard)
    tries += [asyncio.create_task(shop.submit("slow", key="order-1")) for _ in range(8)]
    other = await shop.submit("slow", "stock", key="order-1")
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    assert not any(task.done() for task in tries)
    released.set()
    replies = await asyncio.gather(*tries)
    assert {reply.status for reply in replies} == {200}
    assert len({reply.json["gid"] for reply in replies}) == 1
    assert {reply.json["decision"] for reply in replies} == {"commit"}


async def test_without_a_key_every_request_is_a_transaction(shop: RunningNode) -> None:
    assert (await shop.submit("stock")).json["gid"] != (await shop.submit("stock")).json["gid"]


@pytest.mark.parametrize("key", ["", " " * 3 + "\x7f", "k" * 256, "schl\u00fcssel", "a\tb"])
async def test_keys_are_short_printable_ascii(shop: RunningNode, key: str) -> None:
    raw = json.dumps(body("stock")).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(shop.url.rpartition(":")[2]))
    writer.write(
        f"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nIdempotency-Key: {key}\r\nContent-Length: {len(raw)}\r\n"
        "Connection: close\r\n\r\n".encode()
        + raw
    )
    answer = await reader.read()
    writer.close()
    assert b" 400 " in answer.splitlines()[0]
    # A control character is no header's at all: what parses HTTP refuses it before a node hears of it.
    assert b'"code":"malformed"' in answer or "\x7f" in key


async def test_the_longest_key_is_taken(shop: RunningNode) -> None:
    assert (await shop.submit("stock", key="k" * 255)).status == 200


# ------------------------------------------------------------------------------------------------ bad input

DEEP = 5_000
BAD_TRANSACTIONS: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 400, "malformed"),
    ("no JSON", b"{", 400, "malformed"),
    ("two values", b"{}{}", 400, "malformed"),
    ("not UTF-8", b'{"a":"\xff\xfe"}', 400, "malformed"),
    ("UTF-16 without a mark", '{"a":1}'.encode("utf-16-be")[:-1], 400, "malformed"),
    ("NaN", b'{"branches":[{"participant":"stock","payload":NaN}]}', 400, "malformed"),
    ("Infinity", b'{"branches":[{"participant":"stock","payload":[-Infinity]}]}', 400, "malformed"),
    ("a float beyond floats", b'{"branches":[{"participant":"stock","payload":1e999}]}', 400, "malformed"),
    ("an integer without end", b'{"timeout_s":' + b"9" * 10_000 + b"}", 400, "malformed"),
    ("nested beyond reason", b"[" * DEEP + b"]" * DEEP, 400, "malformed"),
    ("objects beyond reason", b'{"branches":' * DEEP + b"1" + b"}" * DEEP, 400, "malformed"),
    ("a list", b"[]", 400, "malformed"),
    ("null", b"null", 400, "malformed"),
    ("nothing asked for", b"{}", 422, "no_branches"),
    ("no list of branches", b'{"branches":{"participant":"stock"}}', 422, "no_branches"),
    ("no branches", b'{"branches":[]}', 422, "no_branches"),
    ("null branches", b'{"branches":null}', 422, "no_branches"),
    ("a branch that is none", b'{"branches":["stock"]}', 422, "invalid"),
    ("a branch without participant", b'{"branches":[{}]}', 422, "invalid"),
    ("a participant that is a number", b'{"branches":[{"participant":1}]}', 422, "invalid"),
    ("a participant that is a list", b'{"branches":[{"participant":["stock"]}]}', 422, "invalid"),
    ("a participant that is no name", b'{"branches":[{"participant":"../stock"}]}', 422, "invalid"),
    ("a surrogate for a name", rb'{"branches":[{"participant":"\ud800"}]}', 422, "invalid"),
    ("a participant nobody knows", b'{"branches":[{"participant":"ghost"}]}', 422, "unknown_participant"),
    ("a branch name that is none", b'{"branches":[{"participant":"stock","branch":"A b"}]}', 422, "invalid"),
    ("null for a branch name", b'{"branches":[{"participant":"stock","branch":null}]}', 422, "invalid"),
    ("branches twice", b'{"branches":[{"participant":"stock"},{"participant":"stock"}]}', 422, "duplicate_branch"),
    ("a field nobody knows", b'{"branches":[{"participant":"stock"}],"retries":3}', 422, "unknown_field"),
    ("a field of a branch", b'{"branches":[{"participant":"stock","url":"x"}]}', 422, "unknown_field"),
    ("a surrogate for a field", rb'{"\udfff":1}', 422, "unknown_field"),
    ("a protocol nobody knows", b'{"protocol":"5pc","branches":[{"participant":"stock"}]}', 422, "unknown_protocol"),
    ("a protocol that is a list", b'{"protocol":[],"branches":[{"participant":"stock"}]}', 422, "unknown_protocol"),
    ("a wait nobody knows", b'{"wait":"long","branches":[{"participant":"stock"}]}', 422, "invalid_wait"),
    ("a wait that is an object", b'{"wait":{},"branches":[{"participant":"stock"}]}', 422, "invalid_wait"),
]
BAD_TRANSACTIONS += [
    (
        f"timeout {text}",
        b'{"timeout_s":%s,"branches":[{"participant":"stock"}]}' % text.encode(),
        422,
        "invalid_timeout",
    )
    for text in ("0", "-1", "-0.0", "1e308", "1e999", "301", "true", '"10"', "null", "[]", "9" * 4000, "{}")
]


@pytest.mark.parametrize(
    ("raw", "status", "code"), [case[1:] for case in BAD_TRANSACTIONS], ids=[case[0][:40] for case in BAD_TRANSACTIONS]
)
async def test_bad_transactions_are_refused_and_nothing_is_begun(
    shop: RunningNode, raw: bytes, status: int, code: str
) -> None:
    reply = await shop.call("POST", "/v1/transactions", raw=raw)
    assert (reply.status, reply.code) == (status, code), reply.raw
    assert len(shop.node.ledger) == 0


async def test_limits_of_size(shop: RunningNode) -> None:
    limits = shop.node.config.limits
    branch = {"participant": "stock"}
    too_many = [{**branch, "branch": f"b{n}"} for n in range(limits.max_branches + 1)]
    reply = await shop.call("POST", "/v1/transactions", {"branches": too_many})
    assert (reply.status, reply.code) == (422, "too_many_branches")
    reply = await shop.call("POST", "/v1/transactions", {"branches": [{**branch, "payload": "x" * (64 << 10)}]})
    assert (reply.status, reply.code) == (413, "too_large")
    async with shop.session.post(
        f"{shop.url}/v1/transactions", data=io.BytesIO(b" " * (limits.max_body_bytes + 1))
    ) as response:
        assert response.status == 413
        assert (await response.json(content_type=None))["code"] == "too_large"
    reply = await shop.call("POST", "/v1/transactions", {"branches": [{**branch, "payload": "x" * ((64 << 10) - 2)}]})
    assert reply.json["decision"] == "commit"


async def test_a_body_of_unknown_length_is_bounded_too(shop: RunningNode) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * (64 << 10)

    async with shop.session.post(f"{shop.url}/v1/transactions", data=pieces()) as response:
        assert response.status == 413
        assert (await response.json(content_type=None))["code"] == "too_large"


async def test_a_body_of_unknown_length_that_is_there_at_once_is_bounded_too() -> None:
    limits = Limits(max_body_bytes=1000, max_payload_bytes=1000)
    async with running(configs(limits=limits)[0]) as node:
        for size, status in ((1000, 400), (1001, 413)):
            reader, writer = await dial(node)
            head = b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head + b"%x\r\n%b\r\n0\r\n\r\n" % (size, b" " * size))
            async with asyncio.timeout(10):
                answer = await reader.readuntil(b"\r\n")
            writer.close()
            assert answer.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("call", ["POST /v1/transactions", "PUT /v1/reconciliation", "PUT /v1/participants/stock"])
async def test_a_body_that_trickles_in_is_cut_off(
    shop: RunningNode, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("coordinator.bodies.BODY_WITHIN_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(shop.url.rpartition(":")[2]))
    writer.write(call.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_who_hangs_up_within_a_body_is_no_defect(
    shop: RunningNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, ends = [0], list[type[BaseException]]()
    read = web.Request.read

    async def noted(request: web.Request) -> bytes:
        begun[0] += 1
        try:
            return await read(request)
        except BaseException as error:
            ends.append(type(error))
            raise

    monkeypatch.setattr(web.Request, "read", noted)
    _, writer = await asyncio.open_connection("127.0.0.1", int(shop.url.rpartition(":")[2]))
    writer.write(b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await eventually(lambda: begun[0])
    writer.close()
    await eventually(lambda: ends)
    assert issubclass(ends[0], ConnectionError)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_packed_body_is_bounded_by_what_it_unpacks_to(shop: RunningNode) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    reply = await shop.call("POST", "/v1/transactions", raw=bomb, headers={"Content-Encoding": "gzip"})
    assert reply.status in (400, 413)
    assert reply.code in ("malformed", "too_large")


@pytest.mark.parametrize("character", ["\u00e9", "\u6f22", "\U0001f4a9"])
async def test_the_largest_transaction_of_wide_characters_goes_through(shop: RunningNode, character: str) -> None:
    """As JSON text in ASCII they grow up to threefold: what the log holds is larger than what was sent."""
    limits = shop.node.config.limits
    payload = character * (limits.max_payload_bytes // len(json.dumps(character)) - 1)
    branches = [{"participant": "money", "branch": f"b{n}", "payload": payload} for n in range(limits.max_branches)]
    raw = json.dumps({"branches": branches, "wait": "ended"}, ensure_ascii=False).encode()
    if len(raw) > limits.max_body_bytes:
        pytest.skip("the body is larger than any that is taken")
    reply = await shop.call("POST", "/v1/transactions", raw=raw)
    assert reply.status == 200, reply.raw[:300]
    assert reply.json["state"] == "committed"


@pytest.mark.parametrize("depth", [50, 100, 101, 600, 900])
@pytest.mark.parametrize("participant", ["stock", "money"])
async def test_nested_payloads_are_delivered_or_refused(shop: RunningNode, participant: str, depth: int) -> None:
    payload = b"[" * depth + b"]" * depth
    raw = b'{"wait":"ended","timeout_s":5,"branches":[{"participant":"%s","payload":%s}]}' % (
        participant.encode(),
        payload,
    )
    reply = await shop.call("POST", "/v1/transactions", raw=raw)
    if depth <= MAX_NESTING:
        assert (reply.status, reply.json["state"]) == (200, "committed")
    else:
        assert (reply.status, reply.code) == (422, "too_deep")


async def test_what_can_be_read_and_not_be_written_again_is_refused(shop: RunningNode) -> None:
    """The stack ends somewhere: for a reader a little later than for the writer."""
    codes = set()
    for depth in range(850, 1010):
        raw = b'{"branches":[{"participant":"stock","payload":%s}]}' % (b"[" * depth + b"]" * depth)
        reply = await shop.call("POST", "/v1/transactions", raw=raw)
        assert 400 <= reply.status < 500, (depth, reply.raw)
        codes.add(reply.code)
    assert "too_deep" in codes


def test_nesting_is_counted_outside_of_strings_only() -> None:
    assert not nested_too_deeply(json.dumps(["[" * 500, '\\"{' * 500, {"]": "\\"}] + [[]] * 500).encode())
    assert not nested_too_deeply(b"[" * MAX_NESTING + b"]" * MAX_NESTING)
    assert nested_too_deeply(b'["\\\\"' + b',{"a":[' * MAX_NESTING)


@pytest.mark.parametrize("participant", ["stock", "money"])
async def test_strange_but_valid_payloads_are_delivered(shop: RunningNode, participant: str) -> None:
    for payload in (rb'"\ud800"', b"9" * 4000, b"-0", b"1e308", rb'{"\udfff":"\u0000"}', b'{"a":1,"a":2}', b"null"):
        raw = b'{"wait":"ended","branches":[{"participant":"%s","payload":%s}]}' % (participant.encode(), payload)
        reply = await shop.call("POST", "/v1/transactions", raw=raw)
        assert reply.status == 200, reply.raw
        assert reply.json["state"] == "committed", payload


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("wait=long", "invalid_wait"),
        ("timeout_s=x&wait=ended", "invalid_timeout"),
        ("timeout_s=nan&wait=ended", "invalid_timeout"),
        ("timeout_s=1e999&wait=ended", "invalid_timeout"),
        ("timeout_s=-1&wait=ended", "invalid_timeout"),
        ("verbose=1", "unknown_field"),
    ],
)
async def test_showing_refuses_nonsense(shop: RunningNode, query: str, code: str) -> None:
    gid = (await shop.submit("stock")).json["gid"]
    reply = await shop.call("GET", f"/v1/transactions/{gid}?{query}")
    assert (reply.status, reply.code) == (422, code)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["stock", "ended", "2pc", 1]),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(["branches", "participant", "payload", "branch", "timeout_s", "wait", "protocol"])
            | st.text(),
            children,
            max_size=5,
        )
    ),
    max_leaves=12,
)


async def test_no_body_is_a_server_error(shop: RunningNode) -> None:
    loop = asyncio.get_running_loop()
    seen: set[int] = set()

    async def send(raw: bytes) -> None:
        reply = await shop.call("POST", "/v1/transactions", raw=raw, headers={"Outlast-Wait-Ms": "0"})
        seen.add(reply.status)
        if reply.status >= 400:
            assert reply.code != "internal", (raw, reply.raw)
            assert reply.status in (400, 413, 422), (raw, reply.raw)

    # Hypothesis is not made for coroutines: it runs on a thread, and what it makes is sent here.
    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.binary(max_size=200)
        | JSON_VALUES.map(lambda value: json.dumps(value).encode())
        | JSON_VALUES.map(lambda value: json.dumps({"branches": [{"participant": "stock", "payload": value}]}).encode())
        | JSON_VALUES.map(lambda value: json.dumps({"branches": [{"participant": "stock", "branch": value}]}).encode())
    )
    def run(raw: bytes) -> None:
        asyncio.run_coroutine_threadsafe(send(raw), loop).result()

    await asyncio.to_thread(run)
    assert seen >= {200, 202, 400, 422} or seen >= {202, 400, 422} or seen >= {200, 400, 422}


HOSTILE: list[tuple[str, str, bytes | None]] = [
    (method, path, raw)
    for path in (
        "/",
        "//",
        "/v1",
        "/v1/transactions/",
        "/v1/transactions//abort",
        "/v1/transactions/x/y/z",
        "/v1/transactions/%2e%2e/abort",
        "/v1/participants/%00",
        "/v1/participants/" + "a" * 3000,
        "/v1/participants/UPPER",
        "/v1/participants/%ED%A0%80",
        "/v1/outcomes/" + "test-" * 200,
        "/v1/outcomes/%ff?a=%ff&%ff=b",
        "/v1/transactions?after=%ff&limit=%ff&state=%ff",
        "/v1/transactions?limit=1&limit=2",
        "/v1/cluster?x=y",
        "/healthz/../v1/cluster",
        "/metrics/x",
        "/v2/transactions",
        "/%",
        "/v1/transactions%00",
        "/v1/transactions;x=1",
        "/?" + "&" * 500,
    )
    for method, raw in (("GET", None), ("POST", b"\x00"), ("PUT", b"{"), ("DELETE", None), ("PATCH", b"[]"))
]


async def test_no_path_is_a_server_error(shop: RunningNode) -> None:
    for method, path, raw in HOSTILE:
        reply = await shop.call(method, path, raw=raw)
        assert reply.status < 500, (method, path, reply.raw)
        if reply.status >= 400:
            assert reply.code != "internal"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    ],
    ids=lambda raw: raw[:30].decode("latin-1"),
)
async def test_what_is_no_http_is_a_bad_request(shop: RunningNode, raw: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(shop.url.rpartition(":")[2]))
    writer.write(raw)
    if writer.can_write_eof():
        writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answer == b"" or re.match(rb"HTTP/1\.\d 4\d\d ", answer), answer[:200]
    assert b"Traceback" not in answer
    assert (await shop.call("GET", "/healthz")).status == 200


POST = b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x00\xff\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\r\n\r\n", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: rot13\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (POST + b"Content-Encoding: br\r\nContent-Length: 1\r\n\r\nx", 415),
        (POST + b"Expect: tea\r\nContent-Length: 2\r\n\r\n{}", 417),
        (POST + b"X: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (POST + b"".join(b"X%d: y\r\n" % i for i in range(300)) + b"\r\n", 431),
    ],
    ids=lambda raw: repr(raw[-25:]) if isinstance(raw, bytes) else None,
)
async def test_errors_of_http_itself_are_problems_and_no_news(
    shop: RunningNode, caplog: pytest.LogCaptureFixture, raw: bytes, status: int
) -> None:
    caplog.set_level(logging.INFO)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(shop.url.rpartition(":")[2]))
    caplog.clear()
    writer.write(raw)
    async with asyncio.timeout(10):
        head, _, text = (await reader.read()).partition(b"\r\n\r\n")  # the node closes: what follows is unknown
    writer.close()
    assert re.match(rb"HTTP/1\.\d (\d+) ", head)[1] == b"%d" % status  # type: ignore[index]
    assert b"Content-Type: application/problem+json" in head
    problem = json.loads(text)
    assert (problem["status"], problem["code"]) == (status, "malformed")
    assert problem["detail"].isprintable()
    assert len(problem["detail"]) < 300
    # Anybody can send this, as often as they like: it must fill no log.
    assert caplog.records == []


async def test_a_body_that_breaks_after_its_answer_is_no_news(
    shop: RunningNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "coordinator.listening")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(shop.url.rpartition(":")[2]))
    writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n")
    assert b" 404 " in await reader.readuntil(b"}")
    caplog.clear()
    writer.write(b"abcd")
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()
    assert [record.levelname for record in caplog.records] == ["DEBUG"], "else this does not try what it is to try"


async def test_a_client_that_goes_away_leaves_nothing_behind(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    await shop.register("slow", scripted.url)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await shop.submit("slow", timeout_s=0.3)
    assert len(shop.node.ledger) <= 1
    await eventually(lambda: not shop.node.ledger.unfinished)
    await eventually(lambda: not shop.node.driver._decided_waiters)


# ------------------------------------------------------------------------------------------------ who may, and where


async def test_wrong_methods_and_paths(shop: RunningNode) -> None:
    reply = await shop.call("PUT", "/v1/transactions", raw=b"{}")
    assert (reply.status, reply.code) == (405, "method_not_allowed")
    assert {name.strip() for name in reply.headers["Allow"].split(",")} == {"GET", "HEAD", "POST"}
    for path in ("/v1/transactions/x/abort", "/v1/outcomes/x", "/v1/cluster", "/healthz"):
        reply = await shop.call("PATCH", path)
        assert (reply.status, reply.code) == (405, "method_not_allowed")
    reply = await shop.call("GET", "/v1/transaction")
    assert (reply.status, reply.code) == (404, "not_found")


async def test_tokens() -> None:
    async with running(configs(token=TOKEN)[0]) as node:
        node.headers = {}
        for path in ("/healthz", "/readyz"):
            assert (await node.call("GET", path)).status == 200
        for path in ("/v1/cluster", "/v1/participants", "/metrics", "/v1/transactions", "/v1/outcomes/x", "/nothing"):
            reply = await node.call("GET", path)
            assert (reply.status, reply.code) == (401, "unauthorized"), path
            for wrong in ("Bearer wrong", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN} ", f"Bearer {TOKEN}x", TOKEN):
                reply = await node.call("GET", path, headers={"Authorization": wrong})
                if wrong.strip() == f"Bearer {TOKEN}":
                    continue  # outer blanks are not part of a header's value
                assert reply.status in (401, 403), wrong
                assert reply.code in ("unauthorized", "forbidden")
        reply = await node.call("POST", "/v1/transactions", raw=b"{", headers={"Authorization": "Bearer wrong"})
        assert (reply.status, reply.code) == (403, "forbidden"), "who asks comes before what is asked"
        for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
            assert (await node.call("GET", "/v1/cluster", headers={"Authorization": right})).status == 200


async def test_pages_of_other_sites_may_not_use_a_node(shop: RunningNode) -> None:
    for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
        reply = await shop.call("POST", "/v1/transactions", raw=b"{}", headers={"Origin": origin})
        assert (reply.status, reply.code) == (403, "forbidden"), origin
    own = shop.url.removesuffix("/")
    assert (await shop.call("GET", "/v1/cluster", headers={"Origin": own})).status == 200


# ------------------------------------------------------------------------------------------------ backpressure


async def dial(node: RunningNode) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(node.url.rpartition(":")[2]))


async def healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What `GET /healthz` brings on a connection that is kept; of one that is closed at once, its last words."""
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(10):
            return await reader.readuntil(b"}")
    except (ConnectionError, asyncio.IncompleteReadError):
        return b""


async def test_connections_are_bounded_and_who_is_connected_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with running(configs(limits=Limits(max_connections=2))[0]) as node:
        first, idler = await dial(node), await dial(node)
        assert b" 200 OK" in await healthy(*first)
        for _ in range(3):
            reader, writer = await dial(node)
            async with asyncio.timeout(10):
                head, _, text = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            for line in (
                b"Retry-After: 1",
                b"Content-Type: application/problem+json",
                b"Content-Length: %d" % len(text),
            ):
                assert line in head.split(b"\r\n")
            problem = json.loads(text)
            assert (problem["status"], problem["code"]) == (503, "too_many_connections")
        # However many are turned away, the log tells it once in a while.
        assert [record.levelname for record in caplog.records if "turned away" in record.message] == ["WARNING"]
        assert b" 200 OK" in await healthy(*first)
        assert node.node.driver.leading
        idler[1].close()
        answers = []
        while b" 200 OK" not in b"".join(answers):  # the node notices in its own time that there is room
            reader, writer = await dial(node)
            answers.append(await healthy(reader, writer))
            writer.close()
        first[1].close()


@pytest.mark.parametrize("half", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
async def test_who_sends_no_request_is_cut_off(half: bytes) -> None:
    async with running(configs(timing=replace(QUICK, first_request_s=0.05))[0]) as node:
        reader, writer = await dial(node)
        writer.write(half)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("half", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
async def test_who_sends_no_other_request_is_cut_off(half: bytes) -> None:
    async with running(configs(timing=replace(QUICK, first_request_s=0.05, idle_s=0.3))[0]) as node:
        reader, writer = await dial(node)
        assert b" 200 OK" in await healthy(reader, writer)
        writer.write(half)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_too_many_in_flight_is_429_and_passes(scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    async with running(configs(limits=Limits(max_in_flight=3))[0]) as node:
        await node.register("slow", scripted.url)
        for _ in range(3):
            assert (await node.submit("slow", wait="none", timeout_s=0.5)).status == 200
        reply = await node.submit("slow", wait="none")
        assert (reply.status, reply.code) == (429, "too_many_in_flight")
        assert reply.headers["Retry-After"] == "1"
        scripted.rule = honest
        await eventually(lambda: node.node.driver.in_flight == 0)
        assert (await node.submit("slow", wait="none")).status == 200


async def test_concurrent_submissions_keep_the_bound(scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    async with running(configs(limits=Limits(max_in_flight=5))[0]) as node:
        await node.register("slow", scripted.url)
        replies = await asyncio.gather(*(node.submit("slow", wait="none") for _ in range(20)))
        assert sorted(reply.status for reply in replies) == [200] * 5 + [429] * 15


async def test_one_participants_backlog_does_not_disturb_others(
    null: Participant, scripted: ScriptedParticipant
) -> None:
    scripted.rule = on("commit", hang)
    async with running(configs(limits=Limits(max_owed_per_participant=4))[0]) as node:
        await node.register("slow", scripted.url)
        await node.register("quick", null.url)
        for _ in range(4):
            assert (await node.submit("slow")).json["decision"] == "commit"
        reply = await node.submit("slow", "quick")
        assert (reply.status, reply.code) == (429, "participant_backlog")
        assert "slow" in reply.json["detail"]
        for _ in range(8):
            assert (await node.submit("quick", wait="ended")).json["state"] == "committed"
        scripted.rule = honest
        scripted.cut()
        await eventually(lambda: not node.node.ledger.unfinished)
        assert (await node.submit("slow", "quick")).status == 200


async def test_the_ledger_is_bounded_and_forgets_nothing_early(null: Participant) -> None:
    async with running(configs(limits=Limits(max_retained=5, max_in_flight=5))[0]) as node:
        await node.register("stock", null.url)
        for number in range(5):
            assert (await node.submit("stock", wait="ended", key=f"k{number}")).status == 200
        reply = await node.submit("stock")
        assert (reply.status, reply.code) == (429, "too_many_retained")
        assert (await node.submit("stock", key="k0")).status == 200, "a retry is no new work"


async def test_participants_are_bounded(null: Participant) -> None:
    async with running(configs(limits=Limits(max_participants=2))[0]) as node:
        await node.register("a", null.url)
        await node.register("b", null.url)
        reply = await node.call("PUT", "/v1/participants/c", {"url": null.url})
        assert (reply.status, reply.code) == (429, "too_many_participants")
        await node.register("b", null.url, batch=True)


# ------------------------------------------------------------------------------------------------ participants


async def test_participants_are_registered_shown_moved_and_given_up(node: RunningNode) -> None:
    assert (await node.call("GET", "/v1/participants")).json == {"participants": []}
    reply = await node.call("PUT", "/v1/participants/stock", {"url": "http://127.0.0.1:9/base/", "batch": True})
    assert reply.status == 200
    assert reply.json == {"name": "stock", "url": "http://127.0.0.1:9/base", "batch": True}
    shown = (await node.call("GET", "/v1/participants/stock")).json
    assert shown == {**reply.json, "owed": 0, "reachable": True, "trouble": None, "down_since": None}
    await node.register("stock", "https://[::1]:8443")
    assert (await node.call("GET", "/v1/participants")).json["participants"] == [
        {**shown, "url": "https://[::1]:8443", "batch": False}
    ]
    reply = await node.call("DELETE", "/v1/participants/stock")
    assert (reply.status, reply.raw) == (204, b"")
    for method in ("GET", "DELETE"):
        reply = await node.call(method, "/v1/participants/stock")
        assert (reply.status, reply.code) == (404, "not_found")


@pytest.mark.parametrize(
    "url",
    [
        None,
        7,
        "",
        "stock",
        "//127.0.0.1:1",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "http://",
        "http://:80",
        "http://user@127.0.0.1",
        "http://user:password@127.0.0.1",
        "http://127.0.0.1/?q=1",
        "http://127.0.0.1/#x",
        "http://127.0.0.1:port",
        "http://127.0.0.1:65536",
        "http://127.0.0.1:-1",
        "http://127.0.0.1:0",
        "http://[::1",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX: y",
        "http://127.0.0.1/\x7f",
        "http://ex\u00e4mple",
        "http://127.0.0.1/" + "a" * 1000,
        ["http://127.0.0.1"],
        "javascript:alert(1)",
    ],
)
async def test_urls_of_participants_are_checked(node: RunningNode, url: Any) -> None:
    reply = await node.call("PUT", "/v1/participants/stock", {"url": url})
    assert (reply.status, reply.code) == (422, "invalid_url")


@pytest.mark.parametrize(
    ("name", "raw", "status", "code"),
    [
        ("Upper", b'{"url":"http://a"}', 422, "invalid_name"),
        ("a" * 65, b'{"url":"http://a"}', 422, "invalid_name"),
        ("1st", b'{"url":"http://a"}', 422, "invalid_name"),
        ("stock-", b'{"url":"http://a"}', 422, "invalid_name"),
        ("%20", b'{"url":"http://a"}', 422, "invalid_name"),
        ("stock", b'{"url":"http://a","batch":1}', 422, "invalid"),
        ("stock", b'{"url":"http://a","batch":null}', 422, "invalid"),
        ("stock", b'{"url":"http://a","name":"x"}', 422, "unknown_field"),
        ("stock", b"{}", 422, "invalid_url"),
        ("stock", b"", 400, "malformed"),
        ("stock", b"[]", 400, "malformed"),
    ],
)
async def test_registrations_are_checked(node: RunningNode, name: str, raw: bytes, status: int, code: str) -> None:
    reply = await node.call("PUT", f"/v1/participants/{name}", raw=raw)
    assert (reply.status, reply.code) == (status, code)
    assert node.node.ledger.participants == {}


async def test_a_participant_in_use_stays(node: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("commit", hang)
    await node.register("slow", scripted.url)
    gid = (await node.submit("slow")).json["gid"]
    reply = await node.call("DELETE", "/v1/participants/slow")
    assert (reply.status, reply.code) == (409, "conflict")
    assert gid in reply.json["detail"]
    scripted.rule = honest
    scripted.cut()
    await eventually(lambda: not node.node.ledger.unfinished)
    assert (await node.call("DELETE", "/v1/participants/slow")).status == 204


async def test_a_participant_in_trouble_is_shown_so(node: RunningNode) -> None:
    async with ScriptedParticipant() as participant:
        await node.register("stock", participant.url)
    gid = (await node.submit("stock", wait="none")).json["gid"]

    async def shown() -> dict[str, Any]:
        found: dict[str, Any] = (await node.call("GET", "/v1/participants/stock")).json
        return found

    await eventually(lambda: node.node.driver.lanes()["stock"].down)
    now = await shown()
    assert (now["owed"], now["reachable"]) == (1, False)
    assert "no connection" in now["trouble"]
    assert now["down_since"].endswith("Z")
    participant_again = ScriptedParticipant(port=participant.port)
    async with participant_again:
        reply = await node.call("GET", f"/v1/transactions/{gid}?wait=ended")
        assert reply.json["state"] == "committed"
        assert await shown() == {
            "name": "stock",
            "url": participant.url,
            "batch": False,
            "owed": 0,
            "reachable": True,
            "trouble": None,
            "down_since": None,
        }


async def test_the_participant_token_is_sent(scripted: ScriptedParticipant) -> None:
    async with running(configs(participant_token=TOKEN)[0]) as node:
        await node.register("stock", scripted.url)
        assert (await node.submit("stock", wait="ended")).json["state"] == "committed"
    assert {heard.headers["authorization"] for heard in scripted.heard} == {f"Bearer {TOKEN}"}


# ------------------------------------------------------------------------------------------------ the node


async def test_cluster_health_and_readiness(shop: RunningNode) -> None:
    cluster = (await shop.call("GET", "/v1/cluster")).json
    assert cluster == {
        "cluster": "test",
        "node": "n1",
        "role": "leader",
        "leader": "n1",
        "epoch": 1,
        "level": NEWEST,
        "ready": True,
        "nodes": [
            {"id": "n1", "url": shop.url, "role": "leader", "reachable": True, "understands": NEWEST, "trouble": None}
        ],
        "in_flight": 0,
        "trouble": None,
        "reconciling": False,
    }
    assert (await shop.call("GET", "/healthz")).json == {"status": "ok"}
    assert (await shop.call("GET", "/readyz")).json == {"status": "ready"}


async def test_a_node_that_joins_is_shown_and_is_not_ready() -> None:
    replicas = Replicas(("n1", "n2", "n3"))
    log = replicas.logs["n1"]
    async with running(configs(("n1", "n2", "n3"))[0], log, ready=False) as node:

        async def shown() -> tuple[str, bool, list[str], str | None]:
            cluster = (await node.call("GET", "/v1/cluster")).json
            assert cluster["nodes"][0]["trouble"] == cluster["trouble"]
            return cluster["role"], cluster["ready"], [row["role"] for row in cluster["nodes"]], cluster["trouble"]

        replicas.lead("n1")
        await eventually(lambda: node.node.driver.leading)
        log.joiners, log.trouble = frozenset({"n3"}), "no room in /somewhere"
        assert await shown() == ("leader", True, ["leader", "follower", "joining"], "no room in /somewhere")
        replicas.lead("n2", term=log.view.term)
        log.joiners, log.trouble = frozenset({"n1"}), None
        assert await shown() == ("joining", False, ["joining", "leader", "follower"], None)
        assert (await node.call("GET", "/readyz")).status == 503


async def test_readiness_needs_a_leader_and_its_barrier() -> None:
    replicas = Replicas(("n1", "n2", "n3"), hold=True)
    async with running(configs(("n1", "n2", "n3"))[0], replicas.logs["n1"], ready=False) as node:

        async def ready() -> bool:
            reply = await node.call("GET", "/readyz")
            assert reply.status == 200 or (reply.status, reply.code) == (503, "no_leader")
            assert (await node.call("GET", "/v1/cluster")).json["ready"] == (reply.status == 200)
            assert (await node.call("GET", "/healthz")).status == 200
            return reply.status == 200

        assert not await ready()
        replicas.lead("n1")
        assert not await ready(), "it leads, but its barrier is not applied"
        replicas.commit()
        assert await ready()
        replicas.lead("n2")
        assert not await ready(), "the barrier of n2 is not applied here"


async def test_metrics(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = refusing()
    await shop.register("picky", scripted.url)
    await shop.submit("stock", wait="ended")
    await shop.submit("picky", wait="ended")
    reply = await shop.call("GET", "/metrics")
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = dict(line.rsplit(" ", 1) for line in reply.raw.decode().splitlines() if not line.startswith("#"))
    assert lines['outlast_transactions_decided_total{decision="commit"}'] == "1.0"
    assert lines['outlast_transactions_decided_total{decision="abort"}'] == "1.0"
    assert lines["outlast_transactions_in_flight"] == "0.0"
    assert lines["outlast_leader"] == "1.0"
    assert lines["outlast_decision_seconds_count"] == "2.0"


async def test_no_leader_is_503_and_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.relay.LEADER_PATIENCE_S", 0.05)
    replicas = Replicas(("n1", "n2", "n3"))
    async with running(configs(("n1", "n2", "n3"))[0], replicas.logs["n1"], ready=False) as node:
        for method, path, raw in (
            ("POST", "/v1/transactions", json.dumps(body("stock")).encode()),
            ("GET", "/v1/transactions", None),
            ("GET", "/v1/transactions/test-1-1", None),
            ("POST", "/v1/transactions/test-1-1/abort", None),
            ("GET", "/v1/outcomes/test-1-1", None),
            ("GET", "/v1/participants", None),
            ("GET", "/v1/participants/stock", None),
            ("PUT", "/v1/participants/stock", b'{"url":"http://127.0.0.1:1"}'),
            ("DELETE", "/v1/participants/stock", None),
            ("GET", "/readyz", None),
        ):
            reply = await node.call(method, path, raw=raw)
            assert (reply.status, reply.code) == (503, "no_leader"), path
        for path in ("/healthz", "/v1/cluster", "/metrics"):
            assert (await node.call("GET", path)).status == 200
        reply = await node.call("POST", "/v1/transactions", raw=b"{")
        assert reply.status == 400, "nonsense needs no leader to be refused"


async def test_a_proposal_of_unknown_fate_is_503_and_the_key_finds_out(null: Participant) -> None:
    replicas = Replicas()
    timing = Timing(backoff_min_s=0.005, backoff_max_s=0.05)
    async with running(configs(timing=timing)[0], replicas.logs["n1"], ready=False) as node:
        replicas.lead("n1")
        await eventually(lambda: node.node.driver.leading)
        await node.register("stock", null.url)
        replicas.hold = True
        without = asyncio.create_task(node.submit("stock"))
        await eventually(lambda: replicas.waiting)
        replicas.commit_unheard()
        reply = await without
        assert (reply.status, reply.code) == (503, "unknown"), "without a key it is not tried again"
        keyed = asyncio.create_task(node.submit("stock", key="k"))
        await eventually(lambda: replicas.waiting)
        replicas.hold = False
        replicas.commit_unheard()
        reply = await keyed
        assert (reply.status, reply.json["decision"]) == (200, "commit")
        assert len(node.node.ledger) == 2


async def test_a_node_that_stops_begins_nothing_new(null: Participant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.relay.LEADER_PATIENCE_S", 0.05)
    async with running() as node:
        await node.register("stock", null.url)
        gid = (await node.submit("stock", wait="ended")).json["gid"]
        node.node.driver._draining = True
        for call in (node.submit("stock"), node.call("PUT", "/v1/participants/x", {"url": null.url})):
            task = asyncio.create_task(call)
            reply = await task
            assert (reply.status, reply.code) == (503, "shutting_down")
        assert (await node.show(gid))["state"] == "committed"


async def test_stopping_lets_who_waits_have_the_answer(scripted: ScriptedParticipant) -> None:
    arrived, released = asyncio.Event(), asyncio.Event()

    async def when_released(heard: Any) -> bytes:
        arrived.set()
        await released.wait()
        return honest(heard)

    scripted.rule = on("prepare", when_released)
    async with running() as node:
        await node.register("stock", scripted.url)
        waiting = asyncio.create_task(node.submit("stock"))
        await arrived.wait()
        stopping = asyncio.create_task(node.node.stop())
        await eventually(lambda: node.node.driver._draining)
        released.set()
        assert (await waiting).json["decision"] == "commit"
        await stopping


# ------------------------------------------------------------------------------------------------ the list of codes

ROOT = Path(__file__).parents[2]


def emitted_codes() -> set[str]:
    """Every `code` that the source can put into an answer."""
    source = "".join(path.read_text() for path in (ROOT / "coordinator").glob("*.py") if "client" not in path.name)
    errors = (ROOT / "coordinator/errors.py").read_text()
    codes = set(re.findall(r'\bcode(?:: str)? ?= ?"([a-z_]+)"', source))
    codes |= set(re.findall(r'\bcode, (?:status, )?title = "([a-z_]+)"', errors))
    codes |= set(re.findall(r'\d{3}: "([a-z_]+)"', source))
    return codes


def documented_codes() -> set[str]:
    text = (ROOT / "docs/API.md").read_text()
    table = text.partition("## Errors")[2]
    return set(re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE))


def test_the_codes_are_those_that_the_document_lists() -> None:
    # The request is passed on instead of showing the first; the second is always replaced by a more exact one.
    emitted = emitted_codes() - {"not_leader", "too_many"}
    assert emitted, "the pattern found nothing: it has gone stale"
    assert documented_codes() == emitted


def test_every_code_of_an_error_is_found_by_the_pattern() -> None:
    from coordinator import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "code")]
    assert {kind.code for kind in classes} <= emitted_codes()
