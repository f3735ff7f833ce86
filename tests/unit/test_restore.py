"""A copy through the log: the same on every replica, all of it or nothing; and what is said of what it has lost."""

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import packed
from coordinator.commands import encode_command
from coordinator.copies import NO_DIGEST, chained, cut
from coordinator.facts import Knowledge, Verdict
from coordinator.ledger import Ledger
from coordinator.lost import EPOCH_MARGIN, EPOCH_MAX, base_above
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    CopyInstalled,
    CopyPiece,
    Decided,
    Ended,
    Forgotten,
    Header,
    LostRangeNoted,
    Raised,
    Reconciled,
    Registered,
    TookOver,
)
from coordinator.protocol.invariants import check
from coordinator.protocol.messages import Gid
from coordinator.protocol.transaction import Decision, Transaction, VoteKind
from coordinator.states import RECORDS

unpackb = msgpack.unpackb
QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=60)
BASE = 200_000


def do(ledger, *entries, epoch=None, at=5):
    header = Header(epoch=ledger.epoch if epoch is None else epoch, at=at)
    return [applied.verdict for applied in ledger.apply(encode_command(header, list(entries)))]


def new(participants=("a", "b"), epoch=1):
    ledger = Ledger("m")
    do(ledger, TookOver(node="n1"), Raised(level=2), epoch=epoch)
    do(ledger, *(Registered(name=name, url=f"http://{name}") for name in participants))
    return ledger


def begun(gid, key=None):
    plans = tuple(BranchPlan(name=name, participant=name, payload=b"1") for name in ("a", "b"))
    return Begun(gid=gid, protocol="2pc", branches=plans, timeout_ms=50, key=key, body_hash=b"h")


def decided(gid, decision=Decision.COMMIT):
    return Decided(gid=gid, decision=decision, votes=votes())


def votes(*names):
    return tuple(BranchVote(branch=name, vote=VoteKind.PREPARED) for name in names or ("a", "b"))


def plans(*names):
    return tuple(BranchPlan(name=name, participant=name, payload=b"") for name in names)


def lived(seed, count=60):
    """A ledger with a history: some undecided, some unfinished, some forgotten, of several epochs."""
    rng = random.Random(seed)
    ledger = new()
    sequence = 0
    for at in range(count):
        if rng.random() < 0.1:
            do(ledger, TookOver(node="n2"), epoch=ledger.epoch + rng.randrange(1, 4))
            sequence = 0
        gid = f"m-{ledger.epoch}-{sequence}"
        sequence += rng.randrange(1, 3)
        fate = rng.random()
        do(ledger, begun(gid, key=f"k{at}" if rng.random() < 0.7 else None), at=at)
        if fate < 0.9:
            do(ledger, decided(gid, rng.choice(list(Decision))), at=at)
        if fate < 0.7:
            do(ledger, Ended(gid=gid), at=at)
        if rng.random() < 0.05:
            newest = ledger.newest()
            do(ledger, Forgotten(floor=newest.number, before=at - 10), at=at)
    return ledger


def pieces_of(ledger, most=300):
    return list(cut(ledger.snapshot()(), most))


def entries_of(pieces, base=BASE, restore="r"):
    digest = NO_DIGEST
    for piece in pieces:
        digest = chained(digest, piece)
    found = [CopyPiece(restore=restore, index=i, data=piece) for i, piece in enumerate(pieces)]
    return [*found, CopyInstalled(restore=restore, pieces=len(pieces), digest=digest, epoch_base=base)]


def restored(source, **more):
    ledger = new(participants=())
    assert set(do(ledger, *entries_of(pieces_of(source), **more))) == {Verdict.APPLIED}
    return ledger


def test_a_row_of_a_copy_is_unpacked_once(monkeypatch):
    """Every node's event loop waits for it."""
    source = lived(1)
    pieces = list(source.snapshot()())
    unpacked = []
    monkeypatch.setattr(packed.msgpack, "unpackb", lambda data: unpacked.append(data) or unpackb(data))
    copy = Ledger("m", understands=2)
    for piece in pieces:
        copy.feed(piece, foreign=True)
    rows = [row for row in unpacked if row not in pieces]
    assert len(rows) == len(copy) - len(copy.unfinished) > 0


def everything(ledger):
    return (
        ledger.level,
        ledger.epoch,
        ledger.epoch_base,
        ledger.leader,
        ledger.floor,
        ledger.lost,
        ledger.staged is None or (ledger.staged.count, ledger.staged.digest, everything(ledger.staged.ledger)),
        dict(ledger.participants),
        ledger.keys,
        dict(ledger.unfinished),
        list(ledger._table.items()),
        b"".join(ledger.snapshot()()),
    )


