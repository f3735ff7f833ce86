"""Room for connections: a system gives a process fewer descriptors than a node needs, unless it is asked for more."""

import logging
import resource
from typing import Final

_log = logging.getLogger(__name__)

SPARE: Final = 1024
"""For all that is no client of the API: files, the other nodes, participants, TLS handshakes, requests passed on."""


def make_room(connections: int) -> int:
    """Raise this process's limit where it is too low; how many `connections` of clients there is room for then.

    Without descriptors a node could reach neither its peers nor its disk, so clients get what the others leave.
    """
    wanted = connections + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    raised = wanted if hard == resource.RLIM_INFINITY else hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError) as error:  # some systems have a bound of their own below the hard one
        _log.warning("the limit of open files stays at %d: %s", soft, error)
    else:
        soft = raised
    room = min(connections, max(1, soft // 2, soft - SPARE))
    if room < connections:
        _log.warning(
            "open files are limited to %d: at most %d connections of clients, not %d (max_connections)",
            soft,
            room,
            connections,
        )
    return room
