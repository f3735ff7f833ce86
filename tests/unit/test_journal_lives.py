"""Whatever the disk does and whenever the process dies, the journal comes back with what it promised; and if it did
not, this would be noticed."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from cluster.replication import records
from cluster.replication.disk import File
from cluster.replication.journal import DurableJournal, JournalHandlers
from cluster.replication.segments import JournalRefused, Segments
from tests.simulation.disk import PowerLost, SimulatedDisk, VirtualPump
from tests.simulation.journal import JOURNAL_ID, SMALL, Violation, World, live
from tests.simulation.virtual import VirtualLoop, run

LIVES_PER_TEST = 25


@pytest.mark.parametrize("first", range(0, 1000, LIVES_PER_TEST))
def test_nothing_durable_is_lost(first: int) -> None:
    for seed in range(first, first + LIVES_PER_TEST):
        try:
            live(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_lives_are_eventful() -> None:
    worlds = [live(seed) for seed in range(30)]
    calls = {what for world in worlds for what, _name in world.disk.history}
    assert {"write", "sync", "create", "rename", "unlink", "sync_names"} <= calls
    assert sum(world.deaths for world in worlds) > 200
    assert sum(world.resets for world in worlds) > 10


# Known-bad variants.


class AcknowledgesBeforeTheSync(Segments):
    def _sync(self, file: File) -> None:
        pass


class SyncsAgainAfterAFailure(Segments):
    def _sync(self, file: File) -> None:
        try:
            file.sync()
        except PowerLost:
            raise
        except OSError:
            file.sync()


class TrustsWhatTheSystemHasCached(Segments):
    def _repair(self, name: str, file: File, content: bytes, end: int, batch_start: int) -> None:
        super()._repair(name, file, content, end, end)


class LeavesTheTornEnd(Segments):
    def _repair(self, name: str, file: File, content: bytes, end: int, batch_start: int) -> None:
        super()._repair(name, file, content[:end], end, batch_start)


class CompactsInPlace(Segments):
    def drop_before(self, index: int) -> None:
        count = self.count
        super().drop_before(index)
        if self.count < count:
            name = self._segments[-1].name
            content = self._file.read(0, self._file.size())
            self._file.close()
            self._file = self._disk.create(name)
            self._file.write(0, content)
            self._file.sync()
            self._disk.sync_names()


class DropsBeforeTheBaseIsDurable(Segments):
    def drop_before(self, index: int) -> None:
        durable = self._state
        self._state = records.State(base=2**60)
        try:
            super().drop_before(index)
        finally:
            self._state = durable


class DropsTheNewestFirst(Segments):
    def drop_before(self, index: int) -> None:
        self._segments[:-1] = self._segments[-2::-1]
        try:
            super().drop_before(index)
        finally:
            self._segments[:-1] = self._segments[-2::-1]


class NamesASegmentBeforeItIsSynced(Segments):
    _beginning = False

    def _begin(self, sequence: int) -> None:
        self._beginning = True
        super()._begin(sequence)
        self._beginning = False

    def _sync(self, file: File) -> None:
        if not self._beginning:
            super()._sync(file)


class ForgetsTheVoteInNewSegments(Segments):
    def _begin(self, sequence: int) -> None:
        durable = self._state
        self._state = records.State(base=durable.base, last=durable.last)
        try:
            super()._begin(sequence)
        finally:
            self._state = durable


class DoesNotRecordTruncation(DurableJournal):
    def truncate(self, index: int) -> None:
        self._log.truncate(index)
        self._enqueue(records.mark(0))


class CountsReplacedEntriesAsDurable(DurableJournal):
    def truncate(self, index: int) -> None:
        before = self._durable_index
        super().truncate(index)
        self._durable_index = before


class ResetsInThreeSteps(DurableJournal):
    def reset(self, entries: object) -> None:
        position, first = self._position, entries[0]  # type: ignore[index]
        super().reset([first])
        self._pump.turn()  # type: ignore[union-attr]
        for command, index, term in entries[1:]:  # type: ignore[index]
            self.append(command, index, term)
        self._position = position + 1


def no_checksum(data: bytes, start: int = 0) -> int:
    return 0


SEGMENTS = [
    AcknowledgesBeforeTheSync,
    SyncsAgainAfterAFailure,
    TrustsWhatTheSystemHasCached,
    LeavesTheTornEnd,
    CompactsInPlace,
    DropsBeforeTheBaseIsDurable,
    DropsTheNewestFirst,
    NamesASegmentBeforeItIsSynced,
    ForgetsTheVoteInNewSegments,
]
JOURNALS = [DoesNotRecordTruncation, CountsReplacedEntriesAsDurable, ResetsInThreeSteps]


@pytest.mark.parametrize("bad", [*SEGMENTS, *JOURNALS])
def test_a_bad_journal_is_caught(bad: type) -> None:
    journal_type = bad
    if issubclass(bad, Segments):
        journal_type = type("Bad", (DurableJournal,), {"_segments_type": bad})
    for seed in range(3000):
        try:
            live(seed, journal_type)
        except (Violation, JournalRefused):
            return
    raise AssertionError("it was never caught")


def test_a_journal_without_checksums_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "zlib", SimpleNamespace(crc32=no_checksum))
    for seed in range(1000):
        try:
            live(seed)
        except (Violation, JournalRefused):
            return
    raise AssertionError("it was never caught")


# One life, and one disaster at each of its calls in turn.


def script(world: World) -> None:
    """All that a journal does, once or more. Ends early when the world does."""
    for act in (
        lambda: [world.append() for _ in range(4)],
        world.vote,
        lambda: [world.append() for _ in range(9)],
        lambda: world.truncate(len(world.history[-1].entries) - 3),
        lambda: [world.append() for _ in range(8)],
        lambda: world.compact(len(world.history[-1].entries) - 4),
        lambda: [world.append() for _ in range(6)],
        world.vote,
        lambda: world.reset(world.history[-1].next_index + 7),
        lambda: [world.append() for _ in range(10)],
        lambda: world.compact(len(world.history[-1].entries) - 2),
        world.append,
    ):
        with world.mortal():
            act()
            world.pump.settle()
        if world.journal.failure is not None:
            return


def quiet_world(seed: int, *, crash_at: int | None = None, fail_at: dict[int, int] | None = None) -> World:
    world = World(random.Random(seed))
    world.disk.crash_at = crash_at
    world.disk.fail_at = dict(fail_at or {})
    return world


def calls_of_script() -> int:
    world = quiet_world(1)
    script(world)
    assert world.durable == len(world.history) - 1
    assert world.journal.segment_count > 1
    assert any(what == "unlink" for what, _name in world.disk.history)
    return world.disk.calls


CALLS = calls_of_script()


@pytest.mark.parametrize("power", [False, True])
def test_death_at_every_call(power: bool) -> None:
    first = quiet_world(1).disk.calls + 1
    for call in range(first, CALLS + 1):
        for luck in range(8 if power else 3):
            world = quiet_world(1, crash_at=call)
            world.disk.rng = random.Random(luck)
            script(world)
            assert isinstance(world.journal.failure, Exception), f"call {call} was never made"
            world.die(power=power)
            world.recover()


@pytest.mark.parametrize("number", [28, 122])  # ENOSPC, EDQUOT
def test_no_room_at_every_call(number: int) -> None:
    first = quiet_world(1).disk.calls + 1
    seen = set()
    for call in range(first, CALLS + 1):
        world = quiet_world(1, fail_at={call: number})
        script(world)
        what, _name = world.disk.history[call - 1]
        seen.add(what)
        if what in ("sync", "sync_names", "unlink"):
            assert world.journal.failure is not None, f"call {call}: {what} failed, and it goes on"
            world.die(power=True)
            world.recover()
            continue
        assert world.journal.failure is None, f"call {call}: {what}"
        world.pump.settle()
        assert not world.full
        assert world.durable == len(world.history) - 1
        world.die(power=True)
        world.recover()
    assert {"write", "create", "rename", "sync"} <= seen


def test_any_other_error_at_every_call_ends_it() -> None:
    first = quiet_world(1).disk.calls + 1
    for call in range(first, CALLS + 1):
        world = quiet_world(1, fail_at={call: 5})
        script(world)
        what, _name = world.disk.history[call - 1]
        assert world.journal.failure is not None, f"call {call}: {what}"
        assert world.fatal is world.journal.failure
        written = world.disk.calls
        assert written <= call + 1, "it goes on after a failure"  # one more: removing what got no name
        world.die(power=True)
        world.recover()


def test_a_life_under_virtual_time_has_one_outcome() -> None:
    async def main(loop: VirtualLoop, rng: random.Random) -> tuple[float, list[float], int]:
        disk = SimulatedDisk(rng)
        journal = DurableJournal(disk, SMALL, new_id=lambda: JOURNAL_ID)
        pump = VirtualPump(loop, lambda: rng.uniform(0.001, 0.140))
        ended: asyncio.Future[None] = loop.create_future()
        times: list[float] = []
        told: list[str] = []
        journal.start(
            pump,
            JournalHandlers(
                durable=lambda _position: times.append(loop.time()),
                full=told.append,
                room=lambda: ended.set_result(None),
                fatal=ended.set_exception,
            ),
        )
        for index in range(1, 200):
            if index == 100:
                disk.room = disk.sectors_used() * 512
                loop.call_later(3, lambda: setattr(disk, "room", None))
            journal.append(rng.randbytes(100), index, 1)
            await asyncio.sleep(0.003)
        await ended
        assert len(told) == 1
        assert 2 < len(times) < 20, "a slow disk syncs many records at once"
        assert journal.durable_index == 199
        pump.stop()
        disk.lose_power()
        return loop.time(), times, DurableJournal(disk, SMALL).last_index

    one, other = run(3, main), run(3, main)
    assert one == other
    assert one[2] == 199


def test_a_disk_that_is_lent_out_is_locked() -> None:
    disk = SimulatedDisk(random.Random(1))
    disk.lock()
    with pytest.raises(Exception, match="simulated"):
        DurableJournal(disk)
