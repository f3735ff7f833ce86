"""The Python client: over servers that misbehave, and over real nodes."""

import asyncio
import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from cluster.ports import free_ports
from coordinator.client import (
    Branch,
    Client,
    ClientError,
    Cluster,
    Conflict,
    Decision,
    Definite,
    Forgotten,
    Indefinite,
    InvalidRequest,
    KeyReused,
    NotAllowed,
    NotFound,
    NotKnownYet,
    OutcomeUnknown,
    Overloaded,
    Participant,
    State,
    TransactionAborted,
    TransactionResult,
    Unavailable,
)
from coordinator.config import Limits
from participants.server import Participant as Server
from tests.support.logs import Replicas
from tests.support.nodes import RunningNode, configs, running
from tests.support.participants import Heard, Rule, ScriptedParticipant, hang, honest, http, on, refusing
from tests.support.waiting import eventually

TOKEN = "a-token-of-enough-length"
GID = "test-1-0"


def transaction(decision: str | None = "commit", state: str | None = None, **fields: Any) -> dict[str, Any]:
    states = {None: "preparing", "commit": "committing", "abort": "aborting"}
    return {
        "gid": GID,
        "protocol": "2pc",
        "state": state or states[decision],
        "decision": decision,
        "reason": None,
        "retryable": False,
        "epoch": 1,
        "branches": [{"branch": "stock", "participant": "stock", "state": "prepared", "reason": None}],
        "started_at": "2026-01-31T12:00:00.000Z",
        "decided_at": None if decision is None else "2026-01-31T12:00:00.500Z",
        "ended_at": "2026-01-31T12:00:01.000Z" if state in ("committed", "aborted") else None,
        **fields,
    }


def problem(status: int, code: str, *, retry_after_s: float | None = None) -> bytes:
    body: dict[str, Any] = {"type": f"urn:x:{code}", "title": "T", "status": status, "detail": "D", "code": code}
    headers = {"Content-Type": "application/problem+json"}
    if retry_after_s is not None:
        body["retry_after_s"] = retry_after_s
        headers["Retry-After"] = str(max(1, round(retry_after_s)))
    return http(status, body, headers=headers)


@dataclass(slots=True, eq=False)
class Nodes:
    """Servers that pretend to be nodes, and the pauses that the client makes instead of sleeping."""

    servers: list[ScriptedParticipant]
    pauses: list[float] = field(default_factory=list)

    def client(self, **fields: Any) -> Client:
        fields = {"rng": random.Random(1), "try_timeout_s": 5.0, **fields}
        return Client([server.url for server in self.servers], **fields)

    def heard(self) -> list[Heard]:
        return [heard for server in self.servers for heard in server.heard]


@asynccontextmanager
async def scripted_nodes(*rules: Rule) -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as stack:
        yield Nodes([await stack.enter_async_context(ScriptedParticipant(rule)) for rule in rules])


def each(*answers: bytes | Rule | None) -> Rule:
    """The answers in turn, the last one for ever."""
    rest = list(answers)

    def rule(heard: Heard) -> Any:
        answer = rest.pop(0) if len(rest) > 1 else rest[0]
        return answer(heard) if callable(answer) else answer

    return rule


OK = http(200, transaction())

# ------------------------------------------------------------------------------------------------ what it loads


def test_it_loads_nothing_of_a_node() -> None:
    """An application that submits transactions has no use for Raft, SQLite or another event loop."""
    code = "import coordinator.client, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "aiohttp" in loaded
    unwanted = {"pysyncobj", "uvloop", "apsw", "httptools", "msgpack", "prometheus_client", "cluster", "participants"}
    assert not unwanted & set(loaded)
    code = "import coordinator.client, sys; print(*(name for name in sys.modules if name.startswith('coordinator')))"
    ours = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(ours) == {
        "coordinator",
        "coordinator.client",
        "coordinator.client_adapters",
        "coordinator.client_results",
        "coordinator.client_transaction",
        "coordinator.protocol",
        "coordinator.protocol.messages",
        "coordinator.protocol.record",
        "coordinator.protocol.transaction",
    }


