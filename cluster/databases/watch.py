"""`python -m cluster.databases.watch OWNER SERVER SIGNAL`: ends a server when its owner is gone.

OWNER and SERVER are PID:STARTED, as in `cluster.process`. A database server is not ours, so it cannot watch by itself
as our own processes do (`cluster.tether`).
"""

import signal
import sys
import time
from typing import Final

from cluster.databases.server import children_of
from cluster.process import Identity

LOOK_S: Final = 0.5
"""Seconds between looks."""

GRACE_S: Final = 10.0
"""Seconds between the signal and SIGKILL."""


def main() -> None:
    """Look until one of the two is gone."""
    owner, server = map(Identity.read, sys.argv[1:3])
    while owner.alive and server.alive:
        time.sleep(LOOK_S)
    if not server.signal(signal.Signals(int(sys.argv[3]))):
        return
    deadline_s = time.monotonic() + GRACE_S
    while server.alive and time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
    for identity in (server, *map(Identity.of, children_of(server.pid))):
        if identity is not None:
            identity.signal(signal.SIGKILL)


if __name__ == "__main__":
    main()
