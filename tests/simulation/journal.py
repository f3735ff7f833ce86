"""A journal on a simulated disk, its owner, and what must be there after each of its deaths."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.replication.entries import Entry
from cluster.replication.journal import (
    DurableJournal,
    JournalFailed,
    JournalHandlers,
    JournalOverrun,
    JournalSettings,
    StillFull,
)
from cluster.replication.segments import SegmentSettings, SyncFailed
from tests.simulation.disk import ManualPump, PowerLost, SimulatedDisk

SMALL = JournalSettings(
    segments=SegmentSettings(segment_bytes=6 * 1024, preallocate_bytes=4 * 1024),
    unsynced_bytes_high=16 * 1024,
    unsynced_bytes_max=64 * 1024,
)
JOURNAL_ID = bytes(range(16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a journal amounts to."""

    entries: tuple[Entry, ...] = ()
    term: int = 0
    vote: str | None = None

    @property
    def next_index(self) -> int:
        return self.entries[-1][1] + 1 if self.entries else 1


def known(journal: DurableJournal) -> Known:
    return Known(entries=tuple(journal[:]), term=journal.term, vote=journal.vote)


class Violation(AssertionError):
    """What must never be."""


class World:
    """Does as its seed says, and keeps what the journal amounted to after each change.

    It crashes when it is told to, or in the middle of what it does; `recover` then checks that the journal amounts to
    what it did after some change, not earlier than the last one that was reported durable.
    """

    def __init__(self, rng: random.Random, journal_type: type[DurableJournal] = DurableJournal) -> None:
        self.rng = rng
        self.disk = SimulatedDisk(random.Random(rng.random()))
        self._type = journal_type
        # Where all are of one size, what is left of an old record may stand where a new one is looked for.
        self.sizes = rng.choice(((0, 1, 7, 30, 100, 200, 450, 900, 1600), (400,), (475,)))
        self.history: list[Known] = [Known()]
        """After each change since it was opened."""
        self.durable = 0
        self.released = 0
        self.commit = 0
        self.resets = 0
        self.deaths = 0
        self.full = False
        self.fatal: BaseException | None = None
        self.journal: DurableJournal
        self.pump: ManualPump
        self.open()

    # Lives and deaths.

    def open(self) -> None:
        self.journal = self._type(self.disk, SMALL, new_id=lambda: JOURNAL_ID)
        self.pump = ManualPump()
        self.full = False
        self.fatal = None
        self.journal.start(
            self.pump, JournalHandlers(durable=self._durable, full=self._full, room=self._room, fatal=self._fatal)
        )

    def die(self, *, power: bool) -> None:
        """Now; or it has died already."""
        self.deaths += 1
        if power:
            self.disk.lose_power()
        else:
            self.disk.kill()

    def recover(self, *, dying: float = 0.0) -> None:
        """Open what there is, dying with that probability while doing so, and check it."""
        for _ in range(20):
            if self.rng.random() < dying:
                self.disk.crash_at = self.disk.calls + self.rng.randrange(1, 12)
            try:
                self.open()
            except (PowerLost, SyncFailed, OSError):
                self.die(power=self.rng.random() < 0.7)
                continue
            self.disk.crash_at = None
            break
        else:
            self.open()
        self.check()

    def check(self) -> None:
        """What was opened must be what was there after one of the changes that may have been the last."""
        found = known(self.journal)
        for position in range(len(self.history) - 1, self.durable - 1, -1):
            if self.history[position] == found:
                break
        else:
            raise Violation(
                f"durable: {self.durable} of {len(self.history) - 1}\nfound:   {_short(found)}\n"
                f"durable: {_short(self.history[self.durable])}\nlast:    {_short(self.history[-1])}"
            )
        if self.journal.durable_index != self.journal.last_index:
            raise Violation("what was recovered is not durable")
        if found.entries and not self.resets and self.journal.oldest_index > max(self.released, 1):
            raise Violation(
                f"entries from {self.released} on were to be kept; {self.journal.oldest_index} is the first"
            )
        if self.journal.commit_index > self.commit:
            raise Violation(f"entries up to {self.commit} were committed, not {self.journal.commit_index}")
        self.history = [found]
        self.durable = 0

    @contextlib.contextmanager
    def mortal(self) -> Iterator[None]:
        """What is done here may be cut short by its death, or refused for one of the reasons that the journal has."""
        try:
            yield
        except JournalFailed:
            if self.journal.failure is None:
                raise
        except (JournalOverrun, StillFull):
            pass

    # What is done.

    def step(self) -> None:
        """One thing, at random."""
        rng, journal, now = self.rng, self.journal, self.history[-1]
        chance = rng.random()
        with self.mortal():
            if chance < 0.50:
                for _ in range(rng.choice((1, 1, 1, 2, 5, 12))):
                    self.append()
            elif chance < 0.57 and len(now.entries) > 1:
                kept = rng.randrange(1, len(now.entries)) if rng.random() < 0.9 else 0
                self.truncate(kept)
            elif chance < 0.64:
                self.vote()
            elif chance < 0.70 and len(now.entries) > 4:
                self.compact(rng.randrange(1, len(now.entries) - 2))
            elif chance < 0.72:
                self.reset(now.next_index + rng.randrange(1, 50))
            elif chance < 0.74:
                self.commit = max(self.commit, now.next_index - 1)
                journal.note_commit(self.commit)
            elif chance < 0.90:
                self.pump.turn()
            else:
                self.pump.settle()
            if rng.random() < 0.6:
                self.pump.deliver()
        self.check_durable_index()

    def append(self) -> None:
        now = self.history[-1]
        rng = self.rng
        if not now.entries and self.journal.last_index >= self.journal.first_index:
            raise Violation("it has entries that nobody added")
        # Between entries nothing says where they start in a sector; some span several.
        command = rng.randbytes(rng.choice(self.sizes))
        index = now.next_index if now.entries else self.journal.last_index + 1
        term = max(now.term, 1)
        self.journal.append(command, index, term)
        self._changed(Known(entries=(*now.entries, (command, index, term)), term=now.term, vote=now.vote))

    def truncate(self, kept: int) -> None:
        now = self.history[-1]
        self.journal.truncate(now.entries[kept][1])
        self._changed(Known(entries=now.entries[:kept], term=now.term, vote=now.vote))

    def vote(self) -> None:
        now = self.history[-1]
        term = now.term + self.rng.choice((0, 1, 1, 3))
        vote = self.rng.choice((None, "n1", "n2", "a node with a long name"))
        self.journal.set_vote(term, vote)
        self._changed(Known(entries=now.entries, term=term, vote=vote))

    def compact(self, dropped: int) -> None:
        now = self.history[-1]
        base = now.entries[dropped][1]
        self.journal.move_base(base)
        self._changed(Known(entries=now.entries[dropped:], term=now.term, vote=now.vote))
        if self.rng.random() < 0.7:
            self.released = self.rng.randrange(self.released, base + 1) if base > self.released else self.released
            self.journal.release(min(self.released, base))

    def reset(self, index: int) -> None:
        now = self.history[-1]
        entries = tuple((self.rng.randbytes(50), at, max(now.term, 1)) for at in (index, index + 1))
        self.journal.reset(entries)
        self.resets += 1
        self._changed(Known(entries=entries, term=now.term, vote=now.vote))

    def check_durable_index(self) -> None:
        """Entries up to `durable_index` must be the same in every state that a crash can leave now."""
        journal = self.journal
        if journal.failure is not None:
            return
        index = journal.durable_index
        now = [entry for entry in self.history[-1].entries if entry[1] <= index]
        for known_ in self.history[journal.durable_position :]:
            held = {entry[1]: entry for entry in known_.entries}
            first = known_.entries[0][1] if known_.entries else 0
            if any(held.get(entry[1]) != entry for entry in now if entry[1] >= first):
                raise Violation(f"entries up to {index} are said to be durable, and may be lost")

    def _changed(self, now: Known) -> None:
        self.history.append(now)
        if known(self.journal) != now:
            raise Violation("the journal in memory is not what was done to it")
        if self.journal.position != len(self.history) - 1:
            raise Violation("positions are not changes")

    # What is told.

    def _durable(self, position: int) -> None:
        assert self.fatal is None
        self.durable = position

    def _full(self, why: str) -> None:
        assert why
        assert not self.full
        self.full = True

    def _room(self) -> None:
        assert self.full
        self.full = False

    def _fatal(self, error: BaseException) -> None:
        assert self.fatal is None
        self.fatal = error


