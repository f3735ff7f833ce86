"""What a journal tells its owner, and when."""

import asyncio
import errno
import random
from pathlib import Path

import pytest

from cluster.replication.disk import FolderLocked
from cluster.replication.entries import OutOfTurn
from cluster.replication.journal import (
    DurableJournal,
    JournalFailed,
    JournalHandlers,
    JournalOverrun,
    JournalSettings,
    StillFull,
    open_journal,
)
from cluster.replication.pump import ThreadPump
from cluster.replication.segments import SegmentSettings
from tests.simulation.disk import ManualPump, SimulatedDisk

SMALL = JournalSettings(
    segments=SegmentSettings(segment_bytes=8 * 1024, preallocate_bytes=4 * 1024),
    unsynced_bytes_high=2000,
    unsynced_bytes_max=4000,
    retry_min_s=1,
    retry_max_s=5,
)


class Owner:
    def __init__(self, disk: SimulatedDisk | None = None) -> None:
        self.disk = disk or SimulatedDisk(random.Random(1))
        self.pump = ManualPump()
        self.told: list[object] = []
        self.journal = DurableJournal(self.disk, SMALL)
        self.journal.start(
            self.pump,
            JournalHandlers(
                durable=self.told.append,
                full=self._full,
                room=lambda: self.told.append("room"),
                fatal=lambda error: self.told.append(type(error.__cause__ or error).__name__),
            ),
        )
        self.pump.settle()

    def _full(self, why: str) -> None:
        self.told.append("full")

    def reopened(self) -> DurableJournal:
        self.journal.close()
        return DurableJournal(self.disk, SMALL)


def test_nothing_is_durable_before_a_round_and_all_of_it_after() -> None:
    owner = Owner()
    journal = owner.journal
    assert journal.is_new
    assert (len(journal), journal.position, journal.durable_position, journal.durable_index) == (0, 0, 0, 0)
    for index in (1, 2, 3):
        journal.append(b"x", index, 1)
    journal.set_vote(2, "n3")
    assert (journal.position, journal.durable_position, journal.durable_index) == (4, 0, 0)
    assert owner.pump.woken
    before = owner.disk.calls
    owner.pump.turn()
    assert [what for what, _name in owner.disk.history[before:]].count("sync") == 1
    assert (journal.durable_position, journal.durable_index) == (4, 3)
    assert owner.told == []
    owner.pump.deliver()
    assert owner.told == [4]