# ------------------------------------------------------------------------------------------------ requests and results


async def test_a_submission_and_its_result() -> None:
    body = transaction(
        branches=[
            {"branch": "a", "participant": "stock", "state": "committing", "reason": None, "result": {"left": 3}},
            {
                "branch": "b",
                "participant": "stock",
                "state": "committing",
                "reason": "R",
                "heuristic": "aborted",
                "resolved": {"outcome": "abort", "at": "2026-01-31T12:00:00.000Z", "note": None},
                "retryable": True,
            },
        ]
    )
    async with scripted_nodes(each(http(200, body))) as nodes, nodes.client(token=TOKEN) as client:
        txn = await client.submit(
            [Branch("stock", {"n": 1}, name="a"), {"participant": "stock", "branch": "b"}], timeout_s=7, key="k"
        )
        (heard,) = nodes.heard()
        assert heard.path == "/v1/transactions"
        assert heard.body == {
            "branches": [
                {"participant": "stock", "branch": "a", "payload": {"n": 1}},
                {"participant": "stock", "branch": "b"},
            ],
            "timeout_s": 7,
            "wait": "decided",
        }
        assert heard.headers["idempotency-key"] == "k"
        assert heard.headers["authorization"] == f"Bearer {TOKEN}"
        assert heard.content_type == "application/json"
        assert (txn.gid, txn.protocol, txn.key, txn.epoch) == (GID, "2pc", "k", 1)
        assert (txn.state, txn.decision, txn.reason, txn.retryable) == (State.COMMITTING, Decision.COMMIT, None, False)
        assert (txn.committed, txn.aborted, txn.ended) == (True, False, False)
        assert txn.started_at == datetime(2026, 1, 31, 12, tzinfo=UTC)
        assert txn.decided_at == datetime(2026, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)
        assert txn.ended_at is None
        assert txn.branch("a").result == {"left": 3}
        assert txn.branch("b").resolved is Decision.ABORT
        assert (txn.branch("b").heuristic, txn.branch("b").reason, txn.branch("b").retryable) == ("aborted", "R", True)
        with pytest.raises(KeyError):
            txn.branch("c")
        with pytest.raises(dataclasses.FrozenInstanceError):
            txn.gid = "x"  # type: ignore[misc]
        assert txn.raise_for_abort() is txn


async def test_an_abort_is_an_answer_unless_an_exception_is_asked_for() -> None:
    aborted = transaction("abort", "aborted", reason="stock refused: out", retryable=True)
    async with scripted_nodes(each(http(200, aborted))) as nodes, nodes.client() as client:
        txn = await client.submit([Branch("stock")])
        assert (txn.aborted, txn.committed, txn.ended) == (True, False, True)
        with pytest.raises(TransactionAborted, match="stock refused: out") as caught:
            txn.raise_for_abort()
        assert (caught.value.result, caught.value.reason, caught.value.retryable) == (txn, "stock refused: out", True)
        with pytest.raises(TransactionAborted):
            await client.submit([Branch("stock")], or_raise=True)


async def test_or_raise_returns_commits_only() -> None:
    undecided = http(202, transaction(None))
    async with scripted_nodes(each(undecided)) as nodes, nodes.client() as client:
        with pytest.raises(OutcomeUnknown) as caught:
            await client.submit([Branch("stock")], or_raise=True, timeout_s=0.05, patience_s=0.05, key="k")
        assert (caught.value.gid, caught.value.key) == (GID, "k")
        with pytest.raises(ValueError, match="or_raise"):
            await client.submit([Branch("stock")], or_raise=True, wait="none")


