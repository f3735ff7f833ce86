"""The replicated state machine: its rules one by one, then what is true after any commands whatever."""

import logging
import reprlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.replication.log import NeedsNewer
from coordinator.codec import Malformed
from coordinator.commands import COMMAND_VERSION, ENTRIES, decode_command, encode_command
from coordinator.facts import Applied, Knowledge, Verdict
from coordinator.ledger import Ledger
from coordinator.levels import NEWEST
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    ContradictionSeen,
    Decided,
    Ended,
    Enlisted,
    Forgotten,
    Header,
    Opened,
    Raised,
    Registered,
    Sealed,
    TookOver,
    Unregistered,
)
from coordinator.protocol.invariants import check, check_delta, check_owed
from coordinator.protocol.messages import Gid
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import Decision, State, VoteKind
from coordinator.states import STATE_VERSION

ANY = settings(deadline=None, derandomize=True, database=None, max_examples=300)


def number(gid):
    parsed = Gid.parse(gid)
    assert parsed is not None
    return parsed.number


class Bench:
    """A ledger of cluster m, with participants a and b, led by n1 in epoch 1."""

    def __init__(self, ledger=None):
        self.ledger = ledger if ledger is not None else Ledger("m")
        self.ledger.apply(encode_command(Header(epoch=0, at=0), [registered("a"), registered("b")]))
        self.take_over(1)
        self.do(Raised(level=NEWEST))

    def do(self, *entries, epoch=None, at=0):
        header = Header(epoch=self.ledger.epoch if epoch is None else epoch, at=at)
        return self.ledger.apply(encode_command(header, list(entries)))

    def verdict(self, entry, **kwargs):
        (applied,) = self.do(entry, **kwargs)
        assert applied.entry == entry
        return applied.verdict

    def take_over(self, epoch, node="n1"):
        return self.verdict(TookOver(node=node), epoch=epoch)

    def commit(self, gid, at=0, *, end=True):
        self.do(begun(gid), decision(gid, Decision.COMMIT), *([Ended(gid=gid)] if end else []), at=at)


def registered(name):
    return Registered(name=name, url=f"http://{name}", batch=name == "a")


def begun(gid, *names, key=None, body_hash=None, protocol="2pc"):
    plans = tuple(BranchPlan(name=name, participant=name, payload=b"1") for name in names or ("a", "b"))
    return Begun(gid=gid, protocol=protocol, branches=plans, timeout_ms=50, key=key, body_hash=body_hash)


def decision(gid, which, vote=VoteKind.PREPARED):
    votes = tuple(BranchVote(branch=name, vote=vote) for name in ("a", "b"))
    return Decided(gid=gid, decision=which, votes=votes)


def everything(ledger):
    return (
        ledger.level,
        ledger.epoch,
        ledger.leader,
        ledger.floor,
        dict(ledger.participants),
        ledger.keys.copy(),
        dict(ledger.unfinished),
        list(ledger._table.items()),
        b"".join(ledger.snapshot()()),
    )


@pytest.fixture
def bench():
    return Bench()


# ------------------------------------------------------------------------------------------------ commands


def test_one_command_carries_many_entries_and_is_told_of_at_once():
    told = []
    bench = Bench(Ledger("m", told.append))
    applied = bench.do(begun("m-1-1"), begun("m-1-2"))
    assert told[-1] == applied
    assert [one.verdict for one in applied] == [Verdict.APPLIED] * 2
    assert applied[0].txn == bench.ledger.get("m-1-1")


def test_a_command_round_trips():
    header = Header(epoch=3, at=9)
    entries = [TookOver(node="n1"), begun("m-3-1", key="k", body_hash=b"\0"), decision("m-3-1", Decision.ABORT)]
    assert decode_command(encode_command(header, entries)) == (header, entries)


DEEP = [2]
for _ in range(500):
    DEEP = [2, DEEP]
