"""How the journal's records look on disk, and how damage is told from a write that a crash cut short.

    segment   <sequence, 16 hex digits>.segment
    +---------------------------+----------+----------+----  ----+-----------------+
    | header, 512 B             | record   | record   |  ...     | zeros           |
    +---------------------------+----------+----------+----  ----+-----------------+

    header    magic 8 | format 4 | its own size 4 | journal id 16 | sequence 8 | next record's number 8
              | base 8 | last 8 | term 8 | commit 8 | has a vote 1 | length of the vote 1 | vote 255
              | zeros | CRC 4
    record    magic 3 | kind 1 | length 4 | behind 4 | number 8 | body CRC 4 | head CRC 4 | body (length) | end 1

    kind      body
    entry     index 8 | term 8 | command           follows the last entry; any index where there is none
    truncate  index 8                              this entry and all after it are gone
    base      index 8                              entries before it are no longer part of the log
    vote      term 8 | has a vote 1 | vote         the node's term, and whom it voted for in it
    reset     count 4 | count x (index 8 | term 8 | length 4 | command)
                                                   these entries in place of all others, or none of it
    mark      commit 8                             nothing happened; see below

Integers are unsigned and little-endian. All checksums are CRC-32 and start from a number made of the journal's id and
the segment's sequence, so that no record verifies in another file than its own. Numbers count records from the first
of the journal on, without gaps, so that none is lost or repeated unseen. A header repeats what all segments before it
say about base, last index, term and vote: any number of old segments can go at once, and none is ever rewritten.

**Torn, or damaged?** Records are written into zeros, batch by batch, and each batch is synced before the next is
written. So a crash leaves at most one batch unsynced, the last one, and each sector of it holds either all that was
written there, or what was there before: zeros. (A write that was cut short within a sector leaves zeros from there
to the end.) The first record that does not verify is the torn end of an unsynced batch, and can be cut off, if

1. no later record proves otherwise. Each one tells how far *behind* itself the last record is that was known to be
   synced when it was written: if it covers the bad record, that one was acknowledged, and is damaged now. After the
   last batch of a busy time a *mark* says the same, so that the last batch has its witness too; and
2. zeros explain it: a sector that it reaches into is empty, or the file is, from some place within it on. Flipped
   bits do not look like that. The head has a checksum of its own, so that a length can be believed, and the end is a
   byte that is not zero, so that an end that is missing shows.

All else is damage. A journal that is damaged is refused: what it lacks may be what this node has acknowledged, and a
node that votes without it can take away the majority from what was committed.

What remains undecided: the last batch, synced, no mark after it on disk, and then damage that looks like a sector of
zeros (or is hidden by a command that holds one).
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from cluster.replication.entries import Entry, State

FORMAT: Final = 1
HEADER_BYTES: Final = 512
SECTOR_BYTES: Final = 512
VOTE_BYTES_MAX: Final = 255
"""The longest node id that can be voted for, in UTF-8."""

_SEGMENT_MAGIC: Final = b"OUTLASTJ"
_HEADER: Final = struct.Struct("<8sII16sQQQQQQBB255s")
_MAGIC: Final = b"\xf5RE"
_HEAD: Final = struct.Struct("<3sBIIQI")
_CRC: Final = struct.Struct("<I")
_HEAD_BYTES: Final = _HEAD.size + _CRC.size
_END: Final = b"\x7e"
_ENTRY: Final = struct.Struct("<QQ")
_INDEX: Final = struct.Struct("<Q")
_VOTE: Final = struct.Struct("<QB")
_COUNT: Final = struct.Struct("<I")
_RESET_ENTRY: Final = struct.Struct("<QQI")
_BEHIND_MAX: Final = 2**32 - 1

RECORD_OVERHEAD_BYTES: Final = _HEAD_BYTES + len(_END)
ENTRY_OVERHEAD_BYTES: Final = RECORD_OVERHEAD_BYTES + _ENTRY.size
"""What an entry takes on disk beside its command."""

assert _HEADER.size + _CRC.size <= HEADER_BYTES


class Kind(IntEnum):
    """What a record is about."""

    ENTRY = 1
    TRUNCATE = 2
    BASE = 3
    VOTE = 4
    RESET = 5
    MARK = 6


Record = tuple[Kind, bytes, bytes]
"""Kind, and the two parts of the body; two, so that a command need not be copied to get its index in front."""


class BadRecord(Exception):
    """These bytes are not what was written."""


class BadHeader(BadRecord):
    """This is not the start of a segment."""


class OtherFormat(Exception):
    """A segment, but of a format that this version does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first bytes of a segment."""

    journal_id: bytes
    """16 random bytes that all segments of one journal share."""
    sequence: int
    first_number: int
    """The number of its first record."""
    state: State
    """As of the end of the segment before it."""


def seed(journal_id: bytes, sequence: int) -> int:
    """Where the checksums of a segment's records start from."""
    return zlib.crc32(journal_id + sequence.to_bytes(8, "little"))