async def test_each_call_has_a_key_of_its_own_and_keeps_it() -> None:
    rule = each(None, problem(503, "unknown", retry_after_s=0), OK)
    async with scripted_nodes(rule) as nodes, nodes.client() as client:
        first = await client.submit([Branch("stock")])
        second = await client.submit([Branch("stock")])
        keys = [heard.headers["idempotency-key"] for heard in nodes.heard()]
        assert keys == [first.key] * 3 + [second.key]
        assert first.key != second.key


@pytest.mark.parametrize("key", ["", "k" * 256, "a\nb", "schl\u00fcssel", "\x7f"])
async def test_keys_that_no_node_takes(key: str) -> None:
    async with scripted_nodes(each(OK)) as nodes, nodes.client() as client:
        with pytest.raises(ValueError, match="idempotency key"):
            await client.submit([Branch("stock")], key=key)
        assert nodes.heard() == []


@pytest.mark.parametrize("payload", [float("nan"), float("inf"), object(), {1, 2}])
async def test_what_is_no_json_is_never_sent(payload: object) -> None:
    async with scripted_nodes(each(OK)) as nodes, nodes.client() as client:
        with pytest.raises((ValueError, TypeError)):
            await client.submit([Branch("stock", payload)])
        assert nodes.heard() == []


@pytest.mark.parametrize(
    "urls",
    [
        [],
        "http://127.0.0.1:1",
        ["127.0.0.1:1"],
        ["ftp://a"],
        ["http://"],
        ["http://u:p@a"],
        ["http://a?x"],
        ["http://a#x"],
        ["http://a:0"],
        ["http://a:x"],
        ["http://\u00e4"],
        ["http://a b"],
        [None],
    ],
)
def test_urls_that_are_none(urls: Any) -> None:
    with pytest.raises(ValueError, match=r"urls must be|is not a node's URL"):
        Client(urls)


def test_settings_that_cannot_work() -> None:
    for fields in ({"try_timeout_s": 0}, {"patience_s": -1}, {"token": ""}, {"token": "a b"}, {"token": "a\r\nX: y"}):
        with pytest.raises(ValueError):
            Client(["http://127.0.0.1:1"], **fields)  # type: ignore[arg-type]


async def test_outside_of_its_context_it_says_so() -> None:
    client = Client(["http://127.0.0.1:1"])
    with pytest.raises(RuntimeError, match="async with"):
        await client.cluster()
    async with client:
        with pytest.raises(RuntimeError, match="in use"):
            await client.__aenter__()
    await client.close()


# ------------------------------------------------------------------------------------------------ nodes in trouble


async def test_dead_nodes_are_passed_over_and_the_good_one_is_remembered() -> None:
    async with scripted_nodes(each(OK), each(OK), each(OK)) as nodes:
        await nodes.servers[0].stop()
        await nodes.servers[1].stop()
        async with nodes.client() as client:
            for _ in range(3):
                assert (await client.submit([Branch("stock")])).committed
            assert len(nodes.servers[2].heard) == 3
            assert client._first == 2
            await nodes.servers[0].start()
            await nodes.servers[2].stop()
            assert (await client.submit([Branch("stock")])).committed
            assert len(nodes.servers[0].heard) == 1


async def test_a_node_that_hangs_is_given_up() -> None:
    async with scripted_nodes(hang, each(OK)) as nodes, nodes.client(try_timeout_s=0.1) as client:
        for _ in range(3):
            assert (await client.submit([Branch("stock")])).committed
        assert len(nodes.servers[0].heard) == 1
        keys = {heard.headers["idempotency-key"] for heard in (nodes.servers[0].heard[0], nodes.servers[1].heard[0])}
        assert len(keys) == 1


