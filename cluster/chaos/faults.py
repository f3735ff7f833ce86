"""Carries the plan out: begins each fault at its time, makes sure that it did happen, and ends it."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from cluster.chaos.history import Recorder
from cluster.chaos.node import has_seen, set_clock
from cluster.chaos.plan import Fault
from cluster.chaos.stage import ON_SERVER, Stage, well
from cluster.process import ProcessTrouble

_START_TRIES: Final = 20
_FREE_S: Final = 30.0
_LEADER_S: Final = 1.0
_SEEN_S: Final = 6.0
"""Nodes that lead look at their calendar with every transaction, and with their housekeeping."""

Undo = Callable[[], Awaitable[None]]


class Nemesis:
    """What goes wrong at `stage`. `busy` holds who is impaired at the moment. tell: hears of every fault, in words."""

    def __init__(
        self, stage: Stage, recorder: Recorder, plan: Sequence[Fault], seed: int, tell: Callable[[str], None]
    ) -> None:
        self.plan = plan
        self._tell = tell
        self._stage = stage
        self._recorder = recorder
        self._rng = random.Random(f"targets {seed}")
        self.busy: set[str] = set()

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
        while (target := await self._target(fault)) is None:
            if self._recorder.now_s > until_s:
                self._note(fault, fault.target, fired=False, detail="everyone was impaired already")
                return
            await asyncio.sleep(0.1)
        self.busy.add(target)
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

    async def _target(self, fault: Fault) -> str | None:
        """Who it is, now; somebody else of the same sort when that one is impaired already."""
        nodes = self._stage.cluster.nodes
        if fault.target in self._stage.servers:
            return fault.target if fault.target not in self.busy else None
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
            case "pause":
                return self._pause(fault, target)
            case "cut" | "slow":
                return self._links(fault, target)
            case "disk":
                return self._disk(fault, target)
            case _:
                return self._clock(fault, target)

    # -------------------------------------------------------------------------------------------- processes

    async def _kill(self, fault: Fault, target: str) -> Undo:
        stage = self._stage
        if target in stage.servers:
            server = stage.servers[target]
            ran = server.pid is not None
            await server.kill()
            parts = [target, ON_SERVER]
            self._note(fault, target, parts=parts, fired=ran, detail="kill -9 of the server and its children")
            return server.start
        pid = stage.process(target).pid
        if target in stage.services:
            ran = await stage.services[target].kill()
        else:
            ran = await stage.cluster.kill(target)
        self._note(fault, target, parts=[target], fired=ran, detail=f"kill -9 of {pid}")
        return lambda: self._start(target)

    async def _start(self, target: str) -> None:
        """Start it again, on its data. Raises `ProcessTrouble` when it will not."""
        for tries in range(1, _START_TRIES + 1):
            try:
                if target in self._stage.services:
                    await self._stage.services[target].start()
                else:
                    await self._stage.cluster.start_node(target)
            except ProcessTrouble as error:
                # A database server that is down, too, keeps its service from starting.
                if tries == _START_TRIES or self._stage.process(target).alive:
                    raise
                self._recorder.note("note", text=f"{target} did not start: {error}")
                await asyncio.sleep(1.0)
            else:
                return

    def _pause(self, fault: Fault, target: str) -> Undo:
        process = self._stage.process(target)
        process.pause()
        self._note(fault, target, parts=[target], fired=process.paused, detail=f"SIGSTOP of {process.pid}")

        async def resume() -> None:
            process.resume()

        return resume

    # -------------------------------------------------------------------------------------------- links

    def _links(self, fault: Fault, target: str) -> Undo:
        stage = self._stage
        nodes = [node for node in stage.cluster.nodes if node != target]
        far = [*nodes, *stage.services] if fault.other == "all" and target in stage.cluster.nodes else nodes
        if fault.other == "follower" and target in stage.cluster.nodes:
            far = [self._rng.choice(nodes)]
        # All nodes share one wire to a service: with that one cut, nobody would reach it.
        wires = [
            (wire, forth)
            for other in far
            for wire, forth in stage.between(target, other)
            if wire.source != "nodes" or target in stage.services
        ]
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
        # Over the wires that nodes share, services are reached from the others as before.
        links = [(target, other) for other in nodes if other in far] if fault.kind == "cut" else []
        self._note(fault, target, links=links, fired=fired, detail=detail)

        async def heal() -> None:
            for wire, _ in wires:
                wire.heal(fault)

        return heal

    # -------------------------------------------------------------------------------------------- disks and clocks

    def _disk(self, fault: Fault, target: str) -> Undo:
        disk = self._stage.disks[target]
        free = disk.fill()
        detail = f"not a byte is left of {free >> 10} KiB"
        self._note(fault, target, parts=[target], fired=disk.free_bytes == 0, detail=detail)

        async def clear() -> None:
            disk.clear()

        return clear

    def _clock(self, fault: Fault, target: str) -> Undo:
        file = self._stage.cluster.ahead(target)
        ahead_ms = int(fault.amount * 1000)
        set_clock(file, ahead_ms)
        self._note(fault, target, fired=True, detail=f"its calendar is set by {fault.amount:+.0f} s")

        async def back() -> None:
            until_s = self._recorder.now_s + _SEEN_S
            while not has_seen(file, ahead_ms) and self._recorder.now_s < until_s:  # noqa: ASYNC110  # a file
                await asyncio.sleep(0.05)
            # One that does not lead any more need not look.
            self._recorder.note("calendar", fault=fault.number, seen=has_seen(file, ahead_ms))
            set_clock(file, 0)

        return back
