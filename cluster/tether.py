"""`python -m cluster.tether PID:STARTED MODULE ARGUMENTS...` runs a module that ends when its owner does.

A cluster in the foreground must leave nothing behind, even when the command that started it is killed with -9 and can
clean up nothing. So each of its processes watches the owner by itself. It looks at the owner's pid and start time, not
at a pipe or the parent: a node that was started again from another shell has another parent but the same owner.

The module is told by SIGTERM, as by anyone who wants it to stop, and has a grace to do so.
"""

import os
import runpy
import signal
import sys
import threading
import time
from typing import Final

from cluster.process import Identity

LOOK_S: Final = 0.5
"""Seconds between looks at the owner."""

GRACE_S: Final = 5.0
"""Seconds between SIGTERM and the end of patience."""


def _watch(owner: Identity) -> None:
    while owner.alive:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


def main() -> None:
    """Watch the owner from a thread, and become the module."""
    owner, module = Identity.read(sys.argv[1]), sys.argv[2]
    watcher = threading.Thread(target=_watch, args=(owner,), name="tether", daemon=True)
    watcher.start()
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
