"""The durable journal: a node's log entries, its term and its vote; acknowledged means synced.

    the event loop                              the writer (a thread: see `pump.py`)
    append, truncate, set_vote ...  -- queue -->  take all, write, one sync, drop old segments
    position  n                                      |
    durable_position  k <= n        <-- report ------+

Each method changes the log in memory and puts a record into a queue; none waits for the disk. The writer takes all
that is queued, writes it at once and syncs it once (group commit): under light load that is one record, and nothing
waits for a timer. `segments.py` has what is on disk, `records.py` how it looks.

**What the owner must do.** A word that reflects a change (a vote, an acknowledgement, a vote for itself) may leave the
node only once the change is durable: note `position` when the word is made, and let it go when `durable_position` has
got there; `after` does that. A leader may send entries that it has not synced, but counts itself only for those up to
`durable_index`.

**The disk's ways to fail.**

| the disk | the journal | the owner |
|---|---|---|
| has no room | `full`: keeps what is queued and tries again; nothing becomes durable | steps down, and says so |
| has room again | writes what has waited, and goes on | serves again |
| fails a write or a sync | `failure`: writes no more, its methods raise `JournalFailed` | ends the process |
| is slower than what comes | `congested` from `unsynced_bytes_high` on | takes no more until it is not |
| is much slower | `JournalOverrun` from `unsynced_bytes_max` on; the log is as it was | ends the process, or waits |

A failed sync is never tried again. The system may have dropped the pages and marked them clean, and then the next
sync succeeds, and says nothing.

**Snapshots.** `move_base` makes the log start later, once a snapshot holds the state up to there; the segments stay
until `release` says that no snapshot in use needs their entries, so that the snapshot before the last one can still
be gone back to, with `rebase`, at start. `reset` replaces the log by the two entries that a snapshot stands for, as
one record: no crash can leave the one without the other.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, overload

from cluster.replication import records
from cluster.replication.disk import Disk, RealDisk
from cluster.replication.entries import Entry, Log
from cluster.replication.pump import Pump
from cluster.replication.records import Record
from cluster.replication.segments import DiskFull, Segments, SegmentSettings, SyncFailed

_log = logging.getLogger(__name__)

_INDEX_MAX: Final = 2**63


class JournalOverrun(Exception):
    """More than `unsynced_bytes_max` would wait for the disk. Nothing was changed."""


class JournalFailed(Exception):
    """The disk has failed, and nobody knows what it holds. The process must end."""


class StillFull(Exception):
    """There is no room on the disk for what waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalSettings:
    """Limits of a `DurableJournal`."""

    segments: SegmentSettings = field(default_factory=SegmentSettings)
    unsynced_bytes_high: int = 16 * 1024 * 1024
    """`congested` from here on: what waits for the disk."""
    unsynced_bytes_max: int = 256 * 1024 * 1024
    """No record is taken that would make more than this wait for the disk."""
    retry_min_s: float = 0.05
    """How long after it a write that found no room is tried again; doubled each time ..."""
    retry_max_s: float = 1.0
    """... up to this."""
    mark_after_s: float = 0.02
    """With nothing to write for so long, it is noted that all so far is synced. The next batch says so, too."""

    def __post_init__(self) -> None:
        assert 0 < self.unsynced_bytes_high < self.unsynced_bytes_max
        assert self.segments.segment_bytes + self.unsynced_bytes_max < 2**31, "a segment is read in one piece"
        assert 0 < self.retry_min_s <= self.retry_max_s
        assert self.mark_after_s > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalHandlers:
    """What a journal tells its owner, on the owner's thread. They must not raise."""

    durable: Callable[[int], None]
    """`durable_position` has moved to here."""
    full: Callable[[str], None]
    """The disk has no room; why, for people."""
    room: Callable[[], None]
    """It has room again."""
    fatal: Callable[[BaseException], None]
    """Why the process must end. Once, and nothing after it."""


