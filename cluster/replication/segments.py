"""The journal's files: read at start, appended to, dropped from the front. All blocking; `journal.py` brings threads.

The rules, and which crash each of them is for:

- **Bytes are written once, into zeros.** A segment grows by zeros first (which is also where a full disk shows), and
  records are written over them: syncing into room that is there already takes about half the time. No record is ever
  written over another, so nothing that was synced is at risk. Room beyond what is needed is taken only from a disk
  that has plenty.
- **A batch is written and synced before the next one**, so only the last batch can be torn (`records.py` has how that
  is told from damage). At start what is torn is overwritten with zeros, and the last batch is written again as it is:
  if the process before ended because a sync failed, the system may hold pages that look written and are not.
- **A segment gets its name when its header is durable**, and its header is written when all before it is: a segment
  with a broken header, and a gap between two segments, are damage and never a crash.
- **Whole segments are dropped, oldest first**, each removal made durable before the next, so that what remains has no
  gap. A segment goes once all of its entries are below what is asked to be kept, and once the base that says so is
  durable itself.
- **A write that finds no room is tried again with the same bytes at the same place**, perhaps with more after them.
"""

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from cluster.replication import records
from cluster.replication.disk import NO_ROOM, Disk, File
from cluster.replication.entries import Log, OutOfTurn, State
from cluster.replication.log import CannotStart
from cluster.replication.records import (
    HEADER_BYTES,
    SECTOR_BYTES,
    BadHeader,
    BadRecord,
    Header,
    Kind,
    OtherFormat,
    Record,
)

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".segment"
_UNFINISHED: Final = ".new"
_NAME: Final = re.compile(r"([0-9a-f]{16})\.segment")
_BLOCK_BYTES: Final = 4096
_ZEROS: Final = bytes(1024 * 1024)
_PLENTY: Final = 8
"""Room is taken in advance only where the disk has this many times as much."""


class JournalRefused(CannotStart):
    """The files on disk cannot be used. Says which, and what can be done."""


class JournalCorrupt(JournalRefused):
    """The files are damaged, or some are missing: what this node has acknowledged may be gone."""

    def __init__(self, disk: Disk, name: str, offset: int, why: str) -> None:
        super().__init__(
            f"{disk.where(name)} is damaged at byte {offset}: {why}. What this node has acknowledged may be lost with "
            f"it, so it must not vote with what is left: move {disk.where()} away, and start the node with --rejoin "
            "(docs/DISKS.md)"
        )
        self.name = name
        self.offset = offset
        """In bytes."""


class DiskFull(Exception):
    """There is no room for this batch; nothing in it counts. The same call can be made again."""


