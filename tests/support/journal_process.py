"""A process that appends to a journal as fast as its disk lets it, and says what is durable, until it is killed.

Entry i holds a command that follows from i and its term, so that a reader can check it. Now and then it replaces its
last entries, votes, compacts, and starts new segments. It says "<first> <last> <term>" when it has opened the journal,
and then, each time something has become durable, "<durable index> <term that was voted in>".
"""

import asyncio
import random
import sys
from pathlib import Path

from cluster.replication.journal import DurableJournal, JournalHandlers, JournalSettings, open_journal
from cluster.replication.pump import ThreadPump
from cluster.replication.segments import SegmentSettings

SETTINGS = JournalSettings(
    segments=SegmentSettings(segment_bytes=64 * 1024, preallocate_bytes=16 * 1024),
    unsynced_bytes_high=32 * 1024,
    unsynced_bytes_max=1024 * 1024,
)
KEPT = 2000
WINDOW = 64


def command(index: int, term: int) -> bytes:
    """What entry `index` of `term` holds."""
    return random.Random(index * 1_000_003 + term).randbytes(20 + index * 7 % 400)


def votes(term: int) -> str:
    """Whom the node votes for in this term."""
    return f"n{term % 3}"


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Writer:
    def __init__(self, journal: DurableJournal, rng: random.Random) -> None:
        self._journal = journal
        self._rng = rng
        self._open = 0

    def go(self) -> None:
        journal, rng = self._journal, self._rng
        while self._open < WINDOW:
            chance = rng.random()
            if chance < 0.01 and journal.last_index > journal.durable_index >= journal.first_index:
                # Nothing that was said to be durable may go, as in Raft nothing committed may.
                journal.truncate(max(journal.durable_index + 1, journal.last_index - 5))
            elif chance < 0.02:
                journal.set_vote(journal.term + 1, votes(journal.term + 1))
            elif len(journal) > KEPT:
                journal.move_base(journal.durable_index - KEPT // 2)
                journal.release(journal.first_index - 200)
            index = journal.last_index + 1
            journal.append(command(index, journal.term), index, journal.term)
            self._open += 1
            journal.after(journal.position, lambda term=journal.term: self._written(term))  # type: ignore[misc]

    def _written(self, term: int) -> None:
        self._open -= 1
        if self._open == 0:
            say(self._journal.durable_index, term)
            self.go()


async def main() -> None:
    journal = open_journal(Path(sys.argv[1]), SETTINGS)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    pump = ThreadPump(asyncio.get_running_loop(), "journal")
    handlers = JournalHandlers(durable=lambda _position: None, full=print, room=lambda: None, fatal=ended.set_exception)
    say(journal.first_index, journal.last_index, journal.term)
    journal.start(pump, handlers)
    if not len(journal):
        journal.set_vote(1, votes(1))
    Writer(journal, random.Random(journal.last_index)).go()
    await ended


if __name__ == "__main__":
    asyncio.run(main())
