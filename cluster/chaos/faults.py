"""Carries the plan out: begins each fault at its time, makes sure that it did happen, and ends it."""

import asyncio
import random
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cluster.chaos.history import Recorder
from cluster.chaos.node import has_seen, set_clock
from cluster.chaos.plan import Fault
from cluster.chaos.stage import APPLICATION, CLIENTS, LEDGER, ON_SERVER, SERVER, Stage, well
from cluster.process import ProcessTrouble
from cluster.replication.disk import RealDisk
from cluster.replication.standing import load

_START_TRIES: Final = 20
_AGAIN_S: Final = 1.0
_FREE_S: Final = 60.0
"""Until somebody is well to whom a fault can happen."""

_LEADER_S: Final = 1.0
_REJOIN_S: Final = 120.0
_SERVER_S: Final = 60.0
_RECOVERY_S: Final = 8.0
"""Recovery here is a matter of milliseconds. PostgreSQL 18 was seen to wait for ever when its startup process had found
no room, although there was some again."""

_URGES: Final = 0.5
_LOOK_S: Final = 0.05
_SEEN_S: Final = 6.0
"""Nodes that lead look at their calendar with every transaction, and with their housekeeping."""

Undo = Callable[[], Awaitable[None]]


class Nemesis:
    """What goes wrong at `stage`. tell: hears of every fault, in words.

    busy: who is impaired at the moment. lost: whose disk is lost, and does not count again yet. Of three nodes one may
    be so at a time: what two had may be gone for good.
    """

    def __init__(
        self, stage: Stage, recorder: Recorder, plan: Sequence[Fault], seed: int, tell: Callable[[str], None]
    ) -> None:
        self.plan = plan
        self._tell = tell
        self._stage = stage
        self._recorder = recorder
        self._rng = random.Random(f"targets {seed}")
        self.busy: set[str] = set()
        self.lost: str | None = None
        self._choosing = asyncio.Lock()

    async def run(self, began_s: float) -> None:
        """Everything that is planned; on return all of it has ended. `began_s`: of the load, as the recorder counts.

        Should it be cut short, what has begun is undone all the same.
        """
        for fault in self.plan:
            self._recorder.note(
                "planned", fault=fault.number, kind=fault.kind, target=fault.target, due=fault.due_s, for_s=fault.for_s
            )
        async with asyncio.TaskGroup() as group:
            for fault in self.plan:
                await asyncio.sleep(max(0.0, began_s + fault.due_s - self._recorder.now_s))
                group.create_task(self._one(fault))

    async def _one(self, fault: Fault) -> None:
        until_s = self._recorder.now_s + _FREE_S
        while (target := await self._choose(fault)) is None:
            if fault.kind == "lose" and self.lost is not None:
                # Who comes back has its own time for it, which is longer; should that be over, the run ends.
                until_s = self._recorder.now_s + _FREE_S
            if self._recorder.now_s > until_s:
                self._note(fault, fault.target, fired=False, detail="everyone was impaired already")
                return
            await asyncio.sleep(0.1)
        undo: Undo | None = None
        try:
            undo = await self._begin(fault, target)
            await asyncio.sleep(fault.for_s)
        finally:
            if undo is not None:
                # Also when the run is broken off: nothing may stay as it is.
                await asyncio.shield(undo())
            self.busy.discard(target)
            self._recorder.note("ended", fault=fault.number, kind=fault.kind, target=target)

    def _note(
        self,
        fault: Fault,
        target: str,
        *,
        fired: bool,
        detail: str,
        parts: Sequence[str] = (),
        links: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._tell(f"{fault.kind} {target}: {detail}")
        self._recorder.note(
            "began",
            fault=fault.number,
            kind=fault.kind,
            target=target,
            parts=[*parts],
            links=[[*link] for link in links],
            fired=fired,
            detail=detail,
        )

    async def _choose(self, fault: Fault) -> str | None:
        """Who it is, now: nobody else's from here on."""
        async with self._choosing:
            target = await self._target(fault)
            if target is not None:
                self.busy.add(target)
                if fault.kind == "lose":
                    self.lost = target
            return target

    async def _target(self, fault: Fault) -> str | None:
        """Who it is, now; somebody else of the same sort when that one is impaired already."""
        nodes = self._stage.cluster.nodes
        if fault.kind == "lose" and self.lost is not None:
            return None
        if fault.target in (*self._stage.servers, *self._stage.disks, APPLICATION, CLIENTS):
            absent = fault.target == APPLICATION and not self._stage.process(APPLICATION).alive
            return None if absent or fault.target in self.busy else fault.target
        if fault.target in self._stage.services:
            return next(iter(well([fault.target, *self._stage.services], self.busy)), None)
        leader = await self._leader()
        free = well(nodes, self.busy)
        if fault.target == "leader" and leader in free:
            return leader
        if fault.kind == "clock":
            return None  # others never look at theirs: wait until one that is well leads
        others = [node for node in free if node != leader] or free
        return self._rng.choice(others) if others else None

    async def _leader(self) -> str | None:
        try:
            async with asyncio.timeout(_LEADER_S):
                found = await self._stage.cluster.leader()
        except TimeoutError:
            return None
        return None if found is None else found.node

    async def _begin(self, fault: Fault, target: str) -> Undo:
        match fault.kind:
            case "kill":
                return await self._kill(fault, target)
            case "lose":
                return await self._lose(fault, target)
            case "pause":
                return self._pause(fault, target)
            case "cut" | "slow":
                return await self._links(fault, target)
            case "disk":
                return await self._disk(fault, target)
            case _:
                return self._clock(fault, target)

    # -------------------------------------------------------------------------------------------- processes

    async def _kill(self, fault: Fault, target: str) -> Undo:
        stage = self._stage
        if target in stage.servers:
            server = stage.servers[target]
            ran = server.pid is not None
            await server.kill()
            parts = [target, ON_SERVER, LEDGER]
            self._note(fault, target, parts=parts, fired=ran, detail="kill -9 of the server and its children")
            return server.start
        pid = stage.process(target).pid
        if target == APPLICATION:
            # Not waited for: whoever follows it starts it again, and there would be another one by then.
            identity = stage.process(target).identity
            ran = identity is not None and identity.signal(signal.SIGKILL)
        elif target in stage.services:
            ran = await stage.services[target].kill()
        else:
            ran = await stage.cluster.kill(target)
        self._note(fault, target, parts=[target], fired=ran, detail=f"kill -9 of {pid}")
        return lambda: self._start(target)

    async def _lose(self, fault: Fault, target: str) -> Undo:
        """The node dies, and its disk with it; it comes back empty, and is caught up."""
        cluster = self._stage.cluster
        pid = cluster.process(target).pid
        ran = await cluster.kill(target)
        folder = next(config.data for config in cluster.configs if config.node == target)
        gone = await asyncio.to_thread(_empty, folder)
        detail = f"kill -9 of {pid}, and its folder with {gone} files is lost"
        self._note(fault, target, parts=[target], fired=ran and gone > 0, detail=detail)

        async def rejoin() -> None:
            began_s = self._recorder.now_s
            await self._start(target, rejoin=True)
            while (status := await cluster.status(target)) is None or not _counts(status):
                if self._recorder.now_s > began_s + _REJOIN_S:
                    raise ProcessTrouble(f"{target} does not count again {_REJOIN_S:g} s after it lost its disk")
                await asyncio.sleep(_LOOK_S)
            self.lost = None
            after_s = round(self._recorder.now_s - began_s, 2)
            self._recorder.note("rejoined", fault=fault.number, node=target, after_s=after_s)
            self._tell(f"{target} counts again, {after_s:.1f} s after it came back empty")

        return rejoin

    async def _start(self, target: str, *, rejoin: bool = False) -> None:
        """Start it again, on its data, or empty. Raises `ProcessTrouble` when it will not."""
        if target == APPLICATION:
            return  # whoever follows it starts it again
        for tries in range(1, _START_TRIES + 1):
            try:
                if target in self._stage.services:
                    await self._stage.services[target].start()
                else:
                    await self._stage.cluster.start_node(target, rejoin=rejoin and not self._has_standing(target))
            except ProcessTrouble as error:
                # A database server that is down, too, keeps its service from starting.
                if tries == _START_TRIES or self._stage.process(target).alive:
                    raise
                self._recorder.note("note", text=f"{target} did not start: {error}")
                await asyncio.sleep(_AGAIN_S)
            else:
                return

    def _has_standing(self, node: str) -> bool:
        """Whether it has begun to rejoin: from then on its folder says so, and it is started like any other."""
        folder = next(config.data for config in self._stage.cluster.configs if config.node == node) / "log"
        return folder.exists() and load(RealDisk(folder)) is not None

    def _pause(self, fault: Fault, target: str) -> Undo:
        process = self._stage.process(target)
        process.pause()
        self._note(fault, target, parts=[target], fired=process.paused, detail=f"SIGSTOP of {process.pid}")

        async def resume() -> None:
            process.resume()

        return resume

    # -------------------------------------------------------------------------------------------- links

    async def _links(self, fault: Fault, target: str) -> Undo:
        stage = self._stage
        far = await self._far(fault, target)
        wires = [each for other in far for each in stage.between(target, other)]
        fired = bool(wires)
        for wire, forth in wires:
            cut = fault.kind == "cut"
            there, back = cut and (forth or not fault.one_way), cut and (not forth or not fault.one_way)
            if cut:
                wire.cut(fault, there=there, back=back)
            else:
                wire.slow(fault, fault.amount)
            fired = fired and wire.suffers(there=there, back=back, delay_s=fault.amount)
        names = ", ".join(far)
        if fault.kind == "slow":
            detail = f"{target} - {names}: {fault.amount * 1000:.0f} ms each way"
        else:
            detail = f"{target} {'->' if fault.one_way else '-'} {names}: nothing arrives"
        links = [(target, other) for other in far] if fault.kind == "cut" else []
        self._note(fault, target, links=links, fired=fired, detail=detail)

        async def heal() -> None:
            for wire, _ in wires:
                wire.heal(fault)

        return heal

    async def _far(self, fault: Fault, target: str) -> list[str]:
        """The other ends."""
        stage = self._stage
        others = [node for node in stage.cluster.nodes if node != target]
        if fault.other == "all":
            return [*others, *stage.services] if target in stage.cluster.nodes else others
        if fault.other in stage.services:
            return [fault.other]
        leader = await self._leader()
        if fault.other == "leader" and leader in others:
            return [leader]
        if target in stage.cluster.nodes:
            return [self._rng.choice(others)]
        return [self._rng.choice([node for node in others if node != leader])]

    # -------------------------------------------------------------------------------------------- disks and clocks

    async def _disk(self, fault: Fault, target: str) -> Undo:
        disk = self._stage.disks[target]
        # A database server can do for minutes with the room that its log has taken in advance. So every other time it
        # is made to begin another file; over a connection that is there, for it takes no others without a disk.
        urges = target == SERVER and self._rng.random() < _URGES
        connection = await self._connect() if urges else None
        free = disk.fill()
        detail = f"not a byte is left of {free >> 10} KiB" + (", and its log needs room" if urges else "")
        self._note(fault, target, parts=self._stage.relies_on(target), fired=disk.free_bytes == 0, detail=detail)
        if connection is not None:
            await self._needs_room(fault, connection)

        async def clear() -> None:
            disk.clear()
            if target == SERVER:
                await self._restart_server()

        return clear

    async def _connect(self) -> Any:
        import asyncpg  # there is a server, so there is this

        return await asyncpg.connect(self._stage.dsns[0], timeout=_SERVER_S, command_timeout=_SERVER_S)

    async def _needs_room(self, fault: Fault, connection: Any) -> None:
        import asyncpg

        try:
            await connection.execute("SELECT pg_switch_wal()")
            await connection.execute("SELECT pg_current_xact_id()")
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            self._recorder.note("note", text=f"fault {fault.number}: PostgreSQL says {error}")
        finally:
            connection.terminate()

    async def _restart_server(self) -> None:
        """A server without room for its log ends itself, or is lost in its recovery. See that it runs.

        Raises `ProcessTrouble`.
        """
        server = self._stage.servers[SERVER]
        until_s = self._recorder.now_s + _RECOVERY_S
        killed = False
        while True:
            try:
                if server.pid is None:
                    await server.stop()
                    await server.start()
                    self._tell(f"{SERVER} had ended itself, and is started again")
                await server.single("SELECT 1")
            except ProcessTrouble:
                # It may be about to end, or to recover.
                now_s = self._recorder.now_s
                if now_s > until_s and killed:
                    raise
                if now_s > until_s:
                    killed, until_s = True, now_s + _SERVER_S
                    self._tell(f"{SERVER} has not recovered in {_RECOVERY_S:g} s, and is killed")
                    await server.kill()
                await asyncio.sleep(_LOOK_S)
            else:
                return

    def _clock(self, fault: Fault, target: str) -> Undo:
        file = self._stage.cluster.ahead(target)
        ahead_ms = int(fault.amount * 1000)
        set_clock(file, ahead_ms)
        self._note(fault, target, fired=True, detail=f"its calendar is set {_shift(fault.amount)}")

        async def back() -> None:
            until_s = self._recorder.now_s + _SEEN_S
            while not has_seen(file, ahead_ms) and self._recorder.now_s < until_s:  # noqa: ASYNC110  # a file
                await asyncio.sleep(0.05)
            # One that does not lead any more need not look.
            self._recorder.note("calendar", fault=fault.number, seen=has_seen(file, ahead_ms))
            set_clock(file, 0)

        return back


def _counts(status: Mapping[str, Any]) -> bool:
    """Whether a node, by what it says of itself, is a full member."""
    return status.get("role") in ("leader", "follower") and bool(status.get("ready"))


def _empty(folder: Path) -> int:
    """Remove all that is in `folder`, which itself may be a disk; how many files that were."""
    files = sum(1 for each in folder.rglob("*") if each.is_file())
    for each in folder.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink()
    return files


def _shift(seconds: float) -> str:
    """How far a calendar is set, for people."""
    minutes, rest = divmod(round(abs(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    words = [f"{count} {unit}" for count, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if count]
    return f"{' '.join(words) or '0 s'} {'back' if seconds < 0 else 'forwards'}"
