"""`python -m tests.support.slow_disk FILE MODULE ARGUMENTS...` runs a module whose syncs take longer than they need.

How much longer stands in FILE, in seconds, and may change at any time. What is synced is synced all the same.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path


def _slowed(sync: Callable[[int], None], file: Path) -> Callable[[int], None]:
    def slow(descriptor: int) -> None:
        time.sleep(float(file.read_text()))
        sync(descriptor)

    return slow


def main() -> None:
    file, module = Path(sys.argv[1]), sys.argv[2]
    for name in ("fsync", "fdatasync"):
        setattr(os, name, _slowed(getattr(os, name), file))
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
