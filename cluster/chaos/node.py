"""`python -m cluster.chaos.node --ahead FILE --config NODE.toml [--rejoin]`: a node whose calendar can be set.

FILE holds by how many milliseconds it is ahead of the machine's, and may change at any time. The machine's own clock is
left alone. Durations go by another clock, which on real machines nobody can set either.
"""

import argparse
import sys
from pathlib import Path

from cluster.replication.clock import SystemClock
from coordinator.__main__ import run
from coordinator.config import NodeConfig


class SetClock(SystemClock):
    """The system's clocks, the calendar set by what is in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ahead_ms = 0

    def wall_ms(self) -> int:
        """What this node takes for now."""
        ahead_ms = int(self._file.read_text())
        if ahead_ms != self._ahead_ms:
            self._ahead_ms = ahead_ms
            if ahead_ms:
                self._file.with_suffix(".seen").write_text(str(ahead_ms))
        return super().wall_ms() + ahead_ms


def set_clock(file: Path, ahead_ms: int) -> None:
    """From now on, the node that reads `file` is so far ahead."""
    draft = file.with_suffix(".new")
    draft.write_text(str(ahead_ms))
    draft.replace(file)


def has_seen(file: Path, ahead_ms: int) -> bool:
    """Whether the node has looked at its calendar since it was set so."""
    seen = file.with_suffix(".seen")
    return seen.exists() and seen.read_text() == str(ahead_ms)


def main() -> int:
    """The exit status of the node."""
    parser = argparse.ArgumentParser(prog="python -m cluster.chaos.node", description=__doc__)
    parser.add_argument("--ahead", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rejoin", action="store_true", help="its disk is lost, and it comes back empty")
    arguments = parser.parse_args()
    return run(NodeConfig.load(arguments.config), rejoin=arguments.rejoin, clock=SetClock(arguments.ahead))


if __name__ == "__main__":
    sys.exit(main())
