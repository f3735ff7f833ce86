"""What participants answer: to messages, and when they are asked what they hold. Understood, or no answer at all."""

import asyncio
import contextlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster import answers, cli
from cluster.calls import Answer, Caller, _parsed
from cluster.cli import main
from cluster.commands import doctor, tx
from cluster.doctor import participants
from coordinator import inquiry
from coordinator.codec import JSON_TYPE, MSGPACK_TYPE, Malformed, answer_from_wire, batch_from_bytes, json_bytes
from coordinator.commands import encode_command
from coordinator.config import Limits, NodeConfig, Peer
from coordinator.facts import Applied, Participant, Verdict
from coordinator.inquiry import Inquiry
from coordinator.ledger import Ledger
from coordinator.protocol.entries import Entry, Header, Reconciled
from coordinator.protocol.messages import Abort, Acked, Commit, Contradicted, Prepare, Prepared, ReadOnly, Refused
from tests.fuzz import HUNT, examples
from tests.fuzz.lives import CLUSTER, RESTORE, check_usable, ledger_after
from tests.fuzz.mutations import altered, as_json, damaged, pack

MESSAGES = [
    Prepare(gid="m-1-1", branch="a", payload=b"1"),
    Commit(gid="m-1-1", branch="a"),
    Abort(gid="m-1-1", branch="a"),
]
ANSWERS: list[Any] = [
    [{"status": 200, "vote": "prepared", "result": {"a": [1]}}],
    [{"status": 200, "vote": "refused", "reason": "no", "retryable": True}],
    [{"status": 200, "state": "committed"}, {"status": 409, "state": "aborted"}],
    [{"status": 409, "code": "stale_epoch", "epoch": 5}, {"status": 503, "code": "pending"}],
]
BATCHES = altered(st.sampled_from(ANSWERS)).map(pack) | damaged(st.sampled_from(ANSWERS).map(pack))
Read = Callable[[Any, int, object], Any]


def understands(message: Any, content_type: str, body: bytes, read: Read = answer_from_wire) -> None:
    try:
        items = batch_from_bytes(content_type, body)
    except Malformed:
        return
    for item in items:
        status = item.get("status") if isinstance(item, dict) else 0
        try:
            answer = read(message, status if type(status) is int else 0, item)
        except Malformed as error:
            assert len(str(error)) < 500
            continue
        assert (answer.gid, answer.branch) == ("m-1-1", "a")
        assert isinstance(item, dict)
        # What moves a transaction on was said, in so many words, to the message that asked for it.
        match answer:
            case Prepared() | ReadOnly() | Refused():
                assert isinstance(message, Prepare)
                vote = {Prepared: "prepared", ReadOnly: "read_only", Refused: "refused"}[type(answer)]
                assert (status, item["vote"]) == (200, vote)
            case Acked():
                assert (status, item["state"]) == (200, "committed" if isinstance(message, Commit) else "aborted")
            case Contradicted():
                assert (status, item["state"]) == (409, answer.state)


@examples(120)
@given(st.sampled_from(MESSAGES), st.sampled_from([MSGPACK_TYPE, JSON_TYPE]), BATCHES)
def test_a_participant_s_answers_are_understood_or_malformed(message: Any, content_type: str, body: bytes) -> None:
    understands(message, content_type, body)


def test_the_undamaged_answers_are_understood() -> None:
    found = [type(answer_from_wire(MESSAGES[0], item[0]["status"], item[0])) for item in ANSWERS[:2]]
    assert found == [Prepared, Refused]
    assert isinstance(answer_from_wire(MESSAGES[1], 200, ANSWERS[2][0]), Acked)


def _trusting(message: Any, status: int, body: object) -> Any:
    """A 409 says a state, or an epoch."""
    if status == 409 and isinstance(body, dict) and "code" not in body:
        body["state"]
    return answer_from_wire(message, status, body)


def _content(message: Any, status: int, body: object) -> Any:
    """With a 200, whatever it says."""
    if status == 200 and not isinstance(message, Prepare):
        return Acked(gid=message.gid, branch=message.branch)
    return answer_from_wire(message, status, body)


def _voting(message: Any, status: int, body: object) -> Any:
    """Whatever is no refusal is a vote."""
    if isinstance(message, Prepare) and isinstance(body, dict) and body.get("vote") not in ("refused", "read_only"):
        return Prepared(gid=message.gid, branch=message.branch)
    return answer_from_wire(message, status, body)


@pytest.mark.parametrize(
    ("read", "error"),
    [(_trusting, KeyError), (_content, (AssertionError, KeyError)), (_voting, (AssertionError, KeyError))],
)
def test_a_careless_reader_of_answers_is_found(read: Read, error: type[Exception]) -> None:
    @HUNT
    @given(st.sampled_from(MESSAGES), BATCHES)
    def hunt(message: Any, body: bytes) -> None:
        understands(message, MSGPACK_TYPE, body, read)

    with pytest.raises(error):
        hunt()