DEEP_DICT = {}
for _ in range(500):
    DEEP_DICT = {"x": DEEP_DICT}


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {},
        [COMMAND_VERSION - 1, 1, 1, []],
        [str(COMMAND_VERSION + 1), 1, 1, []],
        [COMMAND_VERSION, 1, 1, [], []],
        [COMMAND_VERSION, "1", 1, []],
        [COMMAND_VERSION, 1, None, []],
        [COMMAND_VERSION, 1, 1, {}],
        [COMMAND_VERSION, 1, 1, [7]],
        [COMMAND_VERSION, 1, 1, [[7]]],
        [COMMAND_VERSION, 1, 1, [[7, 5]]],
        [COMMAND_VERSION, 1, 1, [[2, "m-1-1", "2pc", [[7, "m-1-1"]], 1]]],
        [COMMAND_VERSION, 1, 1, [ENTRIES.to_plain(BranchPlan(name="a", participant="a", payload=b""))]],
        [COMMAND_VERSION, 1, 1, [ENTRIES.to_plain(BranchVote(branch="a", vote=VoteKind.PREPARED))]],
        [COMMAND_VERSION, 1, 1, [DEEP]],
        [COMMAND_VERSION, 1, 1, [[DEEP]]],
        [COMMAND_VERSION, 1, 1, [[4, "m-1-1", DEEP_DICT]]],
        [COMMAND_VERSION, 1, 1, [[7, DEEP_DICT]]],
    ],
    ids=lambda plain: reprlib.repr(plain)[:60],
)
def test_a_command_that_is_not_understood_changes_nothing_and_people_hear_of_it(bench, plain, caplog):
    before = everything(bench.ledger)
    with caplog.at_level(logging.CRITICAL):
        assert bench.ledger.apply(msgpack.packb(plain)) == []
    assert everything(bench.ledger) == before
    assert "not understood" in caplog.text


# ------------------------------------------------------------------------------------------------ fencing


def test_entries_of_an_older_epoch_are_refused_whatever_they_are(bench):
    bench.do(begun("m-1-1"))
    bench.take_over(2, "n2")
    before = everything(bench.ledger)
    for entry in (
        begun("m-1-2"),
        decision("m-1-1", Decision.COMMIT),
        Ended(gid="m-1-1"),
        ContradictionSeen(gid="m-1-1", branch="a", state="aborted"),
        TookOver(node="n1"),
        registered("c"),
        Unregistered(name="a"),
        Forgotten(floor=5, before=5),
    ):
        assert bench.verdict(entry, epoch=1) is Verdict.FENCED
    assert everything(bench.ledger) == before


def test_an_epoch_has_one_leader(bench, caplog):
    with caplog.at_level(logging.CRITICAL):
        assert bench.take_over(1, "n2") is Verdict.FENCED
    assert bench.ledger.leader == "n1"
    assert "claims epoch 1" in caplog.text
    assert bench.take_over(1, "n1") is Verdict.APPLIED


def test_a_transaction_begins_only_under_the_leader_that_named_it(bench):
    bench.take_over(3)
    assert bench.verdict(begun("m-2-1")) is Verdict.FENCED
    assert bench.verdict(begun("m-4-1")) is Verdict.FENCED
    assert bench.verdict(begun("m-4-1"), epoch=4) is Verdict.FENCED, "its leader has not taken over yet"
    assert bench.verdict(begun("m-3-1")) is Verdict.APPLIED


# ------------------------------------------------------------------------------------------------ beginning


def test_a_repeated_begun_finds_what_it_began(bench):
    bench.do(begun("m-1-1"))
    (applied,) = bench.do(begun("m-1-1", "a"))
    assert (applied.verdict, applied.txn) == (Verdict.UNCHANGED, bench.ledger.get("m-1-1"))


def test_transactions_begin_in_the_order_of_their_numbers(bench):
    bench.do(begun("m-1-5"))
    (applied,) = bench.do(begun("m-1-4"))
    assert (applied.verdict, applied.txn) == (Verdict.UNCHANGED, None)
    assert bench.ledger.knowledge("m-1-4") is Knowledge.ABORTED
    # Its abort needs no entry, and one would spoil the table's order.
    assert bench.verdict(Decided(gid="m-1-4", decision=Decision.ABORT)) is Verdict.UNCHANGED
    assert list(bench.ledger._table) == [number("m-1-5")]


