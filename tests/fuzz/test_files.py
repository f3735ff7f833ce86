"""What a node reads at start: the journal's segments and snapshots, damaged, and damaged under checksums that fit."""

import contextlib
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replication import records
from cluster.replication.entries import Entry
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


HEAD = struct.Struct("<3sBIIQI")
"""Of a record: magic, kind, length, behind, number, check of the body; the check of all that follows."""
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
    head, at = HEAD, HEADER_BYTES
    while at + head.size + 5 <= len(out) and out[at : at + 3] == b"\xf5RE":
        magic, kind, length, behind, number, _check = head.unpack_from(out, at)
        body = bytes(out[at + head.size + 4 : at + head.size + 4 + length])
        head.pack_into(out, at, magic, kind, length, behind, number, zlib.crc32(body, seed))
        struct.pack_into("<I", out, at + head.size, zlib.crc32(out[at : at + head.size], seed))
        at += head.size + 4 + length + 1
    return bytes(out)


def _records(name: str) -> Iterator[int]:
    """Where each record of a segment begins, and where the last one ends."""
    content, at = SEGMENTS[name], HEADER_BYTES
    seed = records.seed(JOURNAL_ID, int(name[:16], 16))
    yield at
    with contextlib.suppress(records.BadRecord):
        while True:
            at = records.decode(content, at, seed).after
            yield at


LAST = NAMES[-1]
*STARTS, END = _records(LAST)
EARLIER = [_amounts_to({**SEGMENTS, LAST: SEGMENTS[LAST][:at]}) for at in (*STARTS, END)]
"""What there was before each of the last segment's records, and after all of them."""


def opens(name: str, bad: bytes, *, sealed: bool) -> None:
    """A journal of which one segment holds something else."""
    found = _amounts_to({**SEGMENTS, name: _resealed(bad, name) if sealed else bad})
    if isinstance(found, str):
        assert "simulated" in found, "it says which file"
        return
    indices = [index for _command, index, _term in found.entries]
    assert indices == list(range(found.next_index - len(indices), found.next_index))
    if sealed or found == WHOLE:
        return
    assert name == LAST, "only the last segment may end early, as a crash leaves it"
    assert found in EARLIER, "nothing is believed that was not written"
    assert bad[STARTS[-1] : END] != SEGMENTS[name][STARTS[-1] : END], "what was synced is missed"


PLACES = [(name, start, stop) for name in NAMES for start, stop in pairwise(_records(name))]
"""All records."""


@st.composite
def bad_segments(draw: st.DrawFn, *, sealed: bool) -> tuple[str, bytes]:
    """One segment with damage anywhere, or in one of its records: small ones are as likely as large ones."""
    name, start, stop = draw(st.sampled_from(PLACES))
    whole = SEGMENTS[name][: records.end_of_data(SEGMENTS[name])]
    if draw(st.integers(0, 2)) == 0:
        return name, draw(damaged(st.just(whole)))
    if not sealed:
        return name, whole[:start] + draw(damaged(st.just(whole[start:stop]))) + whole[stop:]
    magic, kind, _length, behind, number, check = HEAD.unpack_from(whole, start)
    body = whole[start + HEAD.size + 4 : stop - 1]
    body = draw(damaged(st.just(body)) | st.just(body))
    head = HEAD.pack(magic, draw(st.just(kind) | st.integers(0, 9)), len(body), behind, number, check)
    return name, whole[:start] + head + bytes(4) + body + whole[stop - 1 :]


@examples(60)
@given(bad_segments(sealed=False))
def test_a_damaged_segment_is_refused_by_its_name(segment: tuple[str, bytes]) -> None:
    opens(*segment, sealed=False)


@examples(60)
@given(bad_segments(sealed=True))
def test_a_segment_under_checksums_that_fit_is_read_or_refused_by_its_name(segment: tuple[str, bytes]) -> None:
    opens(*segment, sealed=True)


@examples(30)
@given(st.integers(0, 253), st.binary(min_size=1, max_size=8))
def test_a_header_under_a_checksum_that_fits_is_read_or_refused(at: int, patch: bytes) -> None:
    header = bytearray(SEGMENTS[NAMES[0]])
    header[at : at + len(patch)] = patch
    opens(NAMES[0], bytes(header), sealed=True)


def _unverified(content: bytes, at: int, _seed: int) -> records.Decoded:
    """Believes what is there."""
    stop = len(content) - 1
    if at + HEAD.size + 4 > stop:
        raise records.BadRecord("no record fits there")
    magic, kind, length, behind, number, _check = HEAD.unpack_from(content, at)
    start = at + HEAD.size + 4
    if magic != b"\xf5RE" or start + length > stop:
        raise records.BadRecord("no record starts there")
    return records.Decoded(kind, number, max(0, number - behind), start, start + length)


def _undecoded(content: bytes, record: records.Decoded) -> tuple[int, str | None]:
    """A name is text."""
    term, voted = struct.unpack_from("<QB", content, record.start)
    return term, content[record.start + 9 : record.stop].decode() if voted else None


def _unbounded(content: bytes, record: records.Decoded) -> list[Entry]:
    """As many entries as the count says."""
    (count,), entries, at = struct.unpack_from("<I", content, record.start), [], record.start + 4
    for _ in range(count):
        index, term, length = struct.unpack_from("<QQI", content, at)
        entries.append((content[at + 20 : at + 20 + length], index, term))
        at += 20 + length
    return entries


CARELESS: dict[str, tuple[dict[str, Any], bool, Any]] = {
    "believes what is there": ({"decode": _unverified}, False, AssertionError),
    "takes damage for a crash": ({"witness": lambda *_: None, "is_torn": lambda *_: True}, False, AssertionError),
    "a name is text": ({"vote_of": _undecoded}, True, (UnicodeDecodeError, struct.error)),
    "as many as the count says": ({"entries_of": _unbounded}, True, struct.error),
}


@pytest.mark.parametrize("which", CARELESS)
def test_a_careless_reader_of_segments_is_found(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, sealed, error = CARELESS[which]
    for name, careless in parts.items():
        monkeypatch.setattr(records, name, careless)

    @HUNT
    @given(bad_segments(sealed=sealed))
    def hunt(segment: tuple[str, bytes]) -> None:
        opens(*segment, sealed=sealed)

    with pytest.raises(error):
        hunt()


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
