"""What participants tell of transactions that a restored ledger is not sure of, and what follows from it. Pure.

A participant commits only what has been decided so; it aborts by itself only what it has not voted for; and it drops
the record of a branch only below the floor, once its transaction has ended. Hence:

    somebody has committed it      commit: it had been decided, in what was lost
    somebody has aborted it        abort: it had been decided, or cannot be any more
    somebody has no record of it,
        not below its floor        abort: it has not voted, so nothing was decided but, perhaps, to abort
        below its floor            it has ended, and nobody knows how: it leaves the ledger, and is 410 from then on
    all hold it prepared           of a transaction in the copy: commit, as the rules of two-phase commit have it
                                   of one that is not: abort. Who else took part is not known
    somebody does not answer       wait, unless another's answer decides, or the operator says not to
    somebody cannot tell           of a transaction in the copy: ask it to prepare, which it answers as before
                                   of one that is not: wait; it may have committed

The last row of either kind is where a commit that a client was told of may become an abort, or stay open: the price of
having lost decisions. `docs/RECOVERY.md` says it to operators.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from coordinator.protocol.entries import BranchPlan, BranchVote, Enlisted, Reconciled
from coordinator.protocol.transaction import Decision, Transaction, VoteKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Testimony:
    """What one participant says of one transaction.

    branches: name and state of those that it has on record.
    can_tell: whether it lists all that it has on record, and not only what it holds prepared.
    ended: whether the transaction is below its floor, so that a record may have been dropped.
    """

    branches: tuple[tuple[str, str], ...] = ()
    can_tell: bool = True
    ended: bool = False

    def state(self, branch: str) -> str | None:
        """Of that branch; None when there is no record."""
        return next((state for name, state in self.branches if name == branch), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Let it go the normal way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing can be said yet, because of these participants."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An application enlisted these after the copy was made: note them first, so that they hear of the abort, too."""

    branches: tuple[Enlisted, ...]


Judgement = Reconciled | Release | Wait | Found


def judge_unknown(gid: str, told: Mapping[str, Testimony | None], without: AbstractSet[str]) -> Judgement:
    """A transaction of the lost range that the ledger does not hold, and somebody holds prepared.

    told: by every registered participant; None: it has not answered.
    """
    found = [
        (participant, branch, state)
        for participant, testimony in told.items()
        for branch, state in (() if testimony is None else testimony.branches)
    ]
    states = {state for _participant, _branch, state in found}
    if "committed" in states:
        return _found(gid, Decision.COMMIT, "a participant has committed it", found, ("committed", "prepared"))
    if "aborted" in states:
        return _found(gid, Decision.ABORT, "a participant has aborted it", found, ("prepared",))
    waiting = tuple(
        name
        for name, testimony in told.items()
        if name not in without and (testimony is None or not (testimony.can_tell or testimony.branches))
    )
    if waiting:
        return Wait(names=waiting)
    return _found(gid, Decision.ABORT, "its decision was lost, and nobody has committed it", found, ("prepared",))


def _found(
    gid: str, decision: Decision, reason: str, found: list[tuple[str, str, str]], states: tuple[str, ...]
) -> Judgement:
    # One server may be registered under two names, and speak of a branch under both: one of them is told.
    told: dict[str, str] = {}
    for participant, branch, state in sorted(found, key=lambda each: each[2] != "prepared"):
        if state in states:
            told.setdefault(branch, participant)
    concerned = [(participant, branch) for branch, participant in told.items()]
    if not concerned:
        return Wait(names=())  # nobody holds it prepared any more
    return Reconciled(
        gid=gid,
        decision=decision,
        reason=reason,
        branches=tuple(BranchPlan(name=branch, participant=name, payload=b"") for name, branch in concerned),
        votes=tuple(BranchVote(branch=branch, vote=VoteKind.PREPARED) for _name, branch in concerned),
    )


