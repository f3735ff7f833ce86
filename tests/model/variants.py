"""Rules that are wrong, each in one way that is easy to get wrong. The explorer has to catch every one of them.

A checker that has never failed proves nothing. Each variant replaces one rule of production and leaves the rest alone;
`VARIANTS` says in which world its fault shows, and that world is as small as it can be.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from coordinator.ledger import Applied, Knowledge, Ledger, Verdict
from coordinator.protocol.entries import (
    Begun,
    BranchVote,
    Decided,
    Entry,
    Forgotten,
    Header,
    TookOver,
    TransactionEntry,
)
from coordinator.protocol.messages import Answer, Gid, Prepare, Prepared, Refused, Request, Stamp
from coordinator.protocol.transaction import Decision, Tally, Transaction, VoteKind
from coordinator.protocol.two_phase import TwoPhaseCommit
from participants import resource
from participants.resource import Branch, Horizon, State, Step
from tests.model.world import NOW, Planned, Rules, Scope

# ------------------------------------------------------------------------------------------------ protocols


class LastDecisionWins(TwoPhaseCommit):
    """A second decision, if it is another, replaces the first."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Decided) and txn is not None and txn.decision not in (None, entry.decision):
            return super().evolve(_undecided(txn), entry, header)
        return super().evolve(txn, entry, header)


def _undecided(txn: Transaction) -> Transaction:
    branches = tuple(replace(branch, payload=b"1", vote=None) for branch in txn.branches)
    return replace(txn, branches=branches, decision=None, decided_at=None)


class HastyLeader(TwoPhaseCommit):
    """At the deadline, silence counts as consent. By itself harmless: no ledger takes such a commit."""

    def decide(self, txn: Transaction, tally: Tally, *, expired: bool) -> TransactionEntry | None:
        wish = super().decide(txn, tally, expired=expired)
        refused = any(isinstance(vote, Refused) for vote in tally.votes.values())
        if expired and not refused and isinstance(wish, Decided):
            return replace(wish, decision=Decision.COMMIT)
        return wish


class UnconditionalCommit(HastyLeader):
    """The same, and `Decided(commit)` is applied without the votes that it must rest on."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Decided) and txn is not None:
            silent = {branch.name for branch in txn.branches} - {vote.branch for vote in entry.votes}
            consent = tuple(BranchVote(branch=name, vote=VoteKind.PREPARED) for name in sorted(silent))
            if entry.decision is Decision.COMMIT:
                entry = replace(entry, votes=entry.votes + consent)
        return super().evolve(txn, entry, header)


@dataclass(frozen=True, kw_only=True)
class CountingTally(Tally):
    """Counts the messages that say "prepared", whoever sent them."""

    count: int = 0

    def heard(self, answer: Answer) -> "CountingTally":
        more = 1 if isinstance(answer, Prepared) and self.count < 3 else 0
        return self._counted(Tally.heard(self, answer), self.count + more)

    def asked_to_abort(self, reason: str) -> "CountingTally":
        return self._counted(Tally.asked_to_abort(self, reason), self.count)

    def _counted(self, tally: Tally, count: int) -> "CountingTally":
        return CountingTally(
            votes=tally.votes,
            acked=tally.acked,
            contradictions=tally.contradictions,
            abort_reason=tally.abort_reason,
            count=count,
        )


class CountsVotes(TwoPhaseCommit):
    """As many votes as branches are enough."""

    def decide(self, txn: Transaction, tally: Tally, *, expired: bool) -> TransactionEntry | None:
        if txn.decision is None and isinstance(tally, CountingTally) and tally.count >= len(txn.branches):
            votes = tuple(BranchVote(branch=branch.name, vote=VoteKind.PREPARED) for branch in txn.branches)
            return Decided(gid=txn.gid, decision=Decision.COMMIT, votes=votes)
        return super().decide(txn, tally, expired=expired)


# ------------------------------------------------------------------------------------------------ ledgers


class _Ledger(Ledger):
    def fork(self) -> "Ledger":
        copy = super().fork()
        copy.__class__ = type(self)
        return copy


class NoFence(_Ledger):
    """Entries of older epochs are applied as if they were of today's."""

    def _apply_entry(self, header: Header, entry: Entry) -> Applied:
        if isinstance(entry, TookOver):
            return super()._apply_entry(header, entry)
        return super()._apply_entry(replace(header, epoch=max(header.epoch, self.epoch)), entry)

    def _begin(self, header: Header, entry: Begun) -> Applied:
        gid = self.own_gid(entry.gid)
        today = self.epoch
        self.epoch = gid.epoch if gid is not None else today
        try:
            return super()._begin(replace(header, epoch=self.epoch), entry)
        finally:
            self.epoch = today


class UnknownIsAborted(_Ledger):
    """A plain read answers "aborted" for whatever it does not find."""

    def knowledge(self, text: str) -> Knowledge:
        known = super().knowledge(text)
        return Knowledge.ABORTED if known is Knowledge.ASK_LEADER else known


class CommitsTheUnknown(_Ledger):
    """`Decided(commit)` about a transaction that is not in the table puts it there."""

    def _presume(self, header: Header, entry: TransactionEntry, gid: Gid) -> Applied:
        if not isinstance(entry, Decided) or entry.decision is not Decision.COMMIT:
            return super()._presume(header, entry, gid)
        txn = Transaction(
            gid=entry.gid,
            protocol="2pc",
            epoch=header.epoch,
            branches=(),
            timeout_ms=0,
            started_at=NOW,
            decision=Decision.COMMIT,
            decided_at=NOW,
            ended_at=NOW,
        )
        self._store(gid.number, txn)
        return Applied(entry=entry, verdict=Verdict.APPLIED, txn=txn)


