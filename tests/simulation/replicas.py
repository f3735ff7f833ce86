"""Three nodes over a simulated network, what must hold of them, and known-bad variants that must be caught."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

from pysyncobj import syncobj as stock
from pysyncobj.journal import MemoryJournal

from cluster.replication.guard import Guard, LogView, Message, Verdict
from cluster.replication.log import Leadership, NotProposed, ProposalUnknown
from cluster.replication.raft import RaftLog, Replica
from tests.simulation.network import Network, SimulatedTransport
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

    _SyncObj__sendAppendEntries = stock.SyncObj._SyncObj__sendAppendEntries
    _SyncObj__onBecomeLeader = stock.SyncObj._SyncObj__onBecomeLeader

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.conf.appendEntriesUseBatch = False
        self.conf.appendEntriesBatchSizeBytes = 500

    def _acknowledged(self, sender: Any, message: Message) -> None:
        self._SyncObj__onMessageReceived(sender, message)

    def turn(self) -> None:
        self.doTick()

    def tell_commits(self) -> None:
        pass


class StockRaftLog(RaftLog):
    _replica_type = StockReplica


class Recorder:
    """A state machine that remembers."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []

    def apply(self, command: bytes) -> object:
        self.commands.append(command)
        return len(self.commands)

    def snapshot(self) -> Callable[[], bytes]:
        raise NotImplementedError

    def restore(self, state: bytes) -> None:
        raise NotImplementedError


class Cluster:
    """Three replicas, their clients, and their history."""

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        *,
        log_type: type[RaftLog] = RaftLog,
        guard_type: type[Guard] = Guard,
        unruly: bool = False,
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.network = Network(loop, rng, unruly=unruly)
        self.journals = {node: MemoryJournal() for node in NODES}
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
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, node: str) -> None:
        log = self._log_type(
            node=node,
            peers=[other for other in NODES if other != node],
            transport=SimulatedTransport(self.network, node),
            journal=lambda: self.journals[node],
            clock=self.loop,
            guard=self._guard_type(),
            on_fatal=lambda error: self.fatal.append(f"{node}: {error!r}"),
        )
        self.machines[node] = Recorder()
        self.logs[node] = log
        await log.start(self.machines[node], lambda now: self._led(node, now))

    async def kill(self, node: str) -> None:
        """At once: what it had sent is under way, what its journal holds stays."""
        await self.logs.pop(node).stop()

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
            self.proposed += 1
            command = b"%06d" % self.proposed + b"." * 194
            client = self.loop.create_task(self._client(self.logs[leader], command))
            self._clients.add(client)
            client.add_done_callback(self._clients.discard)

    async def settle(self, limit_s: float = 20.0) -> bool:
        """Heal everything, and wait until every node has applied one more command; False: they never did."""
        self.network.heal()
        for node in NODES:
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
            held = {entry[0][1:] for entry in self.journals[leader][:]}
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
