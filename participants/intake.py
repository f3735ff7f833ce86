"""Between the callers and the resource manager: what waits becomes the next batch.

Messages about different branches wait together, and go to the manager as one batch as soon as it has room; while a
batch runs, the next one collects. Nothing waits for a timer: when little happens, a batch is one message.

Messages about the same branch go one after the other, in the order of their arrival. So an abort is never handled,
and never acked, while a prepare of its branch still runs; and a prepare that is repeated meanwhile joins the first one
instead of running again.

Every answer is a future that several callers may wait for. Its value is an answer, or None when nothing is known.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from coordinator.protocol.messages import Answer, Pending, Prepare
from participants.manager import BranchId, Envelope, ResourceManager, Unavailable
from participants.settings import ServerSettings

_log = logging.getLogger(__name__)

_PER_BRANCH_LIMIT: Final = 16
"""Messages about one branch that wait for each other; more than a few only come from a caller that repeats blindly."""

_SAY_AGAIN_S: Final = 1.0
"""Between two lines in the log that say that nothing is known of a batch because the manager can do nothing."""

Outcome = asyncio.Future[Answer | None]


class _Slot:
    """One message under way. `expires`: when its coordinator gives up on it, by the loop's clock."""

    __slots__ = ("envelope", "expires", "outcome")

    def __init__(self, envelope: Envelope, outcome: Outcome, expires: float | None) -> None:
        self.envelope, self.outcome, self.expires = envelope, outcome, expires


class Intake:
    """Feeds one resource manager. Used from one event loop.

    heard: is told of every answer as the manager gives it, before the callers are.
    lost: is told when nothing is known of a batch.
    """

    def __init__(
        self,
        manager: ResourceManager,
        settings: ServerSettings,
        *,
        heard: Callable[[Envelope, Answer], None],
        lost: Callable[[], None],
    ) -> None:
        self._manager = manager
        self._settings = settings
        self._heard, self._lost = heard, lost
        self._loop = asyncio.get_running_loop()
        self._branches: dict[BranchId, deque[_Slot]] = {}
        """What is under way per branch, oldest first; only the first of each may be with the manager."""
        self._ready: deque[_Slot] = deque()
        self._batches: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._working = 0
        self._pump_is_due = False
        self._stopped = False
        self._say_again_at = 0.0
        self._unsaid = 0
        """Batches of which nothing is known, and nothing was said."""

    @property
    def working(self) -> int:
        """Prepares that run or wait."""
        return self._working

    @property
    def waiting(self) -> int:
        """Messages of any kind that run or wait."""
        return self._waiting

    @property
    def under_way(self) -> Iterable[BranchId]:
        """Branches about which a message runs or waits."""
        return self._branches.keys()

    def submit(self, envelope: Envelope) -> Outcome:
        """The future answer. Cancelling it does no harm to others that wait, nor to the work."""
        slots = self._branches.get(envelope.id)
        if slots is not None:
            for slot in slots:
                if _same(slot.envelope, envelope):
                    return slot.outcome
        outcome = self._loop.create_future()
        no_room = self._no_room(envelope)
        if slots is not None and len(slots) >= _PER_BRANCH_LIMIT:
            no_room = Pending(gid=envelope.message.gid, branch=envelope.message.branch)
        if self._stopped or no_room is not None:
            outcome.set_result(no_room)
            return outcome
        deadline_ms = envelope.stamp.deadline_ms
        slot = _Slot(envelope, outcome, None if deadline_ms is None else self._loop.time() + deadline_ms / 1000)
        self._waiting += 1
        self._working += isinstance(envelope.message, Prepare)
        if slots is None:
            self._branches[envelope.id] = deque((slot,))
            self._ready.append(slot)
            self._pump_soon()
        else:
            slots.append(slot)
        return outcome

    def _no_room(self, envelope: Envelope) -> Pending | None:
        gid, branch = envelope.id
        busy = isinstance(envelope.message, Prepare) and self._working >= self._settings.working_limit
        if busy or self._waiting >= self._settings.waiting_limit:
            # No vote: a refusal needs its record first (see `resource`), and there is no room to write one.
            return Pending(gid=gid, branch=branch)
        return None

    def _pump_soon(self) -> None:
        # Not at once: the other messages of the same request arrive before this iteration of the loop is over.
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        while self._ready and len(self._batches) < self._manager.batches_at_once and not self._stopped:
            batch = [self._ready.popleft() for _ in range(min(len(self._ready), self._manager.batch_limit))]
            task = self._loop.create_task(self._run(batch))
            self._batches.add(task)
            task.add_done_callback(lambda done, batch=batch: self._ended(batch, done))  # type: ignore[misc]

    async def _run(self, slots: list[_Slot]) -> None:
        now = self._loop.time()
        batch = []
        for slot in slots:
            if slot.expires is not None and slot.expires < now and isinstance(slot.envelope.message, Prepare):
                # Its coordinator has given up: to work for it now would only hold locks. No vote is the truth.
                slot.outcome.set_result(Pending(gid=slot.envelope.message.gid, branch=slot.envelope.message.branch))
            else:
                batch.append(slot)
        if not batch:
            return
        answers = await self._manager.handle([slot.envelope for slot in batch])
        for slot, answer in zip(batch, answers, strict=True):
            self._heard(slot.envelope, answer)
            if not slot.outcome.done():
                slot.outcome.set_result(answer)

    def _ended(self, slots: list[_Slot], task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Unavailable):
            self._say_unavailable(len(slots), error)
        elif error is not None:
            _log.error("a batch of %d is unknown: its resource manager failed", len(slots), exc_info=error)
        if error is not None:
            self._lost()
        for slot in slots:
            if not slot.outcome.done():
                slot.outcome.set_result(None)
            self._release(slot)
        self._pump()

    def _say_unavailable(self, messages: int, error: Unavailable) -> None:
        """While the manager can do nothing, every message is repeated, and its end is no news each time."""
        now = self._loop.time()
        if now < self._say_again_at:
            self._unsaid += 1
            return
        more = f"; {self._unsaid} more batches since the last such line" if self._unsaid else ""
        _log.error("a batch of %d is unknown: %s%s", messages, error, more)
        self._say_again_at, self._unsaid = now + _SAY_AGAIN_S, 0

    def _release(self, slot: _Slot) -> None:
        self._waiting -= 1
        self._working -= isinstance(slot.envelope.message, Prepare)
        slots = self._branches[slot.envelope.id]
        slots.popleft()
        if slots:
            self._ready.append(slots[0])
        else:
            del self._branches[slot.envelope.id]

    async def stop(self) -> None:
        """Lets the batches that run finish, and tells everybody else that nothing is known."""
        self._stopped = True
        while self._batches:
            await asyncio.wait(self._batches)
        for slots in self._branches.values():
            for slot in slots:
                if not slot.outcome.done():
                    slot.outcome.set_result(None)
        self._branches.clear()
        self._ready.clear()
        self._waiting = self._working = 0


def _same(under_way: Envelope, arriving: Envelope) -> bool:
    """Does `arriving` ask for nothing that `under_way` does not?

    A newer epoch must reach the manager, which remembers it; a prepare of an older one must be told so.
    """
    return type(under_way.message) is type(arriving.message) and under_way.stamp.epoch == arriving.stamp.epoch