def encode_header(header: Header) -> bytes:
    """`HEADER_BYTES` bytes."""
    state = header.state
    vote = (state.vote or "").encode()
    content = _HEADER.pack(
        _SEGMENT_MAGIC,
        FORMAT,
        HEADER_BYTES,
        header.journal_id,
        header.sequence,
        header.first_number,
        state.base,
        state.last,
        state.term,
        state.commit,
        state.vote is not None,
        len(vote),
        vote,
    ).ljust(HEADER_BYTES - _CRC.size, b"\0")
    return content + _CRC.pack(zlib.crc32(content))


def decode_header(content: bytes) -> Header:
    """Read the start of a segment. Raises `BadHeader`, `OtherFormat`."""
    if len(content) < HEADER_BYTES:
        raise BadHeader(f"a segment starts with {HEADER_BYTES} bytes, and here are {len(content)}")
    magic, format_, size, journal_id, sequence, number, base, last, term, commit, voted, length, vote = (
        _HEADER.unpack_from(content)
    )
    if magic != _SEGMENT_MAGIC:
        raise BadHeader("this is no segment of a journal")
    if format_ != FORMAT or size != HEADER_BYTES:
        raise OtherFormat(f"format {format_}; this version of Outlast reads format {FORMAT}")
    (check,) = _CRC.unpack_from(content, HEADER_BYTES - _CRC.size)
    if check != zlib.crc32(memoryview(content)[: HEADER_BYTES - _CRC.size]):
        raise BadHeader("the header's checksum is wrong")
    try:
        name = vote[:length].decode()
    except UnicodeDecodeError as error:
        raise BadHeader("a vote that is no name") from error
    state = State(base=base, last=last, term=term, vote=name if voted else None, commit=commit)
    return Header(journal_id=journal_id, sequence=sequence, first_number=number, state=state)


def entry(command: bytes, index: int, term: int) -> Record:
    """One more entry of the log."""
    return Kind.ENTRY, _ENTRY.pack(index, term), command


def truncate(index: int) -> Record:
    """Entry `index` and all after it are gone."""
    return Kind.TRUNCATE, _INDEX.pack(index), b""


def base(index: int) -> Record:
    """The log starts with entry `index`."""
    return Kind.BASE, _INDEX.pack(index), b""


def vote(term: int, voted_for: str | None) -> Record:
    """The node's term and vote."""
    name = (voted_for or "").encode()
    assert len(name) <= VOTE_BYTES_MAX
    return Kind.VOTE, _VOTE.pack(term, voted_for is not None), name


def reset(entries: Sequence[Entry]) -> Record:
    """These entries are the log."""
    parts = [_COUNT.pack(len(entries))]
    for command, index, term in entries:
        parts += (_RESET_ENTRY.pack(index, term, len(command)), command)
    return Kind.RESET, b"".join(parts), b""


def mark(commit: int) -> Record:
    """All before it is synced; entries up to `commit` are committed."""
    return Kind.MARK, _INDEX.pack(commit), b""


def size(record: Record) -> int:
    """The bytes that a record takes on disk."""
    return RECORD_OVERHEAD_BYTES + len(record[1]) + len(record[2])


def encode(records: Sequence[Record], number: int, synced: int, seed_: int) -> bytes:
    """The records, the first with `number`, written at a time when all up to number `synced` are synced."""
    parts: list[bytes] = []
    crc32, pack_head, pack_crc = zlib.crc32, _HEAD.pack, _CRC.pack
    for kind, prefix, rest in records:
        check = crc32(rest, crc32(prefix, seed_))
        behind = min(number - synced, _BEHIND_MAX)
        head = pack_head(_MAGIC, kind, len(prefix) + len(rest), behind, number, check)
        parts += (head, pack_crc(crc32(head, seed_)), prefix, rest, _END)
        number += 1
    return b"".join(parts)