class DurableJournal:
    """A log in memory and on `disk`. Opening reads it, and blocks; so do `sync_now` and `close`, and nothing else.

    All methods belong to one thread, the owner's. As a sequence it holds (command, index, term) of the entries from
    `first_index` to `last_index`.
    """

    _segments_type = Segments

    def __init__(
        self, disk: Disk, settings: JournalSettings | None = None, *, new_id: Callable[[], bytes] | None = None
    ) -> None:
        """Read what is there. `new_id` gives a new journal its 16 bytes.

        Raises `JournalRefused`, `FolderLocked`, `SyncFailed`, OSError.
        """
        self._disk = disk
        self._settings = settings or JournalSettings()
        self._where = disk.where()
        disk.lock()
        try:
            self._segments = self._segments_type(disk, self._settings.segments, (new_id or _random_id)())
        except BaseException:
            disk.unlock()
            raise
        self._log: Log = self._segments.log
        self._pump: Pump | None = None
        self._handlers: JournalHandlers | None = None

        self._writing = threading.Lock()
        """Held while the disk is used."""
        self._batch: list[Record] = []
        """What is being written, or waits for room. Of the one who holds `_writing`."""
        self._batch_resets = False

        self._lock = threading.Lock()
        """Held for moments. All below is used with it, but numbers are read without."""
        self._queue: list[Record] = []
        self._queue_resets = False
        self._position = 0
        self._durable_position = 0
        self._batch_index = self._log.last
        """Once the batch is durable, so are the entries of the log up to here."""
        self._durable_index = self._log.last
        self._unsynced_bytes = 0
        self._released = 0
        self._garbage: deque[list[bytes]] = deque()
        """Commands that nobody needs any more; freeing 100,000s of them takes time, which is the writer's."""
        self._retries = 0
        """How often the batch has found no room."""
        self._full: str | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._told: tuple[int, str | None, BaseException | None] = (0, None, None)
        self._telling = False
        self._held: deque[tuple[int, Callable[[], None]]] = deque()

    def start(self, pump: Pump, handlers: JournalHandlers) -> None:
        """Let the pump do the writing from here on."""
        assert self._pump is None
        self._pump = pump
        self._handlers = handlers
        pump.start(self._round)

    # What is known.

    @property
    def is_new(self) -> bool:
        """Whether there was no journal before this one was opened."""
        return self._segments.is_new

    @property
    def position(self) -> int:
        """How many changes have been made since it was opened."""
        return self._position

    @property
    def durable_position(self) -> int:
        """How many of them are on disk, whatever happens next."""
        return self._durable_position

    @property
    def durable_index(self) -> int:
        """The last entry of the log of which it and all before it are on disk; 0 after a `reset` that is not."""
        return self._durable_index

    @property
    def log(self) -> Log:
        """The log in memory, to look at: the same object for as long as it is open."""
        return self._log

    @property
    def first_index(self) -> int:
        """The log's first entry; meaningless if there is none."""
        return self._log.base

    @property
    def last_index(self) -> int:
        """The log's last entry; meaningless if there is none."""
        return self._log.last

    @property
    def oldest_index(self) -> int:
        """The first entry that `rebase` could make the log start with."""
        return self._log.entries.first

    @property
    def term(self) -> int:
        """The node's term, durable or not; 0 if there never was one."""
        return self._log.term

    @property
    def vote(self) -> str | None:
        """Whom it voted for in that term."""
        return self._log.vote

    @property
    def commit_index(self) -> int:
        """Up to here entries are known to be committed, and are in the log. After a restart a while behind, or 0."""
        return min(self._log.commit, self._log.last)

    @property
    def unsynced_bytes(self) -> int:
        """How much waits for the disk."""
        return self._unsynced_bytes

    @property
    def congested(self) -> bool:
        """Whether that is so much that no more should be taken."""
        return self._unsynced_bytes >= self._settings.unsynced_bytes_high

    @property
    def full(self) -> str | None:
        """Why nothing becomes durable at present: the disk has no room."""
        return self._full

    @property
    def failure(self) -> BaseException | None:
        """Why nothing will ever become durable again."""
        return self._failure

    @property
    def segment_count(self) -> int:
        """How many files there are."""
        return self._segments.count

    def __len__(self) -> int:
        return self._log.last - self._log.base + 1

    @overload
    def __getitem__(self, item: int) -> Entry: ...

    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...

    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        log = self._log
        if isinstance(item, slice):
            start, stop, step = item.indices(len(self))
            assert step == 1
            return log.entries.span(log.base + start, log.base + stop)
        index = log.base + item if item >= 0 else log.last + 1 + item
        if not log.base <= index <= log.last:
            raise IndexError(item)
        return log.entries.command(index), index, log.entries.term(index)

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`, None where the log has none."""
        return self._log.term_at(index)

    # What changes it. Each raises `JournalOverrun` and `JournalFailed`, and has changed nothing then.

    def append(self, command: bytes, index: int, term: int) -> None:
        """Add the entry after the last one. Raises `OutOfTurn`: it is not that one."""
        record = records.entry(command, index, term)
        with self._lock:
            self._admit(record)
            self._log.append(command, index, term)
            self._enqueue(record)
        self._wake()

    def truncate(self, index: int) -> None:
        """Forget entry `index` and all after it. Raises `OutOfTurn`: there is no such entry."""
        record = records.truncate(index)
        with self._lock:
            self._admit(record)
            self._log.truncate(index)
            self._enqueue(record)
            self._durable_index = min(self._durable_index, index - 1)
            self._batch_index = min(self._batch_index, index - 1)
        self._wake()

    def reset(self, entries: Sequence[Entry]) -> None:
        """Let these entries be the log, in place of all others: as one record. Raises `OutOfTurn`: there is a gap."""
        record = records.reset(entries)
        with self._lock:
            self._admit(record)
            self._log.reset(entries)
            self._enqueue(record)
            self._queue_resets = True
            self._durable_index = self._batch_index = 0
        self._wake()

    def set_vote(self, term: int, vote: str | None) -> None:
        """Begin a term, or vote in it. Raises `OutOfTurn`: the term goes back."""
        record = records.vote(term, vote)
        with self._lock:
            self._admit(record)
            self._log.set_vote(term, vote)
            self._enqueue(record)
        self._wake()

    def move_base(self, index: int) -> None:
        """Let the log start at `index`, which it has. What was before it stays on disk until `release`."""
        assert self._log.base <= index
        if index == self._log.base:
            return
        record = records.base(index)
        with self._lock:
            self._admit(record)
            self._log.move_base(index)
            self._enqueue(record)
            self._garbage.extend(self._log.forget())
        self._wake()

    def rebase(self, index: int) -> bool:
        """At start: let the log begin at `index`, where the snapshot in use ends. False if it does not reach there.

        Otherwise what is before it is forgotten, so this is done once.
        """
        log = self._log
        if not (log.base <= log.last and log.entries.first <= index <= log.last):
            return False
        record = records.base(index)
        with self._lock:
            self._admit(record)
            if index != log.base:
                log.move_base(index)
                self._enqueue(record)
            self._garbage.extend(log.forget())
        self._wake()
        return True

    def release(self, index: int) -> None:
        """No snapshot in use needs entries before `index`: files that hold no others go, once the base is durable."""
        assert index <= self._log.base
        with self._lock:
            self._released = max(self._released, index)
        self._wake()

    def note_commit(self, index: int) -> None:
        """Entries up to `index` are committed. Costs nothing, and is on disk some time later."""
        self._log.commit = index

    # Waiting for the disk.

    def after(self, position: int, callback: Callable[[], None]) -> None:
        """Call it once `durable_position` has got to `position`: now, or when that is reported; in the order given.

        Positions must not go back from one call to the next. A callback that raises then is fatal.
        """
        if not self._held and position <= self._durable_position:
            callback()
            return
        assert not self._held or self._held[-1][0] <= position
        self._held.append((position, callback))

    def sync_now(self) -> None:
        """Block until all that was changed is durable. Raises `StillFull`, `JournalFailed`."""
        with self._writing:
            for _ in ("what waits", "the mark"):
                self._write()
            if self._failure is not None:
                raise JournalFailed(f"the journal in {self._where} has failed") from self._failure
            if self._full is not None:
                raise StillFull(self._full)

    def close(self) -> None:
        """Sync what can be synced, and release the folder. Handlers are not called any more. Raises `JournalFailed`."""
        if self._closed:
            return
        self._closed = True
        if self._pump is not None:
            self._pump.stop()
        self._held.clear()
        with self._writing:
            try:
                self._write()
                if self._full is not None:
                    _log.warning("%s: closed with %d bytes that found no room", self._where, self._unsynced_bytes)
                if self._failure is None and self._full is None:
                    self._leave()
                else:
                    self._segments.abandon()
            finally:
                self._disk.unlock()
        if self._failure is not None:
            raise JournalFailed(f"the journal in {self._where} has failed") from self._failure

    def _leave(self) -> None:
        try:
            self._segments.close(self._committed())
        except (SyncFailed, OSError) as error:
            self._failure = error

    # On the owner's thread.

    def _admit(self, record: Record) -> None:
        if self._failure is not None:
            raise JournalFailed(f"the journal in {self._where} has failed") from self._failure
        assert not self._closed
        if self._unsynced_bytes + records.size(record) > self._settings.unsynced_bytes_max:
            raise JournalOverrun(f"{self._unsynced_bytes} bytes wait for the disk in {self._where}")

    def _enqueue(self, record: Record) -> None:
        self._queue.append(record)
        self._unsynced_bytes += records.size(record)
        self._position += 1

    def _wake(self) -> None:
        # While there is no room, only time wakes the writer.
        if self._pump is not None and self._full is None:
            self._pump.wake()

    def _tell(self) -> None:
        """Report what has changed since the last time."""
        with self._lock:
            self._telling = False
            now = (self._durable_position, self._full, self._failure)
            before, self._told = self._told, now
        if self._closed or self._handlers is None:
            return
        handlers = self._handlers
        if now[0] != before[0]:
            try:
                while self._held and self._held[0][0] <= now[0]:
                    self._held.popleft()[1]()
            except Exception as error:  # noqa: BLE001 - whatever it is, a word that was held back is lost
                _log.critical("%s: what waited for the disk has failed", self._where, exc_info=error)
                with self._lock:
                    self._failure = self._failure or error
                    self._told = (*now[:2], self._failure)
                handlers.fatal(error)
                return
            handlers.durable(now[0])
        if now[1] is not None and before[1] is None:
            handlers.full(now[1])
        if now[1] is None and before[1] is not None:
            handlers.room()
        if now[2] is not None and before[2] is None:
            handlers.fatal(now[2])

    # On the writer's thread.

    def _round(self) -> float | None:
        with self._writing:
            return self._write()

    def _write(self) -> float | None:
        """Write and sync all that waits, once. With `_writing` held; never raises."""
        if self._failure is not None:
            return None
        try:
            return self._write_and_sync()
        except BaseException as error:  # noqa: BLE001 - whatever it is, what is on disk is not what was meant to be
            _log.critical("%s: the journal has failed; this process must end", self._where, exc_info=error)
            with self._lock:
                self._failure = error
            self._report()
            return None

    def _write_and_sync(self) -> float | None:
        with self._lock:
            taken, self._queue = self._queue, []
            resets, self._queue_resets = self._queue_resets, False
            state = self._log.state()
            position = self._position
            self._batch_index = self._log.last
            size = self._unsynced_bytes
        # Very often there is nothing in it yet, and a list of thousands need not be copied.
        self._batch = self._batch + taken if self._batch else taken
        self._batch_resets = self._batch_resets or resets
        if self._batch:
            try:
                self._segments.append(self._batch, state, resets=self._batch_resets)
            except DiskFull as error:
                self._found_no_room(error)
                self._drop()  # which may give some
                return self._delay_s()
            self._batch, self._batch_resets = [], False
            self._retries = 0
            with self._lock:
                self._durable_position = position
                self._durable_index = self._batch_index
                self._unsynced_bytes -= size
                was_full, self._full = self._full is not None, None
            if was_full:
                _log.warning("%s: there is room again", self._where)
            self._report()
            self._drop()
            return 0.0 if self._queue else self._settings.mark_after_s
        self._drop()
        self._segments.mark(self._committed())
        return None

    def _found_no_room(self, error: DiskFull) -> None:
        self._retries += 1
        if self._full is not None:
            return
        _log.error("%s; what waits is kept, and tried again", error)
        with self._lock:
            self._full = str(error)
        self._report()

    def _delay_s(self) -> float:
        """How long to wait after as many vain attempts."""
        delay_s = self._settings.retry_min_s
        for _ in range(self._retries - 1):
            if delay_s >= self._settings.retry_max_s:
                break
            delay_s *= 2
        return min(delay_s, self._settings.retry_max_s)

    def _drop(self) -> None:
        self._segments.drop_before(self._released)
        while self._garbage:
            self._garbage.popleft()

    def _committed(self) -> int:
        with self._lock:
            return min(self._log.commit, self._durable_index)

    def _report(self) -> None:
        """Have `_tell` called on the owner's thread, unless it is about to be."""
        if self._pump is None or self._handlers is None:
            return
        with self._lock:
            if self._telling:
                return
            self._telling = True
        self._pump.post(self._tell)


def open_journal(folder: Path, settings: JournalSettings | None = None) -> DurableJournal:
    """The journal in `folder`; a new one if there is none. Raises `JournalRefused`, `FolderLocked`, OSError."""
    return DurableJournal(RealDisk(folder), settings)


def _random_id() -> bytes:
    return os.urandom(16)
