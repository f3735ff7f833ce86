"""Two-phase commit with presumed abort (Gray 1978; Mohan, Lindsay & Obermarck 1986).

    undecided --all voted, none refused--> commit --acks of all prepared branches--> ended
        |
        +--a refusal, the deadline, a request--> abort --acks of all that may be prepared--> ended

A transaction that an application does itself (the XA style) is *active* first: its branches are enlisted one by one,
each before the application works there, and nobody is asked to vote. Once it is sealed, it is a transaction like any
other: its participants are asked, and look for themselves whether their branch is prepared.

    active --enlisted, again and again--> active --sealed, with the names of all branches--> undecided
        |
        +--the deadline, a request--> abort --acks of all that are enlisted--> ended

What phase two owes, and to whom, depends on the vote that the *decision* recorded:

| vote in the decision | commit | abort |
|---|---|---|
| prepared | Commit | Abort |
| none | cannot be | Abort: its prepare may still arrive |
| read-only | nothing: it holds no locks | nothing |
| refused | cannot be | nothing: it has undone itself |

To a branch that an operator has resolved by hand nothing is owed either. That changes no decision: the other branches
follow it as before, and whoever is in doubt is told it. Only a branch to which something is owed can be resolved, so
there is nothing to resolve before the decision: what is undecided can be aborted.
"""

from collections.abc import Sequence
from typing import Final

from coordinator.protocol.effects import Effect, Reply, Send, SetDeadline
from coordinator.protocol.entries import (
    Acknowledged,
    Begun,
    BranchVote,
    ContradictionSeen,
    Decided,
    Ended,
    Enlisted,
    Header,
    Opened,
    Resolved,
    Sealed,
    TransactionEntry,
)
from coordinator.protocol.messages import (
    ENLISTED_PAYLOAD,
    Abort,
    Commit,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    Vote,
)
from coordinator.protocol.record import replace
from coordinator.protocol.transaction import Branch, Decision, Tally, Transaction, VoteKind

# To look a member up in its enum takes as long as to make a small record.
_COMMIT: Final = Decision.COMMIT
_REFUSED: Final = VoteKind.REFUSED
_NOT_OWED: Final = (VoteKind.READ_ONLY, _REFUSED)


class TwoPhaseCommit:
    """All or nothing, in two rounds. Stateless: one instance serves every transaction."""

    name: Final = "2pc"

    # ------------------------------------------------------------------------------------------------ wishes

    def decide(self, txn: Transaction, tally: Tally, *, expired: bool) -> TransactionEntry | None:
        """See `CommitProtocol.decide`."""
        if txn.ended_at is not None:
            return None
        if txn.active:
            return self._given_up(txn, tally, expired=expired)
        if txn.decision is None:
            return self._decision(txn, tally, expired=expired)
        if tally.contradictions:
            for branch in txn.branches:
                claimed = tally.contradictions.get(branch.name)
                if claimed is not None and claimed != branch.contradiction and is_owed(branch):
                    return ContradictionSeen(gid=txn.gid, branch=branch.name, state=claimed)
        for branch in txn.branches:
            if branch.name not in tally.acked and is_owed(branch):
                return None
        return Ended(gid=txn.gid)

    def _decision(self, txn: Transaction, tally: Tally, *, expired: bool) -> Decided | None:
        votes = tally.votes
        for vote in votes.values():
            if type(vote) is Refused:
                return self._refused(txn, tally, vote)
        for branch in txn.branches:
            if branch.name not in votes:
                break
        else:
            return Decided(gid=txn.gid, decision=_COMMIT, votes=_recorded(txn, tally))
        if tally.abort_reason is not None:
            return self._abort(txn, tally, tally.abort_reason, retryable=True)
        if expired:
            missing = ", ".join(branch.name for branch in txn.branches if branch.name not in votes)
            return self._abort(txn, tally, f"timeout: no vote from {missing}", retryable=True)
        return None

    def _refused(self, txn: Transaction, tally: Tally, first: Refused) -> Decided:
        """Whoever asks again may fare better if that is true of every refusal."""
        retryable = all(vote.retryable for vote in tally.votes.values() if type(vote) is Refused)
        return self._abort(txn, tally, f"{first.branch} refused: {first.reason}", retryable=retryable)

    def _given_up(self, txn: Transaction, tally: Tally, *, expired: bool) -> Decided | None:
        """The application alone can ask for the commit of what it does: without it there is only the abort."""
        if tally.abort_reason is not None:
            return self._abort(txn, tally, tally.abort_reason, retryable=True)
        if expired:
            reason = "timeout: the application did not ask for the commit in time"
            return self._abort(txn, tally, reason, retryable=True)
        return None

    def _abort(self, txn: Transaction, tally: Tally, reason: str, *, retryable: bool) -> Decided:
        return Decided(
            gid=txn.gid, decision=Decision.ABORT, reason=reason, retryable=retryable, votes=_recorded(txn, tally)
        )

    # ------------------------------------------------------------------------------------------------ truths

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        """See `CommitProtocol.evolve`."""
        match entry:  # what every transaction comes by stands first
            case Begun():
                return txn if txn is not None else _begin(entry, header)
            case Decided():
                return txn if txn is None or txn.decision is not None else _decided(txn, entry, header)
            case Ended():
                if txn is None or txn.decision is None or txn.ended_at is not None:
                    return txn
                return replace(txn, ended_at=header.at)
            case Opened():
                return txn if txn is not None else _open(entry, header)
            case Enlisted():
                if txn is None or not txn.active or any(branch.name == entry.branch for branch in txn.branches):
                    return txn
                branch = Branch(name=entry.branch, participant=entry.participant, payload=ENLISTED_PAYLOAD)
                return replace(txn, branches=(*txn.branches, branch))
            case Sealed():
                if txn is None or not txn.active or not txn.has_branches(entry.branches):
                    return txn
                return replace(txn, active=False)
            case ContradictionSeen():
                if txn is None or txn.decision is None or txn.ended_at is not None:
                    return txn
                branches = tuple(
                    replace(branch, contradiction=entry.state) if branch.name == entry.branch else branch
                    for branch in txn.branches
                )
                return txn if branches == txn.branches else replace(txn, branches=branches)
            case Resolved():
                if txn is None or txn.decision is None or txn.ended_at is not None:
                    return txn
                return _with_resolution(txn, entry, header)
            case Acknowledged():
                return txn if txn is None or not txn.kept else replace(txn, acknowledged_at=header.at)

    # ------------------------------------------------------------------------------------------------ debts

    def owed(self, txn: Transaction) -> Sequence[Effect]:
        """See `CommitProtocol.owed`."""
        effects: list[Effect]
        if txn.decision is None:
            effects = [SetDeadline(at=txn.expires_at)]
            if not txn.active:
                for branch in txn.branches:
                    message = Prepare(gid=txn.gid, branch=branch.name, payload=branch.payload or b"null")
                    effects.append(Send(participant=branch.participant, message=message))
            return effects
        effects = [Reply()]
        if txn.ended_at is None:
            kind = Commit if txn.decision is _COMMIT else Abort
            for branch in txn.branches:
                if is_owed(branch):
                    effects.append(Send(participant=branch.participant, message=kind(gid=txn.gid, branch=branch.name)))
        return effects


