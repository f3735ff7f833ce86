"""What each participant is told that it may forget: everything below its floor.

A participant's floor is the lowest unfinished number that names it, or may come to name it. It only rises: transactions
begin in the order of their numbers, and no number that has ended becomes unfinished again. An active transaction may
come to name any participant any moment, and must not be below that one's floor then.

Heaps, because numbers end in any order: one that has ended is dropped when it comes to the top.
"""

import heapq
from collections.abc import Iterable
from typing import Final

from coordinator.ledger import Ledger
from coordinator.protocol.transaction import Branch

_ROOM: Final = 1000
"""Numbers of one participant that are never swept."""


class Floors:
    """The floors of one leader, in one reign."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._naming: dict[str, list[int]] = {}
        """Per participant a heap of the numbers that name it."""
        self._active: set[int] = set()
        self._oldest_active: list[int] = []
        """A heap of the same, and of some that are active no more."""

    @property
    def active(self) -> int:
        """How many transactions are active."""
        return len(self._active)

    def name(self, number: int, branches: Iterable[Branch]) -> None:
        """This unfinished transaction names the participants of these branches."""
        for branch in branches:
            numbers = self._naming.setdefault(branch.participant, [])
            if len(numbers) > _ROOM and len(numbers) > 2 * len(self._ledger.unfinished):
                # One that does not end, for another participant's sake, keeps those behind it from being dropped.
                numbers[:] = [old for old in numbers if old in self._ledger.unfinished]
                heapq.heapify(numbers)
            heapq.heappush(numbers, number)

    def opened(self, number: int) -> None:
        """This transaction is active."""
        self._active.add(number)
        heapq.heappush(self._oldest_active, number)

    def closed(self, number: int) -> None:
        """It is not, any more."""
        self._active.discard(number)

    def forget(self, participant: str) -> None:
        """It is not registered any more."""
        self._naming.pop(participant, None)

    def clear(self) -> None:
        """This node leads no more."""
        self._naming.clear()
        self._active.clear()
        self._oldest_active.clear()

    def floor(self, participant: str) -> int | None:
        """The number below which it may forget; None where nothing unfinished names it."""
        numbers = self._naming.get(participant, [])
        while numbers and numbers[0] not in self._ledger.unfinished:
            heapq.heappop(numbers)
        if not numbers:
            return None
        while self._oldest_active and self._oldest_active[0] not in self._active:
            heapq.heappop(self._oldest_active)
        return min([numbers[0], *self._oldest_active[:1]])
