"""Rules that are wrong, each in one way that is easy to get wrong. The explorer has to catch every one of them.

A checker that has never failed proves nothing. Each variant replaces one rule of production and leaves the rest alone;
`VARIANTS` says in which world its fault shows, and that world is as small as it can be.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.facts import Applied, Knowledge, Verdict
from coordinator.ledger import Ledger
from coordinator.protocol.effects import Effect
from coordinator.protocol.entries import (
    Acknowledged,
    Beginning,
    BranchVote,
    Decided,
    Enlisted,
    Entry,
    Forgotten,
    Header,
    Resolved,
    Sealed,
    TookOver,
    TransactionEntry,
)
from coordinator.protocol.messages import Answer, Prepare, Prepared, Refused, Request, Stamp
from coordinator.protocol.record import replace
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


class CountingTally(Tally, frozen=True):
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


# ------------------------------------------------------------------------------------------------ applications' own


class SealUndoesAbort(TwoPhaseCommit):
    """A seal is taken although the abort is decided: the application has prepared everything, after all."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Sealed) and txn is not None and txn.decision is Decision.ABORT:
            return _undecided(txn)
        return super().evolve(txn, entry, header)


class SealsWithoutLooking(TwoPhaseCommit):
    """A seal is taken whatever the application believes that it has enlisted."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Sealed) and txn is not None:
            entry = replace(entry, branches=tuple(branch.name for branch in txn.branches))
        return super().evolve(txn, entry, header)


class EnlistsAfterSeal(TwoPhaseCommit):
    """A branch is taken in although the votes of the others are asked for already."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Enlisted) and txn is not None and txn.decision is None and not txn.active:
            after = super().evolve(replace(txn, active=True), entry, header)
            return None if after is None else replace(after, active=False)
        return super().evolve(txn, entry, header)


class AsksWhileActive(TwoPhaseCommit):
    """Participants are asked to vote while the application is still at work."""

    def owed(self, txn: Transaction) -> Sequence[Effect]:
        return super().owed(replace(txn, active=False))


class CommitsUnsealed(TwoPhaseCommit):
    """Nobody has refused, so all is well, whether the application has asked for it or not."""

    def decide(self, txn: Transaction, tally: Tally, *, expired: bool) -> TransactionEntry | None:
        return super().decide(replace(txn, active=False), tally, expired=expired)

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Decided) and txn is not None:
            txn = replace(txn, active=False)
        return super().evolve(txn, entry, header)


class ForgetsWhoWasEnlisted(TwoPhaseCommit):
    """Nobody was asked for a vote, so nobody is told of the abort."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        after = super().evolve(txn, entry, header)
        if txn is not None and txn.active and after is not None and after.decision is not None:
            return replace(after, ended_at=header.at)
        return after


# ------------------------------------------------------------------------------------------------ resolved by hand


class ResolutionDecides(TwoPhaseCommit):
    """What an operator says of one branch becomes the decision for all."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        after = super().evolve(txn, entry, header)
        if isinstance(entry, Resolved) and after is not None and after is not txn:
            return replace(after, decision=entry.outcome)
        return after


class ResolvesUndecided(TwoPhaseCommit):
    """A branch is resolved although nothing is decided: a vote by hand."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Resolved) and txn is not None and txn.decision is None:
            branches = tuple(replace(b, resolved=entry.outcome, resolved_at=header.at) for b in txn.branches)
            return replace(txn, branches=branches)
        return super().evolve(txn, entry, header)


class LastResolutionWins(TwoPhaseCommit):
    """An operator changes his mind, and what was done by hand before is lost to sight."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        if isinstance(entry, Resolved) and txn is not None and txn.ended_at is None:
            txn = replace(txn, branches=tuple(replace(b, resolved=None, resolved_at=None) for b in txn.branches))
        return super().evolve(txn, entry, header)


class AcknowledgedIsOver(TwoPhaseCommit):
    """One branch was seen to, so the transaction counts as ended for all."""

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        after = super().evolve(txn, entry, header)
        if isinstance(entry, Acknowledged) and after is not None and after is not txn and after.ended_at is None:
            return replace(after, ended_at=header.at)
        return after


def _floor_passes_over_active(ledger: Ledger, name: str) -> int | None:
    """The floor minds the transactions that name the participant, and not those that still may."""
    naming = [
        number
        for number, txn in ledger.unfinished.items()
        if any(branch.participant == name for branch in txn.branches)
    ]
    return min(naming, default=None)


def _prepares_over_a_tombstone(branch: Branch, gid: str, horizon: Horizon) -> bool:
    """What an application prepares comes to be, although the branch was aborted."""
    return branch.state in (State.UNKNOWN, State.ABORTED) and not resource.below_floor(gid, horizon)


