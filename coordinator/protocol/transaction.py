"""What is known of a transaction: hard state (replicated) and soft state (a leader's own)."""

from collections.abc import Collection, Mapping
from enum import StrEnum

from coordinator.protocol.messages import Acked, Answer, Contradicted, Prepared, ReadOnly, Refused, Vote
from coordinator.protocol.record import Record, replace


class Decision(StrEnum):
    """The one bit that a transaction is about."""

    COMMIT = "commit"
    ABORT = "abort"


class State(StrEnum):
    """How far a transaction is; derived from decision and end, never stored."""

    ACTIVE = "active"
    PREPARING = "preparing"
    COMMITTING = "committing"
    ABORTING = "aborting"
    COMMITTED = "committed"
    ABORTED = "aborted"


class VoteKind(StrEnum):
    """A branch's vote as the log keeps it."""

    PREPARED = "prepared"
    READ_ONLY = "read_only"
    REFUSED = "refused"


class Heuristic(StrEnum):
    """How a transaction has left the normal way (the XA world's word), the worst first.

    CONTRADICTED: a participant claims a state against the decision, and an operator has to look.
    MIXED: a branch was ended by hand against the decision.
    RESOLVED: a branch was ended by hand, as the decision wants it.
    """

    CONTRADICTED = "contradicted"
    MIXED = "mixed"
    RESOLVED = "resolved"


class Branch(Record, frozen=True, tag=2):
    """One participant's part. Hard state.

    payload: JSON text of the work; leaves with the decision, for nobody will be asked to do the work again.
    vote, reason, retryable, result: as the decision recorded them; None where no vote was in by then.
    contradiction: the state a participant claimed against the decision. A heuristic outcome: shown, never forgotten.
    resolved: how an operator has ended it by hand, whatever the decision; nothing is owed to it since `resolved_at`.
    note: the operator's own words.
    """

    name: str
    participant: str
    payload: bytes | None = None
    vote: VoteKind | None = None
    reason: str | None = None
    retryable: bool = False
    result: bytes | None = None
    contradiction: str | None = None
    resolved: Decision | None = None
    resolved_at: int | None = None
    note: str | None = None


class Transaction(Record, frozen=True, tag=1):
    """All that is replicated of one transaction. Hard state; dates are milliseconds since 1970 as data.

    epoch: of the leader that began it, and part of its gid.
    timeout_ms: from `started_at`; a transaction undecided by then is aborted.
    key, body_hash: the client's idempotency key, and what it asked for under it.
    active: an application is at work in it: branches still come, none is asked for its vote, and it cannot commit.
    acknowledged_at: when an operator said that all that was resolved by hand in it is seen to.
    """

    gid: str
    protocol: str
    epoch: int
    branches: tuple[Branch, ...]
    timeout_ms: int
    started_at: int
    key: str | None = None
    body_hash: bytes | None = None
    decision: Decision | None = None
    reason: str | None = None
    retryable: bool = False
    decided_at: int | None = None
    ended_at: int | None = None
    active: bool = False
    acknowledged_at: int | None = None

    @property
    def state(self) -> State:
        """How far it is."""
        if self.decision is None:
            return State.ACTIVE if self.active else State.PREPARING
        if self.decision is Decision.COMMIT:
            return State.COMMITTED if self.ended_at is not None else State.COMMITTING
        return State.ABORTED if self.ended_at is not None else State.ABORTING

    @property
    def expires_at(self) -> int:
        """When it is aborted if still undecided, in milliseconds since 1970."""
        return self.started_at + self.timeout_ms

    @property
    def kept(self) -> bool:
        """Whether it stays however long ago it ended: a branch was resolved by hand, and that is not acknowledged."""
        if self.acknowledged_at is None:
            for branch in self.branches:
                if branch.resolved is not None:
                    return True
        return False

    @property
    def heuristic(self) -> "Heuristic | None":
        """What an operator should know of it, acknowledged or not; None where every branch goes the normal way."""
        found = None
        for branch in self.branches:
            if branch.resolved is None:
                if branch.contradiction is not None and self.ended_at is None:
                    return Heuristic.CONTRADICTED
            elif branch.resolved is not self.decision:
                found = Heuristic.MIXED
            elif found is None:
                found = Heuristic.RESOLVED
        return found

    def has_branches(self, names: Collection[str]) -> bool:
        """Whether these are the names of its branches: all of them, and no other."""
        return len(names) == len(self.branches) and {branch.name for branch in self.branches} == set(names)


class Tally(Record, frozen=True):
    """What this leader has heard: soft state, by branch name. Sets, so that a repeated message counts once.

    votes: the first vote of each branch; a participant repeats its vote, it never changes it.
    acked: branches that are where the decision wants them.
    contradictions: branch -> state, of those that cannot follow.
    abort_reason: somebody with the right to do so asked for an abort.
    """

    votes: Mapping[str, Vote]
    acked: frozenset[str]
    contradictions: Mapping[str, str]
    abort_reason: str | None = None

    def heard(self, answer: Answer) -> "Tally":
        """This tally and `answer`; the same object when it says nothing new."""
        votes, acked, contradictions = self.votes, self.acked, self.contradictions
        match answer:
            case Acked():
                if answer.branch in acked:
                    return self
                acked = acked | {answer.branch}
            case Prepared() | ReadOnly() | Refused():
                if answer.branch in votes:
                    return self
                votes = {**votes, answer.branch: answer}
            case Contradicted():
                if contradictions.get(answer.branch) == answer.state:
                    return self
                contradictions = {**contradictions, answer.branch: answer.state}
            case _:
                return self
        return replace(self, votes=votes, acked=acked, contradictions=contradictions)

    def asked_to_abort(self, reason: str) -> "Tally":
        """This tally after a request to abort; the first reason stays."""
        return self if self.abort_reason is not None else replace(self, abort_reason=reason)


NOTHING_HEARD = Tally(votes={}, acked=frozenset(), contradictions={})
"""Where every leader starts. Shared and never changed: a tally is replaced, not written to."""