ODD: list[tuple[str, bytes | None]] = [
    ("hanging up", None),
    ("garbage", b"\x00\xff\x00\xff"),
    ("not JSON", http(200, b"<html>")),
    ("JSON of something else", http(200, {"hello": "world"})),
    ("a list", http(200, [])),
    ("a decision that is none", http(200, transaction() | {"decision": "maybe"})),
    ("a state that is none", http(200, transaction() | {"state": "odd"})),
    ("a gid that is none", http(200, transaction() | {"gid": 7})),
    ("a date that is none", http(200, transaction() | {"started_at": "yesterday"})),
    ("deep", http(200, b"[" * 100_000)),
    ("a redirect", http(307, b"", headers={"Location": "http://127.0.0.1:9/"})),
    ("500", problem(500, "internal")),
    ("502", http(502, b"Bad Gateway")),
    ("503 of something else", http(503, b"")),
    ("404 of something else", http(404, b"<html>")),
    ("packed", http(200, b"\x1f\x8b\x08\x00", headers={"Content-Encoding": "gzip"})),
    ("no leader", problem(503, "no_leader", retry_after_s=1)),
    ("shutting down", problem(503, "shutting_down", retry_after_s=0.5)),
    ("unknown", problem(503, "unknown", retry_after_s=1)),
    ("slow body", problem(408, "slow_body")),
]


@pytest.mark.parametrize("raw", [case[1] for case in ODD], ids=[case[0] for case in ODD])
async def test_whatever_one_node_says_the_next_one_is_asked_at_once(raw: bytes | None) -> None:
    async with scripted_nodes(lambda _: raw, each(OK)) as nodes, nodes.client() as client:
        no_pauses(client)
        assert (await client.submit([Branch("stock")])).committed
        assert client._first == 1


def no_pauses(client: Client) -> None:
    """A pause would be a failure of the test."""

    def pause(_: int) -> float:
        return 1000.0

    client._pause_s = pause  # type: ignore[method-assign]


async def test_when_all_have_failed_there_is_a_pause_that_grows_to_its_cap() -> None:
    client = Client(["http://127.0.0.1:1"], rng=random.Random(5))
    for failures in range(-3, 50):
        ceiling = min(1.0, 0.05 * 2 ** max(0, min(failures, 10)))
        pauses = {client._pause_s(failures) for _ in range(10)}
        assert all(ceiling / 2 <= pause <= ceiling for pause in pauses)
        assert len(pauses) == 10


async def test_nobody_is_there() -> None:
    ports = free_ports(3)
    async with Client([f"http://127.0.0.1:{port}" for port in ports], patience_s=0.2) as client:
        with pytest.raises(Unavailable, match="nothing was done") as caught:
            await client.submit([Branch("stock")], timeout_s=0.01)
        assert isinstance(caught.value, Definite)
        assert caught.value.code is None
        for call in (client.get(GID), client.cluster(), client.participants(), client.abort(GID)):
            with pytest.raises(Unavailable):
                await call


@pytest.mark.parametrize(
    "raw", [None, problem(503, "unknown"), problem(500, "internal"), http(502, b""), http(200, b"{")]
)
async def test_what_may_have_been_done_is_said_to_be_unknown(raw: bytes | None) -> None:
    async with scripted_nodes(each(raw, problem(503, "no_leader"))) as nodes, nodes.client() as client:
        with pytest.raises(OutcomeUnknown, match="may have been done") as caught:
            await client.submit([Branch("stock")], timeout_s=0.01, patience_s=0.2, key="k")
        assert isinstance(caught.value, Indefinite)
        assert caught.value.key == "k"
        # A question changes nothing, whoever heard it.
        with pytest.raises(Unavailable):
            await client.get(GID, patience_s=0.1)


