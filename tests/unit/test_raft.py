"""`RaftLog` under virtual time: what needs a moment that no real cluster hits on demand."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from pysyncobj import FAIL_REASON

from cluster.replication import raft, raft_log
from cluster.replication.guard import LogDiverged, Message
from cluster.replication.journal import DurableJournal, JournalSettings
from cluster.replication.log import Leadership, NotProposed, ProposalUnknown
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.raft_log import RaftLog
from cluster.replication.segments import SegmentSettings
from cluster.replication.settings import RaftSettings
from cluster.replication.transport import Handlers
from tests.simulation.disk import ManualPump, SimulatedDisk
from tests.simulation.network import Network
from tests.simulation.pumps import instant_journal
from tests.simulation.replicas import NODES, Cluster, Recorder
from tests.simulation.virtual import VirtualLoop, run
from tests.support.waiting import eventually


class ByHand:
    """A transport whose other ends are the test."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.handlers: Handlers | None = None
        self.frame_bytes_max = 2**30
        self.stopped = False
        self.peers = frozenset({"n2", "n3"})
        self.would_vote = True
        self.stand_by = True
        """Answer a new node so that it founds a cluster with the others."""

    async def start(self, handlers: Handlers) -> None:
        self.handlers = handlers
        for peer in ("n2", "n3"):
            handlers.connected(peer)

    def send(self, peer: str, term: int, message: Message) -> bool:
        if message["type"] == "pre_vote" and self.would_vote:
            answer = {"type": "pre_vote_answer", "term": message["term"], "granted": True}
            assert self.handlers is not None
            asyncio.get_running_loop().call_soon(self.handlers.message, peer, term, answer)
        if message["type"] == "standing" and self.stand_by and not message["voter"]:
            self.stand(peer, echo=message["nonce"])
        self.sent.append((peer, message))
        return True

    def connected(self) -> frozenset[str]:
        return self.peers

    def stand(self, peer: str, **changed: Any) -> None:
        """Say this of a peer; unless told otherwise, that nothing has happened yet."""
        said = {"voter": True, "nonce": b"", "history": False, "echo": b"", "knows": False}
        assert self.handlers is not None
        handlers = self.handlers
        message = {"type": "standing", **said, **changed}
        asyncio.get_running_loop().call_soon(lambda: handlers.message(peer, 0, message))

    async def stop(self) -> None:
        self.stopped = True

    def said(self, kind: str) -> list[Message]:
        return [message for _peer, message in self.sent if message["type"] == kind]


def of_a_voter() -> RaftJournal:
    """A log that has entries, and no standing beside it: software that knew none has left it."""
    journal = instant_journal()
    journal.add(b"\1", 1, 0)
    journal.add(b"\1", 2, 0)
    return journal


class Alone:
    """n1 of three, among nodes that are the test."""

    def __init__(self, loop: VirtualLoop, *, journal: Any = None, **settings: Any) -> None:
        self.loop = loop
        self.transport = ByHand()
        self.machine = Recorder()
        self.told: list[Leadership] = []
        self.fatal: list[BaseException] = []
        self.journal = instant_journal() if journal is None else journal
        self.log = RaftLog(
            node="n1",
            peers=["n2", "n3"],
            transport=self.transport,
            journal=lambda: self.journal,
            settings=RaftSettings(**settings),
            clock=loop,
            on_fatal=self.fatal.append,
        )

    async def start(self) -> None:
        await self.log.start(self.machine, self.told.append)
        for _ in range(10):
            await asyncio.sleep(0)

    def hear(self, peer: str, sender_term: int, /, **message: Any) -> None:
        assert self.transport.handlers is not None
        self.transport.handlers.message(peer, sender_term, message)

    def heartbeat(self, term: int = 1, peer: str = "n2", **changed: Any) -> None:
        fields = {"term": term, "commit_index": 1, "prevLogIdx": 1, "prevLogTerm": 0, "entries": ()}
        self.hear(peer, term, type="append_entries", **(fields | changed))

    def acknowledge(self, next_index: int, peer: str = "n2") -> None:
        term = self.log.leadership().term
        self.hear(peer, term, type="next_node_idx", next_node_idx=next_index, reset=False, success=True)

    async def lead(self) -> None:
        """Have it elected, and its first entry committed."""
        while not self.transport.said("request_vote"):  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.01)
        self.hear("n2", 1, type="response_vote", term=1)
        assert self.log.leadership().is_leader
        self.acknowledge(3)
        await asyncio.sleep(0)


