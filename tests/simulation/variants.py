"""Rules that are wrong, each in one way. A checker that has never failed proves nothing: each must catch some of these.

A variant replaces one thing in the world and leaves the rest alone; `VARIANTS` says which checkers must notice.
`often` adds faults to each plan, so that the moment in which it matters comes often enough.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.replication.guard import Guard, LogView, Message, Verdict
from cluster.replication.log import NotProposed, ProposalUnknown
from cluster.replication.raft import Replica
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.raft_log import RaftLog
from coordinator.driver import Driver
from coordinator.facts import Knowledge
from coordinator.floors import Floors
from coordinator.ledger import Ledger
from coordinator.node import Node
from coordinator.protocol.entries import Begun, Decided
from coordinator.protocol.messages import ENLISTED_PAYLOAD, Commit, Prepare, Prepared, Vote
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import Decision
from coordinator.rows import Keys
from participants import resource
from participants.resource import Branch, Horizon, State, Step
from tests.model.variants import NoFence
from tests.simulation.bank import Bank
from tests.simulation.faults import (
    Fault,
    Miss,
    Plan,
    bank_dies_on_a_slow_disk,
    blackout_in_an_election,
    blackout_on_slow_disks,
    deposed_again_and_again,
    deposed_on_slow_disks,
    drawn,
    drawn_disaster,
    in_order,
    leader_forgets_alone,
    refused_while_late,
    struck,
)
from tests.simulation.injection import Injector, Tell
from tests.simulation.recovery import Recovery
from tests.simulation.replicas import (
    ForgetfulRaftLog,
    HastyRaftLog,
    HeedlessRaftLog,
    NoGuard,
    StockRaftLog,
    VainRaftLog,
)
from tests.simulation.world import Classes

# ------------------------------------------------------------------------------------------------ replication


class BlindGuard(Guard):
    """A follower takes entries whose predecessor it does not have."""

    def append(self, message: Message, view: LogView) -> Verdict:
        previous = message.get("prevLogIdx")
        if previous is not None and message["term"] >= view.term:
            own = view.term_at(previous)
            if own is not None and own != message["prevLogTerm"] and previous > view.commit_index:
                message = message | {"prevLogTerm": own}
        return super().append(message, view)


class CompactsInPlace(RaftJournal):
    """What is kept of the log is written anew where it stood, and not synced: pysyncobj's own way."""

    def release(self, index: int) -> None:
        super().release(index)
        disk: Any = self.disk
        for name in sorted(disk._names):
            if name.endswith(".segment"):
                inode, content = disk._names[name], disk.content(name)
                inode.put(0, bytes(len(content)))
                inode.put(0, content)


class ForwardingLog(RaftLog):
    """As pysyncobj comes: what could not be proposed, or was lost, is proposed again when the node leads again."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._stale: list[tuple[int, bytes]] = []
        """What an earlier term was asked for."""

    def propose(self, command: bytes) -> Any:
        term = self.leadership().term
        future = super().propose(command)

        def failed(done: Any) -> None:
            if not done.cancelled() and isinstance(done.exception(), NotProposed | ProposalUnknown):
                self._stale.append((term, command))

        future.add_done_callback(failed)
        return future

    def _turn(self) -> None:
        super()._turn()
        replica = self._replica
        if self._stale and replica is not None and replica._isLeader() and replica.applied_index == replica.last_index:
            stale = [command for term, command in self._stale if term < replica.term]
            self._stale = [each for each in self._stale if each[0] >= replica.term]
            for command in stale:
                super().propose(command).add_done_callback(lambda done: done.exception())


class NoEpochs(NoFence):
    """The ledger heeds no epochs, and so not the order of gids that rests on them."""

    def _newest(self) -> int:
        return -1


# ------------------------------------------------------------------------------------------------ coordinator


class UnknownIsAborted(Ledger):
    """Whatever is not known to be committed is said to be aborted."""

    def knowledge(self, text: str) -> Knowledge:
        known = super().knowledge(text)
        return Knowledge.ABORTED if known in (Knowledge.UNDECIDED, Knowledge.ASK_LEADER) else known


class SnapshotsWithoutKeys(Ledger):
    """A snapshot does not bring back which keys were used."""

    def restore(self, pieces: Any) -> Any:
        put = super().restore(pieces)

        def put_without() -> object:
            replaced = put()
            self.keys = Keys()
            return replaced

        return put_without


class AnswersFromVotes(Driver):
    """All votes are in: the participants are told to commit before the decision is in the log."""

    def _consider(self, running: Any) -> None:
        txn = running.txn
        if txn.decision is None and running.wish is None:
            wish = PROTOCOLS[txn.protocol].decide(txn, running.tally, expired=running.expired)
            if isinstance(wish, Decided) and wish.decision is Decision.COMMIT:
                for branch in txn.branches:
                    participant = self._ledger.participants[branch.participant]
                    self._courier.send(participant, Commit(gid=txn.gid, branch=branch.name))
        super()._consider(running)


class NewBroom(Driver):
    """A new leader minds what is begun under it, and nothing else."""

    def _adopt(self, txn: Any) -> None:
        if txn.epoch == self._epoch:
            super()._adopt(txn)


class TakesTheWord(Driver):
    """An application says that its branches are prepared, and is believed."""

    def _perform(self, running: Any) -> None:
        super()._perform(running)
        txn = running.txn
        if not txn.active and txn.decision is None:
            for branch in txn.branches:
                if branch.payload == ENLISTED_PAYLOAD:
                    running.tally = running.tally.heard(Prepared(gid=txn.gid, branch=branch.name))


class HeldByNobody(Floors):
    """Floors rise above transactions that may yet come to name anybody."""

    def opened(self, number: int) -> None:
        pass


class NothingHoldsFloors(Driver):
    """Its floors are such."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._floors = HeldByNobody(self._ledger)


