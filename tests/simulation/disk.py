"""A disk in memory that loses power, forgets, fills up and fails, all of it as its seed says.

Each file is a map of sectors. A write changes what readers see; what is on the platter changes with a sync. When the
power goes, each sector that was written since holds what it held before or any state that it had since, whatever its
neighbours do, and each name that was created, renamed or removed since is so or is not. A process that is only killed
loses nothing but the rest of the call it was in. A sync that fails marks as clean what it could not write.
"""

import asyncio
import contextlib
import errno
import os
import random
from collections.abc import Callable

from cluster.replication.disk import File, FolderLocked

SECTOR = 512
_ZEROS = bytes(SECTOR)


class PowerLost(OSError):
    """This process is no more; the disk answers again after `restart`."""


class _Inode:
    def __init__(self) -> None:
        self.sectors: dict[int, bytes] = {}
        """What readers see; zeros where there is nothing."""
        self.size = 0
        self.platter: dict[int, bytes] = {}
        """What is on disk, of the sectors for which that is not what readers see."""
        self.platter_size = 0
        self.dirty: dict[int, list[bytes]] = {}
        """The states that each sector has been in since it was last synced."""

    def put(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        at = offset
        while at < end:
            number, within = divmod(at, SECTOR)
            count = min(SECTOR - within, end - at)
            before = self.sectors.get(number, _ZEROS)
            now = before[:within] + data[at - offset : at - offset + count] + before[within + count :]
            self.platter.setdefault(number, before)
            self.dirty.setdefault(number, []).append(now)
            self.sectors[number] = now
            at += count
        self.size = max(self.size, end)

    def sync(self) -> None:
        for number in self.dirty:
            del self.platter[number]
        self.dirty.clear()
        self.platter_size = self.size

    def fail_to_sync(self, unit: int) -> None:
        """All is clean now, and not on disk."""
        self.dirty.clear()

    def lose_power(self, rng: random.Random) -> None:
        luck = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        size = self.platter_size
        for number, before in self.platter.items():
            states = self.dirty.get(number)
            if states is not None and rng.random() < luck:
                self.sectors[number] = states[-1] if rng.random() < 0.7 else rng.choice(states)
                size = max(size, min(self.size, (number + 1) * SECTOR))
            else:
                self.sectors[number] = before
        for number in [number for number in self.sectors if number * SECTOR >= size]:
            del self.sectors[number]
        self.size = self.platter_size = size
        self.platter.clear()
        self.dirty.clear()


class SimulatedFile:
    def __init__(self, disk: "SimulatedDisk", name: str, inode: _Inode) -> None:
        self._disk = disk
        self._life = disk.life
        self._name = name
        self._inode = inode
        self.closed = False

    def _call(self, what: str, effect: Callable[[], None], partly: Callable[[int], None] | None = None) -> None:
        assert not self.closed, f"{self._name} is closed"
        if self._life != self._disk.life:
            raise PowerLost
        self._disk.call(what, self._name, effect, partly)

    def size(self) -> int:
        self._call("size", _nothing)
        return self._inode.size

    def read(self, offset: int, size: int) -> bytes:
        self._call("read", _nothing)
        inode = self._inode
        end = min(offset + size, inode.size)
        first, last = offset // SECTOR, -(-end // SECTOR)
        content = b"".join([inode.sectors.get(number, _ZEROS) for number in range(first, last)])
        return content[offset - first * SECTOR : end - first * SECTOR]

    def write(self, offset: int, data: bytes) -> None:
        def whole() -> None:
            room = self._disk.room
            if room is not None:
                new = {at // SECTOR for at in range(offset, offset + len(data), SECTOR)} | {
                    (offset + len(data) - 1) // SECTOR
                }
                new -= self._inode.sectors.keys()
                free = max(room // SECTOR - self._disk.sectors_used(), 0)
                if len(new) > free:
                    fits = sorted(new)[free] * SECTOR - offset
                    if fits > 0:
                        self._inode.put(offset, data[:fits])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._inode.put(offset, data)

        def partly(unit: int) -> None:
            # Up to a boundary of so many bytes in the file. Within a sector a write is not interrupted.
            if offset // SECTOR == (offset + len(data) - 1) // SECTOR:
                return
            end = offset + self._disk.rng.randrange(len(data) + 1)
            end -= end % unit
            if end > offset:
                self._inode.put(offset, data[: end - offset])

        self._call("write", whole, partly)

    def sync(self) -> None:
        self._call("sync", self._inode.sync, self._inode.fail_to_sync)

    def close(self) -> None:
        self.closed = True


class SimulatedDisk:
    """One folder. `calls` counts what has been asked of it; the attributes below it say what goes wrong, and when."""

    def __init__(self, rng: random.Random, *, where: str = "/simulated") -> None:
        self.rng = rng
        self.life = 0
        self.calls = 0
        self.crash_at: int | None = None
        """The number of the call in which the process dies."""
        self.fail_at: dict[int, int] = {}
        """By the number of the call: the errno with which it fails."""
        self.room: int | None = None
        """In bytes; None: endless."""
        self.history: list[tuple[str, str]] = []
        self._where = where
        self._names: dict[str, _Inode] = {}
        self._platter: dict[str, _Inode] = {}
        self._pending: list[list[tuple[str, _Inode | None]]] = []
        """What has happened to names since the last sync, in order: what they stand for now."""
        self._locked: int | None = None
        self._dead = False

    # What happens to it.

    def kill(self) -> None:
        """The process dies, the system under it does not."""
        self.crash_at = None
        self._dead = False
        self.life += 1

    def lose_power(self) -> None:
        """All of it dies."""
        self.kill()
        inodes = [*self._names.values(), *self._platter.values()]
        inodes += [inode for changes in self._pending for _name, inode in changes if inode is not None]
        for inode in dict.fromkeys(inodes):
            inode.lose_power(self.rng)
        luck = self.rng.choice((0.0, 0.5, 1.0))
        names = dict(self._platter)
        for changes in self._pending:
            if self.rng.random() < luck:
                for change in changes:
                    _link(names, *change)
        self._names, self._platter = names, dict(names)
        self._pending = []

    def flip(self, name: str, offset: int, mask: int) -> None:
        """Some bits of a byte, on disk and in memory."""
        inode = self._names[name]
        number, within = divmod(offset, SECTOR)
        sector = bytearray(inode.sectors.get(number, _ZEROS))
        sector[within] ^= mask
        inode.sectors[number] = bytes(sector)

    def content(self, name: str) -> bytes:
        """What a reader would see, without a call."""
        inode = self._names[name]
        count = -(-inode.size // SECTOR)
        return b"".join([inode.sectors.get(number, _ZEROS) for number in range(count)])[: inode.size]

    def put(self, name: str, content: bytes) -> None:
        """A durable file, without a call."""
        inode = _Inode()
        inode.put(0, content)
        inode.sync()
        self._names[name] = self._platter[name] = inode

    def remove(self, name: str) -> None:
        """Durably, without a call."""
        del self._names[name]
        self._platter.pop(name, None)

    def copy(self) -> "SimulatedDisk":
        """What is on it, on another one that nobody uses."""
        other = SimulatedDisk(random.Random(self.rng.random()), where=self._where)
        for name in self._names:
            other.put(name, self.content(name))
        return other

    def sectors_used(self) -> int:
        return sum(len(inode.sectors) for inode in self._names.values())

    def call(
        self, what: str, name: str, effect: Callable[[], None], partly: Callable[[int], None] | None = None
    ) -> None:
        """Do it, unless something goes wrong."""
        if self._dead:
            raise PowerLost
        self.calls += 1
        self.history.append((what, name))
        if self.calls == self.crash_at:
            self._dead = True
            chance = self.rng.random()
            if chance < 0.4:
                with contextlib.suppress(OSError):
                    effect()
            elif chance < 0.8 and what == "write" and partly is not None:
                partly(1)
            raise PowerLost
        number = self.fail_at.pop(self.calls, None)
        if number is not None:
            if partly is not None:
                partly(SECTOR)
            raise OSError(number, os.strerror(number))
        effect()

    # Disk.

    def where(self, name: str = "") -> str:
        return f"{self._where}/{name}" if name else self._where

    def lock(self) -> None:
        if self._locked == self.life:
            raise FolderLocked(self._where)
        self._locked = self.life

    def unlock(self) -> None:
        if self._locked == self.life:
            self._locked = None

    def names(self) -> list[str]:
        self.call("names", "", _nothing)
        return sorted(self._names)

    def create(self, name: str) -> File:
        inode = _Inode()
        self._change("create", name, [(name, inode)])
        return SimulatedFile(self, name, inode)

    def open(self, name: str) -> File:
        self.call("open", name, _nothing)
        return SimulatedFile(self, name, self._names[name])

    def rename(self, old: str, new: str) -> None:
        self._change("rename", new, [(new, self._names.get(old)), (old, None)])

    def unlink(self, name: str) -> None:
        self._change("unlink", name, [(name, None)])

    def sync_names(self) -> None:
        def synced() -> None:
            self._platter = dict(self._names)
            self._pending = []

        self.call("sync_names", "", synced)

    def free_bytes(self) -> int:
        return 2**40 if self.room is None else self.room - self.sectors_used() * SECTOR

    def _change(self, what: str, name: str, changes: list[tuple[str, _Inode | None]]) -> None:
        def changed() -> None:
            for change in changes:
                _link(self._names, *change)
            self._pending.append(changes)

        self.call(what, name, changed)


class ManualPump:
    """Rounds and reports when a test says so."""

    def __init__(self) -> None:
        self.round: Callable[[], float | None] | None = None
        self.woken = False
        self.posted: list[Callable[[], None]] = []

    def start(self, round_: Callable[[], float | None]) -> None:
        self.round = round_
        self.woken = True

    def wake(self) -> None:
        self.woken = True

    def post(self, callback: Callable[[], None]) -> None:
        self.posted.append(callback)

    def stop(self) -> None:
        self.round = None

    def turn(self) -> float | None:
        """One round."""
        assert self.round is not None
        self.woken = False
        return self.round()

    def deliver(self) -> None:
        """What has been reported."""
        posted, self.posted = self.posted, []
        for callback in posted:
            callback()

    def settle(self, limit: int = 100) -> None:
        """Rounds and reports until there is nothing to do, or only time will help."""
        for _ in range(limit):
            delay_s = self.turn()
            self.deliver()
            if delay_s != 0 and not self.woken:
                return
        raise AssertionError("it never ends")


class VirtualPump:
    """Rounds under virtual time: each begins when it is asked for, and what it has done is there `delay_s()` later.

    Until then what comes waits for the next round, as on a real disk. A node that dies stops its pump first.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, delay_s: Callable[[], float]) -> None:
        self._loop = loop
        self._delay_s = delay_s
        self._round: Callable[[], float | None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rests = False
        """Whether the timer is of a round that nobody has asked for yet."""

    def start(self, round_: Callable[[], float | None]) -> None:
        self._round = round_
        self.wake()

    def wake(self) -> None:
        if self._rests and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and self._round is not None:
            self._rests = False
            self._timer = self._loop.call_later(self._delay_s(), self._go)

    def post(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon(callback)

    def stop(self) -> None:
        self._round = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go(self) -> None:
        self._timer = None
        if self._round is None:
            return
        delay_s = self._round()
        if delay_s is not None and self._timer is None:
            self._rests = delay_s > 0
            self._timer = self._loop.call_later(delay_s + self._delay_s(), self._go)


def _link(names: dict[str, _Inode], name: str, inode: _Inode | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


def _nothing() -> None:
    pass