# ------------------------------------------------------------------------------------------------ what they hold

OPEN = len(RESTORE) - 5
"""So many of its commands make a ledger that is not sure of a range."""
HELD: list[Any] = [
    {"branches": [{"gid": gid, "branch": "stock", "state": "prepared", "prepared_at": 5.0}], "total": 1, "working": 0}
    for gid in ("m-2-3", "m-2-9", "m-1-3")
] + [{"branches": []}]
TOLD: list[Any] = [
    {
        "branches": [{"gid": gid, "branch": "stock", "state": state} for gid in ("m-2-3", "m-2-9")],
        "known": True,
        "floor": "m-1-1",
        "epoch": 100_003,
    }
    for state in ("prepared", "committed", "aborted", "read_only")
]
ROW = {"gid": "m-2-8", "branch": "pay", "state": "committed"}
WORDS = st.sampled_from(
    [
        ROW,
        {**ROW, "branch": "\ud800"},
        "m-1-3",
        "m-1-4",
        "m-2-9",
        "m-99999-1",
        "prepared",
        "committed",
        "aborted",
        "stock",
    ]
)
TEXTS = altered(st.sampled_from(HELD) | st.sampled_from(TOLD), WORDS).map(as_json) | damaged(
    st.sampled_from(HELD + TOLD).map(as_json)
)
PLAIN_TEXTS = st.sampled_from(HELD + TOLD).map(as_json)
CONFIG = NodeConfig(
    cluster=CLUSTER,
    node="n1",
    data=Path("unused"),
    nodes=(Peer(id="n1", api="127.0.0.1:1", raft="127.0.0.1:2"),),
    secret="s" * 16,
)
Said = Mapping[tuple[str, bool], bytes]
"""By participant, and whether it was asked about gids: what it answers."""


class _Driver:
    """Logs at once, as a leader that nobody disturbs."""

    leading, awaits_copy = True, False

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def log(self, entry: Entry, size: int) -> Applied:
        command = encode_command(Header(epoch=self._ledger.epoch, at=5), [entry])
        assert len(command) <= 2 * size + 300, "as large as was said, or the log does not take it"
        assert len(command) <= Limits().max_command_bytes
        (applied,) = self._ledger.apply(command)
        assert not isinstance(entry, Reconciled) or applied.verdict is Verdict.APPLIED, "what is logged has its effect"
        return applied

    async def barrier(self) -> None:
        pass

    def release(self, gid: str) -> None:
        txn = self._ledger.get(gid)
        assert txn is not None
        assert txn.decision is None


class _Inquiry(Inquiry):
    """Whose participants say what they are told to say."""

    said: Said

    async def _get(self, participant: Participant, path: str) -> dict[str, Any]:
        return inquiry._object(self.said[participant.name, "gid=" in path], "GET /branches")


def finds_out(said: Said, kind: type[_Inquiry] = _Inquiry) -> Ledger:
    """Two rounds, with these answers in both; the ledger then."""
    ledger = ledger_after("restore", OPEN).fork()
    asking = kind(config=CONFIG, driver=cast("Any", _Driver(ledger)), ledger=ledger, tls=None)
    asking.said = said

    async def rounds() -> None:
        for _ in range(2):
            if ledger.lost is not None:
                await asking._round(ledger.lost)
            json_bytes(asking.status())

    asyncio.run(rounds())
    for gid in ("m-2-3", "m-1-3"):
        txn = ledger.get(gid)
        if not all(_is_json(said["stock", about]) for about in (False, True)):
            assert txn is not None, "what was not understood says nothing"
            assert txn.decision is None, "what was not understood decides nothing"
    check_usable(ledger.fork())
    return ledger