@pytest.mark.parametrize("gid", ["other-1-1", "m-1", "M-1-1", "m-01-1", ""])
def test_only_this_clusters_gids_begin(bench, gid):
    assert bench.verdict(begun(gid)) is Verdict.MALFORMED
    assert bench.verdict(Ended(gid=gid)) is Verdict.MALFORMED


def test_every_participant_must_be_registered(bench):
    (applied,) = bench.do(begun("m-1-1", "a", "z"))
    assert (applied.verdict, applied.detail) == (Verdict.UNKNOWN_PARTICIPANT, "z")


def test_an_idempotency_key_names_one_transaction(bench):
    bench.do(begun("m-1-1", key="k", body_hash=b"1"))
    (same,) = bench.do(begun("m-1-2", key="k", body_hash=b"1"))
    (other,) = bench.do(begun("m-1-3", key="k", body_hash=b"2"))
    first = bench.ledger.get("m-1-1")
    assert (same.verdict, same.txn) == (Verdict.KEY_TAKEN, first)
    assert (other.verdict, other.txn) == (Verdict.KEY_REUSED, first)
    assert bench.ledger.holder("k") == first
    assert bench.ledger.holder("other") is None
    assert len(bench.ledger) == 1


def test_a_key_is_kept_as_long_as_its_transaction(bench):
    bench.do(begun("m-1-1", key="k", body_hash=b"1"), decision("m-1-1", Decision.ABORT), Ended(gid="m-1-1"), at=5)
    (applied,) = bench.do(begun("m-1-2", key="k", body_hash=b"1"))
    assert applied.verdict is Verdict.KEY_TAKEN
    bench.do(Forgotten(floor=number("m-1-1"), before=5))
    assert bench.ledger.holder("k") is None
    assert bench.verdict(begun("m-1-2", key="k", body_hash=b"2")) is Verdict.APPLIED


# ------------------------------------------------------------------------------------------------ deciding


def test_the_answer_to_a_second_decision_is_the_stored_one(bench):
    bench.commit("m-1-1", end=False)
    (applied,) = bench.do(decision("m-1-1", Decision.ABORT))
    assert applied.verdict is Verdict.UNCHANGED
    assert applied.txn is not None
    assert applied.txn.decision is Decision.COMMIT
    bench.do(Ended(gid="m-1-1"))
    (applied,) = bench.do(decision("m-1-1", Decision.ABORT))
    assert applied.verdict is Verdict.UNCHANGED
    assert applied.txn is not None
    assert applied.txn.decision is Decision.COMMIT


@pytest.mark.parametrize("gid", ["m-1-7", "m-0-7", "m-2-7"])
def test_an_unknown_transaction_is_never_committed(bench, gid):
    (applied,) = bench.do(decision(gid, Decision.COMMIT))
    assert (applied.verdict, applied.txn) == (Verdict.UNCHANGED, None)
    assert bench.ledger.get(gid) is None


def test_an_unknown_transaction_of_today_is_aborted_when_asked_for_and_never_begins(bench):
    (applied,) = bench.do(Decided(gid="m-1-7", decision=Decision.ABORT, reason="asked for"), at=9)
    assert applied.verdict is Verdict.APPLIED
    assert applied.txn is not None
    assert (applied.txn.state, applied.txn.reason, applied.txn.ended_at) == (State.ABORTED, "asked for", 9)
    assert applied.txn == bench.ledger.get("m-1-7")
    assert bench.verdict(begun("m-1-7")) is Verdict.UNCHANGED
    assert bench.ledger.knowledge("m-1-7") is Knowledge.ABORTED


def test_nothing_else_about_an_unknown_transaction_is_noted(bench):
    for entry in (Ended(gid="m-1-7"), ContradictionSeen(gid="m-1-7", branch="a", state="aborted")):
        assert bench.verdict(entry) is Verdict.UNCHANGED
    # An abort of another epoch is presumed already, or not for this leader to say.
    for gid in ("m-0-7", "m-2-7"):
        assert bench.verdict(Decided(gid=gid, decision=Decision.ABORT)) is Verdict.UNCHANGED
    assert len(bench.ledger) == 0