def reborn(ledger):
    """The same, from its snapshot."""
    other = Ledger("m")
    other.restore(list(ledger.snapshot()()))()
    return other


# ------------------------------------------------------------------------------------------------ all or nothing


@QUICK
@given(st.integers(0, 10_000), st.integers(50, 2000), st.integers(0, 60))
def test_replicas_agree_whoever_began_from_a_snapshot_midway(seed, most, moment):
    source = lived(seed)
    entries = entries_of(pieces_of(source, most))
    one, other = new(participants=()), new(participants=())
    for number, entry in enumerate(entries):
        assert do(one, entry) == do(other, entry) == [Verdict.APPLIED]
        if number == moment % len(entries):
            other = reborn(other)
        assert one.lost is None or number == len(entries) - 1
    assert everything(one) == everything(other) == everything(reborn(other))
    assert one.fork().knowledge("m-9-9") is one.knowledge("m-9-9")
    assert dict(one.unfinished) == dict(source.unfinished)
    assert list(one._table.items()) == list(source._table.items())
    assert one.keys == source.keys
    assert one.participants == source.participants


@QUICK
@given(st.integers(0, 10_000), st.sampled_from(["lost", "twice", "swapped", "damaged", "other", "short", "led"]))
def test_what_is_not_whole_changes_nothing(seed, what):
    rng = random.Random(seed)
    entries = entries_of(pieces_of(lived(seed), 200))
    at = rng.randrange(1, len(entries) - 2)
    ledger = new(participants=())
    untouched = everything(ledger)
    match what:
        case "lost":
            del entries[at]
        case "twice":
            entries.insert(at, entries[at])
        case "swapped":
            entries[at], entries[at + 1] = entries[at + 1], entries[at]
        case "damaged":
            data = bytearray(entries[at].data)
            data[rng.randrange(len(data))] ^= 1
            entries[at] = CopyPiece(restore="r", index=entries[at].index, data=bytes(data))
        case "other":
            entries[at] = CopyPiece(restore="s", index=at, data=entries[at].data)
        case "short":
            del entries[at:-1]
    for number, entry in enumerate(entries):
        if what == "led" and number == at:
            do(ledger, TookOver(node="n2"), epoch=ledger.epoch + 1)
            untouched = everything(new_led_by_n2())
        verdicts = do(ledger, entry)
    assert verdicts != [Verdict.APPLIED]
    assert ledger.lost is None
    assert ledger.epoch_base == 0
    assert len(ledger) == 0
    assert ledger.staged is None
    assert everything(ledger) == untouched
    assert set(do(ledger, *entries_of(pieces_of(lived(seed)), restore="again"))) == {Verdict.APPLIED}


def new_led_by_n2():
    ledger = new(participants=())
    do(ledger, TookOver(node="n2"), epoch=ledger.epoch + 1)
    return ledger


def test_a_copy_never_takes_the_place_of_anything():
    for spoil in (
        lambda ledger: do(ledger, begun("m-1-1")),
        lambda ledger: do(
            ledger, begun("m-1-1"), decided("m-1-1"), Ended(gid="m-1-1"), Forgotten(floor=1 << 50, before=9)
        ),
    ):
        ledger = new()
        spoil(ledger)
        before = everything(ledger)
        assert do(ledger, *entries_of(pieces_of(lived(1))))[-1] is Verdict.UNCHANGED
        assert everything(ledger) == before
    ledger = restored(lived(1))
    before = everything(ledger)
    assert do(ledger, *entries_of(pieces_of(lived(2)), base=400_000))[-1] is Verdict.UNCHANGED
    assert everything(ledger) == before


def test_a_base_must_be_above_the_copy_s_epochs():
    source = lived(3)
    for base in (0, source.epoch, EPOCH_MAX - EPOCH_MARGIN + 1):
        ledger = new(participants=())
        assert do(ledger, *entries_of(pieces_of(source), base=base))[-1] is Verdict.MALFORMED
        assert ledger.is_fresh
    assert base_above(3, 100) == 100 + EPOCH_MARGIN
    assert base_above(EPOCH_MAX - 2 * EPOCH_MARGIN) == EPOCH_MAX - EPOCH_MARGIN
    assert base_above(EPOCH_MAX - 2 * EPOCH_MARGIN + 1) is None