def live(seed: int, journal_type: type[DurableJournal] = DurableJournal, *, steps: int = 60) -> World:
    """A life of a journal, with several deaths in it. Raises `Violation`, and whatever the journal should not."""
    rng = random.Random(seed)
    world = World(rng, journal_type)
    for _ in range(steps):
        if rng.random() < 0.10:
            world.disk.crash_at = world.disk.calls + rng.randrange(1, 15)
        if rng.random() < 0.05:
            world.disk.room = world.disk.sectors_used() * 512 + rng.choice((0, 512, 5000))
        elif rng.random() < 0.3:
            world.disk.room = None
        if rng.random() < 0.02:
            world.disk.fail_at[world.disk.calls + rng.randrange(1, 9)] = 5
        world.step()
        if world.journal.failure is not None or rng.random() < 0.05:
            # What has been reported, but not been heard, does not count.
            world.die(power=rng.random() < 0.6)
            world.disk.room = None
            world.recover(dying=0.3)
        elif rng.random() < 0.02:
            world.disk.room = None
            with world.mortal():
                world.journal.close()
                world.durable = len(world.history) - 1
            world.die(power=rng.random() < 0.6)
            world.recover(dying=0.3)
    world.disk.room = None
    world.disk.crash_at = None
    world.disk.fail_at.clear()
    if world.journal.failure is None:
        world.pump.settle()
        if world.durable != len(world.history) - 1 or world.full:
            raise Violation("with room and time, all should have become durable")
    world.die(power=True)
    world.recover()
    return world


def _short(state: Known) -> str:
    entries = [(index, term, len(command), command[:2].hex()) for command, index, term in state.entries]
    return f"term {state.term} vote {state.vote} {entries}"