def test_ended_transactions_are_packed_and_come_back_equal(bench):
    votes = (
        BranchVote(branch="a", vote=VoteKind.PREPARED, result=b'{"n":1}'),
        BranchVote(branch="b", vote=VoteKind.REFUSED, reason="sold out", retryable=True),
    )
    bench.do(begun("m-1-1", key="k", body_hash=b"h"), at=1)
    bench.do(Decided(gid="m-1-1", decision=Decision.ABORT, reason="b refused", retryable=True, votes=votes), at=2)
    (seen,) = bench.do(ContradictionSeen(gid="m-1-1", branch="a", state="committed"), at=3)
    (ended,) = bench.do(Ended(gid="m-1-1"), at=4)
    assert ended.txn is not None
    assert seen.txn is not None
    assert bench.ledger.unfinished == {}
    assert bench.ledger.get("m-1-1") == ended.txn
    assert check_delta(seen.txn, bench.ledger.get("m-1-1")) == []


# ------------------------------------------------------------------------------------------------ outcomes


def _decided_rows(ledger_bench):
    ledger_bench.commit("m-1-1")
    ledger_bench.commit("m-1-2", end=False)
    ledger_bench.do(begun("m-1-3"), Decided(gid="m-1-3", decision=Decision.ABORT))
    ledger_bench.do(begun("m-1-4"))


@pytest.mark.parametrize(
    ("gid", "today", "after_the_next_takes_over"),
    [
        ("m-1-1", Knowledge.COMMITTED, Knowledge.COMMITTED),
        ("m-1-2", Knowledge.COMMITTED, Knowledge.COMMITTED),
        ("m-1-3", Knowledge.ABORTED, Knowledge.ABORTED),
        ("m-1-4", Knowledge.UNDECIDED, Knowledge.UNDECIDED),
        ("m-1-0", Knowledge.ABORTED, Knowledge.ABORTED),
        ("m-0-9", Knowledge.ABORTED, Knowledge.ABORTED),
        ("m-1-5", Knowledge.ASK_LEADER, Knowledge.ABORTED),
        ("m-2-1", Knowledge.ASK_LEADER, Knowledge.ASK_LEADER),
        ("m-3-1", Knowledge.ASK_LEADER, Knowledge.ASK_LEADER),
        ("other-1-1", Knowledge.FOREIGN, Knowledge.FOREIGN),
        ("nonsense", Knowledge.FOREIGN, Knowledge.FOREIGN),
    ],
)
def test_what_a_ledger_can_say_of_an_outcome(bench, gid, today, after_the_next_takes_over):
    _decided_rows(bench)
    assert bench.ledger.knowledge(gid) is today
    bench.take_over(2, "n2")
    assert bench.ledger.knowledge(gid) is after_the_next_takes_over


def test_at_or_below_the_floor_what_is_not_there_is_forgotten_and_never_aborted(bench):
    _decided_rows(bench)
    bench.do(Forgotten(floor=number("m-1-1"), before=0))
    bench.take_over(2, "n2")
    assert bench.ledger.knowledge("m-1-1") is Knowledge.FORGOTTEN
    assert bench.ledger.knowledge("m-1-0") is Knowledge.FORGOTTEN
    assert bench.ledger.knowledge("m-0-9") is Knowledge.FORGOTTEN
    assert bench.ledger.knowledge("m-1-5") is Knowledge.ABORTED


# ------------------------------------------------------------------------------------------------ forgetting


def test_only_what_has_ended_early_enough_is_forgotten(bench):
    bench.commit("m-1-1", at=1)
    bench.commit("m-1-2", at=1, end=False)
    bench.commit("m-1-3", at=5)
    bench.commit("m-1-4", at=1)
    assert bench.verdict(Forgotten(floor=number("m-1-3"), before=4)) is Verdict.APPLIED
    assert [bench.ledger.get(f"m-1-{n}") is not None for n in (1, 2, 3, 4)] == [False, True, True, True]
    assert bench.ledger.knowledge("m-1-2") is Knowledge.COMMITTED, "below the floor, and still known"


def test_the_floor_never_falls(bench):
    bench.do(Forgotten(floor=9, before=0))
    bench.do(Forgotten(floor=8, before=0))
    assert bench.ledger.floor == 9