def test_who_has_moved_before_the_restore_stays_where_it_is():
    source, ledger = new(), new(participants=())
    do(source, begun("m-1-1"))
    do(ledger, Registered(name="b", url="http://elsewhere"), Registered(name="c", url="http://c"))
    do(ledger, *entries_of(pieces_of(source)))
    assert {name: each.url for name, each in ledger.participants.items()} == {
        "a": "http://a",
        "b": "http://elsewhere",
        "c": "http://c",
    }


# ------------------------------------------------------------------------------------------------ what is known


def test_nothing_is_presumed_of_what_was_lost():
    source = new()
    do(source, begun("m-1-1"), decided("m-1-1"), Ended(gid="m-1-1"), begun("m-1-5"), decided("m-1-5"))
    ledger = restored(source)
    do(ledger, TookOver(node="n1"), epoch=BASE + 1)
    for gid, known in {
        "m-1-1": Knowledge.COMMITTED,
        "m-1-4": Knowledge.ABORTED,
        "m-1-5": Knowledge.COMMITTED,
        "m-1-6": Knowledge.LOST,
        "m-7-0": Knowledge.LOST,
        f"m-{BASE}-7": Knowledge.LOST,
        f"m-{BASE + 1}-7": Knowledge.ASK_LEADER,
    }.items():
        assert ledger.knowledge(gid) is known, gid
    assert do(ledger, begun(f"m-{BASE + 1}-0")) == [Verdict.APPLIED]
    for gid in ("m-1-6", f"m-{BASE}-7"):
        assert do(ledger, begun(gid)) == [Verdict.FENCED]
        assert do(ledger, Decided(gid=gid, decision=Decision.ABORT)) == [Verdict.UNCHANGED]
        assert do(ledger, decided(gid)) == [Verdict.UNCHANGED]
    # An older leader's entries, from before the restore, are fenced as ever.
    assert do(ledger, begun("m-1-9"), epoch=1) == [Verdict.FENCED]
    assert do(ledger, LostRangeNoted(closed=True)) == [Verdict.APPLIED]
    for gid in ("m-1-6", "m-7-0", f"m-{BASE}-7"):
        assert ledger.knowledge(gid) is Knowledge.FORGOTTEN, "never aborted: it may have been committed"
    assert ledger.knowledge("m-1-5") is Knowledge.COMMITTED
    assert do(ledger, begun(f"m-{BASE + 1}-1")) == [Verdict.APPLIED]


def test_what_participants_tell_is_logged_once_and_then_true():
    ledger = restored(lived(4))
    do(ledger, TookOver(node="n1"), epoch=BASE + 1)
    do(ledger, begun(f"m-{BASE + 1}-0"))
    gid, other = "m-500-3", "m-400-9"
    commit = Reconciled(gid=gid, decision=Decision.COMMIT, branches=plans("a"), votes=votes("a"))
    abort = Reconciled(gid=other, decision=Decision.ABORT, branches=plans("b"), votes=votes("b"))
    assert do(ledger, commit, abort) == [Verdict.APPLIED] * 2
    assert (ledger.knowledge(gid), ledger.knowledge(other)) == (Knowledge.COMMITTED, Knowledge.ABORTED)
    against = Reconciled(gid=gid, decision=Decision.ABORT, branches=plans("a"), votes=votes("a"))
    assert do(ledger, against) == [Verdict.UNCHANGED]
    for found in (gid, other):
        txn = ledger.get(found)
        assert txn is not None
        assert check(txn) == []
        assert txn.ended_at is None
    numbers = list(ledger._table)
    assert numbers == sorted(numbers)
    assert list(ledger.unfinished) == sorted(ledger.unfinished)
    assert everything(reborn(ledger)) == everything(ledger)
    assert do(ledger, Ended(gid=gid), Ended(gid=other)) == [Verdict.APPLIED] * 2
    assert everything(reborn(ledger)) == everything(ledger)