@pytest.mark.parametrize("code", ["no_leader", "shutting_down", "too_many_connections"])
async def test_what_was_certainly_not_done_is_said_to_be_unavailable(code: str) -> None:
    async with scripted_nodes(each(problem(503, code))) as nodes, nodes.client() as client:
        with pytest.raises(Unavailable) as caught:
            await client.submit([Branch("stock")], timeout_s=0.01, patience_s=0.1)
        assert (caught.value.code, caught.value.status) == (code, 503)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "malformed", InvalidRequest),
        (401, "unauthorized", NotAllowed),
        (403, "forbidden", NotAllowed),
        (404, "not_found", NotFound),
        (405, "method_not_allowed", InvalidRequest),
        (409, "conflict", Conflict),
        (410, "forgotten", Forgotten),
        (413, "too_large", InvalidRequest),
        (422, "unknown_participant", InvalidRequest),
        (422, "idempotency_key_reused", KeyReused),
    ],
)
async def test_final_errors_are_raised_at_once(status: int, code: str, kind: type[ClientError]) -> None:
    async with scripted_nodes(each(problem(status, code)), each(OK)) as nodes, nodes.client() as client:
        with pytest.raises(kind) as caught:
            await client.submit([Branch("stock")])
        assert type(caught.value) is kind
        assert (caught.value.status, caught.value.code, caught.value.detail) == (status, code, "D")
        assert len(nodes.heard()) == 1


async def test_retry_after_is_honoured_and_the_same_node_is_asked_again() -> None:
    busy = problem(429, "too_many_in_flight", retry_after_s=0.15)
    async with scripted_nodes(each(busy, busy, OK), each(OK)) as nodes, nodes.client() as client:
        slept = recorded(client)
        assert (await client.submit([Branch("stock")])).committed
        assert len(nodes.servers[0].heard) == 3
        assert nodes.servers[1].heard == []
        assert all(pause >= 0.15 for pause in slept)
        assert len(slept) == 2