def _is_json(text: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


ASKED = [(name, about) for name in ("stock", "pay") for about in (False, True)]


def _all_say(*rows: dict[str, Any]) -> Said:
    return dict.fromkeys(ASKED, as_json({"branches": list(rows), "known": True}))


ROWS = st.fixed_dictionaries(
    {
        "gid": st.sampled_from(["m-2-3", "m-2-9", "m-1-3", "m-1-4", "x-1-1", "m-99999-1", ""]),
        "branch": st.sampled_from(["stock", "pay", "A b", "", "\ud800", "x" * 300]),
        "state": st.sampled_from(["prepared", "committed", "aborted", "read_only", "odd"]),
    }
)
SAID = (
    st.fixed_dictionaries(dict.fromkeys(ASKED, TEXTS | PLAIN_TEXTS))
    | TEXTS.map(lambda text: dict.fromkeys(ASKED, text))
    | st.lists(ROWS, max_size=3).map(lambda rows: _all_say(*rows))
)


@examples(60)
@given(SAID)
@example(_all_say({"gid": "m-2-9", "branch": "\ud800", "state": "prepared"}))
@example(_all_say({"gid": "m-2-9", "branch": "stock", "state": "prepared"}))
@example(_all_say({"gid": "m-2-9", "branch": "x" * 5_000_000, "state": "committed"}))
@example(_all_say(*({"gid": "m-2-9", "branch": f"b{n}-{'x' * 58}", "state": "prepared"} for n in range(9999))))
def test_whatever_participants_hold_is_found_out_or_not_understood(said: Said) -> None:
    finds_out(said)


def test_the_undamaged_are_found_out() -> None:
    held, told = as_json(HELD[0]), as_json({**TOLD[1], "branches": TOLD[1]["branches"][:1]})
    nothing = as_json({"branches": [], "known": True})
    said = {("stock", False): held, ("stock", True): told, ("pay", False): nothing, ("pay", True): nothing}
    txn = finds_out(said).get("m-2-3")
    assert txn is not None
    assert txn.decision == "commit"


class _Unchecked(_Inquiry):
    """Takes a branch for what it is called."""

    def _rows(self, body: dict[str, Any]) -> list[tuple[str, str, str]]:
        return inquiry._rows(body)


class _Deaf(_Inquiry):
    """Whoever says nothing that can be understood holds nothing."""

    async def _get(self, participant: Participant, path: str) -> dict[str, Any]:
        try:
            return await super()._get(participant, path)
        except inquiry._NoAnswer:
            return {"branches": [], "known": True}


class _Presuming(_Inquiry):
    """The rows are there, and hold what they should."""

    def _rows(self, body: dict[str, Any]) -> list[tuple[str, str, str]]:
        return [(row["gid"], row["branch"], row["state"]) for row in body["branches"]]


@pytest.mark.parametrize(
    ("kind", "error"),
    [(_Unchecked, (UnicodeEncodeError, AssertionError)), (_Deaf, AssertionError), (_Presuming, (TypeError, KeyError))],
)
def test_a_careless_inquiry_is_found(kind: type[_Inquiry], error: type[Exception]) -> None:
    @HUNT
    @given(SAID)
    def hunt(said: Said) -> None:
        finds_out(said, kind)

    with pytest.raises(error):
        hunt()


# ------------------------------------------------------------------------------------------------ what nodes say

BRANCH = {"branch": "stock", "participant": "stock", "state": "committed", "reason": None, "result": {"left": 1}}
WAITING = {"for": "ack", "branch": "pay", "participant": "pay", "trouble": "silent", "down_since": "2026-01-01"}
TXN: dict[str, Any] = {
    "gid": "m-1-1",
    "protocol": "2pc",
    "state": "committing",
    "decision": "commit",
    "reason": None,
    "retryable": False,
    "epoch": 1,
    "branches": [
        BRANCH,
        {**BRANCH, "branch": "pay", "heuristic": "aborted", "reason": "no"},
        {**BRANCH, "branch": "b", "resolved": {"outcome": "commit", "at": "2026-01-01T00:00:00Z", "note": "by hand"}},
    ],
    "started_at": "2026-01-01T00:00:00Z",
    "decided_at": "2026-01-01T00:00:01Z",
    "ended_at": None,
    "waiting_for": [WAITING, {**WAITING, "for": "operator"}, {**WAITING, "for": "application"}],
    "heuristic": "mixed",
    "acknowledged_at": None,
}
FOUND: dict[str, Any] = {
    "open": True,
    "awaits_copy": False,
    "fresh": False,
    "range": ["m-1-1", "m-9-9"],
    "without": ["pay"],
    "undecided": 1,
    "prepared": 1,
    "settled": {"committed": 1, "aborted": 0, "forgotten": 0},
    "waiting_for": ["stock"],
    "participants": {"stock": {"answered": True, "can_tell": False, "prepared": 1, "trouble": None}},
}
SAYS: dict[str, Any] = {
    "cluster": "m",
    "node": "n1",
    "role": "leader",
    "leader": "n1",
    "epoch": 1,
    "level": 2,
    "ready": True,
    "nodes": [{"id": "n1", "url": "http://127.0.0.1:1", "role": "leader", "understands": 2, "trouble": None}],
    "in_flight": 1,
    "trouble": None,
    "reconciling": False,
}
LANE = {"name": "stock", "url": "http://127.0.0.1:2", "batch": False, "owed": 1, "reachable": False, "trouble": "x"}
PATHS: dict[str, dict[str, Any]] = {
    "/branches": HELD[0],
    "/v1/cluster": SAYS,
    "/v1/participants": {"participants": [{**LANE, "down_since": "2026-01-01T00:00:00Z"}]},
    "/v1/participants/stock": LANE,
    "/v1/reconciliation": FOUND,
    "/v1/transactions": {"transactions": [TXN], "next": None},
}
COMMANDS = [
    ("tx", "submit", "--branch", "stock={}"),
    ("tx", "show", "m-1-1"),
    ("tx", "list"),
    ("tx", "list", "--limit", "1"),
    ("tx", "abort", "m-1-1"),
    ("tx", "resolve", "m-1-1", "--branch", "stock", "--commit"),
    ("tx", "resolve", "m-1-1", "--branch", "stock", "--commit", "--tell"),
    ("tx", "acknowledge", "m-1-1"),
    ("restore", "--status"),
    ("restore", "--without", "stock"),
    ("doctor",),
]
Told = Mapping[str, bytes]


class _Told(Caller):
    """Whose nodes say what they are told to say, by path."""

    said: Told

    async def once(self, method: str, url: str, **_: Any) -> Answer:
        if method == "POST" and "/v1/" in url:
            return Answer(200, _parsed(self.said["a transaction"]))
        path = urlsplit(url).path
        return Answer(200, _parsed(self.said.get(path, self.said["a transaction"])))


NOBODY = [WAITING, {**WAITING, "participant": None}, {**WAITING, "for": "operator", "participant": None}]


def _without(plain: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name not in names}


def _page(txn: dict[str, Any]) -> dict[str, Any]:
    return {"transactions": [txn], "next": None}


def _well() -> dict[str, bytes]:
    """All as it should be."""
    return {path: as_json(plain) for path, plain in PATHS.items()} | {"a transaction": as_json(TXN)}


@st.composite
def told(draw: st.DrawFn) -> Told:
    """One of them in another way than it should."""
    said = _well()
    path = draw(st.sampled_from(sorted(said)))
    plain = PATHS.get(path, TXN)
    said[path] = draw(altered(st.just(plain)).map(as_json) | damaged(st.just(said[path])))
    return said


def tells(words: tuple[str, ...], said: Told, *, as_json_too: bool) -> int:
    _Told.said = said
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*words, "--url", "http://127.0.0.1:1", *(["--json"] if as_json_too else [])])
    for stream in (out, err):
        stream.flush()
    assert status in (0, 1, 2, 3)
    return status


