"""Whose a connection on loopback is: the kernel's list of sockets has its inode, as the process's open files do."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_SOCKETS: Final = Path("/proc/net/tcp")
_LOCAL, _REMOTE, _INODE = 1, 2, 9


def owner(pids: Mapping[str, int | None], port: int, peer_port: int) -> str | None:
    """Who of `pids` holds the end at `port` of the connection with `peer_port`; None: none of them."""
    inode = _inode(port, peer_port)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    for name, pid in pids.items():
        if pid is not None and wanted in _open_files(pid):
            return name
    return None


def _inode(port: int, peer_port: int) -> str | None:
    for line in _SOCKETS.read_text().splitlines()[1:]:
        fields = line.split()
        ends = [int(fields[place].rpartition(":")[2], 16) for place in (_LOCAL, _REMOTE)]
        if ends == [port, peer_port]:
            return fields[_INODE]
    return None


def _open_files(pid: int) -> set[str]:
    found = set()
    try:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found.add(os.readlink(each))
            except OSError:
                continue  # closed while we looked
    except OSError:
        pass  # the process is gone, and its connections with it
    return found
