"""Snapshots on disk: what is read is what was written, and what is broken is noticed."""

import errno
import random
from collections.abc import Callable, Iterable

import pytest

from cluster.replication.log import NeedsNewer
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.segments import SyncFailed
from cluster.replication.snapshot import Snapshot, SnapshotBroken, Snapshots, SnapshotsLost, recover
from tests.simulation.disk import SimulatedDisk
from tests.simulation.pumps import instant_journal

PIECES = [b"one", b"two" * 1000, b"\0", b"three"]


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk(random.Random(1))


@pytest.fixture
def snapshots(disk: SimulatedDisk) -> Snapshots:
    return Snapshots(disk)


def name(index: int) -> str:
    return f"{index:016x}.snapshot"


def read(snapshots: Snapshots, index: int) -> list[bytes]:
    return list(snapshots.read(index)[1])


def test_what_is_read_is_what_was_written(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    written = snapshots.write(7, 2, PIECES)
    assert written == Snapshot(index=7, term=2, size=len(disk.content(name(7))))
    assert snapshots.read(7)[0] == written
    assert read(snapshots, 7) == PIECES
    assert snapshots.indices() == [7]


def test_an_empty_state_is_a_state(snapshots: Snapshots) -> None:
    snapshots.write(7, 2, [])
    assert read(snapshots, 7) == []


@pytest.mark.parametrize("power", [False, True])
def test_it_is_durable_once_it_is_written(snapshots: Snapshots, disk: SimulatedDisk, power: bool) -> None:
    snapshots.write(7, 2, PIECES)
    if power:
        disk.lose_power()
    else:
        disk.kill()
    assert read(Snapshots(disk), 7) == PIECES


def test_the_one_before_it_stays_and_older_ones_go(snapshots: Snapshots) -> None:
    for index in (3, 5, 9):
        snapshots.write(index, 1, PIECES)
    assert snapshots.indices() == [9, 5]


def test_every_flipped_bit_is_noticed(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    snapshots.write(7, 2, [b"one", b"two"])
    for offset in range(len(disk.content(name(7)))):
        disk.flip(name(7), offset, 1 << offset % 8)
        with pytest.raises(SnapshotBroken):
            read(snapshots, 7)
        disk.flip(name(7), offset, 1 << offset % 8)
    assert read(snapshots, 7) == [b"one", b"two"]


def test_every_cut_is_noticed(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    snapshots.write(7, 2, [b"one", b"two"])
    content = disk.content(name(7))
    for size in range(len(content)):
        disk.put(name(7), content[:size])
        with pytest.raises(SnapshotBroken):
            read(snapshots, 7)


def test_one_under_anothers_name_is_noticed(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    snapshots.write(7, 2, PIECES)
    disk.put(name(8), disk.content(name(7)))
    with pytest.raises(SnapshotBroken, match="of entry 7"):
        read(snapshots, 8)


def test_a_crash_at_any_moment_leaves_the_one_before_or_both() -> None:
    crashed = 0
    for call in range(1, 60):
        disk = SimulatedDisk(random.Random(call))
        snapshots = Snapshots(disk)
        snapshots.write(3, 1, PIECES)
        disk.crash_at = disk.calls + call
        try:
            snapshots.write(7, 2, PIECES)
        except OSError:
            crashed += 1
        except SyncFailed:
            crashed += 1
        disk.lose_power()
        after = Snapshots(disk)
        assert after.indices() in ([3], [7, 3])
        for index in after.indices():
            assert read(after, index) == PIECES
    assert crashed > 5


def test_no_room_leaves_nothing_behind(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    snapshots.write(3, 1, [b"x"])
    disk.room = (disk.sectors_used() + 2) * 512
    with pytest.raises(OSError) as raised:
        snapshots.write(7, 2, PIECES)
    assert raised.value.errno == errno.ENOSPC
    assert disk.names() == [name(3)]


def test_a_sync_that_fails_is_no_lack_of_room(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    disk.fail_at = {disk.calls + call: errno.EIO for call in range(2, 20)}
    with pytest.raises((SyncFailed, OSError)):
        snapshots.write(7, 2, PIECES)


# What to start with.


def restored(into: list[bytes]) -> Callable[[Iterable[bytes]], Callable[[], object]]:
    def restore(pieces: Iterable[bytes]) -> Callable[[], object]:
        found = list(pieces)
        return lambda: into.extend(found)

    return restore


def log_of(disk: SimulatedDisk, last: int, term: int = 1) -> RaftJournal:
    journal = instant_journal(disk)
    journal.add(b"\1", 1, 0)
    for index in range(2, last + 1):
        journal.add(b"\0x", index, term)
    journal.close()
    return instant_journal(disk)


def test_the_newest_that_can_be_read_is_taken(
    snapshots: Snapshots, disk: SimulatedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    journal, into = log_of(disk, 12), []
    snapshots.write(5, 1, [b"five"])
    snapshots.write(9, 1, [b"nine"])
    found = recover(snapshots, journal, restored(into))
    assert found is not None
    found[1]()
    assert (found[0].index, into) == (9, [b"nine"])
    assert journal.last_index == 12
    disk.flip(name(9), 40, 1)
    into.clear()
    found = recover(snapshots, journal, restored(into))
    assert found is not None
    found[1]()
    assert (found[0].index, into) == (5, [b"five"])
    assert "is damaged" in caplog.text
    assert snapshots.indices() == [5]


def test_one_that_needs_newer_software_is_left_alone_and_nothing_is_tried_in_its_place(
    snapshots: Snapshots, disk: SimulatedDisk
) -> None:
    journal = log_of(disk, 12)
    snapshots.write(5, 1, [b"five"])
    snapshots.write(9, 1, [b"nine"])

    def newer(pieces: Iterable[bytes]) -> Callable[[], object]:
        raise NeedsNewer(f"install what reads {b''.join(pieces)!r}")

    with pytest.raises(NeedsNewer, match=r"0000000000000009\.snapshot: install what reads b'nine'"):
        recover(snapshots, journal, newer)
    assert snapshots.indices() == [9, 5], "for who can read them"


def test_a_log_that_ends_before_the_snapshot_begins_anew_with_it(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    journal = log_of(disk, 4)
    snapshots.write(9, 3, [b"nine"])
    assert recover(snapshots, journal, restored([])) is not None
    assert (journal.first_index, journal.last_index, journal.term_at(9)) == (9, 9, 3)


def test_and_so_does_one_that_went_another_way(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    journal = log_of(disk, 12, term=1)
    snapshots.write(9, 3, [b"nine"])
    assert recover(snapshots, journal, restored([])) is not None
    assert (journal.first_index, journal.last_index, journal.term_at(9)) == (9, 9, 3)


def test_a_whole_log_needs_none(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    journal = log_of(disk, 4)
    snapshots.write(3, 1, [b"three"])
    disk.flip(name(3), 40, 1)
    assert recover(snapshots, journal, restored([])) is None


def test_without_any_and_without_the_log_before_it_the_node_says_what_to_do(
    snapshots: Snapshots, disk: SimulatedDisk
) -> None:
    journal = log_of(disk, 12)
    journal.move_base(6)
    with pytest.raises(SnapshotsLost, match=r"begins with entry 6, and no snapshot .* --rejoin"):
        recover(snapshots, journal, restored([]))
    snapshots.write(3, 1, [b"three"])
    with pytest.raises(SnapshotsLost, match="the log begins after entry 3"):
        recover(snapshots, journal, restored([]))


def test_a_snapshot_without_a_log_is_refused(snapshots: Snapshots, disk: SimulatedDisk) -> None:
    snapshots.write(3, 1, [b"three"])
    with pytest.raises(SnapshotsLost, match="no log"):
        recover(snapshots, instant_journal(disk), restored([]))