def test_nothing_begins_at_or_below_the_floor(bench):
    bench.do(Forgotten(floor=number("m-1-5"), before=0))
    for gid in ("m-1-4", "m-1-5"):
        assert bench.verdict(begun(gid)) is Verdict.UNCHANGED
        assert bench.verdict(Decided(gid=gid, decision=Decision.ABORT)) is Verdict.UNCHANGED
        assert bench.verdict(decision(gid, Decision.COMMIT)) is Verdict.UNCHANGED
        assert bench.ledger.knowledge(gid) is Knowledge.FORGOTTEN
    assert bench.verdict(begun("m-1-6")) is Verdict.APPLIED


def test_what_may_be_forgotten_comes_oldest_first_and_stops_where_something_has_to_stay(bench):
    for sequence, at in ((1, 1), (3, 2), (4, 9), (5, 1)):
        bench.commit(f"m-1-{sequence}", at=at)
    bench.do(begun("m-1-6"))
    assert list(bench.ledger.forgettable(5)) == [(number("m-1-1"), 1), (number("m-1-3"), 2)]
    assert [n for n, _ in bench.ledger.forgettable(5, number("m-1-5"))] == [
        number(gid) for gid in ("m-1-1", "m-1-3", "m-1-5")
    ]


# ------------------------------------------------------------------------------------------------ participants


def test_a_participant_can_move(bench):
    bench.do(Registered(name="a", url="http://new", batch=False))
    assert bench.ledger.participants["a"].url == "http://new"


def test_a_participant_is_given_up_only_when_nothing_unfinished_names_it(bench):
    bench.do(begun("m-1-1", "a"))
    (applied,) = bench.do(Unregistered(name="a"))
    assert (applied.verdict, applied.detail) == (Verdict.IN_USE, "m-1-1")
    assert bench.verdict(Unregistered(name="b")) is Verdict.APPLIED
    assert bench.verdict(Unregistered(name="b")) is Verdict.UNCHANGED
    bench.do(Decided(gid="m-1-1", decision=Decision.ABORT), Ended(gid="m-1-1"))
    assert bench.verdict(Unregistered(name="a")) is Verdict.APPLIED


# ------------------------------------------------------------------------------------------------ pages


def pages(ledger, **kwargs):
    after, gids = None, []
    for _ in range(100):
        found, after = ledger.page(after=after, **kwargs)
        gids.append([txn.gid for txn in found])
        if after is None:
            return gids
    raise AssertionError("the pages do not end")


def test_pages_show_everything_once_newest_first(bench):
    for sequence in range(5):
        bench.commit(f"m-1-{sequence}", end=sequence % 2 == 0)
    assert pages(bench.ledger, state=None, limit=2, scan=100)[:2] == [["m-1-4", "m-1-3"], ["m-1-2", "m-1-1"]]
    flat = [gid for page in pages(bench.ledger, state=None, limit=3, scan=1) for gid in page]
    assert flat == [f"m-1-{n}" for n in (4, 3, 2, 1, 0)], "a short scan makes more pages, not other ones"


@pytest.mark.parametrize(
    ("state", "gids"),
    [
        (State.COMMITTED, ["m-1-1"]),
        (State.COMMITTING, ["m-1-2"]),
        (State.ABORTING, ["m-1-3"]),
        (State.PREPARING, ["m-1-4"]),
        (State.ABORTED, []),
    ],
)
def test_pages_of_one_state(bench, state, gids):
    _decided_rows(bench)
    assert [gid for page in pages(bench.ledger, state=state, limit=1, scan=100) for gid in page] == gids


