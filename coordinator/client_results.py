"""What a client of a cluster gives and gets: branches, results, errors; and how they are read out of JSON.

`coordinator.client` offers all of this under its own name. A reader raises KeyError, TypeError, ValueError or
AttributeError for JSON that is not what a node answers.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from coordinator.protocol.transaction import Decision, State

# ------------------------------------------------------------------------------------------------ what goes in


@dataclass(frozen=True, slots=True)
class Branch:
    """One participant's part of a transaction.

    participant: its registered name.
    payload: what it is to do; any JSON value.
    name: tells branches of one transaction apart; the participant's name when left out.
    """

    participant: str
    payload: Any = None
    name: str | None = field(default=None, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        named = {} if self.name is None else {"branch": self.name}
        return {"participant": self.participant, **named, "payload": self.payload}


# ------------------------------------------------------------------------------------------------ what comes out


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchResult:
    """How far a branch is.

    state: active, preparing, prepared, read_only, refused, committing, committed, aborting or aborted.
    reason, retryable: of a refusal; `retryable` says that a new transaction might fare better.
    result: what the participant returned with its vote.
    heuristic: the state that a participant claims against the decision; somebody has to look at it.
    resolved: how an operator has ended it by hand, whatever the decision.
    """

    name: str
    participant: str
    state: str
    reason: str | None = None
    retryable: bool = False
    result: Any = None
    heuristic: str | None = None
    resolved: Decision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionResult:
    """A transaction as a node showed it.

    decision: None while it is undecided; it never changes afterwards.
    reason, retryable: of an abort.
    heuristic: contradicted, mixed or resolved, where a participant or an operator has left the normal way.
    key: the idempotency key that it was submitted with, where this client submitted it.
    """

    gid: str
    protocol: str
    state: State
    decision: Decision | None
    reason: str | None
    retryable: bool
    epoch: int
    branches: tuple[BranchResult, ...]
    started_at: datetime
    decided_at: datetime | None
    ended_at: datetime | None
    key: str | None = None
    heuristic: str | None = None

    @property
    def committed(self) -> bool:
        """Whether it is decided that all of it happens; what a participant has not heard yet, it will."""
        return self.decision is Decision.COMMIT

    @property
    def aborted(self) -> bool:
        """Whether it is decided that none of it happens."""
        return self.decision is Decision.ABORT

    @property
    def ended(self) -> bool:
        """Whether every participant has done as decided."""
        return self.ended_at is not None

    def branch(self, name: str) -> BranchResult:
        """The branch of that name. Raises KeyError."""
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise KeyError(name)

    def raise_for_abort(self) -> Self:
        """This result, unless its decision is to abort: that raises `TransactionAborted`."""
        if self.aborted:
            raise TransactionAborted(self)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """A registered participant.

    owed: messages that it has not answered; trouble: why the last request to it failed, None when it did not.
    """

    name: str
    url: str
    batch: bool
    owed: int = 0
    reachable: bool = True
    trouble: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node, as another one sees it."""

    id: str
    url: str
    role: str
    reachable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The cluster as one node sees it. `node` is the one that answered; `ready`: it has a leader and has caught up."""

    cluster: str
    node: str
    role: str
    leader: str | None
    epoch: int
    ready: bool
    in_flight: int
    nodes: tuple[Node, ...]


# ------------------------------------------------------------------------------------------------ what can go wrong


class ClientError(Exception):
    """Base of all that the client raises about a cluster.

    status, code: of the answer, None where there was none; `docs/API.md` lists the codes.
    detail: for people.
    """

    def __init__(self, detail: str, *, code: str | None = None, status: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status


class Definite(ClientError):
    """What was asked for was not done, and will not be."""


class Indefinite(ClientError):
    """What was asked for may have been done, or may still be."""


class InvalidRequest(Definite):
    """The request makes no sense to the cluster; to repeat it is of no use."""


class KeyReused(InvalidRequest):
    """The idempotency key names a transaction that was asked for with another body."""


class NotAllowed(Definite):
    """No token, or not the right one."""


class NotFound(Definite):
    """No such transaction or participant."""


class Forgotten(Definite):
    """The transaction has been forgotten after its retention time; it may have had any outcome."""


class Conflict(Definite):
    """It contradicts what is there: a participant that unfinished transactions name stays registered."""


class Overloaded(Definite):
    """The cluster has as much to do as it takes on. `retry_after_s`: when to come back."""

    def __init__(self, detail: str, *, code: str | None, status: int | None, retry_after_s: float) -> None:
        super().__init__(detail, code=code, status=status)
        self.retry_after_s = retry_after_s


class Unavailable(Definite):
    """No node could do it in time, and none has begun to."""


class NotKnownYet(Unavailable):
    """The question has no answer yet: the transaction is undecided."""


class OutcomeUnknown(Indefinite):
    """A node may have done it and could not say so in time.

    key: of a submission; to submit the same again under it finds the transaction, or begins it once.
    gid: the transaction, where it is known.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        status: int | None = None,
        key: str | None = None,
        gid: str | None = None,
    ) -> None:
        super().__init__(detail, code=code, status=status)
        self.key = key
        self.gid = gid


