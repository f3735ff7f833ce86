"""What a node reads at start: the journal's segments and snapshots, damaged, and damaged under checksums that fit."""

import random
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replication import records
from cluster.replication.journal import DurableJournal
from cluster.replication.records import HEADER_BYTES
from cluster.replication.segments import JournalRefused
from cluster.replication.snapshot import SnapshotBroken, Snapshots
from tests.fuzz import HUNT, examples
from tests.fuzz.mutations import damaged
from tests.simulation.disk import SimulatedDisk
from tests.simulation.journal import JOURNAL_ID, SMALL, Known, known


def _journal() -> dict[str, bytes]:
    disk = SimulatedDisk(random.Random(1))
    journal = DurableJournal(disk, SMALL, new_id=lambda: JOURNAL_ID)
    for index in range(1, 13):
        journal.append(bytes([index]) * 700, index, 1 + index // 6)
        if index % 3 == 0:
            journal.set_vote(2 + index // 6, "n2")
            journal.sync_now()
    journal.truncate(12)
    journal.move_base(4)
    journal.sync_now()
    journal.reset([(b"a", 20, 5), (b"b", 21, 5)])
    journal.append(b"c", 22, 5)
    journal.note_commit(21)
    journal.sync_now()
    journal.close()
    return {name: disk.content(name) for name in disk.names()}


SEGMENTS = _journal()
NAMES = sorted(SEGMENTS)


def _amounts_to(segments: dict[str, bytes]) -> Known | str:
    disk = SimulatedDisk(random.Random(1))
    for name, content in segments.items():
        disk.put(name, content)
    try:
        journal = DurableJournal(disk, SMALL, new_id=lambda: JOURNAL_ID)
    except JournalRefused as error:
        return str(error)
    found = known(journal)
    journal.close()
    return found


WHOLE = _amounts_to(SEGMENTS)


def _resealed(content: bytes, name: str) -> bytes:
    """All checksums computed anew, so that what they protect is believed."""
    out = bytearray(content)
    if len(out) < HEADER_BYTES:
        return content
    struct.pack_into("<I", out, HEADER_BYTES - 4, zlib.crc32(out[: HEADER_BYTES - 4]))
    seed = records.seed(JOURNAL_ID, int(name[:16], 16))
    head, at = struct.Struct("<3sBIIQI"), HEADER_BYTES
    while at + head.size + 5 <= len(out) and out[at : at + 3] == b"\xf5RE":
        magic, kind, length, behind, number, _check = head.unpack_from(out, at)
        body = bytes(out[at + head.size + 4 : at + head.size + 4 + length])
        head.pack_into(out, at, magic, kind, length, behind, number, zlib.crc32(body, seed))
        struct.pack_into("<I", out, at + head.size, zlib.crc32(out[at : at + head.size], seed))
        at += head.size + 4 + length + 1
    return bytes(out)


@examples(60)
@given(st.sampled_from(NAMES), st.booleans(), st.data())
def test_a_damaged_segment_is_refused_by_its_name(name: str, sealed: bool, data: st.DataObject) -> None:
    content = SEGMENTS[name][: records.end_of_data(SEGMENTS[name])]
    bad = data.draw(damaged(st.just(content)))
    if sealed:
        found = _amounts_to({**SEGMENTS, name: _resealed(bad, name)})
    else:
        found = _amounts_to({**SEGMENTS, name: bad})
        # The last segment may end early, as a crash leaves it; nothing else may be believed.
        assert isinstance(found, str) or found == WHOLE or name == NAMES[-1]
    assert not isinstance(found, str) or "simulated" in found, "it says which file"


@examples(30)
@given(st.integers(0, 253), st.binary(min_size=1, max_size=8))
def test_a_header_under_a_checksum_that_fits_is_read_or_refused(at: int, patch: bytes) -> None:
    header = bytearray(SEGMENTS[NAMES[0]])
    header[at : at + len(patch)] = patch
    _amounts_to({**SEGMENTS, NAMES[0]: _resealed(bytes(header), NAMES[0])})


# ------------------------------------------------------------------------------------------------ snapshots

PIECES = [b"one" * 50, b"\0" * 100, b"three"]
Check = Callable[[list[bytes], bytes], None]


def _snapshot() -> bytes:
    disk = SimulatedDisk(random.Random(1))
    Snapshots(disk).write(7, 3, PIECES)
    return disk.content(f"{7:016x}.snapshot")


SNAPSHOT = _snapshot()


def reads(content: bytes, sizes: Callable[[bytes], bytes] = bytes) -> None:
    disk = SimulatedDisk(random.Random(1))
    disk.put(f"{7:016x}.snapshot", sizes(content))
    try:
        snapshot, pieces = Snapshots(disk).read(7)
        taken = list(pieces)
    except SnapshotBroken as error:
        assert "simulated" in str(error)
        return
    assert (snapshot.index, snapshot.term) == (7, 3)
    assert taken == PIECES


@examples(100)
@given(damaged(st.just(SNAPSHOT)))
def test_a_damaged_snapshot_is_noticed(content: bytes) -> None:
    reads(content)


def test_the_undamaged_are_read() -> None:
    reads(SNAPSHOT)
    assert isinstance(WHOLE, Known)
    assert [index for _command, index, _term in WHOLE.entries] == [20, 21, 22]
    assert _amounts_to({name: _resealed(content, name) for name, content in SEGMENTS.items()}) == WHOLE


def test_a_reader_that_believes_what_is_there_is_found() -> None:
    def sealed(content: bytes) -> bytes:
        """As if nothing checked a piece: its checksums are made to fit."""
        out, at, check = bytearray(content), 32, zlib.crc32(content[:28])
        while at + 8 <= len(out):
            (length,) = struct.unpack_from("<I", out, at)
            check = zlib.crc32(out[at + 8 : at + 8 + length], zlib.crc32(out[at : at + 4], check))
            struct.pack_into("<I", out, at + 4, check)
            at += 8 + length
        return bytes(out)

    @HUNT
    @given(damaged(st.just(SNAPSHOT)))
    def hunt(content: bytes) -> None:
        reads(content, sealed)

    with pytest.raises(AssertionError):
        hunt()
