"""Damage is refused, a write that a crash cut short is cut off, and neither is taken for the other."""

import errno
import itertools
import random
import re
import struct
from collections.abc import Iterator

import pytest

from cluster.replication import records
from cluster.replication.disk import FolderLocked
from cluster.replication.entries import State
from cluster.replication.journal import DurableJournal, JournalSettings
from cluster.replication.records import HEADER_BYTES, SECTOR_BYTES, Header
from cluster.replication.segments import JournalCorrupt, JournalRefused, SegmentSettings
from tests.simulation.disk import SimulatedDisk
from tests.simulation.journal import JOURNAL_ID, SMALL, Known, known


def opened(disk: SimulatedDisk, settings: JournalSettings = SMALL) -> DurableJournal:
    return DurableJournal(disk, settings, new_id=lambda: JOURNAL_ID)


def unmarked(commit: int, *, again: bool = False) -> None:
    """In the place of what leaves a mark: as if the power had failed before it."""


def written(*, closed: bool, marked: bool = True) -> tuple[SimulatedDisk, Known]:
    """A journal of three segments that holds a record of each kind, all durable."""
    rng = random.Random(5)
    disk = SimulatedDisk(rng)
    journal = opened(disk)
    term = 1
    for index in range(1, 41):
        journal.append(rng.randbytes(rng.choice((3, 200, 900))), index, term)
        if index % 10 == 0:
            term += 1
            journal.set_vote(term, "n2" if index % 20 else None)
        if index % 4 == 0:
            journal.sync_now()
    journal.truncate(36)
    journal.append(b"in place of 36", 36, term)
    journal.move_base(20)
    journal.sync_now()
    journal.reset([(b"a", 60, term), (b"b", 61, term)])
    journal.set_vote(term + 1, "n3")
    journal.sync_now()
    for index in range(62, 66):
        journal.append(rng.randbytes(150), index, term)
    journal.note_commit(64)
    if not marked:
        journal._segments.mark = unmarked  # type: ignore[method-assign]
    journal.sync_now()
    amounts_to = known(journal)
    assert journal.segment_count >= 3
    if closed:
        journal.close()
    disk.kill()
    return disk, amounts_to


def data_bytes(disk: SimulatedDisk) -> Iterator[tuple[str, int]]:
    """Every byte that means something, and a few of the zeros after each segment's end."""
    for name in disk.names():
        content = disk.content(name)
        end = records.end_of_data(content)
        yield from ((name, offset) for offset in range(end))
        yield from ((name, offset) for offset in range(end, len(content), 97))


@pytest.mark.parametrize(
    ("closed", "marked", "bits", "every"),
    [
        (False, False, "one", 1),
        (False, True, "one", 5),
        (True, True, "one", 5),
        (False, False, "all", 5),
        (False, True, "all", 5),
    ],
)
def test_every_byte_flipped(closed: bool, marked: bool, bits: str, every: int) -> None:
    disk, amounts_to = written(closed=closed, marked=marked)
    rng = random.Random(1)
    refused = accepted = 0
    for name, offset in itertools.islice(data_bytes(disk), 0, None, every):
        mask = 0xFF if bits == "all" else 1 << rng.randrange(8)
        disk.flip(name, offset, mask)
        trial = disk.copy()
        disk.flip(name, offset, mask)
        try:
            journal = opened(trial)
        except JournalRefused:
            refused += 1
        else:
            assert known(journal) == amounts_to, f"{name} {offset}"
            accepted += 1
    assert refused > 9000 // every
    assert accepted > 0  # zeros that mean nothing, and what was filled up for blocks


def test_a_clean_end_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    for closed in (True, False):
        disk, amounts_to = written(closed=closed)
        journal = opened(disk)
        assert known(journal) == amounts_to
        assert journal.commit_index == 64
        assert not caplog.records