@pytest.mark.parametrize(
    ("entry", "verdict"),
    [
        (Reconciled(gid="m-500-3"), Verdict.MALFORMED),
        (Reconciled(gid="m-500-3", decision=Decision.COMMIT), Verdict.MALFORMED),
        (Reconciled(gid="m-500-3", decision=Decision.COMMIT, branches=plans("a")), Verdict.MALFORMED),
        (
            Reconciled(gid="m-500-3", decision=Decision.COMMIT, branches=plans("a", "a"), votes=votes("a")),
            Verdict.MALFORMED,
        ),
        (
            Reconciled(gid="m-500-3", decision=Decision.COMMIT, branches=plans("z"), votes=votes("z")),
            Verdict.UNKNOWN_PARTICIPANT,
        ),
        (
            Reconciled(gid=f"m-{BASE + 1}-3", decision=Decision.COMMIT, branches=plans("a"), votes=votes("a")),
            Verdict.UNCHANGED,
        ),
        (Reconciled(gid="x-1-1", decision=Decision.ABORT, branches=plans("a"), votes=votes("a")), Verdict.UNCHANGED),
    ],
)
def test_what_cannot_be_told(entry, verdict):
    ledger = restored(lived(5))
    do(ledger, TookOver(node="n1"), epoch=BASE + 1)
    before = everything(ledger)
    assert do(ledger, entry) == [verdict]
    assert everything(ledger) == before
    assert do(new(), entry) == [Verdict.UNCHANGED], "nothing is lost there"


def test_what_the_copy_holds_undecided():
    source = new()
    for number in range(4):
        do(source, begun(f"m-1-{number}", key=f"k{number}"))
    do(source, decided("m-1-1"))
    ledger = restored(source)
    do(ledger, TookOver(node="n1"), epoch=BASE + 1)
    assert ledger.lost.low == Gid("m", 1, 0).number, "what may have been decided is part of it"
    assert do(ledger, LostRangeNoted(closed=True)) == [Verdict.UNCHANGED], "something is undecided"
    assert do(ledger, Reconciled(gid="m-1-0", decision=Decision.COMMIT, votes=votes("a"))) == [Verdict.UNCHANGED]
    assert do(
        ledger,
        Reconciled(gid="m-1-0", decision=Decision.COMMIT, votes=votes()),
        Reconciled(gid="m-1-1", decision=Decision.ABORT),
        Reconciled(gid="m-1-2", decision=Decision.ABORT, reason="told"),
        Reconciled(gid="m-1-3"),
    ) == [Verdict.APPLIED, Verdict.UNCHANGED, Verdict.APPLIED, Verdict.APPLIED]
    assert [ledger.knowledge(f"m-1-{number}") for number in range(4)] == [
        Knowledge.COMMITTED,
        Knowledge.COMMITTED,
        Knowledge.ABORTED,
        Knowledge.LOST,
    ]
    assert ledger.holder("k3") is None
    assert ledger.holder("k2").decision is Decision.ABORT
    assert everything(reborn(ledger)) == everything(ledger)
    assert do(ledger, LostRangeNoted(closed=True)) == [Verdict.APPLIED]
    assert ledger.knowledge("m-1-3") is Knowledge.FORGOTTEN


def test_a_copy_of_a_cluster_that_is_still_finding_out():
    first = restored(lived(6))
    do(first, TookOver(node="n1"), epoch=BASE + 1)
    do(first, begun(f"m-{BASE + 1}-0"), decided(f"m-{BASE + 1}-0"), LostRangeNoted(without="a"))
    second = restored(first, base=BASE + 200_000)
    assert second.lost.low == first.lost.low
    assert second.lost.high > first.lost.high
    assert second.lost.without == ()
    assert second.knowledge("m-500-1") is Knowledge.LOST


def test_rows_that_come_late_are_in_order_for_those_who_page():
    ledger = restored(new())
    do(ledger, TookOver(node="n1"), epoch=BASE + 1)
    do(ledger, *(begun(f"m-{BASE + 1}-{n}") for n in range(3)))
    for epoch in (900, 30, 70_000):
        gid = f"m-{epoch}-1"
        do(ledger, Reconciled(gid=gid, decision=Decision.ABORT, branches=plans("a"), votes=votes("a")))
    shown = []
    after = None
    for _ in range(10):
        page, after = ledger.page(state=None, after=after, limit=2, scan=100)
        shown += [txn.gid for txn in page]
        if after is None:
            break
    assert shown == [f"m-{BASE + 1}-{n}" for n in (2, 1, 0)] + ["m-70000-1", "m-900-1", "m-30-1"]


def test_below_the_floor_of_a_restore_what_has_ended_is_forgotten_in_pieces():
    source = new()
    for number in range(9):
        gid = f"m-1-{number}"
        do(source, begun(gid, key=f"k{number}"), decided(gid), Ended(gid=gid))
    ledger = restored(source)
    do(ledger, TookOver(node="n1"), epoch=BASE + 1)
    do(ledger, LostRangeNoted(closed=True))
    floor = ledger.floor
    assert floor >= Gid("m", 1, 8).number
    assert do(ledger, Forgotten(floor=Gid("m", 1, 2).number, before=9)) == [Verdict.APPLIED]
    assert (len(ledger), ledger.floor) == (6, floor)
    assert ledger.holder("k2") is None
    assert ledger.holder("k3") is not None
    assert ledger.knowledge("m-1-2") is Knowledge.FORGOTTEN


