"""What a cluster whose nodes do not all run the same software writes, and what it refuses to."""

import asyncio
import dataclasses
import logging
import reprlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import UnionType
from typing import Any, get_args

import msgpack
import pytest
from msgspec.structs import fields

from cluster.replication.log import NeedsNewer
from cluster.replication.memory import MemoryLog
from cluster.replication.solo import SoloLog
from coordinator import levels
from coordinator.codec import RecordCodec, to_msgpack
from coordinator.commands import COMMAND_VERSION, ENTRIES, encode_command
from coordinator.config import Compatibility
from coordinator.driver import LOOK_AT_LEVELS_S, Driver
from coordinator.errors import NotBeforeUpgrade
from coordinator.facts import Applied, Verdict
from coordinator.ledger import Ledger
from coordinator.levels import ENTRY_LEVELS, FIELD_LEVELS, NEWEST, OLDEST, PROTOCOL_LEVELS, level_of
from coordinator.protocol import entries
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    ContradictionSeen,
    Decided,
    Ended,
    Forgotten,
    Header,
    Raised,
    Registered,
    TookOver,
    Unregistered,
)
from coordinator.protocol.record import replace
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import Branch, Decision, Transaction, VoteKind
from coordinator.states import RECORDS
from tests.support.logs import Replicas
from tests.support.nodes import configs, running
from tests.support.waiting import eventually, turns

NODES = ("n1", "n2", "n3")

FIELDS_OF_LEVEL_1 = {
    TookOver: 1,
    Begun: 6,
    BranchPlan: 3,
    Decided: 5,
    BranchVote: 5,
    ContradictionSeen: 3,
    Ended: 1,
    Registered: 3,
    Unregistered: 1,
    Forgotten: 2,
}
"""How many fields the software before levels knows."""


def kinds(union: Any) -> set[type]:
    return {kind for each in get_args(union) for kind in (kinds(each) if isinstance(each, UnionType) else {each})}


def ledger_at(level: int, *, understands: int = NEWEST) -> Ledger:
    ledger = Ledger("m", understands=understands)
    do(ledger, TookOver(node="n1"), Registered(name="a", url="http://a"))
    if level > OLDEST:
        do(ledger, Raised(level=level))
    return ledger


def do(ledger: Ledger, *wanted: Any, epoch: int = 1) -> list[Applied]:
    return ledger.apply(encode_command(Header(epoch=epoch, at=5), list(wanted)))


def command(*plain: Any, version: int = COMMAND_VERSION, epoch: int = 1) -> bytes:
    packed: bytes = msgpack.packb([version, epoch, 5, list(plain)])
    return packed


def state(ledger: Ledger) -> list[bytes]:
    return list(ledger.snapshot()())


# ------------------------------------------------------------------------------------------------ the table

ENTRY_TAGS = (
    "TookOver", "Begun", "BranchPlan", "Decided", "BranchVote", "ContradictionSeen", "Ended", "Registered",
    "Unregistered", "Forgotten", "Raised", "CopyPiece", "CopyInstalled", "Reconciled", "LostRangeNoted", "Opened",
    "Enlisted", "Sealed", "Resolved", "Acknowledged",
)  # fmt: skip
STATE_TAGS = ("Transaction", "Branch", "Participant")
"""Names in the order of their tags, which are counted from 1. New ones come at the end; disks hold the others."""


@pytest.mark.parametrize(("records", "names"), [(ENTRIES, ENTRY_TAGS), (RECORDS, STATE_TAGS)])
def test_a_tag_stays_with_what_it_was_given_to(records, names):
    assert {tag: kind.__name__ for tag, kind in records._kinds.items()} == dict(enumerate(names, start=1))


