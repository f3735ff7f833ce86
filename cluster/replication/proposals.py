"""The proposals of one node that have no answer yet: each ends, at the latest when its time is over."""

import asyncio

from cluster.replication.clock import Clock
from cluster.replication.log import ProposalUnknown


class Proposals:
    """Open proposals and when they time out, oldest first. Belongs to the event loop's thread."""

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._open: dict[asyncio.Future[object], float] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, future: asyncio.Future[object]) -> None:
        """This one waits for an answer from now on."""
        self._open[future] = self._clock.monotonic_s() + self._timeout_s

    def answer(self, future: asyncio.Future[object], result: object, error: Exception | None) -> None:
        """What came of it. Does not raise; an answer that comes too late is nobody's."""
        self._open.pop(future, None)
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def expire(self, now_s: float) -> None:
        """End those whose time is over."""
        late = []
        for future, deadline_s in self._open.items():
            if deadline_s > now_s:
                break
            late.append(future)
        for future in late:
            self.answer(future, None, ProposalUnknown(f"no majority within {self._timeout_s} s"))

    def abandon(self, why: str) -> None:
        """End them all: nobody knows what will come of them."""
        abandoned, self._open = self._open, {}
        for future in abandoned:
            self.answer(future, None, ProposalUnknown(why))
