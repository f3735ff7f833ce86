"""TCP ports on loopback: free ones, and what to say about one that is not."""

import random
import socket
from pathlib import Path
from typing import Final

from cluster.process import ProcessTrouble

HOST: Final = "127.0.0.1"

_given: Final[set[int]] = set()
"""Ports given out by this process: whoever has one may not listen on it yet, and the next one shall not get it."""

_FIRST: Final = 10_000
_TRIES: Final = 1_000


def is_free(port: int) -> bool:
    """Whether something could listen on `port` of the loopback address now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections that have just ended do not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the system gives to outgoing connections.

    A port out of the system's own range would be free now, and while a killed node is down an outgoing connection, even
    one to that very node, could take it. Raises `ProcessTrouble`.
    """
    end = _ephemeral_start()
    chooser = random.SystemRandom()
    found: set[int] = set()
    for _ in range(_TRIES):
        if len(found) == count:
            _given.update(found)
            return sorted(found)
        port = chooser.randrange(_FIRST, end)
        if port not in found and port not in _given and is_free(port):
            found.add(port)
    raise ProcessTrouble(f"no {count} free ports between {_FIRST} and {end}; stop something, or choose with --port")


def consecutive_ports(base: int, count: int) -> list[int]:
    """`count` ports from `base` on. Raises `ProcessTrouble` for numbers that are no ports."""
    if not 1024 <= base <= 65536 - count:
        raise ProcessTrouble(f"--port {base}: {count} ports are needed, from 1024 to 65535")
    return list(range(base, base + count))


def require_free(port: int, what: str) -> None:
    """Raise `ProcessTrouble` when `port` is taken. `what`: who wants it."""
    if not is_free(port):
        raise ProcessTrouble(
            f"port {port}, which {what} needs, is in use; stop what listens there (see `ss -ltnp sport = :{port}`), "
            "or use another --data with another --port"
        )


def _ephemeral_start() -> int:
    try:
        return max(_FIRST + 1_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except (OSError, ValueError, IndexError):
        return 32_768