_FIRST = Gid("m", 1, 0).number


def _head(epoch=1, floor=-1, leader="n1", count=1):
    return msgpack.packb([2, 2, "m", epoch, leader, floor, [], count])


def _row(*fields, number=_FIRST):
    return msgpack.packb([[number, msgpack.packb(list(fields))]])


_FIELDS = (1, 0, 0, 0, 1, "2pc", None, "k", b"", [["a", 1]])


def _unfinished(number=_FIRST, **fields):
    told = {"gid": "m-1-0", "protocol": "2pc", "epoch": 1, "branches": (), "timeout_ms": 1, "started_at": 0} | fields
    return msgpack.packb([[number, RECORDS.to_plain(Transaction(**told))]])


def _put_in(*pieces):
    """What becomes of a copy that somebody has made up, and of a cluster that goes on from it."""
    ledger = new(participants=("a",))
    digest = NO_DIGEST
    found = set()
    for index, piece in enumerate(pieces):
        found |= set(do(ledger, CopyPiece(restore="r", index=index, data=piece)))
        digest = chained(digest, piece)
    found |= set(do(ledger, CopyInstalled(restore="r", pieces=len(pieces), digest=digest, epoch_base=BASE)))
    do(ledger, TookOver(node="n1"), epoch=BASE + 1)
    plan = BranchPlan(name="a", participant="a", payload=b"1")
    do(ledger, Begun(gid=f"m-{BASE + 1}-0", protocol="2pc", branches=(plan,), timeout_ms=1, key="k", body_hash=b"h"))
    ledger.page(state=None, after=None, limit=10, scan=10)
    reborn(ledger)
    do(ledger, LostRangeNoted(closed=True), Forgotten(floor=Gid("m", BASE, 0).number, before=10**6))
    return found


@pytest.mark.parametrize(
    "pieces",
    [
        (_head(), _row(1)),
        (_head(), msgpack.packb([[Gid("m", 1, 0).number, msgpack.packb({"a": 1})]])),
        (_head(), _row(*_FIELDS[:9])),
        (_head(), _row(*_FIELDS[:9], 5)),
        (_head(), _row(*_FIELDS[:9], [["a", 7]])),
        (_head(), _row(*_FIELDS[:9], [[]])),
        (_head(), _row(1.5, *_FIELDS[1:])),
        (_head(), _row(*_FIELDS[:3], 99, *_FIELDS[4:])),
        (_head(), _row(*_FIELDS, number=Gid("m", 2, 0).number)),
        (_head(), _unfinished(protocol="zz")),
        (_head(), _unfinished(gid="m-1-1")),
        (_head(), _unfinished(gid="nonsense")),
        (_head(), _unfinished(ended_at=5)),
        (_head(floor=2**64 - 1, count=0),),
        (_head(epoch=2**63, count=0),),
        (_head(leader=7, count=0),),
        (_head(count=-1),),
    ],
)
def test_a_copy_that_somebody_made_up_ends_no_node(pieces):
    """Whatever `apply` raises ends every node, at every start again."""
    assert Verdict.MALFORMED in _put_in(*pieces)


def test_what_a_ledger_writes_is_no_such_copy():
    assert _put_in(_head(), _row(*_FIELDS)) == {Verdict.APPLIED}
    assert _put_in(_head(), _unfinished()) == {Verdict.APPLIED}
    assert _put_in(_head(count=0), msgpack.packb({"staged": [1]})) == {Verdict.APPLIED}, "nothing is wanted of that"


def test_at_level_1_a_lower_floor_does_nothing_as_older_software_has_it():
    ledger = Ledger("m")
    do(ledger, TookOver(node="n1"), epoch=1)
    do(ledger, Registered(name="a", url="http://a"), Registered(name="b", url="http://b"))
    do(ledger, begun("m-1-0"), decided("m-1-0"), Forgotten(floor=Gid("m", 1, 5).number, before=9), Ended(gid="m-1-0"))
    assert do(ledger, Forgotten(floor=Gid("m", 1, 0).number, before=9)) == [Verdict.UNCHANGED]
    assert len(ledger) == 1