@ANY
@given(
    dates=st.lists(
        st.tuples(*[st.integers(-(2**63), 2**64 - 1) | st.integers(-200, 200)] * 3, st.sampled_from(Decision)),
        max_size=8,
    )
)
def test_the_state_of_what_has_ended_is_seen_without_unpacking_it(dates):
    bench = Bench()
    for n, (began_at, decided_at, ended_at, which) in enumerate(dates):
        gid = f"m-1-{n}"
        bench.do(begun(gid), at=began_at)
        bench.do(decision(gid, which), at=decided_at)
        bench.do(Ended(gid=gid), at=ended_at)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("coordinator.ledger.unpack", lambda _cluster, number, _packed: number)
        for which, state in ((Decision.COMMIT, State.COMMITTED), (Decision.ABORT, State.ABORTED)):
            found, _ = bench.ledger.page(state=state, after=None, limit=100, scan=100)
            wanted = [number(f"m-1-{n}") for n, (*_, decided) in enumerate(dates) if decided is which]
            assert found == wanted[::-1]


# ------------------------------------------------------------------------------------------------ snapshots


def test_a_snapshot_is_of_the_moment_it_was_taken(bench):
    _decided_rows(bench)
    frozen, then = bench.ledger.snapshot(), everything(bench.ledger)
    bench.do(Ended(gid="m-1-2"), begun("m-1-9"), Unregistered(name="b"))
    bench.take_over(2, "n2")
    copy = Ledger("m")
    copy.restore(frozen())()
    assert everything(copy) == then


@pytest.mark.parametrize(
    "plain",
    [
        [],
        [None],
        [7],
        [[]],
        [[0, 2, "m", 0, None, -1, [], 0]],
        [["2", 2, "m", 0, None, -1, [], 0]],
        [[1, 2, "m", 0, None, -1, [], 0]],
        [[2, 1, "m", 0, None, -1, [], 0]],
        [[2, "m", 0, None, -1, [], 0]],
        *(
            [[*version, *head], *rest]
            for version in ([1], [STATE_VERSION, NEWEST])
            for head, *rest in (
                [["other", 0, None, -1, [], 0]],
                [["m", "0", None, -1, [], 0]],
                [["m", 0, None, None, [], 0]],
                [["m", 0, None, -1, 1, 0]],
                [["m", 0, None, -1, [[1]], 0]],
                [["m", 0, None, -1, [], 1]],
                [["m", 0, None, -1, [], "0"]],
                [["m", 0, None, -1, [], 1], 7],
                [["m", 0, None, -1, [], 1], [[1]]],
                [["m", 0, None, -1, [], 1], [["1", b""]]],
                [["m", 0, None, -1, [], 1], [[1, b""]]],
                [["m", 0, None, -1, [], 1], [[1, msgpack.packb([1] * 10)]]],
                [["m", 0, None, -1, [], 1], [[1, [3, "a", "http://a", False]]]],
                [["m", 0, None, -1, [], 1], [[1, DEEP]]],
            )
        ),
    ],
    ids=lambda plain: reprlib.repr(plain)[:60],
)
def test_what_is_no_state_is_refused_before_anything_has_changed(bench, plain):
    before = everything(bench.ledger)
    with pytest.raises(Malformed):
        bench.ledger.restore([msgpack.packb(piece) for piece in plain])
    assert everything(bench.ledger) == before


# ------------------------------------------------------------------------------------------------ any commands at all

