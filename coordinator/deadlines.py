"""Deadlines by key: one heap and one timer, however many there are."""

import asyncio
import heapq
from collections.abc import Callable
from itertools import count

from cluster.replication.clock import Clock


class Deadlines:
    """Tells `on_due` the keys whose time has come, in one call for all that came together."""

    def __init__(self, clock: Clock, on_due: Callable[[list[str]], None]) -> None:
        self._clock = clock
        self._on_due = on_due
        self._heap: list[tuple[float, int, str]] = []
        self._current: dict[str, int] = {}
        self._order = count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")

    def __len__(self) -> int:
        return len(self._current)

    def set(self, key: str, at_s: float) -> None:
        """`key` is due at `at_s` on the monotonic clock; an earlier deadline of that key no longer counts."""
        ticket = next(self._order)
        self._current[key] = ticket
        heapq.heappush(self._heap, (at_s, ticket, key))
        if at_s < self._timer_at:
            self._arm(at_s)

    def cancel(self, key: str) -> None:
        """`key` is no longer awaited. Its place in the heap goes with its time, or when half of the heap is dead."""
        if (
            self._current.pop(key, None) is not None
            and len(self._heap) > 64
            and len(self._heap) > 2 * len(self._current)
        ):
            self._heap = [item for item in self._heap if self._current.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def clear(self) -> None:
        """Await nothing any more."""
        self._heap.clear()
        self._current.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, float("inf")

    def _arm(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at_s
        delay_s = max(0.0, at_s - self._clock.monotonic_s())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        now_s = self._clock.monotonic_s()
        due: list[str] = []
        while self._heap and self._heap[0][0] <= now_s:
            _, ticket, key = heapq.heappop(self._heap)
            if self._current.get(key) == ticket:
                del self._current[key]
                due.append(key)
        if self._heap:
            self._arm(self._heap[0][0])
        if due:
            self._on_due(due)