def test_everything_that_the_log_can_hold_has_a_level():
    stored = set(ENTRIES._kinds.values())
    assert set(ENTRY_LEVELS) == stored
    assert kinds(entries.Entry) <= stored
    assert set(PROTOCOL_LEVELS) == set(PROTOCOLS)
    used = {*ENTRY_LEVELS.values(), *FIELD_LEVELS.values(), *PROTOCOL_LEVELS.values()}
    assert used <= set(range(OLDEST, NEWEST + 1))


def test_what_the_first_software_knew_is_level_1_and_nothing_else_is():
    assert {kind for kind, level in ENTRY_LEVELS.items() if level == 1} == set(FIELDS_OF_LEVEL_1)
    for kind, known in FIELDS_OF_LEVEL_1.items():
        later = [field.name for field in fields(kind)][known:]
        assert all(FIELD_LEVELS.get((kind, name), OLDEST) > OLDEST for name in later), f"give {later} a level"


def test_a_field_that_was_added_later_has_a_level_unless_it_has_its_default(monkeypatch):
    monkeypatch.setattr(levels, "FIELD_LEVELS", {(BranchVote, "result"): 7})
    monkeypatch.setattr(levels, "_GROWN", frozenset({BranchVote}))
    plain = Decided(gid="m-1-1", decision=Decision.COMMIT, votes=(BranchVote(branch="a", vote=VoteKind.PREPARED),))
    assert level_of(plain) == 1
    assert level_of(replace(plain, votes=(replace(plain.votes[0], result=b"1"),))) == 7


# ------------------------------------------------------------------------------------------------ the ledger


def test_a_cluster_begins_at_the_oldest_level_and_only_rises():
    ledger = Ledger("m")
    assert ledger.level == OLDEST
    assert do(ledger, Raised(level=2))[0].verdict is Verdict.APPLIED
    assert ledger.level == 2
    for level in (2, 1, 0, -1):
        assert do(ledger, Raised(level=level))[0].verdict is Verdict.UNCHANGED
    assert ledger.level == 2
    do(ledger, TookOver(node="n1"), epoch=3)
    assert do(Ledger("m"), Raised(level=2), epoch=0)[0].verdict is Verdict.APPLIED


class IgnoresLevels(Ledger):
    """Known bad: applies whatever it is given."""

    def _apply_entry(self, header, entry):
        self.level, level = NEWEST, self.level
        try:
            return super()._apply_entry(header, entry)
        finally:
            self.level = level


def refuses_what_comes_too_early(ledger: Ledger, monkeypatch) -> bool:
    """Gives the ledger an entry whose kind is of a level above its own."""
    monkeypatch.setitem(ENTRY_LEVELS, Registered, 2)
    before = state(ledger)
    (early,) = do(ledger, Registered(name="b", url="http://b"))
    if early.verdict is not Verdict.TOO_EARLY or state(ledger) != before:
        return False
    early, raised, timely = do(ledger, *[Registered(name="b", url="http://b"), Raised(level=2)] * 2)[:3]
    del early
    assert raised.verdict is Verdict.APPLIED
    assert timely.verdict is Verdict.APPLIED, "once raised, even within one command"
    return True


def test_an_entry_of_a_level_above_the_cluster_s_changes_nothing(monkeypatch):
    assert refuses_what_comes_too_early(ledger_at(1), monkeypatch)


def test_a_ledger_that_ignores_levels_is_found_out(monkeypatch):
    assert not refuses_what_comes_too_early(IgnoresLevels("m"), monkeypatch)


def test_an_old_leader_raises_nothing():
    ledger = ledger_at(1)
    do(ledger, TookOver(node="n2"), epoch=2)
    assert do(ledger, Raised(level=2), epoch=1)[0].verdict is Verdict.FENCED
    assert do(ledger, Raised(level=NEWEST + 1), epoch=1)[0].verdict is Verdict.FENCED, "nor stops anybody"
    assert ledger.level == 1


