"""A `DurableJournal` as pysyncobj sees it: a list of (command, index, term), and the node's term and vote.

pysyncobj believes that what a method has changed is on disk when it returns. It is not: the journal's writer brings it
there a little later. What lies between the two is kept from becoming a lie elsewhere: `holdback.py` keeps words that
speak of what is not durable yet, and a leader counts itself only up to `durable_index`.

The first entry of every log is one that does nothing, with index 1 and term 0. Once a snapshot has taken the place of
older entries, the log begins with the entry that the snapshot ends with: Raft compares it, nobody is sent it.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cluster.replication.disk import Disk, RealDisk
from cluster.replication.entries import Entry
from cluster.replication.journal import DurableJournal, JournalFailed, JournalHandlers, JournalSettings
from cluster.replication.pump import Pump, ThreadPump
from cluster.replication.segments import JournalRefused

_log = logging.getLogger(__name__)

_FIRST_INDEX: Final = 1


class RaftJournal:
    """See the module's text. The methods with capitals inside are pysyncobj's; `disk` is where the journal lives."""

    def __init__(self, disk: Disk, journal: DurableJournal, make_pump: Callable[[], Pump]) -> None:
        self.disk = disk
        self.log = journal.log
        """The log in memory, to look at."""
        self._journal = journal
        self._make_pump = make_pump
        self._term_position = 0

    def start(self, handlers: JournalHandlers) -> None:
        """Let the writer begin. On the event loop."""
        self._journal.start(self._make_pump(), handlers)

    def close(self) -> None:
        """Sync what can be synced, and release the folder. Blocks."""
        try:
            self._journal.close()
        except JournalFailed as error:
            # Whoever is told of a failure ends the process; who stops at the same moment needs no other end.
            _log.error("closed a journal that has failed: %s", error.__cause__)

    # What is durable.

    @property
    def position(self) -> int:
        """How many changes have been made since it was opened."""
        return self._journal.position

    @property
    def term_position(self) -> int:
        """Up to which change the term and the vote of now are told."""
        return self._term_position

    @property
    def durable_position(self) -> int:
        """How many changes are on disk."""
        return self._journal.durable_position

    @property
    def durable_index(self) -> int:
        """The last entry of which it and all before it are on disk."""
        return self._journal.durable_index

    @property
    def unsynced_bytes(self) -> int:
        """How much waits for the disk."""
        return self._journal.unsynced_bytes

    @property
    def congested(self) -> bool:
        """Whether that is so much that no more should be taken."""
        return self._journal.congested

    @property
    def full(self) -> str | None:
        """Why nothing becomes durable at present: the disk has no room."""
        return self._journal.full

    # The log.

    @property
    def is_new(self) -> bool:
        """Whether there was no journal before this one was opened."""
        return self._journal.is_new

    @property
    def has_log(self) -> bool:
        """Whether there is any entry: the first one is there before a node does anything."""
        return len(self._journal) > 0

    @property
    def has_history(self) -> bool:
        """Whether it has been in a term, or has got any entry but the first."""
        return self._journal.term > 0 or (self.has_log and self._journal.last_index > _FIRST_INDEX)

    @property
    def first_index(self) -> int:
        """The log's first entry."""
        return self._journal.first_index

    @property
    def last_index(self) -> int:
        """The log's last entry."""
        return self._journal.last_index

    @property
    def oldest_index(self) -> int:
        """The first entry that `rebase` could make the log start with."""
        return self._journal.oldest_index

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`, None where the log has none."""
        return self._journal.term_at(index)

    def rebase(self, index: int) -> bool:
        """At start: let the log begin at `index`. False if it does not reach there."""
        return self._journal.rebase(index)

    def reset(self, entry: Entry) -> None:
        """Let this entry be the log, in place of all others."""
        self._journal.reset([entry])

    def move_base(self, index: int) -> None:
        """Let the log start at `index`, which it has; what was before it stays on disk until `release`."""
        self._journal.move_base(index)

    def release(self, index: int) -> None:
        """No snapshot in use needs entries before `index`."""
        self._journal.release(index)

    # What pysyncobj asks.

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append one entry."""
        self._journal.append(command, idx, term)

    def clear(self) -> None:
        """Its own way to install a snapshot, which a crash can cut in two: never called."""
        raise NotImplementedError("a log is replaced by `reset`")

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Keep only the first `entryFrom` entries."""
        if entryFrom < len(self._journal):
            self._journal.truncate(self._journal.first_index + entryFrom)

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Its own way to compact: never called."""
        raise NotImplementedError("a log is compacted by `move_base`")

    def __getitem__(self, item: Any) -> Any:
        """An entry by position, or a list of them by slice."""
        return self._journal[item]

    def __len__(self) -> int:
        return len(self._journal)

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Take note of what is committed; it need not be durable."""
        self._journal.note_commit(raftCommitIndex)

    def getRaftCommitIndex(self) -> int:
        """What is known to be committed; never more than is in the log, and at least its first entry."""
        return max(self._journal.commit_index, self._journal.first_index)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Begin a term, or vote in it."""
        self._journal.set_vote(term, votedForNodeId)
        self._term_position = self._journal.position

    def getCurrentTerm(self) -> int:
        """The term last begun, 0 if none."""
        return self._journal.term

    def getVotedForNodeId(self) -> str | None:
        """The vote in it."""
        return self._journal.vote

    def onOneSecondTimer(self) -> None:
        """Nothing is done once a second."""

    def _destroy(self) -> None:
        """Files are released by `close`, which blocks."""


JournalFactory = Callable[[], RaftJournal]
"""Opens a journal; called once, on a thread of its own, for it may read much. Raises `JournalRefused`, OSError."""


def file_journal(folder: Path, settings: JournalSettings | None = None) -> JournalFactory:
    """The journal in `folder`, written by a thread of its own that reports to the event loop."""

    def opened() -> RaftJournal:
        old = folder / "journal.bin"
        if old.exists():
            raise JournalRefused(f"{old} is of an Outlast that was never released; move {folder} away, or remove it")
        disk = RealDisk(folder)
        return RaftJournal(
            disk,
            DurableJournal(disk, settings),
            lambda: ThreadPump(asyncio.get_running_loop(), f"journal of {folder.name}"),
        )

    return opened
