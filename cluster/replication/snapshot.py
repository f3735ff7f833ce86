"""Snapshots on disk: the state as of one entry, so that the log before it need not be kept.

    <index, 16 hex digits>.snapshot
    magic 8 | format 4 | index 8 | term 8 | CRC 4        the last entry that it holds, and that entry's term
    length 4 | CRC 4 | piece                             as many as there are ...
    0 4      | CRC 4                                     ... and the end

Each CRC-32 starts from the one before it, so a piece that is missing, repeated or of another file shows, as does a
flipped bit. Integers are unsigned and little-endian.

A snapshot is written under another name, synced, renamed, and the folder synced; only then may anything rely on it. The
one before it stays, and so does the log from there on: if the newest turns out to be broken, the previous one and a
longer tail of the log amount to the same. Only when no snapshot can be read, and the log does not reach back to its
beginning, must the node stop: what it lacks, its peers have.
"""

import logging
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from cluster.replication.disk import Disk, File
from cluster.replication.entries import Entry
from cluster.replication.log import CannotStart, NeedsNewer
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.segments import SyncFailed

_log = logging.getLogger(__name__)

_MAGIC: Final = b"outlsnap"
_FORMAT: Final = 1
_HEADER: Final = struct.Struct("<8sIQQ")
_CRC: Final = struct.Struct("<I")
_FRAME: Final = struct.Struct("<II")
_SUFFIX: Final = ".snapshot"
_UNFINISHED: Final = ".partial"
_INCOMING: Final = "incoming" + _UNFINISHED
_BROKEN: Final = ".broken"
_NAME: Final = re.compile(r"([0-9a-f]{16})\.snapshot")
_KEPT: Final = 2
"""How many snapshots stay: the newest, and the one to go back to."""

PIECE_BYTES_MAX: Final = 64 * 1024 * 1024
NOTHING_COMMAND: Final = b"\1"
"""What stands in the log for the entry that a snapshot from elsewhere ends with."""


class SnapshotBroken(Exception):
    """The file is not what was written. Names it."""


class SnapshotsLost(CannotStart):
    """No snapshot can be read, and the log alone does not reach back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One that is durable."""

    index: int
    """The last entry that it holds."""
    term: int
    size: int
    """In bytes."""