NEWER = [
    command(version=COMMAND_VERSION + 1),
    msgpack.packb([COMMAND_VERSION + 1, "whatever it may be"]),
    command([99, "m-1-1"]),
    command([7, "m-1-1", "and more"]),
    command([4, "m-1-1", "perhaps"]),
    command([8, "b", "http://b"], [99]),
    command([2, "m-1-1", "9pc", [], 1]),
    command([8, "b", "http://b"], [11, NEWEST + 1]),
]


@pytest.mark.parametrize("newer", NEWER, ids=lambda newer: reprlib.repr(msgpack.unpackb(newer)))
def test_what_newer_software_may_have_written_stops_the_node_before_it_changes_anything(newer):
    ledger, told = ledger_at(1), []
    ledger.on_applied = told.append
    before = state(ledger)
    with pytest.raises(NeedsNewer, match=rf"understands level {NEWEST}: install .* nothing was changed"):
        ledger.apply(newer)
    assert state(ledger) == before
    assert told == []


def test_how_far_the_cluster_is_ahead_is_said():
    with pytest.raises(NeedsNewer, match="this cluster works at level 2, and this software understands level 1"):
        do(ledger_at(1, understands=1), Raised(level=2))


# ------------------------------------------------------------------------------------------------ snapshots


def test_a_cluster_of_level_1_writes_snapshots_that_older_software_reads():
    """Read here as that software does: exact lengths, and all the fields that it knows."""
    ledger = ledger_at(1)
    plans = (BranchPlan(name="x", participant="a", payload=b"1"), BranchPlan(name="a", participant="a", payload=b"2"))
    for gid in ("m-1-1", "m-1-2", "m-1-3"):
        do(ledger, Begun(gid=gid, protocol="2pc", branches=plans, timeout_ms=7, key=f"k{gid}", body_hash=b"h"))
    votes = tuple(BranchVote(branch=plan.name, vote=VoteKind.PREPARED, result=b"3") for plan in plans)
    do(ledger, Decided(gid="m-1-1", decision=Decision.COMMIT, votes=votes), Ended(gid="m-1-1"))
    do(ledger, Decided(gid="m-1-2", decision=Decision.COMMIT, votes=votes))
    head, *chunks = [msgpack.unpackb(piece) for piece in state(ledger)]
    version, cluster, epoch, leader, floor, participants, count = head
    assert (version, cluster, epoch, leader, floor, count) == (1, "m", 1, "n1", -1, 3)
    # Set only by what needs level 2: an application's own transaction, and what an operator has resolved.
    later = {"active", "acknowledged_at", "resolved", "resolved_at", "note"}
    most = {
        **{tag: len({field.name for field in fields(kind)} - later) for tag, kind in ((1, Transaction), (2, Branch))},
        3: 3,
    }
    assert most == {1: 13, 2: 8, 3: 3}, "the new fields are not among what a cluster of level 1 stores: count them here"

    def known(plain: Any) -> None:
        assert len(plain) - 1 <= {1: 13, 2: 8, 3: 3}[plain[0]]
        for part in plain[1:]:
            if isinstance(part, list):
                for record in part:
                    known(record)

    for participant in participants:
        known(participant)
    (rows,) = chunks
    for _number, row in rows:
        if isinstance(row, bytes):
            *_others, branches = unpacked = msgpack.unpackb(row)
            assert len(unpacked) == 10
            assert all(len(branch) <= 7 for branch in branches)
        else:
            known(row)


def test_from_level_2_on_a_snapshot_carries_the_level():
    ledger = ledger_at(2)
    assert msgpack.unpackb(state(ledger)[0])[:3] == [2, 2, "m"]
    copy = Ledger("m")
    copy.restore(state(ledger))()
    assert copy.level == 2
    assert state(copy) == state(ledger)
    older = Ledger("m")
    older.restore(state(ledger_at(1)))()
    assert older.level == 1