def recorded(client: Client) -> list[float]:
    """The pauses that the client makes."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(delay_s: float) -> None:
        slept.append(delay_s)
        await sleep(min(delay_s, 0.01))

    client._sleep = note
    return slept


async def test_overload_to_the_end_is_told_so() -> None:
    busy = problem(429, "participant_backlog", retry_after_s=30)
    async with scripted_nodes(each(busy)) as nodes, nodes.client() as client:
        with pytest.raises(Overloaded) as caught:
            await client.submit([Branch("stock")], patience_s=5)
        assert (caught.value.code, caught.value.retry_after_s) == ("participant_backlog", 30.0)
        assert isinstance(caught.value, Definite)
        assert len(nodes.heard()) == 1, "to wait for longer than there is time would be of no use"


async def test_a_retry_after_in_the_header_alone_counts() -> None:
    busy = http(429, {"code": "too_many_in_flight"}, headers={"Retry-After": "2"})
    async with scripted_nodes(each(busy, OK)) as nodes, nodes.client() as client:
        slept = recorded(client)
        assert (await client.submit([Branch("stock")])).committed
        assert slept[0] >= 2
    odd = http(429, {"code": "x"}, headers={"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})
    async with scripted_nodes(each(odd, OK)) as nodes, nodes.client() as client:
        assert (await client.submit([Branch("stock")])).committed


async def test_the_leader_is_asked_directly_once_it_is_known() -> None:
    async with scripted_nodes(each(OK), each(OK), each(OK)) as nodes, nodes.client() as client:
        leader = nodes.servers[2]
        nodes.servers[0].rule = each(http(200, transaction(), headers={"Outlast-Leader": leader.url}))
        await client.submit([Branch("stock")])
        await client.submit([Branch("stock")])
        assert [len(server.heard) for server in nodes.servers] == [1, 0, 1]


async def test_only_nodes_that_it_was_given_are_asked(scripted: ScriptedParticipant) -> None:
    """Whoever answers could otherwise have the token sent anywhere."""
    passed_on = http(200, transaction(), headers={"Outlast-Leader": scripted.url})
    async with scripted_nodes(each(passed_on)) as nodes, nodes.client(token=TOKEN) as client:
        await client.submit([Branch("stock")])
        await client.submit([Branch("stock")])
        assert len(nodes.heard()) == 2
        assert scripted.heard == []


async def test_an_endless_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.client.MAX_ANSWER_BYTES", 10_000)
    async with scripted_nodes(each(http(200, b" " * 20_000)), each(OK)) as nodes, nodes.client() as client:
        assert (await client.submit([Branch("stock")])).committed


# ------------------------------------------------------------------------------------------------ waiting


async def test_it_goes_on_waiting_for_what_is_begun() -> None:
    rule = each(http(202, transaction(None)), http(202, transaction(None)), OK)
    async with scripted_nodes(rule) as nodes, nodes.client() as client:
        txn = await client.submit([Branch("stock")], key="k")
        assert (txn.decision, txn.key) == (Decision.COMMIT, "k")
        assert [heard.path for heard in nodes.heard()] == [
            "/v1/transactions",
            f"/v1/transactions/{GID}?wait=decided",
            f"/v1/transactions/{GID}?wait=decided",
        ]
        waits_ms = [int(heard.headers["outlast-wait-ms"]) for heard in nodes.heard()]
        assert all(0 < wait_ms < 5000 for wait_ms in waits_ms), "below the time after which a try is given up"


async def test_wait_ended_and_wait_none() -> None:
    rule = each(http(202, transaction()), http(200, transaction("commit", "committed")))
    async with scripted_nodes(rule) as nodes, nodes.client() as client:
        assert (await client.submit([Branch("stock")], wait="ended")).ended
        assert nodes.heard()[-1].path.endswith("?wait=ended")
    async with scripted_nodes(each(http(200, transaction(None)))) as nodes, nodes.client() as client:
        assert (await client.submit([Branch("stock")], wait="none")).decision is None
        assert len(nodes.heard()) == 1


async def test_time_that_runs_out_returns_what_is_known() -> None:
    rule = each(http(202, transaction(None)), problem(503, "no_leader"))
    async with scripted_nodes(rule) as nodes, nodes.client() as client:
        txn = await client.submit([Branch("stock")], timeout_s=0.05, patience_s=0.1)
        assert (txn.gid, txn.decision) == (GID, None)


async def test_get_waits_if_told_to() -> None:
    rule = each(http(200, transaction(None)), OK)
    async with scripted_nodes(rule) as nodes, nodes.client() as client:
        assert (await client.get(GID)).decision is None
        assert (await client.get(GID)).committed
    async with scripted_nodes(rule := each(http(200, transaction(None)), OK)) as nodes, nodes.client() as client:
        assert (await client.get(GID, wait="decided")).committed


async def test_strange_gids_and_names_stay_in_their_place() -> None:
    async with scripted_nodes(each(problem(404, "not_found"))) as nodes, nodes.client() as client:
        for name in ("../../x", "a/b", "a?b=c", "a b", "\u00e4\ud800", "%2e", ""):
            for call in (client.get(name), client.outcome(name), client.abort(name), client.unregister(name)):
                with pytest.raises(NotFound):
                    await call
        assert {heard.path.count("/") for heard in nodes.heard()} <= {3, 4}


# ------------------------------------------------------------------------------------------------ the other calls


async def test_outcome_abort_and_undecided() -> None:
    async with scripted_nodes(each(http(200, {"outcome": "committed"}))) as nodes, nodes.client() as client:
        assert await client.outcome(GID) is Decision.COMMIT
    undecided = problem(503, "not_known_yet", retry_after_s=0.01)
    async with scripted_nodes(each(undecided)) as nodes, nodes.client() as client:
        with pytest.raises(NotKnownYet):
            await client.outcome(GID, patience_s=0.1)
        with pytest.raises(OutcomeUnknown) as caught:
            await client.abort(GID, patience_s=0.1)
        assert caught.value.gid == GID


async def test_giving_up_a_name_whose_first_try_was_lost() -> None:
    there = http(200, {"name": "stock", "url": "http://127.0.0.1:9", "batch": False})
    gone, done = problem(404, "not_found"), b"HTTP/1.1 204 No Content\r\n\r\n"
    for answers in ((there, None, gone), (there, problem(503, "unknown"), gone), (there, done), (None, there, done)):
        async with scripted_nodes(each(*answers)) as nodes, nodes.client() as client:
            await client.unregister("stock")
    async with scripted_nodes(each(problem(503, "no_leader"), gone)) as nodes, nodes.client() as client:
        with pytest.raises(NotFound):
            await client.unregister("stock")


async def test_a_list_goes_on_over_pages_that_are_short_or_empty() -> None:
    def page(number: int, after: str | None) -> bytes:
        rows = [transaction() | {"gid": f"test-1-{9 - number}"}] if number != 1 else []
        return http(200, {"transactions": rows, "next": after})

    rule = each(page(0, "test-1-9"), page(1, "test-1-8"), page(2, None))
    async with scripted_nodes(rule) as nodes, nodes.client() as client:
        gids = [txn.gid async for txn in client.list(state=State.COMMITTING, page=1)]
        assert gids == ["test-1-9", "test-1-7"]
        assert [heard.path.partition("?")[2] for heard in nodes.heard()] == [
            "limit=1&state=committing",
            "limit=1&state=committing&after=test-1-9",
            "limit=1&state=committing&after=test-1-8",
        ]


async def test_calls_at_once_share_a_client() -> None:
    async with scripted_nodes(hang, each(OK)) as nodes, nodes.client(try_timeout_s=0.1) as client:
        results = await asyncio.gather(*(client.submit([Branch("stock")]) for _ in range(50)))
        assert all(txn.committed for txn in results)
        assert len({txn.key for txn in results}) == 50


async def test_a_call_that_is_cancelled_ends() -> None:
    async with scripted_nodes(hang) as nodes:
        async with nodes.client() as client:
            task = asyncio.create_task(client.submit([Branch("stock")]))
            await eventually(nodes.heard)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await eventually(lambda: not nodes.servers[0].open)


# ------------------------------------------------------------------------------------------------ real nodes


async def test_every_call_on_a_real_node(node: RunningNode, null: Server, scripted: ScriptedParticipant) -> None:
    async with Client([node.url]) as client:
        registered = await client.register("stock", null.url, batch=True)
        assert registered == Participant(name="stock", url=null.url, batch=True)
        await client.register("picky", scripted.url)
        txn = await client.submit([Branch("stock", {"n": 1})], wait="ended", or_raise=True)
        assert (txn.state, txn.ended, txn.branch("stock").state) == (State.COMMITTED, True, "committed")
        assert await client.submit([Branch("stock", {"n": 1})], key=txn.key) == txn
        assert dataclasses.replace(txn, key=None) == await client.get(txn.gid)
        with pytest.raises(KeyReused):
            await client.submit([Branch("stock", {"n": 2})], key=txn.key)
        scripted.rule = refusing("out", retryable=True)
        refused = await client.submit([Branch("picky"), Branch("stock")], wait="ended")
        assert (refused.aborted, refused.retryable, refused.branch("picky").reason) == (True, True, "out")
        assert await client.outcome(txn.gid) is Decision.COMMIT
        assert await client.outcome(refused.gid) is Decision.ABORT
        scripted.rule = on("prepare", hang)
        begun = await client.submit([Branch("picky")], wait="none")
        assert (await client.abort(begun.gid)).aborted
        assert (await client.get(begun.gid, wait="ended")).state is State.ABORTED
        assert [one.gid async for one in client.list(page=2)] == [begun.gid, refused.gid, txn.gid]
        assert [one.gid async for one in client.list(state="committed")] == [txn.gid]
        cluster = await client.cluster()
        assert isinstance(cluster, Cluster)
        assert (cluster.leader, cluster.nodes[0].url, cluster.ready) == ("n1", node.url, True)
        assert [one.name for one in await client.participants()] == ["stock", "picky"]
        scripted.rule = honest
        await client.unregister("picky")
        with pytest.raises(NotFound):
            await client.unregister("picky")
        with pytest.raises(InvalidRequest) as caught:
            await client.submit([Branch("picky")])
        assert caught.value.code == "unknown_participant"
        for wrong in (client.submit([]), client.submit([Branch("stock")], timeout_s=-1), client.register("X", "y")):
            with pytest.raises(InvalidRequest):
                await wrong
        with pytest.raises(NotFound):
            await client.get("test-1-999")


async def test_a_slow_transaction_outlasts_many_tries(node: RunningNode, scripted: ScriptedParticipant) -> None:
    released = asyncio.Event()

    async def when_released(heard: Heard) -> bytes:
        await released.wait()
        return honest(heard)

    scripted.rule = on("prepare", when_released)
    async with Client([node.url], try_timeout_s=0.1) as client:
        await client.register("slow", scripted.url)
        task = asyncio.create_task(client.submit([Branch("slow")]))
        looked = counted(client)
        await eventually(lambda: looked() >= 5)
        released.set()
        assert (await task).committed
        assert len(node.node.ledger) == 1


def counted(client: Client) -> Callable[[], int]:
    """How many tries the client has made."""
    tries = 0
    real = client._try

    async def count(*arguments: Any) -> Any:
        nonlocal tries
        tries += 1
        return await real(*arguments)

    client._try = count  # type: ignore[method-assign]
    return lambda: tries


async def test_tokens_on_a_real_node() -> None:
    async with running(configs(token=TOKEN)[0]) as node:
        for token in (None, "another-token-of-some-length"):
            async with Client([node.url], token=token) as client:
                with pytest.raises(NotAllowed):
                    await client.participants()
        async with Client([node.url], token=TOKEN) as client:
            assert await client.participants() == ()


async def test_overload_on_a_real_node(scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    async with running(configs(limits=Limits(max_in_flight=1))[0]) as node, Client([node.url]) as client:
        await client.register("slow", scripted.url)
        await client.submit([Branch("slow")], wait="none", timeout_s=300)
        with pytest.raises(Overloaded) as caught:
            await client.submit([Branch("slow")], wait="none", patience_s=0.5)
        assert (caught.value.code, caught.value.retry_after_s) == ("too_many_in_flight", 1.0)


async def test_the_leader_dies_under_it(null: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.relay.LEADER_PATIENCE_S", 0.3)
    replicas = Replicas(("n1", "n2", "n3"))
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(running(config, replicas.logs[config.node], ready=False))
            for config in configs(("n1", "n2", "n3"))
        ]
        replicas.lead("n1")
        await eventually(lambda: nodes[0].node.driver.leading)
        client = await stack.enter_async_context(Client([node.url for node in nodes]))
        await client.register("stock", null.url)
        replicas.hold = True
        task = asyncio.create_task(client.submit([Branch("stock")]))
        await eventually(lambda: replicas.waiting)  # n1 has it
        replicas.logs["n1"].deaf = True
        replicas.commit_unheard()
        replicas.hold = False
        replicas.lead("n2", unheard_by=("n1",))
        stopping = asyncio.create_task(nodes[0].node.stop())
        txn = await task
        assert txn.committed
        await stopping
        assert len(nodes[1].node.ledger) == 1
        assert (await client.get(txn.gid)).committed
        assert client._first == 1


async def test_results_can_be_compared_and_shown() -> None:
    async with scripted_nodes(each(OK)) as nodes, nodes.client(token=TOKEN) as client:
        one = await client.submit([Branch("stock")], key="k")
        two = await client.submit([Branch("stock")], key="k")
        assert one == two
        assert isinstance(one, TransactionResult)
        assert TOKEN not in repr(client)
        assert json.dumps(one.branches[0].result) == "null"