class Decoded(NamedTuple):
    """A record that verifies. (A named tuple, because a start reads millions of them.)"""

    kind: int
    """Of `Kind`, or of a later version's."""
    number: int
    synced: int
    """Up to this number all records were synced when it was written; 0 also if that was too long ago to tell."""
    start: int
    """Where its body starts ..."""
    stop: int
    """... and where it ends, in the segment."""

    @property
    def after(self) -> int:
        """Where the next record starts."""
        return self.stop + len(_END)


def decode(content: bytes, at: int, seed_: int) -> Decoded:
    """The record at this offset. Raises `BadRecord`."""
    head_end = at + _HEAD.size
    if head_end + _CRC.size > len(content):
        raise BadRecord("no record fits there")
    magic, kind, length, behind, number, body_check = _HEAD.unpack_from(content, at)
    if magic != _MAGIC:
        raise BadRecord("no record starts there")
    view = memoryview(content)
    if zlib.crc32(view[at:head_end], seed_) != _CRC.unpack_from(content, head_end)[0]:
        raise BadRecord("the checksum of a record's head is wrong")
    start = head_end + _CRC.size
    stop = start + length
    if stop >= len(content):
        raise BadRecord("a record is longer than its file")
    if zlib.crc32(view[start:stop], seed_) != body_check or content[stop] != _END[0]:
        raise BadRecord("a record's checksum is wrong")
    return Decoded(kind, number, max(0, number - behind), start, stop)


def entry_of(content: bytes, record: Decoded) -> Entry:
    """What an entry's record holds. Raises `BadRecord`, like all of these: the body is not one of that kind."""
    at = record.start + _ENTRY.size
    if at > record.stop:
        raise BadRecord("an entry that is too short")
    index, term = _ENTRY.unpack_from(content, record.start)
    return content[at : record.stop], index, term


def index_of(content: bytes, record: Decoded) -> int:
    """What a record of kind truncate, base or mark holds."""
    if record.stop - record.start != _INDEX.size:
        raise BadRecord("an index of another length")
    index: int = _INDEX.unpack_from(content, record.start)[0]
    return index


def vote_of(content: bytes, record: Decoded) -> tuple[int, str | None]:
    """The term, and the vote in it."""
    at = record.start + _VOTE.size
    if at > record.stop:
        raise BadRecord("a vote that is too short")
    term, voted = _VOTE.unpack_from(content, record.start)
    try:
        name = content[at : record.stop].decode()
    except UnicodeDecodeError as error:
        raise BadRecord("a vote that is no name") from error
    return term, name if voted else None


def entries_of(content: bytes, record: Decoded) -> list[Entry]:
    """The entries of a reset."""
    body = content[record.start : record.stop]
    entries = []
    try:
        (count,) = _COUNT.unpack_from(body)
        at = _COUNT.size
        for _ in range(count):
            index, term, length = _RESET_ENTRY.unpack_from(body, at)
            at += _RESET_ENTRY.size
            entries.append((body[at : at + length], index, term))
            at += length
    except struct.error as error:
        raise BadRecord("a reset that is too short") from error
    if at != len(body):
        raise BadRecord("a reset of another length")
    return entries


def end_of_data(content: bytes) -> int:
    """Where the zeros begin that reach to the end of the file."""
    return len(content.rstrip(b"\0"))


def witness(content: bytes, at: int, number: int, seed_: int) -> int | None:
    """The offset of a record after `at` which proves that the one with `number`, expected there, was synced."""
    found = content.find(_MAGIC, at + 1)
    while found >= 0:
        try:
            record = decode(content, found, seed_)
        except BadRecord:
            pass  # chance, or a part of what is torn or damaged
        else:
            if record.number > number and record.synced >= number:
                return found
        found = content.find(_MAGIC, found + 1)
    return None


def is_torn(content: bytes, at: int, seed_: int) -> bool:
    """Whether zeros in place of whole sectors, or from somewhere on, explain why no record verifies at this offset."""
    data_end = end_of_data(content)
    start = at + _HEAD_BYTES
    head = content[at : at + _HEAD.size]
    if len(content) < start or zlib.crc32(head, seed_) != _CRC.unpack_from(content, start - _CRC.size)[0]:
        stop = start
    else:
        # The head is there, all of it, so what is missing is behind it.
        at, stop = start, start + _HEAD.unpack(head)[2] + len(_END)
    if data_end < stop:
        return True
    while at < stop:
        sector_end = (at // SECTOR_BYTES + 1) * SECTOR_BYTES
        # The sector that the head ends in was written with it.
        whole = at != start or at % SECTOR_BYTES == 0
        if whole and not content[at : min(sector_end, len(content))].strip(b"\0"):
            return True
        at = sector_end
    return False
