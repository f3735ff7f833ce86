"""Three nodes over a simulated network, what must hold of them, and known-bad variants that must be caught."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from pysyncobj import syncobj as stock

from cluster.replication import raft
from cluster.replication.compaction import Compaction
from cluster.replication.disk import File
from cluster.replication.guard import Guard, LogView, Message, Verdict
from cluster.replication.holdback import ACKNOWLEDGEMENT, VOTES, HoldBack
from cluster.replication.journal import DurableJournal
from cluster.replication.log import CannotStart, Leadership, NotProposed, ProposalUnknown
from cluster.replication.raft import Replica
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.raft_log import RaftLog
from cluster.replication.settings import RaftSettings
from cluster.replication.snapshot import Snapshots
from cluster.replication.standing import Standing
from tests.simulation.disk import SimulatedDisk
from tests.simulation.network import Network, SimulatedTransport
from tests.simulation.pumps import SMALL, SlowPump
from tests.simulation.virtual import VirtualLoop

NODES = ("n1", "n2", "n3")


class NoGuard(Guard):
    """Known bad: pysyncobj gets messages as they come."""

    def append(self, message: Message, view: LogView) -> Verdict:
        return Verdict(message=message)

    def counts_acknowledgement(self, message: Message, sender_term: int, view: LogView) -> bool:
        return True

    def counts_vote(self, message: Message, voter: str) -> bool:
        return True


class StockReplica(Replica):
    """Sends as pysyncobj does: each command at once, and again from wherever an answer says."""

    _SyncObj__getEntries = stock.SyncObj._SyncObj__getEntries
    _SyncObj__sendAppendEntries = stock.SyncObj._SyncObj__sendAppendEntries
    _SyncObj__onBecomeLeader = stock.SyncObj._SyncObj__onBecomeLeader

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.conf.appendEntriesUseBatch = False
        self.conf.appendEntriesBatchSizeBytes = 500

    def _acknowledged(self, sender: Any, message: Message) -> None:
        self._SyncObj__onMessageReceived(sender, message)

    def _SyncObj__applyLogEntries(self) -> bool:  # noqa: N802 - pysyncobj's
        applied = self.applied_index
        super()._SyncObj__applyLogEntries()
        if self._isLeader() and self.applied_index > applied:
            self._SyncObj__sendAppendEntries()
        return False

    def send_eagerly(self) -> None:
        pass

    def tell_commits(self) -> None:
        pass


class StockRaftLog(RaftLog):
    _replica_type = StockReplica


class HastyHoldBack(HoldBack):
    """Known bad: acknowledges before the sync."""

    def needs(self, message: Message) -> int:
        return 0 if message["type"] == ACKNOWLEDGEMENT else super().needs(message)


class ForgetfulHoldBack(HoldBack):
    """Known bad: votes, and asks for votes, before that is durable."""

    def needs(self, message: Message) -> int:
        return 0 if message["type"] in VOTES else super().needs(message)


class HastyReplica(Replica):
    _hold_back_type = HastyHoldBack


class ForgetfulReplica(Replica):
    _hold_back_type = ForgetfulHoldBack


class VainReplica(Replica):
    """Known bad: a leader that counts itself before its own sync."""

    def _own_match_index(self) -> int:
        return self.last_index


class HastyRaftLog(RaftLog):
    _replica_type = HastyReplica


class ForgetfulRaftLog(RaftLog):
    _replica_type = ForgetfulReplica


class VainRaftLog(RaftLog):
    _replica_type = VainReplica


class HeedlessCompaction(Compaction):
    """Known bad: compacts the log without a snapshot."""

    def take_if_due(self, now_s: float) -> None:
        if self._replica.applied_index > self._settings.snapshot_log_entries:
            self._replica.compact(self._replica.applied_index)


class HeedlessRaftLog(RaftLog):
    _compaction_type = HeedlessCompaction


class UnsyncedSnapshots(Snapshots):
    """Known bad: a snapshot gets its name before it is synced."""

    def _sync(self, file: File) -> None:
        pass


class UnsyncedRaftLog(RaftLog):
    _snapshots_type = UnsyncedSnapshots


class EagerStanding(Standing):
    """Known bad: an empty node votes and acknowledges at once."""

    @property
    def is_voter(self) -> bool:
        return True


class GullibleStanding(Standing):
    """Known bad: an entry from before it lost its disk makes a node a voter."""

    def admits(self, node: str, nonce: bytes) -> bool:
        return not self.is_voter and node == self._node


class RashStanding(Standing):
    """Known bad: whoever is connected is enough to found a cluster."""

    def may_found(self, connected: AbstractSet[str], *, history: bool) -> bool:
        heard = [self._heard.get(peer) for peer in connected]
        fresh = [one for one in heard if one is not None and not one.history]
        return not self.is_voter and not history and bool(fresh)

    def say(self, peer: str, *, history: bool) -> Message:
        return super().say(peer, history=history) | {"history": history}


class ImpatientReplica(Replica):
    """Known bad: a node counts as soon as it has the entry, and does not wait until others have it."""

    def receive(self, sender: Any, sender_term: int, message: Message) -> None:
        super().receive(sender, sender_term, message)
        for command, _index, _term in message.get("entries", ()):
            if command[0] == raft._JOINED:
                self._SyncObj__doApplyCommand(command)


class EagerRaftLog(RaftLog):
    _standing_type = EagerStanding


class GullibleRaftLog(RaftLog):
    _standing_type = GullibleStanding


class RashRaftLog(RaftLog):
    _standing_type = RashStanding


class ImpatientRaftLog(RaftLog):
    _replica_type = ImpatientReplica


class Recorder:
    """A state machine that remembers."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []
        self.restored = 0

    def apply(self, command: bytes) -> object:
        self.commands.append(command)
        return len(self.commands)

    def snapshot(self) -> Callable[[], Iterator[bytes]]:
        frozen = list(self.commands)

        def encode() -> Iterator[bytes]:
            yield b"%d" % len(frozen)
            yield from (command + b"." for command in frozen)

        return encode

    def restore(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        count, *commands = [bytes(piece) for piece in pieces]
        assert len(commands) == int(count)

        def put() -> object:
            replaced, self.commands = self.commands, [command[:-1] for command in commands]
            self.restored += 1
            return replaced

        return put


class Cluster:
    """Three replicas, or more, their clients, and their history."""

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        *,
        log_type: type[RaftLog] = RaftLog,
        guard_type: type[Guard] = Guard,
        sync_s: tuple[float, float] = (0.0001, 0.003),
        unruly: bool = False,
        nodes: tuple[str, ...] = NODES,
        **settings: Any,
    ) -> None:
        self.nodes = nodes
        self.loop = loop
        self.rng = rng
        self.network = Network(loop, rng, unruly=unruly)
        self.disks = {node: SimulatedDisk(random.Random(rng.random()), where=f"/{node}") for node in nodes}
        self.pumps: dict[str, SlowPump] = {}
        self.journals: dict[str, RaftJournal] = {}
        self.logs: dict[str, RaftLog] = {}
        self.machines: dict[str, Recorder] = {}
        self.acknowledged: list[bytes] = []
        self.refused: list[bytes] = []
        self.leaders: dict[int, set[str]] = {}
        self.fatal: list[str] = []
        self.proposed = 0
        # Sending as pysyncobj does, a cluster whose logs differ by more than one message may never come to rest.
        self.must_settle = log_type is RaftLog
        self._log_type = log_type
        self._guard_type = guard_type
        usual = {
            # Sending as pysyncobj does knows its own snapshots only, which nobody takes.
            "snapshot_log_entries": 100_000 if issubclass(log_type, StockRaftLog) else rng.choice((8, 40, 100_000)),
            "snapshot_piece_bytes": rng.choice((300, 5_000)),
        }
        self.settings = RaftSettings(**(usual | settings))
        self._sync_s = sync_s
        self.powerless = 0
        self.installed = 0
        self.cramped = 0
        self.lost = 0
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, node: str, *, rejoin: bool = False) -> None:
        log = self._log_type(
            node=node,
            peers=[other for other in self.nodes if other != node],
            transport=SimulatedTransport(self.network, node),
            journal=lambda: self._open(node),
            settings=self.settings,
            clock=self.loop,
            guard=self._guard_type(),
            on_fatal=lambda error: self.fatal.append(f"{node}: {error!r}"),
            rejoin=rejoin,
        )
        self.machines[node] = Recorder()
        self.logs[node] = log
        try:
            await log.start(self.machines[node], lambda now: self._led(node, now))
        except CannotStart as error:
            self.fatal.append(f"{node} cannot start: {error}")

    async def kill(self, node: str, *, power: bool | None = None) -> None:
        """At once: what it had sent is under way, what its disk was given stays, unless the power goes too."""
        if power or (power is None and self.rng.random() < 0.5):
            self.powerless += 1
            self.disks[node].lose_power()
        else:
            self.disks[node].kill()
        self.installed += self.machines[node].restored
        self.pumps[node].stop()
        await self.logs.pop(node).stop()

    async def lose_disk(self, node: str) -> None:
        """It dies, and its next life begins with nothing."""
        if node in self.logs:
            await self.kill(node)
        self.lost += 1
        self.disks[node] = SimulatedDisk(random.Random(self.rng.random()), where=f"/{node}")

    def _open(self, node: str) -> RaftJournal:
        """Its journal, in a new life."""
        pump = self.pumps[node] = SlowPump(self.loop, random.Random(self.rng.random()), sync_s=self._sync_s)
        disk = self.disks[node]
        journal = self.journals[node] = RaftJournal(
            disk, DurableJournal(disk, SMALL, new_id=lambda: node.encode().ljust(16)), lambda: pump
        )
        return journal

    def leader(self) -> str | None:
        """Who leads the highest term."""
        leading = [(log.leadership().term, node) for node, log in self.logs.items() if log.leadership().is_leader]
        return max(leading)[1] if leading else None

    async def until(self, condition: Callable[[], object], limit_s: float = 20.0) -> None:
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110 - virtual time costs nothing
                await asyncio.sleep(0.002)

    def propose(self) -> None:
        """One more command, to whoever leads."""
        leader = self.leader()
        if leader is not None:
            self.propose_to(leader)

    def propose_to(self, node: str) -> None:
        """One more command, to this node."""
        self.proposed += 1
        command = b"%06d" % self.proposed + b"." * 194
        client = self.loop.create_task(self._client(self.logs[node], command))
        self._clients.add(client)
        client.add_done_callback(self._clients.discard)

    async def settle(self, limit_s: float = 20.0) -> bool:
        """Heal everything, and wait until every node has applied one more command; False: they never did."""
        self.network.heal()
        for node in self.nodes:
            if node not in self.logs:
                await self.start(node)
        if self._clients:
            await asyncio.wait(set(self._clients))
        marker = b"the end"
        end_s = self.loop.time() + limit_s
        while not all(marker in machine.commands for machine in self.machines.values()):
            if self.loop.time() > end_s or self.fatal:
                return False
            leader = self.leader()
            if leader is not None:
                with contextlib.suppress(NotProposed, ProposalUnknown):
                    await self.logs[leader].propose(marker)
            await asyncio.sleep(0.5)
        return True

    def violations(self) -> list[str]:
        """What must never be, and is."""
        found = [*self.fatal]
        found += [f"term {term} has the leaders {sorted(who)}" for term, who in self.leaders.items() if len(who) > 1]
        reference = max((machine.commands for machine in self.machines.values()), key=len)
        for node, machine in sorted(self.machines.items()):
            if machine.commands != reference[: len(machine.commands)]:
                found.append(f"{node} has applied another history")
            ghosts = set(self.refused) & set(machine.commands)
            if ghosts:
                found.append(f"{node} has applied what it was said would never be: {_numbers(ghosts)}")
        once = [command for command in reference if command != b"the end"]
        if len(once) != len(set(once)):
            found.append("a command was applied twice")
        leader = self.leader()
        if leader is not None:
            held = {entry[0][1:] for entry in self.journals[leader][:]} | set(self.machines[leader].commands)
            lost = set(self.acknowledged) - held
            if lost:
                found.append(f"{leader} leads without {len(lost)} acknowledged commands: {_numbers(lost)}")
        return found

    async def _client(self, log: RaftLog, command: bytes) -> None:
        try:
            await log.propose(command)
        except NotProposed:
            self.refused.append(command)
        except ProposalUnknown:
            pass
        else:
            self.acknowledged.append(command)

    def _led(self, node: str, now: Leadership) -> None:
        if now.is_leader:
            self.leaders.setdefault(now.term, set()).add(node)


def _numbers(commands: set[bytes]) -> str:
    return " ".join(sorted(command[:6].decode() for command in commands))