NAMES = st.sampled_from(["a", "b", "c"])
GIDS = st.sampled_from(["m-0-1", *(f"m-{epoch}-{n}" for epoch in (1, 2) for n in (1, 2, 3)), "x-1-1", "?"])
FLOORS = GIDS.map(lambda gid: number(gid) if gid != "?" else 0)
TIMES = st.integers(0, 6)
TEXTS = st.none() | st.sampled_from(["", "x", "é"])
BYTES = st.none() | st.sampled_from([b"", b"1"])
STATES = st.sampled_from(["aborted", "committed", "unknown"])
PLANS = st.lists(
    st.builds(BranchPlan, name=NAMES, participant=NAMES, payload=st.just(b"1")), max_size=3, unique_by=lambda p: p.name
)
VOTES = st.builds(
    BranchVote,
    branch=NAMES,
    vote=st.sampled_from(VoteKind),
    reason=TEXTS,
    retryable=st.booleans(),
    result=BYTES,
)
BEGINNINGS = st.builds(
    Begun,
    gid=GIDS,
    protocol=st.just("2pc"),
    branches=PLANS.map(tuple),
    timeout_ms=TIMES,
    key=st.none() | st.sampled_from(["k", "l"]),
    body_hash=BYTES,
)
OPENINGS = st.builds(
    Opened,
    gid=GIDS,
    protocol=st.just("2pc"),
    timeout_ms=TIMES,
    key=st.none() | st.sampled_from(["k", "l"]),
    body_hash=BYTES,
)
DECISIONS = st.builds(
    Decided,
    gid=GIDS,
    decision=st.sampled_from(Decision),
    reason=TEXTS,
    retryable=st.booleans(),
    votes=st.lists(VOTES, max_size=4).map(tuple),
)
ENTRY = st.one_of(
    st.builds(TookOver, node=st.sampled_from(["n1", "n2"])),
    BEGINNINGS,
    BEGINNINGS,
    DECISIONS,
    DECISIONS,
    st.builds(ContradictionSeen, gid=GIDS, branch=NAMES, state=STATES),
    st.builds(Ended, gid=GIDS),
    st.builds(Registered, name=NAMES, url=st.just("http://p"), batch=st.booleans()),
    st.builds(Unregistered, name=NAMES),
    st.builds(Forgotten, floor=FLOORS, before=TIMES),
    st.builds(Raised, level=st.integers(-1, NEWEST)),
    OPENINGS,
    st.builds(Enlisted, gid=GIDS, branch=NAMES, participant=NAMES),
    st.builds(Sealed, gid=GIDS, branches=st.lists(NAMES, max_size=2, unique=True).map(tuple)),
)
HEADERS = st.builds(Header, epoch=st.sampled_from([1, 1, 1, 2, 0]), at=TIMES)


def _life(gid, names, kinds):
    """Entries of one transaction that follow from each other, as chance alone hardly ever puts them together."""
    votes = tuple(BranchVote(branch=name, vote=VoteKind.PREPARED) for name in names)
    life = {
        "begun": [Begun(gid=gid, protocol="2pc", branches=begun(gid, *names).branches, timeout_ms=1)],
        "opened": [Opened(gid=gid, protocol="2pc", timeout_ms=1)],
        "enlisted": [Enlisted(gid=gid, branch=name, participant=name) for name in names],
        "sealed": [Sealed(gid=gid, branches=tuple(names))],
        "commit": [Decided(gid=gid, decision=Decision.COMMIT, votes=votes)],
        "abort": [Decided(gid=gid, decision=Decision.ABORT)],
        "ended": [Ended(gid=gid)],
    }
    return [entry for kind in kinds for entry in life[kind]]


LIVES = st.builds(
    _life,
    st.sampled_from(["m-1-1", "m-1-2", "m-2-1"]),
    st.lists(st.sampled_from(["a", "b"]), min_size=1, unique=True),
    st.sampled_from(
        [
            ("begun", "commit", "ended"),
            ("begun", "abort", "ended"),
            ("opened", "enlisted", "sealed", "commit", "ended"),
            ("opened", "enlisted", "abort", "sealed", "ended"),
            ("opened", "enlisted", "sealed", "enlisted"),
            ("opened", "sealed", "commit"),
            ("enlisted", "sealed"),
            ("commit", "ended"),
        ]
    ).flatmap(lambda kinds: st.integers(1, len(kinds)).map(lambda count: kinds[:count])),
)
COMMANDS = st.builds(encode_command, HEADERS, st.lists(ENTRY, min_size=1, max_size=4) | LIVES)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 12) | st.sampled_from(["m-1-1", "a", "2pc", "commit"]) | st.just(b"1"),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=12,
)
DAMAGED = st.builds(
    lambda command, at, byte: command[: at % len(command)] + bytes([byte]) + command[at % len(command) + 1 :],
    COMMANDS,
    st.integers(0, 1000),
    st.integers(0, 255),
)
LOOKALIKES = st.builds(
    lambda epoch, at, items: msgpack.packb([COMMAND_VERSION, epoch, at, items]), PLAIN, PLAIN, st.lists(PLAIN)
)
WELL_FORMED_LOGS = st.lists(COMMANDS, max_size=12)
LOGS = st.lists(st.one_of(COMMANDS, COMMANDS, COMMANDS, DAMAGED, LOOKALIKES, st.binary(max_size=40)), max_size=12)


