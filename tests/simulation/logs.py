"""What the program logs during a run: lines of its trace, and defects where no fault explains them."""

import logging
import re
from typing import Any, Final

from cluster.replication.journal import JournalFailed
from cluster.replication.segments import DiskFull, SyncFailed
from participants.manager import Unavailable
from tests.simulation.machines import LIFE

_ROOTS: Final = ("coordinator", "cluster", "participants", "aiohttp", "asyncio")

_EXPLAINED: Final = re.compile(
    r"this node must stop|takes no part until there is room|no room (for a snapshot|in /|to note)"
    r"|the journal has failed; this process must end|closed a journal that has failed"
    r"|^a batch of \d+ is unknown|^/(prepare|commit|abort|batch|branches): "
)
"""Errors that may follow from the faults that there are: they do if whatever exception they tell of does."""

_OF_FAULTS: Final = (OSError, DiskFull, SyncFailed, JournalFailed, Unavailable)
"""A disk, a network or a participant that fails ends in one of these. No other may stop a node, or end its work."""


def follows_from_faults(error: BaseException) -> bool:
    """Whether there are faults that end in this; without them it is a defect."""
    return isinstance(error, _OF_FAULTS)


class Log(logging.Handler):
    """In place of all other handlers, while it is entered."""

    def __init__(self, world: Any) -> None:
        super().__init__(logging.INFO if world.tracing else logging.ERROR)
        self._world = world
        self._before: list[tuple[logging.Logger, list[logging.Handler], int, bool]] = []

    def __enter__(self) -> "Log":
        for root in _ROOTS:
            logger = logging.getLogger(root)
            self._before.append((logger, logger.handlers, logger.level, logger.propagate))
            logger.handlers, logger.propagate = [self], False
            logger.setLevel(self.level)
        return self

    def __exit__(self, *_: object) -> None:
        for logger, handlers, level, propagate in self._before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        life = LIFE.get()
        if life is not None and not life.alive:
            return
        who = "?" if life is None else life.machine.name
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text += f" [{error!r}]"
        self._world.note(who, f"log {record.levelname.lower()}: {text}")
        if record.levelno < logging.ERROR:
            return
        told = [error] if error is not None else []
        if isinstance(record.args, tuple):
            told += [one for one in record.args if isinstance(one, BaseException)]
        if not _EXPLAINED.search(record.getMessage()) or not all(follows_from_faults(one) for one in told):
            self._world.defect(f"{who} logs: {text}")
