"""A disk for a node or a database alone, small enough to be filled: a file system in memory, which takes root to mount.

It is filled as disks are in life: by a file that somebody else puts there. What the node gets is the kernel's own
answer.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

SIZE_MIB: Final = 28
"""So little that nodes take no room in advance (32 MiB), and feel at once that it is full."""

_PART: Final = bytes(1 << 16)


class Disk:
    """Mounted at `folder`, which is made; `unmount` it in the end."""

    def __init__(self, folder: Path, *, size_mib: int = SIZE_MIB) -> None:
        self.folder = folder
        self._size_mib = size_mib
        self._ballast = folder / "ballast"

    def mount(self) -> None:
        """Raises `OSError` when this machine, or this user, cannot."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        words = ["mount", "-t", "tmpfs", "-o", f"size={self._size_mib}m,mode=700", "tmpfs", str(self.folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(
                done.returncode, f"no file system can be mounted at {self.folder}: {done.stderr.partition(chr(10))[0]}"
            )

    def unmount(self) -> None:
        """Let go of it, and of all that is on it."""
        subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True, check=False)

    def fill(self) -> int:
        """Leave no room; bytes that were left before."""
        size = 0
        with self._ballast.open("ab", buffering=0) as file:
            part = _PART
            while part:
                try:
                    size += file.write(part)
                except OSError:
                    # Full for pieces of this size; at the end not a byte is left.
                    part = part[: len(part) // 2]
        return size

    def clear(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int:
        """Room that is left."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize


def why_not() -> str | None:
    """Why there can be no disks of one's own here; None: there can."""
    with tempfile.TemporaryDirectory(prefix="outlast-disk-") as folder:
        disk = Disk(Path(folder))
        try:
            disk.mount()
        except OSError as error:
            return str(error.strerror or error)
        disk.unmount()
        return None
