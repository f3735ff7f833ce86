"""What a replicated log promises to the one who drives it.

Entries are opaque bytes. An implementation applies them to a `StateMachine`, on every node, in one order, and tells
its owner who leads. It promises three things and no more:

1. `apply` is called with the same commands in the same order on every node, for live traffic and for replay alike.
2. A proposal's future ends in exactly one of three ways: the value that `apply` returned here (it is committed),
   `NotProposed` (it is not in the log and never will be), `ProposalUnknown` (it may or may not be, or come to be).
3. `on_leadership` is told of every change. Two nodes may believe that they lead at the same time, never in the same
   term; whoever must be sure proposes an entry and waits for it.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

MAX_COMMAND_BYTES = 4 * 1024 * 1024
"""The largest command that an implementation takes unless its settings say otherwise: larger ones are `NotProposed`."""

OnFatal = Callable[[BaseException], None]
"""Told once, on the event loop, why a log can no longer go on: the node should end, and be started anew."""


class CannotStart(Exception):
    """What is on disk must not, or cannot, be used. Says which file it is, and what can be done."""


class NeedsNewer(CannotStart):
    """What is committed was written by newer software, and means something that this one does not know.

    Nothing was changed, and nothing is wrong with what is on disk: newer software goes on from there.
    """


class NotProposed(Exception):
    """Definite: the command did not enter the log, and never will."""


class ProposalUnknown(Exception):
    """Indefinite: the command may be in the log, may enter it later, or may be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leadership:
    """Who leads, as this node knows it. `term` is this node's current term, whoever leads it."""

    term: int
    leader: str | None
    is_leader: bool


class StateMachine(Protocol):
    """What is replicated. No method may call back into the log, nor raise on any bytes that a proposal can hold.

    But for `NeedsNewer`, of `apply` and `restore`: nothing has changed then, the node stops before it takes what it
    does not understand for something else, and other replicas may well understand it.
    """

    def apply(self, command: bytes) -> object:
        """Apply one committed command and return what its proposer wants to know."""
        ...

    def snapshot(self) -> Callable[[], Iterator[bytes]]:
        """Freeze the state now, cheaply; the returned function encodes it, piece by piece, on another thread.

        Pieces are neither empty nor large: each is made in one go, and the event loop may have to wait for it.
        """
        ...

    def restore(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        """Make a state of what an earlier `snapshot` encoded, perhaps on another thread, and change nothing yet.

        The returned function puts it in place, on the event loop, and returns what it replaces: letting go of that may
        take time. May raise anything if the pieces are not what `snapshot` made.
        """
        ...


class ReplicatedLog(Protocol):
    """One node's end of the log. All methods belong to the event loop's thread."""

    @property
    def node(self) -> str:
        """This node's id."""
        ...

    async def start(self, machine: StateMachine, on_leadership: Callable[[Leadership], None]) -> None:
        """Open what is on disk, listen, and begin; `on_leadership` runs on the event loop and must not block."""
        ...

    def propose(self, command: bytes) -> asyncio.Future[object]:
        """Ask for `command` to be committed. The future has its own deadline (see the implementation's settings)."""
        ...

    def leadership(self) -> Leadership:
        """Who leads, as this node knows it now."""
        ...

    def reachable(self) -> frozenset[str]:
        """Ids of the other nodes that this one is connected to."""
        ...

    def understands(self) -> Mapping[str, int | None]:
        """By node of the cluster, this one included: the level that it has said it understands.

        What that means is the owner's business. A node that is connected and has not said anything understands 1; None:
        there is no connection to it now.
        """
        ...

    def joining(self) -> frozenset[str]:
        """Ids of the nodes that came without a log and do not count yet, as far as this one knows; its own as well."""
        ...

    @property
    def trouble(self) -> str | None:
        """What keeps this node from taking part, such as a full disk, for people; None: nothing does."""
        ...

    async def transfer(self) -> bool:
        """Hand leadership over, if this node leads: True once another node leads, False if it could not be done."""
        ...

    async def stop(self) -> None:
        """Stop taking part, and release sockets and files. Futures still open end in `ProposalUnknown`."""
        ...
