"""Writers without threads: one that is done at once, and one that takes its time under virtual time."""

import asyncio
import random
from collections.abc import Callable

from cluster.replication.journal import DurableJournal, JournalSettings
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.segments import SegmentSettings
from tests.simulation.disk import SimulatedDisk

SMALL = JournalSettings(
    segments=SegmentSettings(segment_bytes=16 * 1024, preallocate_bytes=0),
    unsynced_bytes_high=2**20,
    unsynced_bytes_max=2**24,
)
LARGE = JournalSettings(segments=SegmentSettings(segment_bytes=2**30, preallocate_bytes=0))


class InstantPump:
    """What was changed is durable when the call that changed it returns."""

    def __init__(self) -> None:
        self._round: Callable[[], float | None] | None = None

    def start(self, round_: Callable[[], float | None]) -> None:
        self._round = round_
        self.wake()

    def wake(self) -> None:
        while self._round is not None and self._round() == 0:
            pass

    def post(self, callback: Callable[[], None]) -> None:
        callback()

    def stop(self) -> None:
        self._round = None


class SlowPump:
    """Rounds and reports come a while later, as chance has it; now and then the disk stalls."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, rng: random.Random, *, sync_s: tuple[float, float] = (0.0001, 0.003)
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._sync_s = sync_s
        self._round: Callable[[], float | None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rests = False
        """Whether the timer is of a round that nobody has asked for yet."""

    def start(self, round_: Callable[[], float | None]) -> None:
        self._round = round_
        self.wake()

    def wake(self) -> None:
        if self._rests and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and self._round is not None:
            self._rests = False
            stalled = self._rng.random() < 0.01
            self._timer = self._loop.call_later(
                self._rng.uniform(*((0.05, 0.3) if stalled else self._sync_s)), self._work
            )

    def post(self, callback: Callable[[], None]) -> None:
        def report() -> None:
            if self._round is not None:
                callback()

        self._loop.call_later(self._rng.uniform(0.00001, 0.001), report)

    def stop(self) -> None:
        self._round = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _work(self) -> None:
        self._timer = None
        if self._round is None:
            return
        delay_s = self._round()
        if delay_s == 0:
            self.wake()
        elif delay_s is not None and self._timer is None:
            self._rests = True
            self._timer = self._loop.call_later(delay_s, self._work)


def instant_journal(disk: SimulatedDisk | None = None, settings: JournalSettings = LARGE) -> RaftJournal:
    """A journal on a simulated disk, on which everything is durable at once."""
    disk = disk or SimulatedDisk(random.Random(0))
    journal = DurableJournal(disk, settings, new_id=lambda: bytes(16))
    return RaftJournal(disk, journal, InstantPump)
