"""The words that a coordinator and its participants exchange: the whole vocabulary of a participant.

The terms are Gray & Lamport's ("Consensus on Transaction Commit", 2006) and the XA world's: a transaction has a gid
and branches; a participant votes on its branch (prepared, refused, read-only), and is told the decision.

A message says *what* is asked. Its `Stamp` says what the sender knew when it asked: epoch, floor, time left. The stamp
is put on when the message leaves, so that a message repeated an hour later carries today's floor.
"""

import re
from functools import lru_cache
from typing import Final, NamedTuple

from coordinator.protocol.record import Record

MAX_CLUSTER_NAME: Final = 24
"""Characters. A gid must fit into the 64 bytes that MariaDB gives a gtrid."""

_GID_LENGTH: Final = MAX_CLUSTER_NAME + 1 + 7 + 1 + 12
_SEQUENCE_BITS: Final = 40
_GID = re.compile(r"([a-z][a-z0-9-]{0,23})-(0|[1-9][0-9]{0,6})-(0|[1-9][0-9]{0,11})", re.ASCII)


class Gid(NamedTuple):
    """A transaction's name, taken apart: `<cluster>-<epoch>-<sequence>`.

    The epoch is that of the leader that began the transaction, so a restarted node never reuses one.
    """

    cluster: str
    epoch: int
    sequence: int

    @property
    def number(self) -> int:
        """Gids of one cluster in the order in which they were given out, as one integer."""
        return self.epoch << _SEQUENCE_BITS | self.sequence

    def __str__(self) -> str:
        return f"{self.cluster}-{self.epoch}-{self.sequence}"

    @staticmethod
    def parse(text: str) -> "Gid | None":
        """The gid that `text` spells, or None: only the canonical spelling is one."""
        # What is too long is not remembered either: anybody can send it.
        return _parsed(text) if len(text) <= _GID_LENGTH else None

    @staticmethod
    def number_in(cluster: str, text: str) -> int | None:
        """The number of the gid that `text` spells, if it is one of this cluster's; quickly."""
        return _number_in(cluster, text) if len(text) <= _GID_LENGTH else None

    @staticmethod
    def of_number(cluster: str, number: int) -> "Gid":
        """The inverse of `number`."""
        return Gid(cluster, number >> _SEQUENCE_BITS, number & ((1 << _SEQUENCE_BITS) - 1))


@lru_cache(maxsize=16_384)
def _parsed(text: str) -> Gid | None:
    """A gid comes by a dozen times in a transaction's life, on every node."""
    match = _GID.fullmatch(text)
    return Gid(match[1], int(match[2]), int(match[3])) if match else None


@lru_cache(maxsize=16_384)
def _number_in(cluster: str, text: str) -> int | None:
    gid = _parsed(text)
    return gid.number if gid is not None and gid.cluster == cluster else None


# ------------------------------------------------------------------------------------- coordinator to participant


class Stamp(Record, frozen=True):
    """What the sender of a message knows.

    epoch: of the sending leader; a participant fences prepares of an older epoch than it has seen.
    floor: the oldest gid naming this participant that has not ended. Below it nothing will ever be asked again, so the
        participant refuses prepares and may forget what it kept to answer repeats.
    deadline_ms: time left until the coordinator aborts, from now; prepares only.
    coordinators: where the outcome can be asked; a hint, never trusted over configuration; prepares only.
    """

    epoch: int
    floor: str | None = None
    deadline_ms: int | None = None
    coordinators: tuple[str, ...] = ()


class Prepare(Record, frozen=True):
    """Do the branch's work, make it durable without making it visible, and vote. `payload` is JSON text."""

    gid: str
    branch: str
    payload: bytes


ENLISTED_PAYLOAD: Final = b'{"op":"outlast.enlisted"}'
"""Payload of a prepare whose work an application has done already, on a connection of its own.

It asks the participant to look, not to work: vote prepared if the branch is prepared in its database, else refuse, and
make sure that it never will be. To a participant that does not know the word it is an unknown operation: a vote no.
"""


class Commit(Record, frozen=True):
    """The decision is commit: make the prepared branch visible."""

    gid: str
    branch: str


class Abort(Record, frozen=True):
    """The decision is abort: undo the branch, or make sure that it never comes to be."""

    gid: str
    branch: str


Request = Prepare | Commit | Abort

# ------------------------------------------------------------------------------------- participant to coordinator


class Prepared(Record, frozen=True):
    """A vote: the branch is durable, and its participant has given up the right to abort it. `result` is JSON text."""

    gid: str
    branch: str
    result: bytes | None = None


class ReadOnly(Record, frozen=True):
    """A vote: the branch changed nothing, and needs no second phase. `result` is JSON text."""

    gid: str
    branch: str
    result: bytes | None = None


class Refused(Record, frozen=True):
    """A vote: the branch is undone and will never commit. `retryable`: a new transaction might fare better."""

    gid: str
    branch: str
    reason: str
    retryable: bool = False


class Acked(Record, frozen=True):
    """The branch is in the state that was asked for, durably."""

    gid: str
    branch: str


class Contradicted(Record, frozen=True):
    """The branch cannot follow the decision: it is in `state` (working, aborted, committed, unknown). An alarm."""

    gid: str
    branch: str
    state: str


class StaleEpoch(Record, frozen=True):
    """No vote: the participant has heard from a leader of the newer `epoch`."""

    gid: str
    branch: str
    epoch: int


class Pending(Record, frozen=True):
    """No answer yet: the work still runs. The same message, repeated, joins it."""

    gid: str
    branch: str


Vote = Prepared | ReadOnly | Refused
Answer = Prepared | ReadOnly | Refused | Acked | Contradicted | StaleEpoch | Pending