class BeginsInAnyOrder(_Ledger):
    """A transaction may begin after one with a higher number."""

    def _newest(self) -> int:
        return -1


class ForgetsWithoutFloor(_Ledger):
    """Ended transactions leave the table, and nothing remembers that they were there."""

    def _forget(self, entry: Forgotten) -> Applied:
        applied = super()._forget(entry)
        self.floor = -1
        return applied


# ------------------------------------------------------------------------------------------------ participants


def _walks_away_prepared(branch: Branch, reason: str) -> Step:
    """A prepared participant loses patience."""
    if branch.state is State.PREPARED:
        return Step(branch=Branch(state=State.ABORTED))
    return resource.walk_away(branch, reason)


def _keeps_no_tombstone(branch: Branch, horizon: Horizon, message: Request, stamp: Stamp) -> Step:
    """To a prepare, an aborted branch is as good as a new one."""
    if branch.state is State.ABORTED and type(message) is Prepare:
        branch = Branch()
    return resource.receive(branch, horizon, message, stamp)


def _refuses_without_tombstone(branch: Branch, horizon: Horizon, message: Request, stamp: Stamp) -> Step:
    """A prepare is refused while the work that an abort has fenced still runs, and no tombstone is durable."""
    if branch.state is State.FENCED and type(message) is Prepare:
        return Step(branch=branch, answer=Refused(gid=message.gid, branch=message.branch, reason="-"))
    return resource.receive(branch, horizon, message, stamp)


def _prunes_by_time(branch: Branch, gid: str, horizon: Horizon) -> bool:
    """Tombstones are dropped when they are old enough, wherever the floor is."""
    return branch.state is State.ABORTED or resource.prunable(branch, gid, horizon)


def _votes_before_sync(branch: Branch) -> Branch:
    """The vote left before the record was durable."""
    return Branch() if branch.state is State.PREPARED else resource.crashed(branch)


# ------------------------------------------------------------------------------------------------ where they show

_TWO_IN_A_ROW = (Planned("m-1-1", (0,)), Planned("m-1-2", (0,)))
_NOTHING_COUNTED = CountingTally(votes={}, acked=frozenset(), contradictions={})


@dataclass(frozen=True)
class Variant:
    """A fault, the world in which it shows, and words that must be in the complaint."""

    rules: Callable[[], Rules]
    scope: Scope
    complaint: str


VARIANTS: Mapping[str, Variant] = {
    "the last decision wins": Variant(
        lambda: Rules(protocol=LastDecisionWins()), Scope(2, 0), "decision changed after the decision"
    ),
    "commit without its votes": Variant(
        lambda: Rules(protocol=UnconditionalCommit()), Scope(2, 0), "never voted for it"
    ),
    "commit of an unknown transaction": Variant(
        lambda: Rules(ledger=CommitsTheUnknown), Scope(1, 0, forgetting=True), "answers committed, and another aborted"
    ),
    "unknown is answered aborted": Variant(
        lambda: Rules(ledger=UnknownIsAborted), Scope(1, 0), "answers committed, and another aborted"
    ),
    "a prepared participant walks away": Variant(
        lambda: Rules(walk_away=_walks_away_prepared), Scope(2, 0), "aborted it on its own"
    ),
    "no tombstone after an abort": Variant(
        lambda: Rules(receive=_keeps_no_tombstone), Scope(1, 0), "holds its locks again"
    ),
    "tombstones pruned by time": Variant(lambda: Rules(prunable=_prunes_by_time), Scope(1, 0), "holds its locks again"),
    "epochs are not checked": Variant(
        lambda: Rules(ledger=NoFence), Scope(1, 1), "answers committed, and another aborted"
    ),
    "votes are counted": Variant(
        lambda: Rules(protocol=CountsVotes(), nothing_heard=_NOTHING_COUNTED), Scope(2, 0), "never voted for it"
    ),
    "the client hears a wish": Variant(lambda: Rules(tells_early=True), Scope(1, 0), "a client is told an outcome"),
    "a vote that is not durable": Variant(
        lambda: Rules(crashed=_votes_before_sync), Scope(1, 0), "aborted it on its own"
    ),
    "a horizon that is not durable": Variant(
        lambda: Rules(horizon_survives=False), Scope(1, 0, _TWO_IN_A_ROW), "holds its locks again"
    ),
    "a refusal before its tombstone": Variant(
        lambda: Rules(receive=_refuses_without_tombstone), Scope(1, 0, forgetting=True), "nothing leads to an end"
    ),
    "a refusal without a record": Variant(
        Rules, Scope(1, 0, forgetting=True, serial=True, records_lost=True), "nothing leads to an end"
    ),
    "transactions begin in any order": Variant(
        lambda: Rules(ledger=BeginsInAnyOrder), Scope(1, 0, _TWO_IN_A_ROW), "below a floor"
    ),
    "forgetting leaves no floor": Variant(
        lambda: Rules(ledger=ForgetsWithoutFloor),
        Scope(1, 1, forgetting=True),
        "answers committed, and another aborted",
    ),
}
