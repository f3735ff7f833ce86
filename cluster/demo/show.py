"""The play: load, crashes, and the measuring around them. The same scenes with three nodes and with one."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.calls import Caller
from cluster.demo.crash import Crash, Outage, finished, recovery, strike, strike_server
from cluster.demo.databases import Databases, Server
from cluster.demo.load import Load, balances_cents, customers, stock
from cluster.demo.stage import Stage
from cluster.demo.verdict import Evidence, Verdict, judge
from cluster.demo.view import NodeLine, Picture, View
from cluster.local import Leader
from participants.shop.audit import audit

OUTAGE_S: Final = 10.0
"""How long the single coordinator stays dead in the contrast: a person or a supervisor needs so long to notice."""

_WARM_UP_S: Final = 2.0
_DRAW_S: Final = 0.2
_SETTLE_S: Final = 30.0
_LOOK_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be chosen.

    seconds: of load with three nodes. per_s: customers. outage_s: of the contrast.
    """

    seconds: float = 14.0
    per_s: float = 30.0
    contrast: bool = True
    outage_s: float = OUTAGE_S
    seed: int | None = None


async def run(folder: Path, databases: Databases, options: Options, view: View) -> tuple[Verdict, Verdict | None]:
    """Both parts, and a verdict on each. Raises `ProcessTrouble` and `NotCaught` when the scenery fails."""
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    view.event(f"seed {seed}")
    if databases.servers:
        view.event(f"starting {' and '.join(databases.names)}")
    async with databases:
        # Judged while the servers are up: what they hold is the evidence.
        three = await replicated(folder / "three", options, view, seed=seed, databases=databases)
        verdict = judge(three, folder / "three" / "shop")
        if not options.contrast:
            return verdict, None
        view.event("for contrast, the same crash with one coordinator: a durable log, no replication")
        one = await alone(folder / "one", options, view, seed=seed, databases=databases)
        return verdict, judge(one, folder / "one" / "shop")


async def replicated(
    folder: Path, options: Options, view: View, *, seed: int, databases: Databases | None = None
) -> Evidence:
    """Three nodes; the leader is killed at 1/4 and at 5/8 of the time, and restarted in between.

    Where the shop is on database servers, each of them is killed in between, too.
    """
    async with _scene(folder, options, view, nodes=3, seed=seed, title="three nodes", databases=databases) as scene:
        crashes: list[Crash] = []
        outages: list[Outage] = []
        for share in (0.25, 0.625):
            await scene.until(share * options.seconds)
            crashes.append(await scene.crash())
            await recovery(scene.stage, crashes[-1], newer_than=scene.epoch)
            leader = crashes[-1].leader
            assert leader is not None, "recovery returns with a leader or raises"
            view.event(f"{leader.node} leads after {crashes[-1].leader_after_s or 0:.2f} s")
            await scene.finished(crashes[-1])
            # Customers go on with two nodes for a while before the third comes back.
            await scene.until((share + 0.15) * options.seconds)
            view.event(f"starting {crashes[-1].node} again, on its data")
            await scene.stage.cluster.start_node(crashes[-1].node)
            if databases is not None and not outages:
                outages += [await scene.outage(server) for server in databases.servers.values()]
        await scene.until(options.seconds)
        return await scene.end(crashes, outages)


async def alone(
    folder: Path, options: Options, view: View, *, seed: int, databases: Databases | None = None
) -> Evidence:
    """One coordinator; killed once in the same way, and started again after the outage."""
    title = "one coordinator, no replication"
    async with _scene(folder, options, view, nodes=1, seed=seed, title=title, databases=databases) as scene:
        await scene.until(_WARM_UP_S)
        crash = await scene.crash()
        view.event(f"nobody takes over; it is started again in {options.outage_s:g} s")
        await scene.sleep_until(crash.killed_s + options.outage_s)
        view.event(f"starting {crash.node} again, on its data")
        await scene.stage.cluster.start_node(crash.node)
        await recovery(scene.stage, crash, newer_than=scene.epoch)
        view.event(f"it coordinates again {crash.leader_after_s or 0:.2f} s after it was killed")
        await scene.finished(crash)
        return await scene.end([crash])