class TransactionAborted(Definite):
    """The decision is to abort. `retryable`: a new transaction, under a new key, might fare better."""

    def __init__(self, result: TransactionResult) -> None:
        super().__init__(f"{result.gid} aborted: {result.reason or 'no reason given'}", code="aborted")
        self.result = result
        self.reason = result.reason
        self.retryable = result.retryable


# ------------------------------------------------------------------------------------------------ answers, read


def read_transaction(body: Any) -> TransactionResult:
    """A transaction."""
    decision = body["decision"]
    return TransactionResult(
        gid=_text(body["gid"]),
        protocol=_text(body["protocol"]),
        state=State(body["state"]),
        decision=None if decision is None else Decision(decision),
        reason=_text_or_none(body.get("reason")),
        retryable=bool(body.get("retryable", False)),
        epoch=int(body["epoch"]),
        branches=tuple(_branch(item) for item in body["branches"]),
        started_at=datetime.fromisoformat(body["started_at"]),
        decided_at=_date(body.get("decided_at")),
        ended_at=_date(body.get("ended_at")),
        heuristic=_text_or_none(body.get("heuristic")),
    )


def _branch(body: Any) -> BranchResult:
    resolved = body.get("resolved")
    return BranchResult(
        name=_text(body["branch"]),
        participant=_text(body["participant"]),
        state=_text(body["state"]),
        reason=_text_or_none(body.get("reason")),
        retryable=bool(body.get("retryable", False)),
        result=body.get("result"),
        heuristic=_text_or_none(body.get("heuristic")),
        resolved=None if resolved is None else Decision(resolved["outcome"]),
    )


def read_page(body: Any) -> tuple[list[TransactionResult], str | None]:
    """The transactions of a page, and the gid to go on after."""
    return [read_transaction(item) for item in body["transactions"]], _text_or_none(body["next"])


def read_outcome(body: Any) -> Decision:
    """A participant's answer to its doubt."""
    return {"committed": Decision.COMMIT, "aborted": Decision.ABORT}[body["outcome"]]


def read_participant(body: Any) -> Participant:
    """A registration."""
    return Participant(
        name=_text(body["name"]),
        url=_text(body["url"]),
        batch=bool(body["batch"]),
        owed=int(body.get("owed", 0)),
        reachable=bool(body.get("reachable", True)),
        trouble=_text_or_none(body.get("trouble")),
    )


def read_participants(body: Any) -> tuple[Participant, ...]:
    """All registrations."""
    return tuple(read_participant(item) for item in body["participants"])


def read_cluster(body: Any) -> Cluster:
    """The cluster, as a node sees it."""
    return Cluster(
        cluster=_text(body["cluster"]),
        node=_text(body["node"]),
        role=_text(body["role"]),
        leader=_text_or_none(body["leader"]),
        epoch=int(body["epoch"]),
        ready=bool(body.get("ready", body["leader"] is not None)),
        in_flight=int(body["in_flight"]),
        nodes=tuple(
            Node(id=_text(item["id"]), url=_text(item["url"]), role=_text(item["role"]), reachable=item["reachable"])
            for item in body["nodes"]
        ),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a string")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _date(value: Any) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)