class WaitsForNobody(Driver):
    """A leader writes what it understands itself."""

    def _understood(self) -> int:
        return self._config.compatibility.announced


class AsksNobody(Ledger):
    """A copy is taken for all that ever was: nothing came after it."""

    def _install(self, header: Any, entry: Any) -> Any:
        result = super()._install(header, entry)
        self.lost = None
        return result


class JudgesKeysEarly(Ledger):
    """A key is looked up when a request comes in, and not when it is applied."""

    def _begin(self, header: Any, entry: Begun) -> Any:
        held = None if entry.key is None else self.keys.get(entry.key)
        if held is not None:
            del self.keys[entry.key]
        return super()._begin(header, entry)


def _node(**types: Any) -> type[Node]:
    return type("Variant", (Node,), types)


# ------------------------------------------------------------------------------------------------ participants


def _keeps_no_tombstone(branch: Branch, horizon: Horizon, message: Any, stamp: Any) -> Step:
    if branch.state is State.ABORTED and type(message) is Prepare:
        branch = Branch()
    return resource.receive(branch, horizon, message, stamp)


class NoTombstones(Bank):
    """To a prepare, an aborted branch is as good as a new one."""

    receive = staticmethod(_keeps_no_tombstone)


class LetsInLatePrepares(Bank):
    """An application prepares whenever it likes: nobody looks whether an abort was here before."""

    may_prepare = staticmethod(lambda branch, _gid, _horizon: branch.state is not State.PREPARED)


class VotesBeforeSync(Bank):
    """The vote leaves before the record of it is durable."""

    syncs_votes = False


class KeepsLocks(Bank):
    """An abort does not give back what was locked."""

    def _end(self, key: Any) -> None:
        account, _amount = self.tables["redo"][key]
        kept = self.tables["locks"].get(account)
        super()._end(key)
        if key not in self.tables["marks"]:
            self._put("locks", account, kept)


class KeepsHalf(Bank):
    """What is credited above 20 is less by one."""

    @staticmethod
    def _wish(payload: bytes) -> tuple[str, int]:
        account, amount = Bank._wish(payload)
        return account, amount - (amount > 20)


class LosesMarks(Bank):
    """A commit that comes twice is not done once more, but the first one is not always done."""

    def _end(self, key: Any) -> None:
        account, amount = self.tables["redo"][key]
        if key in self.tables["marks"] and amount % 7 == 0:
            self._put("marks", key, None)
            self._put("balances", account, self.tables["balances"][account] - amount)
        super()._end(key)


class Breaks(Bank):
    """It has a defect, which is not a disk that fails."""

    async def _work(self, key: Any, payload: bytes) -> Vote:
        if self._rng.random() < 0.05:
            raise KeyError("a defect of a bank")
        return await super()._work(key, payload)


