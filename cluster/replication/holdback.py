"""Words that must not leave the node before the disk holds what they speak of.

A vote, a vote for oneself, and the word "I hold the log up to here" are promises: the other nodes count them, and a
node that forgets them in a power cut can take a majority away from what was committed, or vote twice. So each waits
until the journal's durable position has reached what it was when the word was made. They go in the order in which they
were made, per peer, and not at all once the term has moved on or the connection has gone: whoever still wants to know
asks again.

**Alive, but not yet.** A leader that speaks again while an acknowledgement to it waits is told that this node lives:
the same message without its "success", which is counted for nothing else. So a disk that is slow for a second deposes
nobody; and a disk that is not slow costs no second message, for the acknowledgement is on its way before the leader
speaks again. A node whose disk is full says nothing: it is of no use to a leader until there is room.

What is not a promise waits for nothing: entries that a leader sends on (it counts itself only when its own copy is
durable), heartbeats, and the answer that a log does not match, which moves the leader to send more, never less.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cluster.replication.guard import Message

VOTES: Final = frozenset({"request_vote", "response_vote"})
ACKNOWLEDGEMENT: Final = "next_node_idx"
CAUGHT_UP: Final = "snapshot_got"


class Durability(Protocol):
    """What must be known of a journal."""

    @property
    def position(self) -> int:
        """How many changes have been made."""
        ...

    @property
    def term_position(self) -> int:
        """Up to which change the term and the vote of now are told."""
        ...

    @property
    def durable_position(self) -> int:
        """How many changes are on disk."""
        ...

    @property
    def durable_index(self) -> int:
        """The last entry of which it and all before it are on disk."""
        ...

    @property
    def full(self) -> str | None:
        """Why nothing becomes durable at present."""
        ...


@dataclass(slots=True, kw_only=True)
class _Held:
    """A message, the term in which it was made, and what must be durable before it goes."""

    position: int
    term: int
    message: Message


class HoldBack:
    """Sends by `send(peer, term, message)`, once that may be said. `term` tells the node's own."""

    def __init__(
        self, *, journal: Durability, term: Callable[[], int], send: Callable[[str, int, Message], bool]
    ) -> None:
        self._journal = journal
        self._term = term
        self._send = send
        self._held: dict[str, deque[_Held]] = {}

    def __len__(self) -> int:
        """How many words wait."""
        return sum(len(queue) for queue in self._held.values())

    def send(self, peer: str, message: Message) -> bool:
        """Say it now, or when it may be said. False: it could not be sent."""
        position = self.needs(message)
        term = self._term()
        if position <= self._journal.durable_position:
            return self._send(peer, term, message)
        acknowledges = message["type"] == ACKNOWLEDGEMENT
        queue = self._held.setdefault(peer, deque())
        if acknowledges and queue and self._journal.full is None:
            self._send(peer, term, message | {"success": False})
        while queue and queue[-1].term != term:
            queue.pop()
        if acknowledges and any(_covers(held.message, message) for held in queue):
            return True
        queue.append(_Held(position=position, term=term, message=message))
        return True

    def needs(self, message: Message) -> int:
        """The position that must be durable before this may be said."""
        kind = message["type"]
        if kind in VOTES or (kind == CAUGHT_UP and message["done"]):
            return self._journal.position
        if kind != ACKNOWLEDGEMENT or not message["success"]:
            return 0
        if message["next_node_idx"] - 1 <= self._journal.durable_index:
            return self._journal.term_position
        return self._journal.position

    def release(self) -> None:
        """More is durable: say what may be said now."""
        durable, term = self._journal.durable_position, self._term()
        for peer, queue in self._held.items():
            while queue and queue[0].position <= durable:
                held = queue.popleft()
                if held.term == term:
                    self._send(peer, term, held.message)

    def forget(self, peer: str) -> None:
        """The connection to this peer has gone."""
        self._held.pop(peer, None)


def _covers(held: Message, message: Message) -> bool:
    """Whether an acknowledgement that waits says all that this one would."""
    return held["type"] == ACKNOWLEDGEMENT and bool(held["next_node_idx"] >= message["next_node_idx"])