def test_a_sector_of_zeros_in_what_was_synced_is_refused() -> None:
    disk, _amounts_to = written(closed=False)
    for name in disk.names():
        content = disk.content(name)
        # The sector in which the last mark stands cannot be told from one that was never written.
        last = content.rindex(b"\xf5RE")
        for start in range(0, last // SECTOR_BYTES * SECTOR_BYTES, SECTOR_BYTES):
            trial = disk.copy()
            trial.put(name, content[:start] + bytes(SECTOR_BYTES) + content[start + SECTOR_BYTES :])
            with pytest.raises(JournalCorrupt):
                opened(trial)


def test_a_torn_end_is_cut_off_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """The last batch spans sectors, nothing is known to be synced after it, and any of its sectors may be missing."""
    disk = SimulatedDisk(random.Random(1))
    journal = opened(disk)
    journal.append(b"first", 1, 1)
    journal.sync_now()
    (name,) = disk.names()
    begin = records.end_of_data(disk.content(name))
    for index in range(2, 6):
        journal.append(bytes([index]) * 700, index, 1)
    journal._segments.mark = unmarked  # type: ignore[method-assign]
    journal.sync_now()
    disk.kill()
    content = disk.content(name)
    end = records.end_of_data(content)
    sectors = range(begin // SECTOR_BYTES, end // SECTOR_BYTES + 1)
    for chosen in range(1, 2 ** len(sectors)):
        torn = bytearray(content)
        for place, sector in enumerate(sectors):
            if chosen >> place & 1:
                start = max(sector * SECTOR_BYTES, begin)
                torn[start : (sector + 1) * SECTOR_BYTES] = bytes((sector + 1) * SECTOR_BYTES - start)
        trial = disk.copy()
        trial.put(name, bytes(torn))
        caplog.clear()
        journal = opened(trial)
        assert journal.last_index < 5
        assert known(journal).entries == tuple((command, index, 1) for command, index, _t in journal[:])
        left = records.end_of_data(trial.content(name))
        assert left <= begin + (journal.last_index - 1) * (700 + records.ENTRY_OVERHEAD_BYTES)
        garbage = records.end_of_data(bytes(torn)) > left
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == (1 if garbage else 0), lines
        if garbage:
            assert re.fullmatch(
                rf"/simulated/{name}: cut off \d+ bytes from byte {left} on, which a crash left half written", lines[0]
            )
        journal.append(b"goes on", journal.last_index + 1, 1)
        journal.sync_now()
        journal.close()
        again = opened(trial)
        assert again[-1][0] == b"goes on"


def test_a_write_cut_short_anywhere_is_a_torn_end() -> None:
    disk = SimulatedDisk(random.Random(1))
    journal = opened(disk)
    journal.append(b"first", 1, 1)
    journal.sync_now()
    (name,) = disk.names()
    begin = records.end_of_data(disk.content(name))
    journal.append(b"second" + bytes(600), 2, 1)
    journal._segments.mark = unmarked  # type: ignore[method-assign]
    journal.sync_now()
    disk.kill()
    content = disk.content(name)
    end = records.end_of_data(content)
    for cut in range(begin, end):
        trial = disk.copy()
        trial.put(name, content[:cut] + bytes(len(content) - cut))
        assert opened(trial).last_index == 1
        trial = disk.copy()
        trial.put(name, content[:cut])
        assert opened(trial).last_index == 1


def test_what_a_later_record_proves_to_have_been_synced_is_never_cut_off() -> None:
    """Zeros look like a torn write, but the mark after the batch says that it was synced."""
    disk = SimulatedDisk(random.Random(1))
    journal = opened(disk)
    for index in range(1, 8):
        journal.append(bytes([index]) * 700, index, 1)
    journal.sync_now()  # leaves a mark
    disk.kill()
    (name,) = disk.names()
    content = disk.content(name)
    for start in range(SECTOR_BYTES, 8 * SECTOR_BYTES, SECTOR_BYTES):
        trial = disk.copy()
        trial.put(name, content[:start] + bytes(SECTOR_BYTES) + content[start + SECTOR_BYTES :])
        with pytest.raises(JournalCorrupt, match=r"was synced, as a record at byte \d+ says") as caught:
            opened(trial)
        assert caught.value.name == name
        assert caught.value.offset <= start
        assert "start the node with --rejoin" in str(caught.value)
        assert "docs/DISKS.md" in str(caught.value)


# Files.


def names(disk: SimulatedDisk) -> list[str]:
    return disk.names()


def test_a_missing_segment_is_refused() -> None:
    disk, _ = written(closed=True)
    for name in names(disk)[1:-1]:
        trial = disk.copy()
        trial.remove(name)
        with pytest.raises(JournalCorrupt, match="should come before it, and is missing"):
            opened(trial)


def test_missing_first_segments_are_refused_if_they_are_needed() -> None:
    disk = SimulatedDisk(random.Random(1))
    journal = opened(disk)
    for index in range(1, 30):
        journal.append(bytes(500), index, 1)
        journal.sync_now()
    assert journal.segment_count > 2
    journal.close()
    disk.remove(names(disk)[0])
    with pytest.raises(JournalCorrupt, match=r"entries 1 to \d+ were in segments before it, which are missing"):
        opened(disk)


def test_a_segment_under_another_name_is_refused() -> None:
    disk, _ = written(closed=True)
    first, second, *_rest = names(disk)
    for content, name, why in (
        (disk.content(first), second, "under another's name"),
        (disk.content(first), "2.segment", "another name"),
        (b"", second, "starts with 512 bytes, and here are 0"),
        (disk.content(second)[:100], second, "starts with 512 bytes"),
        (bytes(4096), second, "no segment"),
        (random.Random(1).randbytes(4096), second, "no segment"),
    ):
        trial = disk.copy()
        trial.put(name, content)
        with pytest.raises(JournalCorrupt, match=why):
            opened(trial)


def test_a_segment_of_another_journal_is_refused() -> None:
    disk, _ = written(closed=True)
    second = names(disk)[1]
    header = records.decode_header(disk.content(second))
    foreign = Header(
        journal_id=bytes(16), sequence=header.sequence, first_number=header.first_number, state=header.state
    )
    disk.put(second, records.encode_header(foreign) + disk.content(second)[HEADER_BYTES:])
    with pytest.raises(JournalCorrupt, match="another journal"):
        opened(disk)


def test_records_of_another_segment_do_not_verify() -> None:
    disk, _ = written(closed=True)
    first, second, *_rest = names(disk)
    disk.put(second, disk.content(second)[:HEADER_BYTES] + disk.content(first)[HEADER_BYTES:])
    with pytest.raises(JournalCorrupt):
        opened(disk)


def test_another_format_is_refused_without_a_word_of_damage() -> None:
    disk, _ = written(closed=True)
    name = names(disk)[0]
    content = bytearray(disk.content(name))
    struct.pack_into("<I", content, 8, 7)
    disk.put(name, bytes(content))
    with pytest.raises(JournalRefused, match="format 7; this version of Outlast reads format 1") as caught:
        opened(disk)
    assert not isinstance(caught.value, JournalCorrupt)


def test_a_record_of_a_later_version_is_refused() -> None:
    disk = SimulatedDisk(random.Random(1))
    journal = opened(disk)
    journal._segments.append([(99, b"", b"")], State())  # type: ignore[list-item]
    journal.close()
    with pytest.raises(JournalRefused, match="unknown kind 99: a later version") as caught:
        opened(disk)
    assert not isinstance(caught.value, JournalCorrupt)


def test_records_that_verify_and_make_no_sense_are_refused() -> None:
    for record in (
        records.entry(b"", 7, 1),
        records.truncate(9),
        records.base(9),
        (records.Kind.VOTE, b"\0", b""),
        (records.Kind.VOTE, struct.pack("<QB", 9, 1), b"\xff"),
    ):
        disk = SimulatedDisk(random.Random(1))
        journal = opened(disk)
        journal.append(b"", 1, 1)
        journal.sync_now()
        journal._segments.append([record], State())
        journal.close()
        with pytest.raises(JournalCorrupt, match="impossible"):
            opened(disk)


def test_an_unfinished_segment_is_removed(caplog: pytest.LogCaptureFixture) -> None:
    disk, amounts_to = written(closed=True)
    disk.put("00000000000000ff.new", b"half a head")
    caplog.set_level("INFO")
    assert known(opened(disk)) == amounts_to
    assert "00000000000000ff.new" not in names(disk)
    assert "never finished" in caplog.text


def test_an_empty_last_segment_is_normal() -> None:
    disk = SimulatedDisk(random.Random(1))
    journal = opened(disk)
    journal.set_vote(3, "n1")
    journal.sync_now()
    journal._segments._begin(2)
    disk.lose_power()
    journal = opened(disk)
    assert (journal.term, journal.vote, journal.segment_count) == (3, "n1", 2)


def test_files_of_others_are_left_alone() -> None:
    disk, amounts_to = written(closed=True)
    disk.put("notes.txt", b"mine")
    assert known(opened(disk)) == amounts_to
    assert disk.content("notes.txt") == b"mine"


def test_a_journal_opens_once() -> None:
    disk = SimulatedDisk(random.Random(1))
    journal = opened(disk)
    with pytest.raises(FolderLocked):
        opened(disk)
    journal.close()
    opened(disk).close()


def test_a_journal_that_cannot_be_opened_is_not_locked() -> None:
    disk = SimulatedDisk(random.Random(1))
    disk.fail_at = {2: errno.EACCES}
    with pytest.raises(PermissionError):
        opened(disk)
    opened(disk).close()


# Large numbers.


def test_numbers_of_64_bits() -> None:
    """As if 2^40 records, of which many terabytes are gone, had come before."""
    disk = SimulatedDisk(random.Random(1))
    far = 2**40
    state = State(base=far - 5, last=far - 6, term=2**41, vote="n2", commit=0)
    header = Header(journal_id=JOURNAL_ID, sequence=2**36, first_number=2**42, state=state)
    disk.put(f"{2**36:016x}.segment", records.encode_header(header))
    journal = opened(disk)
    for index in range(far, far + 100):
        journal.append(bytes(200), index, 2**41)
        journal.sync_now()
    journal.move_base(far + 90)
    journal.release(far + 90)
    journal.set_vote(2**62, None)
    journal.sync_now()
    journal.close()
    assert journal.segment_count < 4
    journal = opened(disk)
    assert journal.first_index == far + 90
    assert journal[0][1:] == (far + 90, 2**41)
    assert journal.last_index == journal.durable_index == far + 99
    assert (journal.term, journal.vote) == (2**62, None)


def test_offsets_stay_small_however_long_the_history() -> None:
    with pytest.raises(AssertionError, match="in one piece"):
        JournalSettings(segments=SegmentSettings(segment_bytes=2**31 - 1))


@pytest.mark.parametrize("vote", [None, "", "n1", "ein Knoten", "é" * 127, "x" * 255])
def test_headers_say_who_was_voted_for(vote: str | None) -> None:
    header = Header(
        journal_id=JOURNAL_ID, sequence=3, first_number=9, state=State(base=1, last=8, term=4, vote=vote, commit=2)
    )
    assert records.decode_header(records.encode_header(header)) == header
    assert len(records.encode_header(header)) == HEADER_BYTES


# Known-bad judges: each of the two rules is needed.


def test_without_witnesses_synced_entries_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "witness", no_witness)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_what_a_later_record_proves_to_have_been_synced_is_never_cut_off()


def test_without_looking_for_zeros_flipped_entries_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "is_torn", always_torn)
    with pytest.raises(AssertionError, match="segment"):
        test_every_byte_flipped(closed=False, marked=False, bits="one", every=5)


def no_witness(content: bytes, at: int, number: int, seed: int) -> None:
    """In the place of the search for one."""


def always_torn(content: bytes, at: int, seed: int) -> bool:
    return True
