"""What a resource manager promises, and how the server asks it.

A resource manager is given messages in batches and answers each: that is the whole of it. Batches exist so that one
sync to disk pays for many branches; a manager that cannot share a sync takes batches of one, several at once. Most
managers do not implement this protocol by hand:

- `participants.sqlite.SqliteManager` runs named operations against an SQLite database;
- `participants.per_branch.PerBranchManager` asks for three coroutines (prepare, commit, abort of one branch) and
  keeps the records of who voted what for you: about twenty lines make a participant;
- whoever wants it all decides with `participants.resource` and stores with `participants.records`.

The server promises in turn: no two messages about the same branch are handled at the same time, not even within one
batch; at most `batches_at_once` calls of `handle` run together; a batch is never longer than `batch_limit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from coordinator.protocol.messages import Answer, Request, Stamp


class BranchId(NamedTuple):
    """Which branch of which transaction."""

    gid: str
    branch: str


class Envelope(NamedTuple):
    """A message, and what its sender knew when it left."""

    message: Request
    stamp: Stamp

    @property
    def id(self) -> BranchId:
        """The branch that the message is about."""
        return BranchId(self.message.gid, self.message.branch)


@dataclass(frozen=True, slots=True, kw_only=True)
class InDoubt:
    """A prepared branch that waits for its decision. `prepared_at` is in seconds since the Unix epoch."""

    gid: str
    branch: str
    prepared_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBranch:
    """A branch of which there is a record, and its state: prepared, committed, aborted or read_only."""

    gid: str
    branch: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a manager has on record of some transactions of one cluster.

    epoch: the newest that the cluster's messages have spoken of.
    floor: a gid's number; of transactions below it the record may have been dropped, because they had ended.
    """

    branches: tuple[KnownBranch, ...]
    epoch: int
    floor: int


@runtime_checkable
class TellsWhatItKnows(Protocol):
    """What a manager may do beside `ResourceManager`: say what became of branches that are prepared no more.

    After a coordinator has lost its newest decisions it asks the participants: what one of them has committed, the
    others must commit. Of one that cannot tell, a person must find out. See docs/RECOVERY.md.
    """

    async def known(self, gids: Sequence[str]) -> Known:
        """Every branch of these transactions of one cluster that there is a record of. Raises `Unavailable`."""
        ...


class Unavailable(Exception):
    """The manager cannot say what became of a batch: the disk is full, the database is away. Never a vote.

    The text is for the log. Whoever asked is told "unknown", and asks again.
    """


class ResourceManager(Protocol):
    """What `participants.server` serves. All methods are called from one event loop."""

    @property
    def batches_at_once(self) -> int:
        """How many calls of `handle` may run together; 1 for one writer with group commit."""
        ...

    @property
    def batch_limit(self) -> int:
        """Messages in one batch, at most."""
        ...

    async def open(self) -> Sequence[InDoubt]:
        """Recover, and tell which branches a crash or a stop left prepared. Called once, before anything else."""
        ...

    async def handle(self, batch: Sequence[Envelope]) -> Sequence[Answer]:
        """The answers to `batch`, in its order, each true and durable by the rules of `participants.resource`.

        Raises `Unavailable` when nothing is known of the whole batch: all of it is then asked again, and the manager
        must answer as if it had perhaps been done.
        """
        ...

    async def in_doubt(self) -> Sequence[InDoubt]:
        """The prepared branches of this moment, oldest first."""
        ...

    async def close(self) -> None:
        """Release what `open` took. Called once, when no `handle` runs; a manager that did not open closes too."""
        ...