def prepared_ledger():
    return Bench().ledger


def apply(ledger, command):
    """What it did; the words of a refusal, of what newer software may have written."""
    before = ledger.fork()
    try:
        return ledger.apply(command)
    except NeedsNewer as refusal:
        assert everything(ledger) == everything(before)
        return str(refusal)


@ANY
@given(LOGS)
def test_no_bytes_make_it_raise_anything_else_and_equal_logs_make_equal_ledgers(log):
    one, two = prepared_ledger(), prepared_ledger()
    for command in log:
        verdicts = apply(one, command)
        assert isinstance(verdicts, str) or all(isinstance(applied, Applied) for applied in verdicts)
        assert apply(two, command) == verdicts
    assert everything(one) == everything(two)


@ANY
@given(LOGS, LOGS)
def test_a_restored_ledger_is_the_same_and_goes_on_in_the_same_way(log, rest):
    one, two = prepared_ledger(), Ledger("m")
    for command in log:
        apply(one, command)
    two.restore(one.snapshot()())()
    assert everything(one) == everything(two)
    for command in rest:
        assert apply(one, command) == apply(two, command)
    assert everything(one) == everything(two)


@ANY
@given(LOGS, LOGS)
def test_a_fork_goes_its_own_way(log, rest):
    one = prepared_ledger()
    for command in log:
        apply(one, command)
    before = everything(one)
    fork = one.fork()
    assert everything(fork) == before
    for command in rest:
        apply(fork, command)
    assert everything(one) == before


@ANY
@given(WELL_FORMED_LOGS)
def test_every_step_keeps_the_invariants(log):
    ledger = prepared_ledger()
    for command in log:
        header, entries = decode_command(command)
        for entry in entries:
            gid = getattr(entry, "gid", None)
            before = ledger.get(gid) if gid is not None else None
            epoch, floor, level = ledger.epoch, ledger.floor, ledger.level
            (applied,) = ledger.apply(encode_command(header, [entry]))
            after = ledger.get(gid) if gid is not None else None
            assert check_delta(before, after) == []
            assert after is None or check(after) == []
            assert after is None or check_owed(after, PROTOCOLS[after.protocol].owed(after)) == []
            assert ledger.epoch >= epoch
            assert ledger.floor >= floor
            assert ledger.level >= level
            assert applied.verdict is Verdict.APPLIED or after == before
            if applied.verdict is Verdict.APPLIED and gid is not None:
                assert applied.txn == after, "packed and unpacked it is the same"
        assert list(ledger._table) == sorted(ledger._table)
        assert {n for n, row in ledger._table.items() if row is None} == set(ledger.unfinished)
        keyed = [txn for txn in map(ledger._at, ledger._table) if txn is not None and txn.key is not None]
        assert len(ledger.keys) == len(keyed)
        for txn in keyed:
            assert ledger.keys.get(txn.key) == number(txn.gid)
            assert ledger.holder(txn.key) == txn


@ANY
@given(LOGS)
def test_an_outcome_once_told_is_never_told_differently(log):
    ledger = prepared_ledger()
    gids = ["m-0-1", *(f"m-{epoch}-{n}" for epoch in (1, 2) for n in (1, 2, 3))]
    for command in log:
        before = {gid: ledger.knowledge(gid) for gid in gids}
        apply(ledger, command)
        for gid, old in before.items():
            new = ledger.knowledge(gid)
            match old:
                case Knowledge.COMMITTED | Knowledge.ABORTED:
                    assert new in (old, Knowledge.FORGOTTEN)
                case Knowledge.FORGOTTEN:
                    assert new is Knowledge.FORGOTTEN
                case Knowledge.UNDECIDED:
                    assert new is not Knowledge.ASK_LEADER
                case _:
                    pass


@ANY
@given(st.binary(max_size=60) | PLAIN.map(msgpack.packb))
def test_no_bytes_make_restoring_raise_anything_else(state):
    ledger = prepared_ledger()
    before = everything(ledger)
    with pytest.raises((Malformed, NeedsNewer)):
        ledger.restore([state])
    assert everything(ledger) == before