class SyncFailed(Exception):
    """Nobody knows what the disk holds now. The process must end, and read anew what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSettings:
    """How the log is cut into files."""

    segment_bytes: int = 64 * 1024 * 1024
    """A segment takes no further batch once it holds this many bytes."""
    preallocate_bytes: int = 4 * 1024 * 1024
    """How much room is taken in advance, where there is plenty."""

    def __post_init__(self) -> None:
        assert HEADER_BYTES < self.segment_bytes < 2**31
        assert 0 <= self.preallocate_bytes <= self.segment_bytes


@dataclass(slots=True, kw_only=True)
class _Segment:
    name: str
    sequence: int
    top: int = 0
    """No entry of the log above this index is in this segment."""


class Segments:
    """The files of one journal. Opening reads them all; what they amount to is `log`, until somebody takes it."""

    def __init__(self, disk: Disk, settings: SegmentSettings, journal_id: bytes) -> None:
        """Read, and repair a torn end. `journal_id` is given to a new journal. Raises `JournalRefused`, OSError."""
        assert len(journal_id) == 16
        self._disk = disk
        self._settings = settings
        self._journal_id = journal_id
        self._segments: list[_Segment] = []
        self._number = 0
        """Of the last record written."""
        self._synced = 0
        """Of the last record synced."""
        self._owed: list[Record] = []
        """A mark for which there was no room; where it would stand, nothing else may."""
        self._state = State()
        """As of the last record synced."""
        self._end = 0
        self._allocated = 0
        """The active segment holds zeros from `_end` to here."""
        self._seed = 0
        self._file: File
        self.is_new = False
        """Whether there was no journal."""
        self.log = Log(self._state)
        """What the records on disk amount to."""
        names = self._tidied()
        if names:
            self._read(names)
        else:
            self.is_new = True
            self._begin(1)

    @property
    def state(self) -> State:
        """What all that is synced amounts to."""
        return self._state

    @property
    def count(self) -> int:
        """How many files there are."""
        return len(self._segments)

    def append(self, batch: Sequence[Record], state: State, *, resets: bool = False) -> None:
        """Write the batch, and sync it. `state` is what all amounts to after it; `resets`: it holds a reset.

        Raises `DiskFull`, `SyncFailed`, OSError; after the last two nothing more may be written.
        """
        if self._owed:
            batch = [*self._owed, *batch]
        try:
            if self._end >= self._settings.segment_bytes and not self._owed:
                self._begin(self._segments[-1].sequence + 1)
            content = records.encode(batch, self._number + 1, self._synced, self._seed)
            self._allocate(self._end + len(content))
            self._file.write(self._end, content)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise DiskFull(f"no room in {self._disk.where()}: {error}") from error
            raise
        self._sync(self._file)
        self._owed = []
        self._end += len(content)
        self._number += len(batch)
        self._synced = self._number
        self._state = state
        if resets:
            for segment in self._segments:
                segment.top = 0
        self._segments[-1].top = max(self._segments[-1].top, state.last)

    def mark(self, commit: int, *, again: bool = False) -> None:
        """Note that all so far is synced, and what is committed, without a sync. Raises OSError; see `append`.

        Once after each batch, or `again`.
        """
        if self._owed or (self._synced < self._number and not again):
            return
        batch = [records.mark(commit)]
        content = records.encode(batch, self._number + 1, self._synced, self._seed)
        if self._end + len(content) > self._allocated:
            return
        try:
            self._file.write(self._end, content)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._owed = batch
            return
        self._end += len(content)
        self._number += 1

    def drop_before(self, index: int) -> None:
        """Remove the segments that hold nothing from `index` on. Raises OSError, `SyncFailed`."""
        index = min(index, self._state.base)
        while len(self._segments) > 1 and self._segments[0].top < index:
            self._disk.unlink(self._segments[0].name)
            self._sync_names()
            del self._segments[0]

    def close(self, commit: int) -> None:
        """Leave a mark that is durable, and release the file. Only after a last `append` that did not fail."""
        self.mark(commit, again=True)
        self._sync(self._file)
        self._file.close()

    def abandon(self) -> None:
        """Release the file, and nothing else."""
        self._file.close()

    # Writing.

    def _begin(self, sequence: int) -> None:
        """Start the next segment. Raises OSError, `SyncFailed`."""
        if self._synced < self._number:
            self._sync(self._file)  # the header vouches for all before it, a mark included
            self._synced = self._number
        header = Header(
            journal_id=self._journal_id, sequence=sequence, first_number=self._number + 1, state=self._state
        )
        segment = _Segment(name=f"{sequence:016x}{_SUFFIX}", sequence=sequence)
        unfinished = f"{sequence:016x}{_UNFINISHED}"
        file = self._disk.create(unfinished)
        try:
            file.write(0, records.encode_header(header).ljust(_BLOCK_BYTES, b"\0"))
            self._sync(file)
            self._disk.rename(unfinished, segment.name)
        except OSError:
            file.close()
            self._disk.unlink(unfinished)
            raise
        self._sync_names()
        if self._segments:
            self._file.close()
        self._file = file
        self._segments.append(segment)
        self._seed = records.seed(self._journal_id, sequence)
        self._end = HEADER_BYTES
        self._allocated = _BLOCK_BYTES

    def _allocate(self, end: int) -> None:
        """Have zeros up to `end` at least. Raises OSError."""
        if end <= self._allocated:
            return
        self._fill(-(-end // _BLOCK_BYTES) * _BLOCK_BYTES)
        more = min(self._allocated + self._settings.preallocate_bytes, self._settings.segment_bytes)
        if more <= self._allocated or self._disk.free_bytes() < _PLENTY * self._settings.preallocate_bytes:
            return
        try:
            self._fill(more)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _log.debug("%s: no room to take in advance: %s", self._disk.where(), error)

    def _fill(self, end: int) -> None:
        while self._allocated < end:
            step = min(end - self._allocated, len(_ZEROS))
            self._file.write(self._allocated, _ZEROS if step == len(_ZEROS) else bytes(step))
            self._allocated += step

    def _sync(self, file: File) -> None:
        """Raises `SyncFailed`: it is not to be taken for a write that can be tried again."""
        try:
            file.sync()
        except OSError as error:
            raise SyncFailed(f"a sync failed in {self._disk.where()}: {error}") from error

    def _sync_names(self) -> None:
        """Likewise, for the folder."""
        try:
            self._disk.sync_names()
        except OSError as error:
            raise SyncFailed(f"a sync failed in {self._disk.where()}: {error}") from error

    # Reading.

    def _tidied(self) -> list[str]:
        """The segments' names in order; segments that never got their name are removed."""
        segments = []
        for name in self._disk.names():
            if name.endswith(_UNFINISHED):
                _log.info("removed %s, which was never finished", self._disk.where(name))
                self._disk.unlink(name)
            elif name.endswith(_SUFFIX):
                if _NAME.fullmatch(name) is None:
                    raise JournalCorrupt(self._disk, name, 0, "a segment has another name")
                segments.append(name)
        return segments

    def _read(self, names: list[str]) -> None:
        before: tuple[str, int] | None = None
        """The segment before this one, and where its records end."""
        for name in names:
            with contextlib.ExitStack() as opened:
                file = self._disk.open(name)
                opened.callback(file.close)
                content = file.read(0, file.size())
                end, batch_start = self._read_segment(name, content, before)
                before = name, end
                if name == names[-1]:
                    self._check_reach(names[0])
                    self._repair(name, file, content, end, batch_start)
                    self._file, self._end, self._allocated = file, end, len(content)
                    opened.pop_all()
        self._synced = self._number
        self._state = self.log.state()

    def _check_reach(self, first_name: str) -> None:
        """The log must not begin before the first segment does."""
        log = self.log
        if log.base <= log.last and log.base < log.entries.first:
            missing = f"{log.base} to {log.entries.first - 1}"
            self._corrupt(first_name, 0, f"entries {missing} were in segments before it, which are missing")

    def _read_segment(self, name: str, content: bytes, before: tuple[str, int] | None) -> tuple[int, int]:
        """Replay one segment: where its records end, and where the last batch in it starts."""
        header = self._header(name, content, before)
        self._seed = records.seed(header.journal_id, header.sequence)
        segment = _Segment(name=name, sequence=header.sequence)
        self._segments.append(segment)
        at = batch_start = HEADER_BYTES
        while True:
            try:
                record = records.decode(content, at, self._seed)
            except BadRecord:
                return at, batch_start
            if record.number != self._number + 1:
                self._corrupt(name, at, f"record {record.number} stands where {self._number + 1} should")
            if record.synced == self._number:
                batch_start = at
            try:
                self._replay(content, record, segment)
            except (OutOfTurn, BadRecord) as error:
                raise JournalCorrupt(self._disk, name, at, f"record {record.number} is impossible: {error}") from error
            except OtherFormat as error:
                raise JournalRefused(f"{self._disk.where(name)}, byte {at}: {error}") from error
            self._number = record.number
            at = record.after

    def _header(self, name: str, content: bytes, before: tuple[str, int] | None) -> Header:
        """The segment's header, if it follows what has been read."""
        try:
            header = records.decode_header(content)
        except BadHeader as error:
            raise JournalCorrupt(self._disk, name, 0, str(error)) from error
        except OtherFormat as error:
            raise JournalRefused(f"{self._disk.where(name)}: {error}") from error
        if f"{header.sequence:016x}{_SUFFIX}" != name:
            self._corrupt(name, 0, f"it is segment {header.sequence}, under another's name")
        if before is None:
            self._journal_id = header.journal_id
            self._number = header.first_number - 1
            self.log = Log(header.state)
            return header
        if header.journal_id != self._journal_id:
            self._corrupt(name, 0, "it is of another journal")
        expected = self._segments[-1].sequence + 1
        if header.sequence != expected:
            self._corrupt(name, 0, f"segment {expected} should come before it, and is missing")
        if header.first_number != self._number + 1:
            self._corrupt(
                *before,
                f"record {self._number + 1} is bad, and all up to {header.first_number - 1} should follow there",
            )
        if header.state._replace(commit=0) != self.log.state()._replace(commit=0):
            self._corrupt(name, 0, "its header does not fit what comes before it")
        return header

    def _replay(self, content: bytes, record: records.Decoded, segment: _Segment) -> None:
        log = self.log
        match record.kind:
            case Kind.ENTRY:
                command, index, term = records.entry_of(content, record)
                log.append(command, index, term)
                if index > segment.top:
                    segment.top = index
            case Kind.TRUNCATE:
                log.truncate(records.index_of(content, record))
            case Kind.BASE:
                log.move_base(records.index_of(content, record))
            case Kind.VOTE:
                log.set_vote(*records.vote_of(content, record))
            case Kind.RESET:
                log.reset(records.entries_of(content, record))
                for other in self._segments:
                    other.top = 0
                segment.top = log.last
            case Kind.MARK:
                log.commit = records.index_of(content, record)
            case unknown:
                raise OtherFormat(f"a record of unknown kind {unknown}: a later version of Outlast wrote it")

    def _repair(self, name: str, file: File, content: bytes, end: int, batch_start: int) -> None:
        """Judge the end of the last segment; make what is before it durable, and what is behind it zeros."""
        data_end = records.end_of_data(content)
        if data_end > end:
            proof = records.witness(content, end, self._number + 1, self._seed)
            if proof is not None:
                self._corrupt(
                    name, end, f"record {self._number + 1} is bad, and was synced, as a record at byte {proof} says"
                )
            if not records.is_torn(content, end, self._seed):
                self._corrupt(name, end, f"record {self._number + 1} is bad, and not as a crash leaves it")
            _log.warning(
                "%s: cut off %d bytes from byte %d on, which a crash left half written",
                self._disk.where(name),
                data_end - end,
                end,
            )
            # The first sector last, and in one piece: until then what is torn goes on looking like it.
            first_sector_end = min(-(-end // SECTOR_BYTES) * SECTOR_BYTES, data_end)
            if first_sector_end < data_end:
                file.write(first_sector_end, bytes(data_end - first_sector_end))
            if end < first_sector_end:
                file.write(end, bytes(first_sector_end - end))
        if batch_start < end:
            file.write(batch_start, content[batch_start:end])
        self._sync(file)
        self._sync_names()

    def _corrupt(self, name: str, offset: int, why: str) -> NoReturn:
        raise JournalCorrupt(self._disk, name, offset, why)