def alone(scenario: Callable[[Alone], Coroutine[Any, Any, None]], *, journal: Any = None, **settings: Any) -> Alone:
    async def main(loop: VirtualLoop, rng: random.Random) -> Alone:
        node = Alone(loop, journal=journal, **settings)
        await node.start()
        await scenario(node)
        await node.log.stop()
        return node

    return run(1, main)


# Elections.


async def _stall(node: Alone) -> None:
    node.heartbeat()
    await asyncio.sleep(0.1)
    node.heartbeat()
    # The loop stands still for a second, with a heartbeat in the socket: the next poll will read it.
    node.log._wake()
    node.loop._virtual.now_s += 1.0
    node.loop.call_soon(node.loop.call_soon, node.heartbeat)
    await asyncio.sleep(0.1)


def test_after_a_stall_what_has_arrived_is_read_before_anyone_is_deposed() -> None:
    node = alone(_stall)
    assert not node.transport.said("pre_vote")
    assert node.told[-2].leader == "n2"


@pytest.mark.parametrize("reads", [0, 1])
def test_else_it_would_ask_who_votes_for_it(monkeypatch: pytest.MonkeyPatch, reads: int) -> None:
    monkeypatch.setattr(raft_log, "_READS_BEFORE_A_LATE_TURN", reads)
    assert alone(_stall).transport.said("pre_vote")