@pytest.mark.parametrize(
    "pieces",
    [
        [[2, NEWEST + 1, "m", 0, None, -1, [], 0]],
        [[99, NEWEST + 1, {"anything": "else"}]],
        [[99, NEWEST, "m", 0, None, -1, [], 0]],
        [[2, 2, "m", 0, None, -1, [[99]], 0]],
        [[2, 2, "m", 0, None, -1, [], 1], [[1, [1, *range(99)]]]],
    ],
)
def test_a_snapshot_of_newer_software_is_left_alone(pieces):
    ledger = ledger_at(1)
    before = state(ledger)
    with pytest.raises(NeedsNewer, match=rf"understands level {NEWEST}: install .* nothing was changed"):
        ledger.restore([msgpack.packb(piece) for piece in pieces])
    assert state(ledger) == before


def test_defaults_at_the_end_of_a_record_are_left_out_and_come_back():
    for codec in (ENTRIES, RECORDS):
        assert isinstance(codec, RecordCodec)
    assert ENTRIES.to_plain(Registered(name="a", url="u")) == [8, "a", "u"]
    assert ENTRIES.to_plain(Registered(name="a", url="u", batch=True)) == [8, "a", "u", True]
    vote = BranchVote(branch="a", vote=VoteKind.PREPARED, result=b"")
    assert ENTRIES.to_plain(vote) == [5, "a", "prepared", None, False, b""], "not what comes before the last"
    for record in (vote, Registered(name="a", url="u")):
        assert ENTRIES.from_plain(msgpack.unpackb(to_msgpack(ENTRIES.to_plain(record)))) == record


# ------------------------------------------------------------------------------------------------ the leader


class RaisesAtOnce(Driver):
    """Known bad: it asks nobody."""

    def _understood(self) -> int:
        return self._config.compatibility.announced


@asynccontextmanager
async def led(understand: dict[str, int | None], *, highest: int = NEWEST) -> AsyncIterator[tuple[Replicas, Any]]:
    replicas = Replicas(NODES, understand=understand)
    config = dataclasses.replace(configs(NODES)[0], compatibility=Compatibility(highest_level=highest))
    async with running(config, replicas.logs["n1"], ready=False) as node:
        replicas.lead("n1")
        await eventually(lambda: node.node.driver.leading)
        yield replicas, node


def looks(driver: Any, monkeypatch) -> list[None]:
    """A list that grows with each look at what the nodes understand."""
    seen: list[None] = []
    look = driver._look_at_levels

    def counted() -> None:
        seen.append(None)
        look()

    monkeypatch.setattr(driver, "_look_at_levels", counted)
    return seen


async def test_a_leader_whose_nodes_all_understand_it_raises_the_level_with_its_first_command():
    async with led({}) as (replicas, node):
        assert node.node.ledger.level == NEWEST
        assert replicas.proposed == 1, "nobody waits for it"


async def raised_too_early(understand: dict[str, int | None], monkeypatch, *, highest: int = NEWEST) -> bool:
    monkeypatch.setattr("coordinator.driver.LOOK_AT_LEVELS_S", LOOK_AT_LEVELS_S / 100)
    async with led(understand, highest=highest) as (_replicas, node):
        seen = looks(node.node.driver, monkeypatch)
        if highest > OLDEST:
            await eventually(lambda: len(seen) > 2 or node.node.ledger.level > OLDEST)
        await turns(20)
        return bool(node.node.ledger.level > OLDEST)


MIXED = [{"n3": 1}, {"n2": None}, {"n2": 1, "n3": None}, {"n1": 1}]


@pytest.mark.parametrize("understand", MIXED)
async def test_a_leader_raises_nothing_before_every_node_is_known_to_understand_it(understand, monkeypatch):
    assert not await raised_too_early(understand, monkeypatch)


async def test_an_operator_holds_the_level(monkeypatch):
    assert not await raised_too_early({}, monkeypatch, highest=1)