@pytest.fixture
def nodes_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cli.parser()
    monkeypatch.setattr(cli, "parser", lambda: made)
    for module in (tx, doctor, participants):
        monkeypatch.setattr(module, "Caller", _Told)


@pytest.mark.usefixtures("nodes_as_told")
@examples(150)
@given(st.sampled_from(COMMANDS), told(), st.booleans())
@example(("tx", "list"), dict.fromkeys([*PATHS, "a transaction"], b'{"ok":true}'), False)
@example(("doctor",), dict.fromkeys([*PATHS, "a transaction"], b'{"nodes":7}'), False)
@example(("tx", "show", "m-1-1"), dict.fromkeys([*PATHS, "a transaction"], b"[" * 2000), True)
@example(("tx", "show", "m-1-1"), dict.fromkeys([*PATHS, "a transaction"], b"[" * 500 + b"]" * 500), True)
@example(("tx", "show", "m-1-1"), _well() | {"a transaction": as_json(_without(TXN, "acknowledged_at"))}, False)
@example(("doctor",), _well() | {"/v1/cluster": as_json(_without(SAYS, "level", "trouble", "reconciling"))}, False)
@example(("doctor",), _well() | {"/v1/transactions": as_json(_page(_without(TXN, "heuristic")))}, False)
@example(("doctor",), _well() | {"/v1/transactions": as_json(_page({**TXN, "waiting_for": NOBODY}))}, False)
@example(COMMANDS[6], _well() | {"/v1/participants/stock": as_json({**LANE, "url": "http://["})}, False)
@example(COMMANDS[6], _well() | {"/v1/participants/stock": as_json({**LANE, "url": ""})}, False)
@example(COMMANDS[10], _well() | {"/v1/participants": as_json({"participants": [{**LANE, "url": "http://["}]})}, False)
def test_whatever_answers_commands_end_with_a_status(words: tuple[str, ...], said: Told, as_json_too: bool) -> None:
    tells(words, said, as_json_too=as_json_too)


@pytest.mark.usefixtures("nodes_as_told")
def test_commands_understand_what_nodes_say() -> None:
    said = _well()
    found = [tells(words, said, as_json_too=False) for words in COMMANDS]
    assert found == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2], "the abort comes too late, and a participant is down"


@pytest.mark.usefixtures("nodes_as_told")
def test_commands_that_take_any_answer_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "fits", lambda *_: True)

    @HUNT
    @given(st.sampled_from(COMMANDS), told())
    def hunt(words: tuple[str, ...], said: Told) -> None:
        tells(words, said, as_json_too=False)

    with pytest.raises((KeyError, TypeError, AttributeError, ValueError)):
        hunt()
