"""Reads a node's folder while the node does not run: what is known there to be committed, and nothing beyond.

The last entries of a log may not be committed; then another leader may have put others in their place, and told clients
and participants of those. A journal notes from time to time up to where everything is committed, a snapshot holds
nothing else, and only so far is read here. What is lost by that is at most what the last moments before the end
brought, and whoever goes on from here has to ask around for what came after it anyway.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from cluster.replication import standing
from cluster.replication.raft_journal import RaftJournal, file_journal
from cluster.replication.snapshot import Snapshots, recover

_REGULAR: Final = 0
"""The first byte of commands that were proposed, as `raft.py` has it; the others are for itself."""


class Readable(Protocol):
    """The part of a state machine that reading needs."""

    def apply(self, command: bytes) -> object:
        """See `log.StateMachine`."""
        ...

    def restore(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        """See `log.StateMachine`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """What was found. Entries of the log up to `committed` were applied, of those up to `last` that there are.

    term: the node's. voter: False for one that was coming back empty, and counts for nothing.
    """

    committed: int
    last: int
    term: int
    voter: bool


def has_log(folder: Path) -> bool:
    """Whether a node has ever kept a log there."""
    return any(folder.glob("*.segment"))


def read_committed(folder: Path, machine: Readable) -> Offline:
    """Apply all that is known to be committed to `machine`, which is empty. Blocks.

    A torn end is repaired, as a start of the node would do; nothing else changes. Raises `CannotStart` (the node runs,
    the journal is damaged, ...), OSError, and what the machine raises.
    """
    return committed_of(file_journal(folder)(), machine)


def committed_of(journal: RaftJournal, machine: Readable) -> Offline:
    """The same with a journal that is open already, and is closed by this."""
    try:
        marker = standing.load(journal.disk)
        found = recover(Snapshots(journal.disk), journal, machine.restore)
        index = 0
        if found is not None:
            snapshot, put = found
            put()
            index = snapshot.index
        first = journal.first_index
        committed = max(index, min(journal.getRaftCommitIndex(), journal.last_index))
        for position in range(max(index + 1, first), committed + 1):
            command: bytes = journal[position - first][0]
            if command[:1] == bytes([_REGULAR]):
                machine.apply(command[1:])
        return Offline(
            committed=committed,
            last=journal.last_index,
            term=journal.getCurrentTerm(),
            voter=marker is None or marker.voter,
        )
    finally:
        journal.close()
