"""Whose data a folder holds: a cluster that was made anew from a copy is another one than it was.

Nodes of the old one may come back to life: a disk is found again, a machine is reached again. They remember what the
new cluster has lost, or what it has decided otherwise, and must not take part in it. So a cluster has a *generation*:
1, and one more whenever it is made anew (`outlast recover`). It is part of what nodes prove to each other when they
connect, so nodes of two generations never speak; and a node's folder says of which it is, so that old data under a new
configuration is refused as well.
"""

import os
from pathlib import Path
from typing import Final

from cluster.replication.log import CannotStart
from coordinator.config import NodeConfig

_FILE: Final = "generation"


def identity(config: NodeConfig) -> str:
    """What nodes of one generation of a cluster call it among themselves."""
    return config.cluster if config.generation == 1 else f"{config.cluster}, generation {config.generation}"


def claim(config: NodeConfig) -> None:
    """Make sure that the node's folder is empty, or of its generation; then it is. Raises `CannotStart`, OSError."""
    file = config.data / _FILE
    found = _found(file)
    if found is None and not any((config.data / "log").glob("*")):
        if config.generation > 1:
            _write(file, config.generation)
        return
    if (found or 1) != config.generation:
        raise CannotStart(
            f"{config.data} is of generation {found or 1} of the cluster {config.cluster}, and this node is configured "
            f"for generation {config.generation}: they do not mix. Keep the old folder away, and start the node with "
            "an empty one (docs/RECOVERY.md)"
        )


def of_folder(data: Path) -> int:
    """The generation of what is in a node's folder. Raises `CannotStart`, OSError."""
    return _found(data / _FILE) or 1


def _found(file: Path) -> int | None:
    try:
        text = file.read_text("ascii").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = ""
    if not text.isdigit() or len(text) > 6:
        raise CannotStart(f"{file} should hold the generation of the data beside it, a number, and does not")
    return int(text)


def _write(file: Path, generation: int) -> None:
    draft = file.with_suffix(".partial")
    with draft.open("w") as out:
        out.write(f"{generation}\n")
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