def judge_active(txn: Transaction, told: Mapping[str, Testimony | None], without: AbstractSet[str]) -> Judgement:
    """One that the copy holds active: its application may have enlisted others since, and asked for the commit.

    told: by every registered participant. What somebody has committed leaves the ledger, and is then like one that the
    ledger never knew: whoever holds it prepared is told to commit. So does one that is over and perhaps was committed,
    with its records dropped: it is below a floor, which did not rise above it while it was active, and nobody holds it
    prepared. But whoever is named in the copy must have voted for a commit, and have that on record.
    """
    states = {state for each in told.values() for _branch, state in (() if each is None else each.branches)}
    if "committed" in states:
        return Reconciled(gid=txn.gid, reason="a participant has committed it, with branches that the copy lacks")
    if "aborted" in states:
        return _aborted(txn, "a participant has aborted it")
    waiting = tuple(
        name
        for name, each in told.items()
        if name not in without and (each is None or not (each.can_tell or each.branches))
    )
    if waiting:
        return Wait(names=waiting)
    known = {branch.name for branch in txn.branches}
    lacking = {
        branch: participant
        for participant, each in told.items()
        for branch, state in (() if each is None else each.branches)
        if state == "prepared" and branch not in known
    }
    if lacking:
        return Found(
            branches=tuple(
                Enlisted(gid=txn.gid, branch=branch, participant=participant) for branch, participant in lacking.items()
            )
        )
    ended = any(each is not None and each.ended for each in told.values())
    if ended and "prepared" not in states and not any(_never_voted(txn, name, told) for name in _named(txn)):
        return Reconciled(gid=txn.gid, reason="it ended in what was lost, and nobody knows how")
    return _aborted(txn, "its commit was not asked for when the copy was made")


def _named(txn: Transaction) -> set[str]:
    return {branch.participant for branch in txn.branches}


def _never_voted(txn: Transaction, name: str, told: Mapping[str, Testimony | None]) -> bool:
    """Whether a participant that the copy names has no record of a branch, although none can have been dropped."""
    each = told.get(name)
    mine = [branch.name for branch in txn.branches if branch.participant == name]
    return each is not None and each.can_tell and not each.ended and any(each.state(one) is None for one in mine)


def judge_copied(txn: Transaction, told: Mapping[str, Testimony | None], without: AbstractSet[str]) -> Judgement:
    """A transaction that the copy holds undecided. told: by every participant that it names."""
    states = {}
    waiting: list[str] = []
    mute = excluded = unprepared = ended = False
    for branch in txn.branches:
        testimony = told.get(branch.participant)
        state = None if testimony is None else testimony.state(branch.name)
        states[branch.name] = state
        if state is not None:
            continue
        if testimony is None:
            if branch.participant in without:
                excluded = True
            else:
                waiting.append(branch.participant)
        elif not testimony.can_tell:
            mute = True
        elif testimony.ended:
            ended = True
        else:
            unprepared = True
    if "committed" in states.values():
        return Reconciled(
            gid=txn.gid, decision=Decision.COMMIT, reason="a participant has committed it", votes=_votes(states)
        )
    if "aborted" in states.values():
        return _aborted(txn, "a participant has aborted it")
    if waiting:
        return Wait(names=tuple(dict.fromkeys(waiting)))
    if unprepared:
        return _aborted(txn, "not prepared everywhere when the cluster was restored")
    if ended:
        return Reconciled(gid=txn.gid, reason="it ended in what was lost, and nobody knows how")
    if excluded:
        return _aborted(txn, "not prepared everywhere, as far as is known without those that were left out")
    if mute:
        return Release()
    return Reconciled(gid=txn.gid, decision=Decision.COMMIT, votes=_votes(states))


def _aborted(txn: Transaction, reason: str) -> Reconciled:
    return Reconciled(gid=txn.gid, decision=Decision.ABORT, reason=reason)


def _votes(states: Mapping[str, str | None]) -> tuple[BranchVote, ...]:
    """A commit means that all had voted for it, also those whose record says no more."""
    return tuple(
        BranchVote(branch=name, vote=VoteKind.READ_ONLY if state == "read_only" else VoteKind.PREPARED)
        for name, state in states.items()
    )
