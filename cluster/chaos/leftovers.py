"""`python -m cluster.chaos.leftovers OWNER MOUNTED... -- FOLDER...`: tidies up after a run that was killed with -9.

OWNER is PID:STARTED, as in `cluster.process`. When it is gone, however it ended, what is mounted is unmounted, and
each folder is removed once nobody uses it any more: the run's own processes end by themselves (`cluster.tether`), and
those that are paused are woken for it. A folder that is still used after a minute is left as it is.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from cluster.chaos.disks import Disk
from cluster.process import Identity

_LOOK_S: Final = 0.5
_USED_S: Final = 60.0
"""Longer than it takes services, nodes and a database server to end by themselves."""


def watch_over(mounted: Sequence[Path], folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """A process that does so should this one be killed. End it when there is nothing left to do."""
    words = [Identity.mine().word, *map(str, mounted), "--", *map(str, folders)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.chaos.leftovers", *words], stdin=subprocess.DEVNULL, process_group=0
    )


def users(folder: Path) -> list[int]:
    """Pids of all who were told of `folder`, work in it, or have opened a file in it, as far as that can be seen."""
    return [pid for pid in _others() if _uses(pid, folder)]


def tethered(owner: Identity) -> list[Identity]:
    """All who are to end when `owner` has."""
    tether = ("cluster.tether", owner.word)
    found = (Identity.of(pid) for pid in _others() if tether in pairwise(_words(pid)))
    return [identity for identity in found if identity is not None]


def _uses(pid: int, folder: Path) -> bool:
    if any(str(folder) in word for word in _words(pid)):
        return True
    process = Path("/proc") / str(pid)
    links = [process / "cwd"]
    with contextlib.suppress(OSError):  # it has ended, or is somebody else's
        links += (process / "fd").iterdir()
    for link in links:
        with contextlib.suppress(OSError):
            if Path(os.readlink(link)).is_relative_to(folder.resolve()):
                return True
    return False


def _others() -> Iterator[int]:
    """Every process but this one; what has ended and is not let go of is none."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and Identity.of(int(entry.name)) is not None:
            yield int(entry.name)


def _words(pid: int) -> list[str]:
    """What it was started with; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def main() -> None:
    """Look until the owner is gone."""
    words = sys.argv[2:]
    mounted, folders = words[: words.index("--")], words[words.index("--") + 1 :]
    owner = Identity.read(sys.argv[1])
    while owner.alive:
        time.sleep(_LOOK_S)
    for place in mounted:
        Disk(Path(place)).unmount()
    left = list(map(Path, folders))
    deadline_s = time.monotonic() + _USED_S
    while (staying := tethered(owner)) or left:
        if time.monotonic() > deadline_s:
            break
        for identity in staying:
            # The system wakes only those whose every thread stood still when the owner died.
            if identity.paused:
                identity.signal(signal.SIGCONT)
        for folder in [folder for folder in left if not users(folder)]:
            shutil.rmtree(folder, ignore_errors=True)
            left.remove(folder)
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
