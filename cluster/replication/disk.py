"""One folder of a disk, as small as a journal needs it, so that tests can put another in its place.

A real disk does terrible things seldom: it fills up, it fails a sync, it loses what was not synced, in any order. What
is built on `Disk` can be shown all of that at every call. Nothing here decides anything: each method is one system
call, or two where only the pair makes sense.

**What may be relied on.** What was written is there after a crash only if `File.sync` has returned since; until then
each sector (512 bytes) may hold what it held before or any later state, whatever its neighbours do. A process that is
killed may leave a write half done, but not within a sector. Names are there only if `sync_names` has returned since. A
rename is atomic. A sync that fails has told all it ever will: pages may have been dropped and marked clean, so a second
sync that succeeds proves nothing.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Protocol

from cluster.replication.log import CannotStart
from cluster.replication.term import sync_folder

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The errors of a write that stop once there is room."""

_LOCK = "lock"


class FolderLocked(CannotStart):
    """Another process, or another object of this one, holds the folder."""


class File(Protocol):
    """An open file. Offsets and sizes are bytes."""

    def size(self) -> int:
        """Where the file ends."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """What is there; shorter only where the file ends."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Put all of `data` there. Raises OSError; any part of it may have been written then."""
        ...

    def sync(self) -> None:
        """Return once the content and the size are durable. Raises OSError: nobody knows what is, then."""
        ...

    def close(self) -> None:
        """Release it; syncs nothing."""
        ...


class Disk(Protocol):
    """The files of one folder, by name. All methods block, and raise OSError."""

    def where(self, name: str = "") -> str:
        """How people find this file (or the folder)."""
        ...

    def lock(self) -> None:
        """Keep all others out of the folder until `unlock`, or until the process ends. Raises `FolderLocked`."""
        ...

    def unlock(self) -> None:
        """Let others in."""
        ...

    def names(self) -> list[str]:
        """All files, sorted."""
        ...

    def create(self, name: str) -> File:
        """A new and empty file; a file of that name is replaced."""
        ...

    def open(self, name: str) -> File:
        """An existing file, to read and write."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Atomically; a file called `new` is replaced."""
        ...

    def unlink(self, name: str) -> None:
        """Remove the name; the room is given back once nobody has the file open."""
        ...

    def sync_names(self) -> None:
        """Make created, renamed and removed names durable."""
        ...

    def free_bytes(self) -> int:
        """How much more the disk says it can hold. A hint: quotas are not seen."""
        ...


class RealFile:
    """A file of the operating system."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def size(self) -> int:
        """Where the file ends."""
        return os.fstat(self._handle).st_size

    def read(self, offset: int, size: int) -> bytes:
        """What is there; shorter only where the file ends."""
        parts = []
        while size > 0:
            part = os.pread(self._handle, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """One call, unless the system writes less than it was given."""
        written = os.pwrite(self._handle, data, offset)
        if written == len(data):
            return
        rest = memoryview(data)
        while written < len(rest):
            step = os.pwrite(self._handle, rest[written:], offset + written)
            if step == 0:
                raise OSError(errno.EIO, "the system writes nothing and gives no reason")
            written += step

    def sync(self) -> None:
        """Sync the content, and of the metadata what is needed to read it."""
        os.fdatasync(self._handle)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._handle)


class RealDisk:
    """A folder of the operating system; it is made if there is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: int | None = None
        made = []
        for path in (folder, *folder.parents):
            if path.exists():
                break
            made.append(path)
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            sync_folder(path.parent)

    def where(self, name: str = "") -> str:
        """The path."""
        return str(self._folder / name) if name else str(self._folder)

    def lock(self) -> None:
        """Take the lock of a file in the folder. It goes with the process, however that ends."""
        assert self._lock is None
        handle = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FolderLocked(f"{self._folder} is in use by another process") from error
            undo.pop_all()
        self._lock = handle

    def unlock(self) -> None:
        """Release it. The file stays: removing it would let two processes lock two files of one name."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def names(self) -> list[str]:
        """All files except the lock."""
        return sorted(name for name in os.listdir(self._folder) if name != _LOCK)

    def create(self, name: str) -> File:
        """For its owner's eyes only."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return RealFile(os.open(self._folder / name, flags, 0o600))

    def open(self, name: str) -> File:
        """An existing file, to read and write."""
        return RealFile(os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC))

    def rename(self, old: str, new: str) -> None:
        """Atomically."""
        (self._folder / old).replace(self._folder / new)

    def unlink(self, name: str) -> None:
        """Remove the name."""
        (self._folder / name).unlink()

    def sync_names(self) -> None:
        """Sync the folder."""
        sync_folder(self._folder)

    def free_bytes(self) -> int:
        """What the file system gives to those who are not root."""
        stats = os.statvfs(self._folder)
        return stats.f_bavail * stats.f_frsize