def is_owed(branch: Branch) -> bool:
    """Whether a decision, once there is one, has to be carried to the branch."""
    return branch.vote not in _NOT_OWED and branch.resolved is None


def _begin(entry: Begun, header: Header) -> Transaction:
    return Transaction(
        gid=entry.gid,
        protocol=entry.protocol,
        epoch=header.epoch,
        branches=tuple(
            [Branch(name=plan.name, participant=plan.participant, payload=plan.payload) for plan in entry.branches]
        ),
        timeout_ms=entry.timeout_ms,
        started_at=header.at,
        key=entry.key,
        body_hash=entry.body_hash,
    )


def _open(entry: Opened, header: Header) -> Transaction:
    return Transaction(
        gid=entry.gid,
        protocol=entry.protocol,
        epoch=header.epoch,
        branches=(),
        timeout_ms=entry.timeout_ms,
        started_at=header.at,
        key=entry.key,
        body_hash=entry.body_hash,
        active=True,
    )


def _decided(txn: Transaction, entry: Decided, header: Header) -> Transaction:
    is_commit = entry.decision is _COMMIT
    if is_commit and txn.active:
        return txn
    votes = {vote.branch: vote for vote in entry.votes}
    branches: list[Branch] = []
    is_over = True
    for before in txn.branches:
        vote = votes.get(before.name)
        # A commit must rest on a vote of every branch, none of them a refusal; an abort needs none: it is presumed.
        if is_commit and (vote is None or vote.vote is _REFUSED):
            return txn
        branch = _with_vote(before, vote)
        branches.append(branch)
        if branch.vote not in _NOT_OWED:
            is_over = False
    return replace(
        txn,
        branches=tuple(branches),
        decision=entry.decision,
        reason=entry.reason,
        retryable=entry.retryable,
        decided_at=header.at,
        ended_at=header.at if is_over else None,
        active=False,
    )


def _with_resolution(txn: Transaction, entry: Resolved, header: Header) -> Transaction:
    if not any(branch.name == entry.branch and is_owed(branch) for branch in txn.branches):
        return txn
    branches = tuple(
        replace(branch, resolved=entry.outcome, resolved_at=header.at, note=entry.note)
        if branch.name == entry.branch
        else branch
        for branch in txn.branches
    )
    return replace(txn, branches=branches, acknowledged_at=None)


def _with_vote(branch: Branch, vote: BranchVote | None) -> Branch:
    """Who it is, and the vote that the decision recorded: nothing else is known of a branch by then."""
    if vote is None:
        return Branch(name=branch.name, participant=branch.participant)
    return Branch(
        name=branch.name,
        participant=branch.participant,
        vote=vote.vote,
        reason=vote.reason,
        retryable=vote.retryable,
        result=vote.result,
    )


def _recorded(txn: Transaction, tally: Tally) -> tuple[BranchVote, ...]:
    """The votes as the log keeps them, in the order of the branches."""
    return tuple([_record(vote) for branch in txn.branches if (vote := tally.votes.get(branch.name)) is not None])


def _record(vote: Vote) -> BranchVote:
    match vote:
        case Prepared():
            return BranchVote(branch=vote.branch, vote=VoteKind.PREPARED, result=vote.result)
        case ReadOnly():
            return BranchVote(branch=vote.branch, vote=VoteKind.READ_ONLY, result=vote.result)
        case Refused():
            return BranchVote(branch=vote.branch, vote=VoteKind.REFUSED, reason=vote.reason, retryable=vote.retryable)