def test_a_journal_reads_like_a_list_of_entries() -> None:
    journal = Owner().journal
    entries = [(b"%d" % index, index, 1 + index // 4) for index in range(5, 15)]
    for entry in entries:
        journal.append(*entry)
    assert list(journal) == journal[:] == entries
    assert len(journal) == 10
    assert journal[0:2] == entries[0:2]
    assert journal[3] == entries[3]
    assert journal[-1] == entries[-1]
    assert journal[-3:] == entries[-3:]
    assert journal[8:40] == entries[8:]
    assert journal[40:] == []
    assert (journal.first_index, journal.last_index) == (5, 14)
    assert [journal.term_at(index) for index in (4, 5, 14, 15)] == [None, 2, 4, None]
    for place in (10, -11):
        with pytest.raises(IndexError):
            journal[place]


def test_truncation_takes_durability_back() -> None:
    owner = Owner()
    journal = owner.journal
    for index in range(1, 6):
        journal.append(b"old", index, 1)
    owner.pump.settle()
    assert journal.durable_index == 5
    journal.truncate(3)
    journal.append(b"new", 3, 2)
    assert journal.durable_index == 2
    owner.pump.settle()
    assert journal.durable_index == 3
    assert [entry[0] for entry in owner.reopened()] == [b"old", b"old", b"new"]


def test_truncation_while_a_batch_is_written() -> None:
    """The batch becomes durable, but what it held of the log does not: some of that has been replaced."""
    owner = Owner()
    journal = owner.journal
    for index in range(1, 6):
        journal.append(b"old", index, 1)
    during: list[int] = []

    def replace() -> None:
        journal.truncate(3)
        for index in (3, 4, 5, 6):
            journal.append(b"new", index, 2)
        during.append(journal.durable_index)

    segments = journal._segments
    append = segments.append

    def append_and_be_overtaken(*args: object, **named: object) -> None:
        append(*args, **named)  # type: ignore[arg-type]
        if not during:
            replace()

    segments.append = append_and_be_overtaken  # type: ignore[method-assign]
    owner.pump.turn()
    assert during == [0]
    assert (journal.durable_position, journal.durable_index) == (5, 2)
    owner.pump.settle()
    assert (journal.durable_position, journal.durable_index) == (10, 6)


def test_a_reset_is_durable_as_a_whole() -> None:
    owner = Owner()
    journal = owner.journal
    for index in range(1, 6):
        journal.append(b"old", index, 1)
    owner.pump.settle()
    journal.reset([(b"a", 100, 3), (b"b", 101, 3)])
    assert journal.position == 6
    assert journal[:] == [(b"a", 100, 3), (b"b", 101, 3)]
    assert journal.durable_index == 0
    owner.pump.settle()
    assert journal.durable_index == 101
    assert owner.reopened()[0:2] == [(b"a", 100, 3), (b"b", 101, 3)]


def test_clearing_is_a_reset_to_nothing() -> None:
    owner = Owner()
    owner.journal.append(b"old", 1, 1)
    owner.journal.reset([])
    assert len(owner.journal) == 0
    owner.journal.append(b"anywhere", 50, 2)
    assert owner.reopened()[:] == [(b"anywhere", 50, 2)]


def test_what_waits_is_called_in_order_and_not_too_early() -> None:
    owner = Owner()
    journal = owner.journal
    said: list[str] = []
    journal.after(0, lambda: said.append("at once"))
    journal.append(b"", 1, 1)
    journal.after(journal.position, lambda: said.append("1"))
    journal.append(b"", 2, 1)
    journal.after(journal.position, lambda: said.append("2"))
    journal.after(journal.position, lambda: said.append("2 again"))
    assert said == ["at once"]
    owner.pump.turn()
    journal.append(b"", 3, 1)
    journal.after(2, lambda: said.append("behind those that wait"))
    journal.after(journal.position, lambda: said.append("3"))
    owner.pump.deliver()
    assert said == ["at once", "1", "2", "2 again", "behind those that wait"]
    owner.pump.settle()
    assert said[-1] == "3"


def test_what_waits_must_not_fail() -> None:
    owner = Owner()
    owner.journal.append(b"", 1, 1)
    owner.journal.after(1, [].pop)
    owner.pump.settle()
    assert owner.told == ["IndexError"]
    with pytest.raises(JournalFailed):
        owner.journal.append(b"", 2, 1)
    owner.pump.settle()
    assert owner.told == ["IndexError"]


def test_mistakes_change_nothing() -> None:
    owner = Owner()
    journal = owner.journal
    journal.append(b"", 1, 4)
    journal.set_vote(4, "n1")
    for mistake in (
        lambda: journal.append(b"", 1, 4),
        lambda: journal.append(b"", 3, 4),
        lambda: journal.truncate(2),
        lambda: journal.truncate(0),
        lambda: journal.reset([(b"", 5, 4), (b"", 7, 4)]),
        lambda: journal.set_vote(3, None),
        lambda: journal.move_base(2),
    ):
        with pytest.raises(OutOfTurn):
            mistake()
    assert (journal.position, journal.term, journal.vote) == (2, 4, "n1")
    assert owner.reopened()[:] == [(b"", 1, 4)]


# Compaction.


def grown(owner: Owner, last: int) -> None:
    for index in range(owner.journal.last_index + 1, last + 1):
        owner.journal.append(bytes(1000), index, 1)
        owner.pump.settle()


def test_segments_stay_until_they_are_released() -> None:
    owner = Owner()
    journal = owner.journal
    grown(owner, 60)
    count = journal.segment_count
    assert count > 5
    journal.move_base(30)
    owner.pump.settle()
    assert journal.segment_count == count
    assert journal[0][1] == 30
    journal.release(20)
    owner.pump.settle()
    assert journal.segment_count < count
    journal = owner.reopened()
    assert journal[0][1] == 30
    assert 10 < journal.oldest_index <= 20
    # The snapshot that ends at 30 turns out to be broken; the one before it ended at 20.
    assert not journal.rebase(5)
    assert journal.rebase(20)
    assert journal[0:2] == [(bytes(1000), 20, 1), (bytes(1000), 21, 1)]
    assert journal.oldest_index == 20
    journal.close()
    journal = DurableJournal(owner.disk, SMALL)
    assert journal.first_index == 20
    assert journal.rebase(55)
    assert not journal.rebase(30)
    journal.release(55)
    journal.sync_now()
    assert journal.segment_count < 3


def test_a_vote_outlives_the_segment_it_was_written_to() -> None:
    owner = Owner()
    owner.journal.set_vote(7, "n2")
    grown(owner, 60)
    owner.journal.move_base(60)
    owner.journal.release(60)
    owner.pump.settle()
    assert owner.journal.segment_count == 1
    journal = owner.reopened()
    assert (journal.term, journal.vote) == (7, "n2")


def test_memory_of_what_was_dropped_is_given_back() -> None:
    owner = Owner()
    journal = owner.journal
    for index in range(1, 5001):
        journal.append(b"", index, 1)
        if index % 50 == 0:
            journal.sync_now()
    assert len(journal._log.entries._chunks) == 5
    journal.move_base(4999)
    assert len(journal._log.entries._chunks) == 1
    assert len(journal._garbage) == 4
    owner.pump.settle()
    assert not journal._garbage


# A disk that is slow, full, or broken.


def test_a_slow_disk_is_seen_before_it_hurts() -> None:
    owner = Owner()
    journal = owner.journal
    index = 0
    while not journal.congested:
        index += 1
        journal.append(bytes(100), index, 1)
    assert SMALL.unsynced_bytes_high <= journal.unsynced_bytes < SMALL.unsynced_bytes_high + 200
    with pytest.raises(JournalOverrun):
        journal.append(bytes(SMALL.unsynced_bytes_max), index + 1, 1)
    assert journal.last_index == index
    owner.pump.settle()
    assert (journal.unsynced_bytes, journal.congested) == (0, False)
    assert journal.durable_index == index


def test_a_full_disk_is_told_tried_again_and_survived() -> None:
    owner = Owner()
    journal = owner.journal
    journal.append(b"before", 1, 1)
    owner.pump.settle()
    owner.told.clear()
    owner.disk.room = 0
    journal.append(bytes(3800), 2, 1)
    delays = [owner.pump.turn() for _ in range(5)]
    assert delays == [1, 2, 4, 5, 5]
    owner.pump.deliver()
    assert owner.told == ["full"]
    assert journal.full is not None
    assert "simulated" in journal.full
    assert (journal.durable_position, journal.durable_index) == (1, 1)
    owner.pump.woken = False
    journal.set_vote(2, "n1")
    assert not owner.pump.woken, "only time may try again"
    with pytest.raises(StillFull):
        journal.sync_now()
    owner.disk.room = None
    owner.pump.settle()
    assert owner.told == ["full", 3, "room"]
    assert (journal.full, journal.durable_index) == (None, 2)
    journal = owner.reopened()
    assert (journal.last_index, journal.term) == (2, 2)


def test_a_full_disk_that_has_room_before_anybody_hears_is_no_news() -> None:
    owner = Owner()
    owner.disk.fail_at = {owner.disk.calls + 1: errno.ENOSPC}
    owner.journal.append(b"", 1, 1)
    owner.pump.turn()
    owner.pump.turn()
    owner.pump.deliver()
    assert owner.told == [1]


def test_releasing_segments_makes_room_on_a_full_disk() -> None:
    owner = Owner()
    grown(owner, 60)
    owner.journal.move_base(60)
    owner.pump.settle()
    owner.disk.room = owner.disk.sectors_used() * 512
    owner.journal.append(bytes(3800), 61, 1)
    owner.pump.turn()
    assert owner.journal.full
    owner.journal.release(60)
    owner.pump.turn()
    owner.pump.settle()
    assert owner.journal.full is None
    assert owner.journal.durable_index == 61


def test_closing_on_a_full_disk_keeps_what_was_durable(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner()
    owner.journal.append(b"before", 1, 1)
    owner.pump.settle()
    owner.disk.room = 0
    owner.journal.append(bytes(3800), 2, 1)
    journal = owner.reopened()
    assert "found no room" in caplog.text
    assert journal.last_index == 1


@pytest.mark.parametrize("what", ["write", "sync"])
def test_a_broken_disk_ends_it(what: str) -> None:
    owner = Owner()
    journal = owner.journal
    journal.append(b"", 1, 1)
    owner.disk.fail_at = {owner.disk.calls + (1 if what == "write" else 2): errno.EIO}
    said: list[str] = []
    journal.after(1, lambda: said.append("never"))
    owner.pump.settle()
    assert owner.disk.history[-1][0] == what
    assert owner.told == ["OSError"]
    assert journal.failure is not None
    assert (journal.durable_position, journal.durable_index) == (0, 0)
    calls = owner.disk.calls
    owner.pump.settle()
    for change in (
        lambda: journal.append(b"", 2, 1),
        lambda: journal.set_vote(2, None),
        lambda: journal.truncate(1),
        lambda: journal.reset([]),
        journal.sync_now,
        journal.close,
    ):
        with pytest.raises(JournalFailed):
            change()
    journal.close()
    assert owner.disk.calls == calls
    assert said == []
    assert owner.told == ["OSError"]


def test_settings_state_their_relations() -> None:
    for wrong in (
        {"unsynced_bytes_high": 0},
        {"unsynced_bytes_high": 2**30},
        {"unsynced_bytes_max": 2**31},
        {"retry_min_s": 2.0},
    ):
        with pytest.raises(AssertionError):
            JournalSettings(**wrong)  # type: ignore[arg-type]
    for wrong in ({"segment_bytes": 100}, {"preallocate_bytes": 2**30}):
        with pytest.raises(AssertionError):
            SegmentSettings(**wrong)


# A real disk and a real thread.


async def test_a_thread_writes_what_an_event_loop_appends(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "journal"
    journal = open_journal(folder)
    with pytest.raises(FolderLocked, match=str(folder)):
        open_journal(folder)
    loop = asyncio.get_running_loop()
    fatal: list[BaseException] = []
    durable: list[int] = []
    journal.start(
        ThreadPump(loop, "disk"),
        JournalHandlers(durable=durable.append, full=fatal.append, room=lambda: None, fatal=fatal.append),  # type: ignore[arg-type]
    )
    arrived: list[asyncio.Future[None]] = []
    for index in range(1, 2001):
        journal.append(b"%d" % index, index, 1)
        future = loop.create_future()
        journal.after(journal.position, lambda future=future: future.set_result(None))  # type: ignore[misc]
        arrived.append(future)
        if index % 50 == 0:
            await arrived[-10]
    await asyncio.gather(*arrived)
    assert durable == sorted(durable)
    assert durable[-1] == journal.durable_index == 2000
    assert not fatal
    journal.note_commit(1990)
    journal.close()
    journal.close()
    journal = open_journal(folder)
    assert [entry[1] for entry in journal] == list(range(1, 2001))
    assert journal.commit_index == 1990
    assert not journal.is_new
    journal.close()