class _Scene:
    """One stage with load on it."""

    def __init__(self, stage: Stage, load: Load, view: View, *, title: str, seconds: float) -> None:
        self.stage = stage
        self.epoch = -1
        """Of the leader that was killed last."""
        self._load = load
        self._view = view
        self._title = title
        self._seconds = seconds
        self._began_s = time.monotonic()
        self._arrivals = asyncio.create_task(load.arrive())
        self._drawing = asyncio.create_task(self._draw())

    async def until(self, at_s: float) -> None:
        """Let time pass until `at_s` seconds after the load began."""
        await self.sleep_until(self._began_s + at_s)

    async def sleep_until(self, at_s: float) -> None:
        """The same, on the monotonic clock."""
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))

    async def crash(self) -> Crash:
        """Kill the leader at the worst moment."""
        leader: Leader = await self.stage.cluster.wait_for_leader()
        self.epoch = leader.epoch
        crash = await strike(self.stage, leader)
        self._view.event(
            f"kill -9 {leader.node}, the leader: {len(crash.blocked)} transactions prepared everywhere, none told"
        )
        return crash

    async def outage(self, server: Server) -> Outage:
        """Kill a database server at the worst moment, start it again, and see through what it held."""
        outage = await strike_server(self.stage, server)
        self._view.event(f"kill -9 {outage.server}: {len(outage.blocked)} transactions prepared everywhere, none told")
        await server.start()
        outage.back_after_s = time.monotonic() - outage.killed_s
        self._view.event(f"{outage.server}, started again on its data, is back after {outage.back_after_s:.2f} s")
        await self.finished(outage)
        return outage

    async def finished(self, crash: Crash | Outage) -> None:
        """See those that were caught through."""
        await finished(self.stage, crash)
        if crash.finished_after_s is not None:
            self._view.event(f"all {len(crash.blocked)} finished, {crash.finished_after_s:.2f} s after the kill")

    async def end(self, crashes: list[Crash], outages: Sequence[Outage] = ()) -> Evidence:
        """No more customers; wait until everyone has an answer and nothing is in doubt, and sum up."""
        self._arrivals.cancel()
        seconds = time.monotonic() - self._began_s
        await self._load.finish()
        deadline_s = time.monotonic() + _SETTLE_S
        # What is not settled by then is for the verdict to find.
        while self.stage.prepared_now() or await asyncio.to_thread(self._in_doubt):
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(_LOOK_S)
        self._drawing.cancel()
        self._view.show(await self._picture())
        load = self._load
        return Evidence(
            nodes=len(self.stage.cluster.nodes),
            seconds=seconds,
            begun=load.begun,
            turned_away=load.turned_away,
            repeated=load.repeated,
            tried_again=load.tried_again,
            told=tuple(load.told),
            crashes=tuple(crashes),
            longest_prepared_s=self.stage.longest_prepared_s(),
            outages=tuple(outages),
        )

    def _in_doubt(self) -> int:
        return audit(self.stage.shop).in_doubt

    async def close(self) -> None:
        """Stop what runs beside the play."""
        self._arrivals.cancel()
        self._drawing.cancel()
        for task in (self._arrivals, self._drawing):
            with suppress(asyncio.CancelledError):
                await task
        await self._load.close()

    # -------------------------------------------------------------------------------------------- drawing

    async def _draw(self) -> None:
        while True:
            self._view.show(await self._picture())
            await asyncio.sleep(_DRAW_S)

    async def _picture(self) -> Picture:
        cluster, load = self.stage.cluster, self._load
        leader = await cluster.leader()
        nodes = []
        for node in cluster.nodes:
            pid = cluster.process(node).pid
            state = "killed" if pid is None else "leader" if leader and leader.node == node else "follower"
            if pid is not None and len(cluster.nodes) == 1 and leader is None:
                state = "starting"
            nodes.append(NodeLine(name=node, state=state, detail="" if pid is None else f"pid {pid}"))
        return Picture(
            title=self._title,
            share=min(1.0, (time.monotonic() - self._began_s) / self._seconds),
            nodes=nodes,
            committed=load.count("committed"),
            refused=load.count("refused"),
            errors=load.count("error"),
            waiting=load.waiting,
            prepared=self.stage.prepared_now(),
            longest_prepared_s=self.stage.longest_prepared_s(),
        )


@asynccontextmanager
async def _scene(
    folder: Path,
    options: Options,
    view: View,
    *,
    nodes: int,
    seed: int,
    title: str,
    databases: Databases | None,
) -> AsyncIterator[_Scene]:
    view.event(f"starting {nodes} node{'s' * (nodes > 1)} and the shop: inventory, payments, orders")
    rng = random.Random(seed)  # noqa: S311  # chooses what customers want; a seed repeats it
    stage = Stage(folder, nodes=nodes, stock=stock(), balances_cents=balances_cents(), databases=databases)
    seconds = options.seconds if nodes > 1 else _WARM_UP_S + options.outage_s + 1.0
    async with stage, Caller(stage.cluster.urls) as caller:
        scene = _Scene(
            stage, Load(caller, customers("order", rng), rng, per_s=options.per_s), view, title=title, seconds=seconds
        )
        try:
            yield scene
        finally:
            await scene.close()