# ------------------------------------------------------------------------------------------------ what stops


class StumblesReplica(Replica):
    """A turn fails, for a reason that no fault explains."""

    def turn(self) -> None:
        if self.applied_index > 20:
            raise KeyError("a defect of a turn")
        super().turn()


class Stumbles(RaftLog):
    """Its replica does."""

    _replica_type = StumblesReplica


class TripsAtTheEnd(Node):
    """It has stopped, and its last step fails: whoever waits for its end is not told of it."""

    async def stop(self) -> None:
        await super().stop()
        raise KeyError("a defect of a stop")


# ------------------------------------------------------------------------------------------------ the simulation


class NothingPauses(Injector):
    """Some faults of the plan are left out."""

    def _happen(self, fault: Fault) -> None:
        if fault.kind != "pause":
            super()._happen(fault)


class HitsNobody(Injector):
    """Some miss, and are said to have had no chance."""

    def inject(self, fault: Fault, who: str, tell: Tell) -> None:
        if fault.kind == "snapshot":
            tell(Miss.NOT_STARTED)
        else:
            super().inject(fault, who, tell)


class NothingIsLost(Recovery):
    """The disaster does not come, and nobody says so."""

    async def run(self) -> None:
        pass


class CannotReadCopies(Recovery):
    """It ends by an exception before anything is lost."""

    async def _until(self, at_s: float) -> None:
        raise KeyError("a defect of a recovery")


