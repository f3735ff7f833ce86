"""Real classes that tell the checkers what they do, and change nothing."""

import errno
from collections.abc import Callable
from typing import Any

from cluster.replication.raft_journal import RaftJournal
from cluster.replication.raft_log import RaftLog
from coordinator.facts import Applied
from coordinator.ledger import Ledger
from coordinator.node import Node
from tests.simulation.bank import USUAL_SYNC_S
from tests.simulation.disk import SimulatedDisk
from tests.simulation.machines import LIFE, SimLoop


def watched_log(world: Any, base: type[RaftLog]) -> type[RaftLog]:
    """`base`, whose replica tells of elections and of what it applies."""
    replica_type: Any = base._replica_type

    class WatchedReplica(replica_type):
        def _SyncObj__doApplyCommand(self, command: bytes) -> object:  # noqa: N802 - pysyncobj's
            index = self.applied_index + 1
            term = self.term_at(index)
            result = super()._SyncObj__doApplyCommand(command)
            world.hear("applied_index", self._SyncObj__selfNode.id, index, term, command, result)
            return result

        def _SyncObj__onBecomeLeader(self) -> None:  # noqa: N802
            node = self._SyncObj__selfNode.id
            world.note(node, f"leads term {self.term}, its log ends with {self.last_index}")
            world.hear("leads", node, world.machines[node].lives, self.term, self._journal)
            super()._SyncObj__onBecomeLeader()

    class WatchedLog(base):  # type: ignore[valid-type, misc]
        _replica_type = WatchedReplica

    return WatchedLog


def watched_journal(world: Any, node: str, base: type[RaftJournal]) -> type[RaftJournal]:
    """`base`, which tells of entries."""

    class WatchedJournal(base):  # type: ignore[valid-type, misc]
        def add(self, command: bytes, idx: int, term: int) -> None:
            world.hear("appended", node, idx, term, self.term_at(idx - 1), command)
            super().add(command, idx, term)

    return WatchedJournal


def watched_ledger(world: Any, node: str, base: type[Ledger]) -> type[Ledger]:
    """`base`, which tells of outcomes."""

    class WatchedLedger(base):  # type: ignore[valid-type, misc]
        def apply(self, command: bytes) -> list[Applied]:
            results: list[Applied] = super().apply(command)
            for result in results:
                world.hear("applied", node, result)
                txn = result.txn
                if txn is not None and txn.decision is not None:
                    outcome = "committed" if txn.decision.value == "commit" else "aborted"
                    world.hear("saw", txn.gid, outcome, f"applied on {node}")
                if world.tracing:
                    gid = getattr(result.entry, "gid", "")
                    extra = getattr(result.entry, "decision", "")
                    world.note(node, f"applied {type(result.entry).__name__} {gid} {extra} {result.verdict.name}")
            return results

        def restore(self, pieces: Any) -> Any:
            put = super().restore(pieces)

            def replaced() -> object:
                before = put()
                world.note(node, "a snapshot is its state now")
                world.hear("restored", node, self)
                return before

            return replaced

    return WatchedLedger


def watched_node(world: Any, node: str, base: type[Node]) -> type[Node]:
    """`base`, with such a ledger."""

    class WatchedNode(base):  # type: ignore[valid-type, misc]
        _ledger_type = watched_ledger(world, node, base._ledger_type)

    return WatchedNode


class NodeDisk(SimulatedDisk):
    """A disk whose owner dies when it does."""

    crash_power = True
    was_lost = False
    down_s = 1.0
    sync_s = USUAL_SYNC_S

    def __init__(self, world: Any, node: str, rng: Any) -> None:
        super().__init__(rng, where=f"/{node}")
        self._world = world
        self._node = node
        self.torn = 0
        self.strikes: dict[int, Callable[[], None]] = {}
        """By the number of a call in which it is to die, or that is to fail: who is told when that happens."""

    def replaced(self) -> None:
        """Another one, with nothing on it."""
        for name in list(self._names):
            self.remove(name)
        self._platter, self._pending = {}, []
        self.was_lost = True

    def lose_power(self) -> None:
        if any(inode.dirty for inode in self._names.values()):
            self._world.net.count("power cuts with something unsynced")
        super().lose_power()

    def call(self, what: str, name: str, effect: Any, partly: Any = None) -> None:
        self.history.clear()
        if self._world.tracing:
            self._world.note(self._node, f"disk {what} {name}", fine=True)
        number = self.calls + 1
        dies = number == self.crash_at and not self._dead
        if self.strikes and not self._dead and (dies or number in self.fail_at):
            self.strikes.pop(number)()
        try:
            super().call(what, name, effect, partly)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._world.net.count("writes that found no room")
            raise
        finally:
            if dies:
                self.torn += what == "write"
                self._world.dies_now(self._node, power=self.crash_power, down_s=self.down_s, doing=what)


class Pump:
    """Rounds of a journal's writer under virtual time, as fast as the disk is."""

    def __init__(self, loop: SimLoop, disk: NodeDisk) -> None:
        self._loop = loop
        self._disk = disk
        self._round: Any = None
        self._timer: Any = None

    def start(self, round_: Any) -> None:
        self._round = round_
        self.wake()

    def wake(self) -> None:
        if self._timer is None and self._round is not None:
            self._timer = self._loop.call_later(self._disk.rng.uniform(*self._disk.sync_s), self._work)

    def post(self, callback: Any) -> None:
        self._loop.call_later(self._disk.rng.uniform(0.00001, 0.0005), self._report, callback)

    def _report(self, callback: Any) -> None:
        if self._round is not None:
            callback()

    def stop(self) -> None:
        self._round = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _work(self) -> None:
        self._timer = None
        if self._round is None:
            return
        delay_s = self._round()
        life = LIFE.get()
        if life is None or not life.alive:
            return
        if delay_s == 0:
            self.wake()
        elif delay_s is not None and self._timer is None:
            self._timer = self._loop.call_later(delay_s, self._work)
