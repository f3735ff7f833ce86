"""Whether a node's promises count: its marker, when a cluster is founded, and what an empty node does not say."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.replication.disk import File, RealDisk
from cluster.replication.log import CannotStart
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.segments import SyncFailed
from cluster.replication.snapshot import Snapshots
from cluster.replication.standing import Marker, Standing, StandingRefused, at_start, counts, load, store
from tests.simulation.disk import SimulatedDisk
from tests.simulation.pumps import instant_journal
from tests.simulation.replicas import Recorder
from tests.unit.test_raft import Alone, alone

NONCE, OTHER = b"n" * 16, b"o" * 16
EMPTY = Marker(node="n1", voter=False, nonce=NONCE)
VOTER = Marker(node="n1", voter=True, known=frozenset({"n2"}))


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk(random.Random(1))


# The marker.


@pytest.mark.parametrize("marker", [EMPTY, VOTER, replace(EMPTY, rejoin=True)])
def test_what_is_stored_is_there_after_a_power_failure(disk: SimulatedDisk, marker: Marker) -> None:
    store(disk, marker)
    disk.lose_power()
    assert load(disk) == marker


def test_a_change_is_there_whole_or_not_at_all() -> None:
    found = set()
    for seed in range(200):
        disk = SimulatedDisk(random.Random(seed))
        store(disk, EMPTY)
        disk.crash_at = disk.calls + 1 + seed % 5
        try:
            store(disk, VOTER)
        except (OSError, SyncFailed):
            disk.lose_power()
        marker = load(disk)
        assert marker in (EMPTY, VOTER)
        found.add(marker)
    assert found == {EMPTY, VOTER}


@pytest.mark.parametrize("offset", range(0, 100, 7))
def test_damage_is_refused(disk: SimulatedDisk, offset: int) -> None:
    store(disk, VOTER)
    disk.flip("standing", offset, 0x01)
    with pytest.raises(StandingRefused, match=r"/simulated/standing is .*"):
        load(disk)


def test_a_sync_that_fails_is_no_lack_of_room(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str) -> File:
        file = create(name)
        disk.fail_at[disk.calls + 2] = 28
        return file

    create = disk.create
    monkeypatch.setattr(disk, "create", failing)
    with pytest.raises(SyncFailed):
        store(disk, VOTER)


# At start.


def begin(disk: SimulatedDisk, *, has_log: bool = False, has_history: bool = False, rejoin: bool = False) -> Marker:
    return at_start(disk, "n1", has_log=has_log, has_history=has_history, rejoin=rejoin, nonce=NONCE)


def test_a_new_folder_is_empty_and_stays_so_under_one_nonce(disk: SimulatedDisk) -> None:
    assert begin(disk) == EMPTY
    disk.lose_power()
    assert at_start(disk, "n1", has_log=True, has_history=True, rejoin=False, nonce=OTHER) == EMPTY


def test_a_folder_of_older_software_is_that_of_a_voter(disk: SimulatedDisk) -> None:
    assert begin(disk, has_log=True, has_history=True).voter
    assert load(disk) == Marker(node="n1", voter=True)


def test_one_without_a_history_has_promised_nothing(disk: SimulatedDisk) -> None:
    assert begin(disk, has_log=True) == EMPTY


def test_who_was_refused_may_be_told_to_rejoin(disk: SimulatedDisk) -> None:
    begin(disk)
    assert begin(disk, has_log=True, rejoin=True) == replace(EMPTY, rejoin=True)
    assert begin(disk, has_log=True) == replace(EMPTY, rejoin=True)
    assert begin(disk, has_log=True, rejoin=True) == replace(EMPTY, rejoin=True)


@pytest.mark.parametrize(
    ("marker", "has_log", "has_history", "rejoin", "says"),
    [
        (None, True, True, True, "is not empty. Start the node without it"),
        (VOTER, True, True, True, "is not empty. Start the node without it"),
        (VOTER, True, False, True, "is not empty. Start the node without it"),
        (EMPTY, True, True, True, "begun to rejoin already"),
        (VOTER, False, False, False, "its log is gone"),
        (VOTER, False, False, True, "its log is gone"),
        (replace(VOTER, node="n2"), True, True, False, "is that of n2, and this is n1"),
        (replace(VOTER, node="n2"), True, True, True, "is that of n2, and this is n1"),
    ],
)
def test_what_is_refused(
    disk: SimulatedDisk, marker: Marker | None, has_log: bool, has_history: bool, rejoin: bool, says: str
) -> None:
    if marker is not None:
        store(disk, marker)
    with pytest.raises(CannotStart, match=says) as refused:
        begin(disk, has_log=has_log, has_history=has_history, rejoin=rejoin)
    assert "Nothing was changed" in str(refused.value)
    assert load(disk) == marker


def test_what_can_be_seen_from_outside(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    assert not counts(folder)
    assert not folder.exists()
    disk = RealDisk(folder)
    assert not counts(folder)
    (folder / "0000000000000001.segment").touch()
    assert counts(folder)
    store(disk, EMPTY)
    assert not counts(folder)
    store(disk, VOTER)
    assert counts(folder)
    (folder / "standing").write_text("nonsense")
    assert counts(folder)


# Founding.


def heard(voter: bool = False, history: bool = False, echo: bytes = NONCE, knows: bool = False) -> dict[str, Any]:
    nonce = b"" if voter else OTHER
    return {"type": "standing", "voter": voter, "nonce": nonce, "history": history, "echo": echo, "knows": knows}


BOTH = frozenset({"n2", "n3"})


@pytest.mark.parametrize(
    ("other", "marker", "connected", "history", "founds"),
    [
        (heard(), EMPTY, BOTH, False, True),
        (heard(voter=True), EMPTY, BOTH, False, True),
        (heard(history=True), EMPTY, BOTH, False, False),
        (heard(voter=True, history=True), EMPTY, BOTH, False, False),
        (heard(echo=OTHER), EMPTY, BOTH, False, False),
        (heard(echo=b""), EMPTY, BOTH, False, False),
        (heard(), EMPTY, frozenset({"n2"}), False, False),
        (heard(), EMPTY, BOTH, True, False),
        (heard(), replace(EMPTY, rejoin=True), BOTH, False, False),
        (heard(), VOTER, BOTH, False, False),
        (None, EMPTY, BOTH, False, False),
    ],
)
def test_a_cluster_is_founded_by_all_who_are_new_and_by_no_others(
    other: dict[str, Any] | None, marker: Marker, connected: frozenset[str], history: bool, founds: bool
) -> None:
    standing = Standing("n1", BOTH, marker)
    standing.hear("n2", heard())
    if other is not None:
        standing.hear("n3", other)
    assert standing.may_found(connected, history=history) == founds


def test_an_empty_node_is_answered_once() -> None:
    standing = Standing("n1", BOTH, VOTER)
    standing.say("n2", history=True)
    assert standing.hear("n2", heard())
    assert standing.say("n2", history=True)["echo"] == OTHER
    assert not standing.hear("n2", heard())
    assert not standing.hear("n3", heard(voter=True))
    standing.forget("n2")
    assert standing.say("n2", history=True)["echo"] == b""


def test_who_was_told_to_rejoin_has_a_history_to_others() -> None:
    assert not Standing("n1", BOTH, EMPTY).say("n2", history=False)["history"]
    assert Standing("n1", BOTH, replace(EMPTY, rejoin=True)).say("n2", history=False)["history"]


# What an empty node does, and does not, among others that have a leader.


async def _joins(node: Alone) -> bytes:
    """n2 leads term 3; its log has three entries."""
    node.transport.stand_by = False
    nonce: bytes = node.transport.said("standing")[0]["nonce"]
    for peer in ("n2", "n3"):
        node.transport.stand(peer, history=True, echo=nonce)
    await asyncio.sleep(0.01)
    node.heartbeat(3, entries=((b"\1", 2, 1), (b"\0x", 3, 3)), commit_index=3)
    await asyncio.sleep(0.01)
    return nonce


def joining(scenario: Any, journal: RaftJournal | None = None) -> Alone:
    from tests.unit import test_raft

    class Quiet(test_raft.ByHand):
        def __init__(self) -> None:
            super().__init__()
            self.stand_by = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_raft, "ByHand", Quiet)
        return alone(scenario, journal=journal)


def test_an_empty_node_neither_votes_nor_campaigns_nor_acknowledges() -> None:
    async def scenario(node: Alone) -> None:
        await _joins(node)
        assert node.machine.commands == [b"x"]
        assert node.log.joining() == {"n1"}
        node.hear("n3", 4, type="request_vote", term=4, last_log_index=9, last_log_term=3)
        node.hear("n2", 3, type="timeout_now", term=3)
        await asyncio.sleep(3.0)
        node.hear("n3", 3, type="pre_vote", term=4, last_log_index=9, last_log_term=3)
        node.hear("n2", 3, type="timeout_now", term=3)
        await asyncio.sleep(1.0)
        assert {message["type"] for _peer, message in node.transport.sent} == {
            "standing",
            "progress",
            "pre_vote_answer",
            "understands",
        }
        assert node.transport.said("progress") == [{"type": "progress", "next_node_idx": 4}]
        assert [message["granted"] for message in node.transport.said("pre_vote_answer")] == [False]

    joining(scenario)


def test_it_counts_once_it_applies_that_it_has_joined_with_its_own_nonce() -> None:
    async def scenario(node: Alone) -> None:
        nonce = await _joins(node)
        other = b"\4" + OTHER + b"n1", 4, 3
        of_another = b"\4" + nonce + b"n3", 5, 3
        own = b"\4" + nonce + b"n1", 6, 3
        node.heartbeat(3, prevLogIdx=3, prevLogTerm=3, entries=(other, of_another, own), commit_index=5)
        await asyncio.sleep(0.05)
        assert node.log.joining() == {"n1"}
        assert not node.transport.said("next_node_idx")
        node.heartbeat(3, prevLogIdx=6, prevLogTerm=3, commit_index=6)
        await asyncio.sleep(0.01)
        assert not node.log.joining()
        assert node.transport.said("standing")[-1]["voter"]
        node.heartbeat(3, prevLogIdx=6, prevLogTerm=3, commit_index=6)
        await asyncio.sleep(0.01)
        assert node.transport.said("next_node_idx")[-1]["success"]
        # In this term it may have voted before. In another it votes, and campaigns.
        node.hear("n3", 3, type="request_vote", term=3, last_log_index=9, last_log_term=3)
        await asyncio.sleep(0.01)
        assert not node.transport.said("response_vote")
        node.hear("n3", 4, type="request_vote", term=4, last_log_index=9, last_log_term=3)
        await asyncio.sleep(0.01)
        assert node.transport.said("response_vote")
        while not node.transport.said("request_vote"):  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.01)

    disk = SimulatedDisk(random.Random(1))
    joining(scenario, instant_journal(disk))
    marker = load(disk)
    assert marker is not None
    assert marker.voter


def test_a_crash_between_a_snapshot_and_the_log_that_follows_it_is_no_damage_to_who_joins() -> None:
    async def scenario(node: Alone) -> None:
        assert node.machine.commands == [b"x", b"y"]
        assert node.log.joining() == {"n1"}

    disk = SimulatedDisk(random.Random(1))
    store(disk, EMPTY)
    instant_journal(disk).close()
    given = Recorder()
    given.commands = [b"x", b"y"]
    Snapshots(disk).write(7, 3, given.snapshot()())
    joining(scenario, instant_journal(disk))


def test_a_node_that_is_known_and_was_not_told_to_rejoin_ends() -> None:
    async def scenario(node: Alone) -> None:
        node.transport.stand("n2", history=True, knows=True)
        await asyncio.sleep(0.01)
        assert node.transport.stopped

    (error,) = joining(scenario).fatal
    assert isinstance(error, CannotStart)
    assert "n1 was a member of this cluster, as n2 knows, and its log is not in /simulated" in str(error)
    assert "outlast start n1 --rejoin" in str(error)


def test_a_leader_lets_an_empty_node_join_for_as_long_as_it_is_empty() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        node.transport.stand("n3", voter=False, nonce=OTHER, history=False)
        await asyncio.sleep(2.5)
        node.acknowledge(3)
        await asyncio.sleep(0.01)
        assert node.log.joining() == {"n3"}

        def appended() -> set[int]:
            return {
                index
                for message in node.transport.said("append_entries")
                for command, index, _term in message["entries"]
                if command == b"\4" + OTHER + b"n3"
            }

        assert len(appended()) >= 1
        node.transport.stand("n3", voter=True, history=True)
        await asyncio.sleep(0.01)
        before = len(appended())
        node.acknowledge(4)
        await asyncio.sleep(0.5)
        assert not node.log.joining()
        assert len(appended()) <= before + 1

    alone(scenario)


def test_with_an_empty_node_there_is_no_majority() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        node.transport.stand("n3", voter=False, nonce=OTHER, history=False)
        for _ in range(30):
            await asyncio.sleep(0.05)
            node.hear("n3", 1, type="next_node_idx", next_node_idx=2, reset=False, success=False)
        assert not node.log.leadership().is_leader

    alone(scenario)