# ------------------------------------------------------------------------------------------------ where they show


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is wrong, what makes it show, and who must notice: all of `caught_by`, each in some seed."""

    classes: Classes
    caught_by: tuple[str, ...]
    often: tuple[str | Callable[[random.Random, float], list[Fault]], ...] = ()
    """Kinds of faults, and combinations of them, that are added."""
    disaster: bool = False
    """Whether every run has one."""
    says: str = ""
    """What a complaint must hold to count."""
    first: int = 0
    """The seed to begin with; it showed there last, and when it does not any more, others will be found."""

    def plan(self, plan: Plan) -> Plan:
        """The plan, with more of what matters here."""
        rng = random.Random(f"often {plan.heal_s}")
        more: list[Fault] = []
        for kind in self.often:
            for _ in range(rng.randrange(1, 4)):
                at_s = rng.uniform(0.3, plan.heal_s - 1.5)
                more += [drawn(rng, kind, at_s)] if isinstance(kind, str) else kind(rng, at_s)
        plan = replace(plan, faults=in_order([*plan.faults, *more], plan.heal_s))
        if self.disaster and plan.disaster is None:
            return struck(plan, drawn_disaster(rng, plan.heal_s))
        return plan


VARIANTS: Mapping[str, Variant] = {
    "no guard": Variant(
        first=3,
        classes=Classes(guard=NoGuard, log=StockRaftLog),
        caught_by=("acknowledged",),
        often=("kill", "isolate", "slow network", "unruly network"),
    ),
    "entries after a gap": Variant(
        first=22,
        classes=Classes(guard=BlindGuard),
        caught_by=("log matching",),
        often=("isolate", "cut", "isolate", "slow network"),
    ),
    "acknowledges before the sync": Variant(
        first=2,
        classes=Classes(log=HastyRaftLog),
        caught_by=("leader completeness", "same history"),
        often=(blackout_on_slow_disks,),
    ),
    "a leader counts itself before its sync": Variant(
        first=0,
        classes=Classes(log=VainRaftLog),
        caught_by=("leader completeness",),
        often=(leader_forgets_alone, leader_forgets_alone),
    ),
    "votes before the sync": Variant(
        first=3,
        classes=Classes(log=ForgetfulRaftLog),
        caught_by=("election safety",),
        often=(blackout_in_an_election, blackout_in_an_election),
    ),
    "compaction in place": Variant(
        first=4,
        classes=Classes(journal=CompactsInPlace),
        caught_by=("defect",),
        often=("power cut", "snapshot", "blackout"),
    ),
    "compaction without a snapshot": Variant(
        classes=Classes(log=HeedlessRaftLog), caught_by=("defect",), often=("kill", "power cut")
    ),
    "no epochs": Variant(
        first=3,
        classes=Classes(node=_node(_ledger_type=NoEpochs), log=ForwardingLog),
        caught_by=("keys",),
        often=(deposed_again_and_again,) * 6,
    ),
    "unknown is answered aborted": Variant(
        first=2,
        classes=Classes(node=_node(_ledger_type=UnknownIsAborted)),
        caught_by=("outcomes",),
        often=("kill", "pause", "slow network"),
    ),
    "answers from votes": Variant(
        first=2,
        classes=Classes(node=_node(_driver_type=AnswersFromVotes)),
        caught_by=("outcomes",),
        often=(deposed_on_slow_disks, deposed_on_slow_disks),
    ),
    "an application is taken at its word": Variant(
        first=4, classes=Classes(node=_node(_driver_type=TakesTheWord)), caught_by=("atomicity",)
    ),
    "floors rise above active transactions": Variant(
        classes=Classes(node=_node(_driver_type=NothingHoldsFloors)), caught_by=("floors",)
    ),
    "a leader waits for no upgrade": Variant(
        first=8, classes=Classes(node=_node(_driver_type=WaitsForNobody)), caught_by=("levels",)
    ),
    "recovered, and nobody is asked": Variant(
        first=6,
        classes=Classes(node=_node(_ledger_type=AsksNobody)),
        caught_by=("outcomes",),
        disaster=True,
    ),
    "a new leader minds its own business": Variant(
        first=1,
        classes=Classes(node=_node(_driver_type=NewBroom)),
        caught_by=("doubt", "progress"),
        often=("kill", "isolate"),
    ),
    "keys are not in snapshots": Variant(
        first=11,
        classes=Classes(node=_node(_ledger_type=SnapshotsWithoutKeys)),
        caught_by=("keys",),
        often=("kill", "restart", "snapshot", "slow network"),
    ),
    "keys are judged too early": Variant(
        classes=Classes(node=_node(_ledger_type=JudgesKeysEarly)), caught_by=("keys",), often=("isolate", "kill")
    ),
    "no tombstones": Variant(
        first=30,
        classes=Classes(bank=NoTombstones),
        caught_by=("locks",),
        often=(refused_while_late, refused_while_late),
    ),
    "late prepares are let in": Variant(first=2, classes=Classes(bank=LetsInLatePrepares), caught_by=("locks",)),
    "a participant votes before its sync": Variant(
        first=1,
        classes=Classes(bank=VotesBeforeSync),
        caught_by=("atomicity",),
        often=(bank_dies_on_a_slow_disk, bank_dies_on_a_slow_disk),
    ),
    "locks outlive aborts": Variant(classes=Classes(bank=KeepsLocks), caught_by=("locks",)),
    "a bank keeps the change": Variant(classes=Classes(bank=KeepsHalf), caught_by=("sums",)),
    "a bank loses commits": Variant(classes=Classes(bank=LosesMarks), caught_by=("atomicity",)),
    "a bank breaks": Variant(
        classes=Classes(bank=Breaks), caught_by=("defect",), says="its resource manager failed [KeyError("
    ),
    "a turn fails": Variant(
        classes=Classes(log=Stumbles), caught_by=("defect",), says="stops: KeyError('a defect of a turn')"
    ),
    "a turn fails, by the log": Variant(
        classes=Classes(log=Stumbles), caught_by=("defect",), says="must stop [KeyError('a defect of a turn')]"
    ),
    "a stop fails": Variant(
        first=1,
        classes=Classes(node=TripsAtTheEnd),
        caught_by=("defect",),
        says="ended: KeyError('a defect of a stop')",
        often=("restart",),
    ),
    "a recovery fails": Variant(
        classes=Classes(recovery=CannotReadCopies),
        caught_by=("defect",),
        says="ended: KeyError('a defect of a recovery')",
        disaster=True,
    ),
    "a disaster is left out": Variant(
        classes=Classes(recovery=NothingIsLost), caught_by=("fired",), says="disaster", disaster=True
    ),
    "a fault misses": Variant(
        classes=Classes(injector=HitsNobody), caught_by=("fired",), says="it is not so that", often=("snapshot",)
    ),
    "a fault is left out": Variant(classes=Classes(injector=NothingPauses), caught_by=("fired",), often=("pause",)),
}