@pytest.mark.parametrize("away_s", [0.5, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_who_comes_back_deposes_nobody(seed: int, away_s: float) -> None:
    async def main(loop: VirtualLoop, rng: random.Random) -> None:
        cluster = Cluster(loop, rng)
        for node in NODES:
            await cluster.start(node)
        await cluster.until(lambda: cluster.leader() is not None)
        await asyncio.sleep(0.5)
        leader = cluster.leader()
        assert leader is not None
        term = cluster.logs[leader].leadership().term
        for away in NODES:
            if away != leader:
                for other in NODES:
                    if other != away:
                        cluster.network.cut(away, other)
                await asyncio.sleep(away_s)
                cluster.network.heal()
                await asyncio.sleep(1.0)
        assert {(log.leadership().term, log.leadership().leader) for log in cluster.logs.values()} == {(term, leader)}
        for log in cluster.logs.values():
            await log.stop()

    run(seed, main)


async def _polls(node: Alone) -> None:
    node.transport.would_vote = False
    node.heartbeat()
    while not node.transport.said("pre_vote"):  # noqa: ASYNC110 - virtual time costs nothing
        await asyncio.sleep(0.01)


def test_nobody_campaigns_whom_no_majority_would_vote_for() -> None:
    async def scenario(node: Alone) -> None:
        await _polls(node)
        await asyncio.sleep(2.0)
        assert node.log.leadership().term == 1
        assert not node.transport.said("request_vote")
        node.hear("n3", 1, type="pre_vote_answer", term=2, granted=False)
        await asyncio.sleep(0.01)
        assert not node.transport.said("request_vote")
        node.hear("n3", 1, type="pre_vote_answer", term=2, granted=True)
        node.hear("n2", 1, type="pre_vote_answer", term=2, granted=True)
        await asyncio.sleep(0.01)
        assert [message["term"] for message in node.transport.said("request_vote")] == [2, 2]

    alone(scenario)


@pytest.mark.parametrize("step_s", [1e-4, 1e-3])
def test_time_that_passes_within_a_turn_is_no_reason_to_campaign(
    step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(node: Alone) -> None:
        await _polls(node)
        passed_s = itertools.count(1)
        now_s = asyncio.get_running_loop().time
        chooser = random.Random(1)
        with monkeypatch.context() as patched:
            # pysyncobj reads the clock after us, and it has gone on.
            patched.setattr(raft.stock, "monotonicTime", lambda: now_s() + next(passed_s) * step_s)
            for _ in range(2000):
                node.log._wake()
                await asyncio.sleep(chooser.random() * 0.005)
        assert len(node.transport.said("pre_vote")) > 50
        assert not node.transport.said("request_vote")
        assert node.log.leadership().term == 1

    alone(scenario)


def test_a_leader_that_answers_late_is_not_deposed() -> None:
    async def scenario(node: Alone) -> None:
        await _polls(node)
        node.hear("n3", 1, type="pre_vote_answer", term=2, granted=True)
        await asyncio.sleep(0.01)
        node.heartbeat()
        await asyncio.sleep(0.1)
        assert not node.transport.said("request_vote")

    alone(scenario)


def test_who_hears_from_nobody_knows_no_leader() -> None:
    async def scenario(node: Alone) -> None:
        node.heartbeat()
        assert node.log.leadership().leader == "n2"
        await _polls(node)
        await asyncio.sleep(0.1)
        assert node.told[-1] == node.log.leadership() == Leadership(term=1, leader=None, is_leader=False)
        node.heartbeat()
        assert node.log.leadership().leader == "n2"

    alone(scenario)


def test_a_leader_that_does_not_answer_is() -> None:
    async def scenario(node: Alone) -> None:
        await _polls(node)
        node.hear("n3", 1, type="pre_vote_answer", term=2, granted=True)
        await asyncio.sleep(0.05)
        assert node.transport.said("request_vote")

    alone(scenario)


@pytest.mark.parametrize(
    ("changed", "would"),
    [
        ({}, True),
        ({"term": 1}, False),  # it has been in that term already
        ({"last_log_index": 1}, False),
        ({"last_log_index": 9, "last_log_term": 0}, False),
    ],
)
@pytest.mark.parametrize("has_leader", [False, True])
def test_who_has_a_leader_would_vote_for_nobody_else(changed: dict[str, int], would: bool, has_leader: bool) -> None:
    async def scenario(node: Alone) -> None:
        node.heartbeat(entries=((b"\0x", 2, 1),))
        if not has_leader:
            await _polls(node)
            node.transport.sent.clear()
        question = {"term": 2, "last_log_index": 2, "last_log_term": 1} | changed
        node.hear("n3", 1, type="pre_vote", **question)
        answers = [message["granted"] for message in node.transport.said("pre_vote_answer")]
        assert answers == [would and not has_leader]
        assert node.log.leadership().term == 1, "a question begins no term"

    alone(scenario)


def test_a_leader_answers_a_poll_with_a_heartbeat() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        node.transport.sent.clear()
        node.hear("n3", 1, type="pre_vote", term=2, last_log_index=9, last_log_term=1)
        assert [(peer, message["type"]) for peer, message in node.transport.sent] == [("n3", "append_entries")]
        assert node.log.leadership().is_leader

    alone(scenario)


def test_who_is_behind_in_terms_learns_of_it() -> None:
    async def scenario(node: Alone) -> None:
        await _polls(node)
        node.hear("n3", 7, type="pre_vote_answer", term=2, granted=False)
        assert node.log.leadership() == Leadership(term=7, leader=None, is_leader=False)

    alone(scenario)


def _failover_s(seed: int, monkeypatch: pytest.MonkeyPatch | None) -> float:
    """How long a cluster whose leader dies has none; without the news of the death if there is a monkeypatch."""

    async def main(loop: VirtualLoop, rng: random.Random) -> float:
        cluster = Cluster(loop, rng)
        for node in NODES:
            await cluster.start(node)
        await cluster.until(lambda: cluster.leader() is not None)
        await asyncio.sleep(rng.uniform(0.5, 1.0))
        leader = cluster.leader()
        assert leader is not None
        await cluster.kill(leader)
        died_s = loop.time()
        await cluster.until(lambda: cluster.leader() is not None)
        took_s = loop.time() - died_s
        for log in cluster.logs.values():
            await log.stop()
        return took_s

    with contextlib.ExitStack() as stack:
        if monkeypatch is not None:
            stack.enter_context(monkeypatch.context()).setattr(Network, "_refuse", lambda *_: None)
        return run(seed, main)


def test_a_dead_leaders_successor_does_not_wait_for_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RaftSettings()
    told = [_failover_s(seed, None) for seed in range(20)]
    untold = [_failover_s(seed, monkeypatch) for seed in range(20)]
    assert max(told) < settings.election_min_s - settings.heartbeat_s
    assert min(untold) > settings.election_min_s - 2 * settings.heartbeat_s
    assert max(untold) < 1.0


@pytest.mark.parametrize(("entries", "campaigns"), [(50, True), (5000, False)])
def test_who_has_much_to_apply_lets_others_campaign_first(entries: int, campaigns: bool) -> None:
    journal = instant_journal()
    journal.add(b"\1", 1, 0)
    for index in range(2, entries + 2):
        journal.add(b"\0x", index, 1)

    async def scenario(node: Alone) -> None:
        node.heartbeat()
        assert node.transport.handlers is not None
        node.transport.handlers.refused("n2")
        await asyncio.sleep(0.1)
        assert bool(node.transport.said("request_vote")) == campaigns
        await asyncio.sleep(0.5)
        assert bool(node.transport.said("request_vote")) == campaigns
        # Later it does, or there might be no leader at all.
        await asyncio.sleep(1.0)

    assert alone(scenario, journal=journal).transport.said("request_vote")


def test_what_a_tick_leaves_to_apply_is_no_backlog() -> None:
    """At a high rate more is committed between two ticks than a backlog has."""
    journal = instant_journal()
    journal.add(b"\1", 1, 0)
    for index in range(2, 502):
        journal.add(b"\0x", index, 1)

    async def scenario(node: Alone) -> None:
        node.heartbeat(prevLogIdx=501, prevLogTerm=1, commit_index=501)
        assert node.transport.handlers is not None
        node.transport.handlers.refused("n2")
        assert len(node.machine.commands) == 0
        # Virtual time, and less of it than an election timeout.
        await eventually(lambda: node.transport.said("request_vote"), within_s=0.1)
        assert len(node.machine.commands) == 500

    alone(scenario, journal=journal, apply_entries_max=100)


def test_who_hears_from_another_leader_meanwhile_does_not_campaign() -> None:
    async def scenario(node: Alone) -> None:
        node.heartbeat()
        assert node.transport.handlers is not None
        node.transport.handlers.refused("n2")
        node.heartbeat(term=2, peer="n3")
        await asyncio.sleep(0.1)

    assert not alone(scenario).transport.said("request_vote")


def test_the_death_of_a_follower_elects_nobody() -> None:
    async def scenario(node: Alone) -> None:
        node.heartbeat()
        assert node.transport.handlers is not None
        node.transport.handlers.refused("n3")
        await asyncio.sleep(0.1)

    assert not alone(scenario).transport.said("request_vote")


def test_one_vote_that_arrives_twice_elects_nobody() -> None:
    """Of five nodes three must agree. (Three nodes cannot show it: there one vote of another is enough.)"""

    async def main(loop: VirtualLoop, rng: random.Random) -> None:
        transport = ByHand()
        log = RaftLog(node="n1", peers=["n2", "n3", "n4", "n5"], transport=transport, journal=of_a_voter, clock=loop)
        await log.start(Recorder(), lambda _now: None)
        while not transport.said("request_vote"):  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.01)
        assert transport.handlers is not None
        for _ in range(3):
            transport.handlers.message("n2", 1, {"type": "response_vote", "term": 1})
        assert not log.leadership().is_leader
        transport.handlers.message("n3", 1, {"type": "response_vote", "term": 1})
        assert log.leadership().is_leader
        await log.stop()

    run(1, main)


# Proposals.


def test_who_loses_leadership_answers_at_once_and_with_what_it_knows() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        known, unknown = node.log.propose(b"known"), node.log.propose(b"unknown")
        await asyncio.sleep(0.05)
        late = node.log.propose(b"late")  # waits in the queue, when the news comes
        began_s = node.loop.time()
        # n3 leads: it has the first of the two, and has committed it.
        entries = ((b"\0known", 3, 1), (b"\1", 4, 2))
        node.heartbeat(2, "n3", prevLogIdx=2, prevLogTerm=1, entries=entries, commit_index=3)
        with pytest.raises(NotProposed):
            await node.log.propose(b"too late")
        assert await known == 1
        with pytest.raises(ProposalUnknown):
            await unknown
        with pytest.raises(NotProposed):
            await late
        assert node.loop.time() == began_s
        assert node.machine.commands == [b"known"]
        assert node.told[-1] == Leadership(term=2, leader="n3", is_leader=False)

    alone(scenario)


def test_a_proposal_has_its_own_end() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        future = node.log.propose(b"x")
        began_s = node.loop.time()
        while not future.done():
            node.acknowledge(3)  # alive, and never holds it
            await asyncio.sleep(0.05)
        assert isinstance(future.exception(), ProposalUnknown)
        assert 2.5 <= node.loop.time() - began_s < 2.6
        assert node.log.leadership().is_leader
        node.acknowledge(4)
        await asyncio.sleep(0.05)
        assert node.machine.commands == [b"x"]

    alone(scenario)


def test_a_leader_that_hears_from_nobody_steps_down() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        future = node.log.propose(b"x")
        began_s = node.loop.time()
        with pytest.raises(ProposalUnknown, match="no longer leads"):
            await future
        assert 0.9 < node.loop.time() - began_s < 1.2

    node = alone(scenario)
    assert [now.is_leader for now in node.told].count(True) == 1


def test_the_queue_is_bounded() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        futures = [node.log.propose(b"x") for _ in range(4)]
        await asyncio.sleep(0)
        assert [future.done() for future in futures] == [False, False, False, True]
        assert isinstance(futures[3].exception(), NotProposed)
        node.acknowledge(6)
        assert await asyncio.gather(*futures[:3]) == [1, 2, 3]

    alone(scenario, proposals_max=3)


@pytest.mark.parametrize("name", [name for name in vars(FAIL_REASON) if name.isupper() and name != "SUCCESS"])
def test_only_three_reasons_are_definite(name: str) -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        errors: list[Exception | None] = []
        replica = node.log._replica
        assert replica is not None
        replica._answer(lambda _result, error: errors.append(error), None, getattr(FAIL_REASON, name))
        definite = name in {"QUEUE_FULL", "MISSING_LEADER", "REQUEST_DENIED"}
        assert isinstance(errors[0], NotProposed if definite else ProposalUnknown)

    alone(scenario)


def test_one_message_is_outstanding_and_carries_all_that_has_come() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        node.transport.sent.clear()
        futures = []
        for number in range(10):
            futures.append(node.log.propose(b"%d" % number))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        to_two = [message["entries"] for peer, message in node.transport.sent if peer == "n2"]
        assert [len(entries) for entries in to_two] == [1]
        node.acknowledge(4)
        await asyncio.sleep(0)
        to_two = [message["entries"] for peer, message in node.transport.sent if peer == "n2"]
        assert [len(entries) for entries in to_two] == [1, 9]
        node.acknowledge(13)
        assert await asyncio.gather(*futures) == list(range(1, 11))

    alone(scenario)


def test_what_is_never_answered_is_sent_again() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        node.log.propose(b"x").cancel()
        node.transport.sent.clear()
        for _ in range(40):
            node.acknowledge(3)
            await asyncio.sleep(0.05)
        with_it = [message for peer, message in node.transport.sent if peer == "n2" and message["entries"]]
        assert len(with_it) == 2
        assert with_it[0]["entries"] == with_it[1]["entries"]

    alone(scenario)


def test_a_stale_denial_does_not_send_it_forward_again() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        node.acknowledge(3, "n3")
        for number in range(10):
            node.log.propose(b"%d" % number).cancel()
        await asyncio.sleep(0.01)
        node.acknowledge(13, "n3")
        denial = {"type": "next_node_idx", "reset": True, "success": False}
        node.transport.sent.clear()
        node.hear("n3", 1, next_node_idx=5, **denial)
        await asyncio.sleep(0.01)
        node.hear("n3", 1, next_node_idx=11, **denial)  # of a message sent before
        await asyncio.sleep(0.1)
        firsts = [message["prevLogIdx"] for peer, message in node.transport.sent if peer == "n3"]
        assert set(firsts) == {4}

    alone(scenario)


def test_a_long_log_is_replayed_in_slices_and_heartbeats_are_answered_meanwhile() -> None:
    journal = instant_journal()
    journal.add(b"\1", 1, 0)
    for index in range(2, 5002):
        journal.add(b"\0x", index, 1)

    async def scenario(node: Alone) -> None:
        node.heartbeat(prevLogIdx=5001, prevLogTerm=1, commit_index=5001)
        await eventually(lambda: node.machine.commands)
        counts = [len(node.machine.commands)]
        assert counts[0] < 1000
        while len(node.machine.commands) < 5000:
            await asyncio.sleep(0)
            counts.append(len(node.machine.commands))
        assert max(later - earlier for earlier, later in itertools.pairwise(counts)) == 100
        assert node.loop.time() < 0.25

    alone(scenario, journal=journal, apply_entries_max=100)


def test_large_commands_make_small_slices() -> None:
    """A command holds many things to do; a node that is busy with a thousand of them votes for nobody meanwhile."""
    journal = instant_journal()
    journal.add(b"\1", 1, 0)
    for index in range(2, 62):
        journal.add(b"\0" + bytes(999), index, 1)

    async def scenario(node: Alone) -> None:
        node.heartbeat(prevLogIdx=61, prevLogTerm=1, commit_index=61)
        await eventually(lambda: node.machine.commands)
        counts = [len(node.machine.commands)]
        assert counts[0] < 10
        while len(node.machine.commands) < 60:
            await asyncio.sleep(0)
            counts.append(len(node.machine.commands))
        # The third brings it to 3000 bytes.
        assert max(later - earlier for earlier, later in itertools.pairwise(counts)) == 3

    alone(scenario, journal=journal, apply_bytes_max=2500)


# The end.


def test_a_sync_that_fails_stops_the_node() -> None:
    disk = SimulatedDisk(random.Random(1))

    async def scenario(node: Alone) -> None:
        await node.lead()
        disk.fail_at = dict.fromkeys(range(disk.calls + 1, disk.calls + 10), 5)
        with pytest.raises(ProposalUnknown):
            await node.log.propose(b"x")
        await asyncio.sleep(0.01)
        assert [type(error) for error in node.fatal] == [OSError]
        assert node.transport.stopped
        assert node.told[-1] == Leadership(term=1, leader=None, is_leader=False)
        before = len(node.transport.sent)
        await asyncio.sleep(2.0)
        assert len(node.transport.sent) == before

    alone(scenario, journal=instant_journal(disk))


class Disks:
    """n1's disk, whose writer is the test."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk(random.Random(1))
        self.pump = ManualPump()
        settings = JournalSettings(segments=SegmentSettings(preallocate_bytes=0))
        self.journal = RaftJournal(self.disk, DurableJournal(self.disk, settings), lambda: self.pump)


def test_a_vote_is_asked_for_and_given_once_it_is_durable() -> None:
    disks = Disks()

    async def scenario(node: Alone) -> None:
        disks.pump.settle()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not node.log.joining()
        node.hear("n2", 1, type="request_vote", term=1, last_log_index=1, last_log_term=0)
        await asyncio.sleep(0.01)
        assert not node.transport.said("response_vote")
        disks.pump.settle()
        assert node.transport.said("response_vote") == [{"type": "response_vote", "term": 1}]
        while node.log.leadership().term < 2:  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.01)
        assert not node.transport.said("request_vote")
        disks.pump.settle()
        assert [message["term"] for message in node.transport.said("request_vote")] == [2, 2]

    alone(scenario, journal=disks.journal)


async def _lead_by_hand(node: Alone, disks: Disks) -> None:
    while not node.transport.said("request_vote"):
        await asyncio.sleep(0.01)
        disks.pump.settle()
    node.hear("n2", 1, type="response_vote", term=1)
    assert node.log.leadership().is_leader


def test_a_leader_counts_itself_when_its_own_copy_is_durable() -> None:
    disks = Disks()

    async def scenario(node: Alone) -> None:
        await _lead_by_hand(node, disks)
        future = node.log.propose(b"x")
        await asyncio.sleep(0.01)
        node.acknowledge(4)
        await asyncio.sleep(0.01)
        assert not future.done()
        disks.pump.settle()
        assert await future == 1

    alone(scenario, journal=disks.journal)


def test_two_followers_are_a_majority_without_the_leader() -> None:
    disks = Disks()

    async def scenario(node: Alone) -> None:
        await _lead_by_hand(node, disks)
        future = node.log.propose(b"x")
        await asyncio.sleep(0.01)
        node.acknowledge(4)
        node.acknowledge(4, "n3")
        assert await future == 1

    alone(scenario, journal=disks.journal)


def test_what_a_follower_holds_it_says_once_that_is_durable() -> None:
    disks = Disks()

    async def scenario(node: Alone) -> None:
        node.heartbeat()
        disks.pump.settle()
        node.transport.sent.clear()
        node.heartbeat(entries=((b"\0x", 2, 1),))
        await asyncio.sleep(0.01)
        assert not node.transport.said("next_node_idx"), "it will be there before the leader speaks again, as a rule"
        node.heartbeat(prevLogIdx=2, prevLogTerm=1)
        assert [message["success"] for message in node.transport.said("next_node_idx")] == [False]
        disks.pump.settle()
        assert [message["success"] for message in node.transport.said("next_node_idx")] == [False, True]

    alone(scenario, journal=disks.journal)


def test_no_more_is_taken_than_the_disk_can_keep_up_with() -> None:
    disks = Disks()

    async def scenario(node: Alone) -> None:
        await _lead_by_hand(node, disks)
        futures = [node.log.propose(bytes(100)) for _ in range(20)]
        await asyncio.sleep(0.01)
        with pytest.raises(NotProposed, match="does not keep up"):
            await node.log.propose(b"one more")
        disks.pump.settle()
        assert node.log.propose(b"again").cancel()
        assert any(future.done() for future in futures)

    alone(scenario, journal=disks.journal, unsynced_bytes_max=1000)


def test_a_leader_whose_disk_is_full_lets_another_lead_until_there_is_room() -> None:
    disks = Disks()

    async def scenario(node: Alone) -> None:
        await _lead_by_hand(node, disks)
        disks.pump.settle()
        disks.disk.room = 0
        opened = node.log.propose(bytes(9000))
        await asyncio.sleep(0.01)
        disks.pump.settle()
        assert node.log.trouble is not None
        assert not node.log.leadership().is_leader
        assert node.transport.said("timeout_now")
        with pytest.raises(ProposalUnknown):
            await opened
        node.transport.sent.clear()
        await asyncio.sleep(3.0)
        assert not node.transport.said("request_vote")
        assert node.log.leadership().term == 1, "it does not campaign"
        node.heartbeat(2, "n3")
        assert not [message for message in node.transport.said("next_node_idx") if message["success"]]
        disks.disk.room = None
        disks.pump.settle()
        assert node.log.trouble is None
        assert [message["success"] for message in node.transport.said("next_node_idx")] == [True]
        while not node.transport.said("request_vote"):
            await asyncio.sleep(0.01)
            disks.pump.settle()
        assert not node.fatal

    alone(scenario, journal=disks.journal)


def test_nobody_is_handed_over_to_where_nobody_is() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        node.log.propose(b"open").cancel()
        handover = asyncio.get_running_loop().create_task(node.log.transfer())
        await asyncio.sleep(0)
        began_s = node.loop.time()
        node.transport.peers = frozenset()
        assert not await handover
        assert node.loop.time() - began_s < 0.1
        assert not await node.log.transfer()

    alone(scenario)


def test_logs_that_have_diverged_stop_the_node() -> None:
    async def scenario(node: Alone) -> None:
        entries = ((b"\0x", 2, 1), (b"\0y", 3, 1))
        node.heartbeat(1, entries=entries, commit_index=3)
        await asyncio.sleep(0.01)
        assert node.machine.commands == [b"x", b"y"]
        node.heartbeat(2, "n3", prevLogIdx=2, prevLogTerm=1, entries=((b"\0z", 3, 2),))
        await asyncio.sleep(0.01)
        assert [type(error) for error in node.fatal] == [LogDiverged]
        assert node.journal[-1] == (b"\0y", 3, 1)

    alone(scenario)


def test_a_handover_is_bounded() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        opened = node.log.propose(b"x")
        began_s = node.loop.time()
        handover = asyncio.get_running_loop().create_task(node.log.transfer())
        await asyncio.sleep(0)
        with pytest.raises(NotProposed, match="hands leadership over"):
            await node.log.propose(b"y")
        while not handover.done():
            node.acknowledge(3)  # the target never holds all
            await asyncio.sleep(0.05)
        assert not handover.result()
        assert 1.99 < node.loop.time() - began_s < 2.1
        node.acknowledge(4)
        assert await opened == 1
        assert not node.transport.said("timeout_now")

    alone(scenario)


def test_a_handover_to_who_does_not_take_it_goes_on_here() -> None:
    async def scenario(node: Alone) -> None:
        await node.lead()
        handover = asyncio.get_running_loop().create_task(node.log.transfer())
        while not handover.done():
            node.acknowledge(3)
            await asyncio.sleep(0.05)
        assert not handover.result()
        assert node.transport.said("timeout_now")
        node.log.propose(b"x").cancel()
        assert node.log.leadership().is_leader

    alone(scenario)


@pytest.mark.parametrize(
    "changed",
    [
        {"heartbeat_s": 0.1},
        {"election_spread_s": 0.2},
        {"death_step_s": 0.2},
        {"leader_fallback_s": 0.2},
        {"proposal_timeout_s": 0.5},
        {"tick_s": 0.06},
        {"stall_s": 0.005},
        {"max_command_bytes": 0},
    ],
)
def test_settings_know_their_relations(changed: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        replace(RaftSettings(), **changed)


def test_a_transport_must_carry_the_largest_message() -> None:
    transport = ByHand()
    transport.frame_bytes_max = RaftSettings().message_bytes_max - 1
    with pytest.raises(AssertionError):
        RaftLog(node="n1", peers=["n2"], transport=transport, journal=instant_journal)