class Snapshots:
    """The snapshots in the folder of `disk`. All methods block; from any thread."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._naming = threading.Lock()
        for name in disk.names():
            if name.endswith(_UNFINISHED):
                disk.unlink(name)

    def indices(self) -> list[int]:
        """The last entries of all, newest first."""
        found = [_NAME.fullmatch(name) for name in self._disk.names()]
        return sorted((int(match[1], 16) for match in found if match is not None), reverse=True)

    def write(self, index: int, term: int, pieces: Iterable[bytes]) -> Snapshot:
        """Store one; it is durable when this returns. Raises OSError (there is no room, say), `SyncFailed`."""
        name = f"{index:016x}{_UNFINISHED}"
        file = self._disk.create(name)
        try:
            size = 0
            for part in _encoded(index, term, pieces):
                file.write(size, part)
                size += len(part)
            self._sync(file)
        except OSError:
            file.close()
            self._disk.unlink(name)
            raise
        file.close()
        self._name(name, index)
        return Snapshot(index=index, term=term, size=size)

    def read(self, index: int) -> tuple[Snapshot, Iterator[bytes]]:
        """One of them, and its pieces, which are verified as they come. Raises `SnapshotBroken`, OSError."""
        name = _name(index)
        file = self._disk.open(name)
        try:
            snapshot = self._header(file, name)
        except BaseException:
            file.close()
            raise
        if snapshot.index != index:
            file.close()
            raise SnapshotBroken(f"{self._disk.where(name)} is of entry {snapshot.index}")
        return snapshot, self._pieces(file, name)

    def open(self, index: int) -> tuple[Snapshot, File]:
        """One of them as it is on disk, to be sent; the caller closes the file. Raises `SnapshotBroken`, OSError."""
        name = _name(index)
        file = self._disk.open(name)
        try:
            return self._header(file, name), file
        except BaseException:
            file.close()
            raise

    def where(self, index: int) -> str:
        """Where it is, for people."""
        return self._disk.where(_name(index))

    def set_aside(self, index: int) -> None:
        """It is broken: let nobody take it for one."""
        self._disk.rename(_name(index), _name(index) + _BROKEN)
        self._disk.sync_names()

    # One that comes from elsewhere.

    def begin_incoming(self) -> File:
        """A file for what comes; there is one at a time."""
        return self._disk.create(_INCOMING)

    def finish_incoming(self, file: File) -> Snapshot:
        """All has come: verify it, and keep it. Raises `SnapshotBroken`, OSError, `SyncFailed`."""
        snapshot = self._header(file, _INCOMING)
        for _piece in self._pieces(file, _INCOMING, close=False):
            pass
        self._sync(file)
        self._name(_INCOMING, snapshot.index)
        return snapshot

    # How.

    def _name(self, name: str, index: int) -> None:
        with self._naming:
            try:
                self._disk.rename(name, _name(index))
                self._disk.sync_names()
            except OSError as error:
                raise SyncFailed(f"a rename failed in {self._disk.where()}: {error}") from error
            for old in self.indices()[_KEPT:]:
                self._disk.unlink(_name(old))

    def _sync(self, file: File) -> None:
        try:
            file.sync()
        except OSError as error:
            raise SyncFailed(f"a sync failed in {self._disk.where()}: {error}") from error

    def _header(self, file: File, name: str) -> Snapshot:
        content = file.read(0, _HEADER.size + _CRC.size)
        if len(content) < _HEADER.size + _CRC.size:
            raise SnapshotBroken(f"{self._disk.where(name)} has no header")
        magic, kind, index, term = _HEADER.unpack_from(content)
        (check,) = _CRC.unpack_from(content, _HEADER.size)
        if magic != _MAGIC or check != zlib.crc32(content[: _HEADER.size]):
            raise SnapshotBroken(f"the header of {self._disk.where(name)} is damaged")
        if kind != _FORMAT:
            raise SnapshotBroken(f"{self._disk.where(name)} is of format {kind}; this version reads {_FORMAT}")
        return Snapshot(index=index, term=term, size=file.size())

    def _pieces(self, file: File, name: str, *, close: bool = True) -> Iterator[bytes]:
        try:
            at = _HEADER.size + _CRC.size
            check = zlib.crc32(file.read(0, _HEADER.size))
            while True:
                frame = file.read(at, _FRAME.size)
                if len(frame) < _FRAME.size:
                    raise SnapshotBroken(f"{self._disk.where(name)} ends at byte {at}, too early")
                length, expected = _FRAME.unpack(frame)
                if length > PIECE_BYTES_MAX:
                    raise SnapshotBroken(f"{self._disk.where(name)} is damaged at byte {at}")
                piece = file.read(at + _FRAME.size, length)
                check = zlib.crc32(piece, zlib.crc32(frame[:4], check))
                if check != expected:
                    raise SnapshotBroken(f"{self._disk.where(name)} is damaged at byte {at}")
                if not length:
                    return
                yield piece
                at += _FRAME.size + length
        finally:
            if close:
                file.close()


def _name(index: int) -> str:
    return f"{index:016x}{_SUFFIX}"


def _encoded(index: int, term: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
    header = _HEADER.pack(_MAGIC, _FORMAT, index, term)
    check = zlib.crc32(header)
    yield header + _CRC.pack(check)
    for piece in pieces:
        assert 0 < len(piece) <= PIECE_BYTES_MAX
        check = zlib.crc32(piece, zlib.crc32(_CRC.pack(len(piece)), check))
        yield _FRAME.pack(len(piece), check) + piece
    yield _FRAME.pack(0, zlib.crc32(_CRC.pack(0), check))


def recover(
    snapshots: Snapshots, journal: RaftJournal, restore: Callable[[Iterable[bytes]], Callable[[], object]]
) -> tuple[Snapshot, Callable[[], object]] | None:
    """What to start with: the newest snapshot that can be read, and what `restore` made of it; None: an empty state.

    The journal then holds the snapshot's last entry. Raises `SnapshotsLost`.
    """
    problems = []
    for index in snapshots.indices():
        if index < journal.first_index:
            problems.append(f"the log begins after entry {index}")
            continue
        try:
            snapshot, pieces = snapshots.read(index)
            put = restore(pieces)
        except NeedsNewer as error:
            # Nothing is wrong with it, and whoever can read it will.
            raise NeedsNewer(f"{snapshots.where(index)}: {error}") from error
        except Exception as error:  # noqa: BLE001 - whatever it is, this one cannot be used, and there may be another
            _log.error("a snapshot cannot be used: %s", error)
            problems.append(str(error))
            snapshots.set_aside(index)
            continue
        if journal.is_new:
            raise SnapshotsLost(f"there is a snapshot in {journal.disk.where()} and no log: {_WAY_BACK}")
        if journal.term_at(index) != snapshot.term:
            # The log ends before it, or goes another way: a snapshot holds only what is committed.
            last: Entry = (NOTHING_COMMAND, index, snapshot.term)
            journal.reset(last)
        return snapshot, put
    if journal.first_index > 1:
        why = "; ".join(problems) or "there is none"
        raise SnapshotsLost(
            f"the log in {journal.disk.where()} begins with entry {journal.first_index}, and no snapshot of what was "
            f"before it can be read ({why}): {_WAY_BACK}"
        )
    return None


_WAY_BACK: Final = (
    "what this node has acknowledged may be lost: move the folder away, and start the node with --rejoin "
    "(docs/DISKS.md)"
)