def _prepares_below_the_floor(branch: Branch, gid: str, horizon: Horizon) -> bool:
    """What an application prepares comes to be wherever there is no record, although it may have been pruned."""
    return branch.state is State.UNKNOWN


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

    def _begin(self, header: Header, entry: Beginning) -> Applied:
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

    def _presume(self, header: Header, entry: TransactionEntry, number: int) -> Applied:
        if not isinstance(entry, Decided) or entry.decision is not Decision.COMMIT:
            return super()._presume(header, entry, number)
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
        self._store(number, txn)
        return Applied(entry=entry, verdict=Verdict.APPLIED, txn=txn)


class BeginsInAnyOrder(_Ledger):
    """A transaction may begin after one with a higher number."""

    def _begin(self, header: Header, entry: Beginning) -> Applied:
        if self.get(entry.gid) is not None:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        return super()._begin(header, entry)

    def _newest(self) -> int:
        return -1


class ForgetsTheUnacknowledged(_Ledger):
    """Retention does not mind what an operator has not seen to."""

    def _store(self, number: int, txn: Transaction) -> None:
        super()._store(number, txn)
        self.kept.clear()


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
_APPLICATION = (Planned("m-1-1", (0,), application=True),)
_APPLICATION_AT_TWO = (Planned("m-1-1", (0, 1), application=True),)
_APPLICATION_AND_A_STRAY = (Planned("m-1-1", (0,), application=True, strays=(1,)),)
_APPLICATION_THEN_ANOTHER = (Planned("m-1-1", (0,), application=True), Planned("m-1-2", (0,)))
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
    "a seal undoes the abort": Variant(
        lambda: Rules(protocol=SealUndoesAbort()), Scope(1, 0, _APPLICATION), "decision changed after the decision"
    ),
    "a seal of other branches": Variant(
        lambda: Rules(protocol=SealsWithoutLooking()), Scope(2, 0, _APPLICATION_AT_TWO), "never voted for it"
    ),
    "a branch after the seal": Variant(
        lambda: Rules(protocol=EnlistsAfterSeal()), Scope(2, 0, _APPLICATION_AND_A_STRAY), "the branches changed"
    ),
    "a prepare while the application works": Variant(
        lambda: Rules(protocol=AsksWhileActive()),
        Scope(1, 0, _APPLICATION),
        "a prepare is owed while the application is at work",
    ),
    "a commit that was not asked for": Variant(
        lambda: Rules(protocol=CommitsUnsealed()), Scope(1, 0, _APPLICATION), "committed without having been sealed"
    ),
    "an expiry forgets who was enlisted": Variant(
        lambda: Rules(protocol=ForgetsWhoWasEnlisted()),
        Scope(1, 0, _APPLICATION, forgetting=True, serial=True),
        "nothing leads to an end",
    ),
    "an application works before it is enlisted": Variant(
        lambda: Rules(works_unenlisted=True),
        Scope(1, 0, _APPLICATION, forgetting=True, serial=True),
        "nothing leads to an end",
    ),
    "a resolution decides": Variant(
        lambda: Rules(protocol=ResolutionDecides()), Scope(2, 0, operator=True), "decision changed after the decision"
    ),
    "a resolution before the decision": Variant(
        lambda: Rules(protocol=ResolvesUndecided()), Scope(1, 0, operator=True), "was resolved before the decision"
    ),
    "the last resolution wins": Variant(
        lambda: Rules(protocol=LastResolutionWins()), Scope(2, 0, operator=True), "the resolution of a changed"
    ),
    "retention forgets what nobody has acknowledged": Variant(
        lambda: Rules(ledger=ForgetsTheUnacknowledged),
        Scope(1, 0, forgetting=True, serial=True, operator=True),
        "nothing leads to an end",
    ),
    "an acknowledgement ends the others": Variant(
        lambda: Rules(protocol=AcknowledgedIsOver()),
        Scope(2, 0, forgetting=True, serial=True, operator=True),
        "nothing leads to an end",
    ),
    "floors pass over what is active": Variant(
        lambda: Rules(floor_of=_floor_passes_over_active), Scope(1, 0, _APPLICATION_THEN_ANOTHER), "below a floor"
    ),
    "an application prepares over a tombstone": Variant(
        lambda: Rules(may_prepare=_prepares_over_a_tombstone), Scope(1, 0, _APPLICATION), "holds its locks again"
    ),
    "an application prepares below the floor": Variant(
        lambda: Rules(may_prepare=_prepares_below_the_floor),
        Scope(1, 0, _APPLICATION_THEN_ANOTHER, serial=True),
        "holds its locks again",
    ),
}