@pytest.mark.parametrize("understand", MIXED)
async def test_a_leader_that_raises_too_early_is_found_out(understand, monkeypatch):
    monkeypatch.setattr("coordinator.node.Node._driver_type", RaisesAtOnce)
    assert await raised_too_early(understand, monkeypatch)


async def test_the_level_rises_once_the_last_node_is_there(monkeypatch):
    async with led({"n2": None, "n3": 1}) as (replicas, node):
        driver, ledger = node.node.driver, node.node.ledger
        with pytest.raises(NotBeforeUpgrade, match="n2 is not connected, n3 announces level 1; nothing was done"):
            driver._require_level(2, "such things")
        driver._require_level(1, "what has always been there")
        replicas.understand["n2"] = replicas.understand["n3"] = NEWEST
        with pytest.raises(NotBeforeUpgrade, match="about to rise"):
            driver._require_level(2, "such things")
        await eventually(lambda: ledger.level == NEWEST)
        driver._require_level(2, "such things")
        with pytest.raises(NotBeforeUpgrade):
            driver._require_level(NEWEST + 1, "such things")


async def test_a_node_that_announces_less_than_the_cluster_s_level_is_told_of_once(caplog):
    async with led({}) as (replicas, node):
        driver = node.node.driver

        async def kept_house(times: int) -> None:
            for _ in range(times):
                keeper = driver._housekeeper
                await eventually(lambda keeper=keeper: driver._housekeeper is not keeper)

        replicas.understand |= {"n2": None, "n3": 1}
        await kept_house(3)
        assert caplog.text.count(f"n3 announces level 1, and this cluster works at level {NEWEST}") == 1
        assert "n2" not in "".join(record.message for record in caplog.records if record.levelname == "WARNING")
        assert node.node.ledger.level == NEWEST
        replicas.understand |= {"n3": NEWEST}
        await kept_house(2)
        replicas.understand |= {"n3": 1}
        await kept_house(2)
        assert caplog.text.count("n3 announces level 1") == 2


async def test_raising_is_tried_again_when_the_log_does_not_take_it():
    async with led({"n3": 1}) as (replicas, node):
        replicas.hold = True
        replicas.understand["n3"] = NEWEST
        for fate in (replicas.refuse, replicas.lose, replicas.refuse):
            await eventually(lambda: replicas.waiting)
            assert len(replicas.waiting) == 1
            fate()
        await eventually(lambda: replicas.waiting)
        replicas.commit()
        assert node.node.ledger.level == NEWEST


# ------------------------------------------------------------------------------------------------ the logs


async def stops(log: MemoryLog, ledger: Ledger, fatal: list[BaseException]) -> None:
    await log.start(ledger, lambda _leadership: None)
    future = log.propose(encode_command(Header(epoch=1, at=0), [Raised(level=2)]))
    await asyncio.wait([future])
    assert future.exception() is not None
    await eventually(lambda: fatal)
    assert isinstance(fatal[0], NeedsNewer)
    assert ledger.level == OLDEST
    await log.stop()


async def test_a_node_that_does_not_understand_its_log_stops_and_says_so(tmp_path):
    fatal: list[BaseException] = []
    await stops(MemoryLog(on_fatal=fatal.append), ledger_at(1, understands=1), fatal)
    fatal.clear()
    await stops(SoloLog(tmp_path, on_fatal=fatal.append), ledger_at(1, understands=1), fatal)
    again = SoloLog(tmp_path)
    with pytest.raises(NeedsNewer, match="install"):
        await again.start(ledger_at(1, understands=1), lambda _leadership: None)
    await again.stop()
    newer, log = ledger_at(1), SoloLog(tmp_path)
    await log.start(newer, lambda _leadership: None)
    assert newer.level == 2, "nothing was lost"
    await log.stop()


async def test_the_level_is_told_to_people(caplog):
    with caplog.at_level(logging.INFO):
        async with led({}):
            pass
    assert f"works at level {NEWEST} from here on" in caplog.text
