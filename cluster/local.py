"""A cluster of real processes on this machine: laid out, started, stopped, killed, paused, started again.

    async with LocalCluster(folder) as cluster:     # three processes; there is a leader
        killed = await cluster.kill_leader()        # kill -9
        await cluster.wait_for_leader(besides=killed)
        await cluster.start_node(killed)            # on its data
                                                    # and nothing is left running

The folder is shared: the `outlast` command in another shell may kill or start a node of a cluster that a program holds.
So each method reads `cluster.json` before it acts, and each change of it is made under the folder's lock (`layout.py`).

Everything is stopped by `stop`, which leaving the context calls. Should this process die before that, its nodes and
services notice and stop by themselves; unless `tethered` is False, for a cluster that shall outlast its starter.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cluster.calls import Caller, Unreachable
from cluster.layout import Row, Running, Settings, lay_out, locked, read_layout, read_running, write_running
from cluster.ports import require_free
from cluster.process import TERM_GRACE_S, Identity, Process, ProcessTrouble, Program, arguments, stop_all
from cluster.replication.standing import counts
from cluster.service import READY_S, Service, listening, register
from coordinator.config import NodeConfig, split_address

__all__ = [
    "AlreadyRunning",
    "Leader",
    "LocalCluster",
    "NotRunning",
    "ProcessTrouble",
    "Service",
    "register",
]

LEADER_S: Final = 30.0
"""Until a cluster without a leader counts as one that will have none. An election takes about a second."""

ADMITTED_S: Final = 10.0
"""Until it is no longer waited for what others say to a node that comes empty: they may not run."""

_LAST_WORD: Final = " CRITICAL coordinator: "
"""Before what a node says when it cannot go on."""

_LOOK_S: Final = 0.02
_STATUS_S: Final = 1.0


class AlreadyRunning(ProcessTrouble):
    """The cluster is up, and has been left alone."""


class NotRunning(ProcessTrouble):
    """There is no such cluster, or it is not up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """A node that says it leads, and in which epoch."""

    node: str
    url: str
    epoch: int


class LocalCluster:
    """The nodes of one folder, and the services that were started beside them.

    data: the folder. One that holds a cluster already is taken up with its data; else a new one is laid out.
    nodes: how many; odd. One node has a durable log and no replication.
    port: API ports from here on, and the nodes' own after them; None: free ones.
    name: of the cluster; None: a name of its own.
    settings: sections of `node.toml`, such as `{"timing": {"backoff_max_s": 0.5}}`; of a new layout only.
    tls: whether a new layout has certificates and tokens, see `layout.py`.
    tethered: whether the processes end when this one does.
    """

    def __init__(
        self,
        data: Path | str,
        *,
        nodes: int = 3,
        port: int | None = None,
        name: str | None = None,
        settings: Settings | None = None,
        tls: bool = False,
        tethered: bool = True,
    ) -> None:
        self.data = Path(data).absolute()
        self.services: dict[str, Service] = {}
        self._wanted = nodes
        self._port = port
        self._name = name
        self._settings = settings
        self._tls = tls
        self._tether = Identity.mine() if tethered else None
        self._configs: dict[str, NodeConfig] = {}
        self._nodes: dict[str, Process] = {}
        self._left = False

    @classmethod
    def open(cls, data: Path | str) -> "LocalCluster":
        """The cluster that is in `data`, running or not. What is started here lives as long as its `outlast up` does.

        Raises `NotRunning` when there is none, `ProcessTrouble` when the folder is damaged.
        """
        folder = Path(data).absolute()
        running, configs = read_running(folder), read_layout(folder)
        if running is None or not configs:
            raise NotRunning(f"there is no cluster in {data}; start one with `outlast up --data {data}`")
        cluster = cls(folder, nodes=len(configs), tethered=False)
        owner = running.owner
        cluster._tether = owner if owner is not None and owner.alive else None
        cluster._take(configs)
        cluster.refresh()
        return cluster

    # -------------------------------------------------------------------------------------------- what there is

    @property
    def name(self) -> str:
        """Of the cluster: the first part of every gid."""
        return next(iter(self._laid_out().values())).cluster

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes' ids: n1, n2, ..."""
        return tuple(self._laid_out())

    @property
    def configs(self) -> tuple[NodeConfig, ...]:
        """What every node was told, in the order of `nodes`."""
        return tuple(self._laid_out().values())

    @property
    def urls(self) -> tuple[str, ...]:
        """Every node's URL, running or not, in the order of `nodes`."""
        return tuple(config.me.url for config in self._laid_out().values())

    @property
    def token(self) -> str | None:
        """What the nodes want to be shown."""
        return next(iter(self._laid_out().values())).token

    @property
    def ca(self) -> Path | None:
        """Who issued the nodes' certificates; None where they speak plain HTTP, or show those of a public authority."""
        tls = next(iter(self._laid_out().values())).tls
        return None if tls is None else tls.trusted

    def caller(self) -> Caller:
        """Connections to the nodes, as they want them."""
        return Caller(self.urls, token=self.token, ca=self.ca)

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the nodes whose process runs; a paused one does."""
        return tuple(node for node in self.nodes if self.process(node).alive)

    def url(self, node: str) -> str:
        """Where `node` listens. Raises `KeyError`."""
        return self._laid_out()[node].me.url

    def process(self, node: str) -> Process:
        """The process of `node`: its pid, its log. Raises `KeyError`."""
        self._laid_out()
        return self._nodes[node]

    def _laid_out(self) -> dict[str, NodeConfig]:
        if not self._configs:
            self.lay_out()
        return self._configs

    def lay_out(self) -> None:
        """Make the folder ready, so that ids and URLs are known before anything runs. Raises `ProcessTrouble`."""
        configs = lay_out(
            self.data, nodes=self._wanted, port=self._port, name=self._name, settings=self._settings, tls=self._tls
        )
        self._take(configs)

    def _take(self, configs: Sequence[NodeConfig]) -> None:
        self._configs = {config.node: config for config in configs}
        for node in self._configs:
            folder = self.data / node
            program = Program(
                module="cluster.cli",
                arguments=arguments("node", "--config", folder / "node.toml"),
                log=folder / "log.txt",
            )
            self._nodes[node] = Process(node, program, tether=self._tether)

    def refresh(self) -> Running | None:
        """Learn from `cluster.json` what others have started and ended meanwhile; it, or None when there is none.

        A cluster that has been started anew by another owner is no longer this one, and nothing of it is taken over.
        """
        running = read_running(self.data)
        if running is not None and self._is_ours(running):
            self._adopt(running)
        return running

    def _is_ours(self, running: Running) -> bool:
        return self._tether == (running.owner if running.owner is not None and running.owner.alive else None)

    def _adopt(self, running: Running) -> None:
        for row in running.nodes:
            if row.id in self._nodes:
                self._nodes[row.id].adopt(row.identity)
        for row in running.services:
            if row.id not in self.services and row.module is not None:
                self.services[row.id] = Service(
                    row.id,
                    module=row.module,
                    arguments=row.arguments,
                    url=row.url,
                    folder=self.data / row.id,
                    ca=self.ca,
                    tether=self._tether,
                    tethered=self._tether is not None,
                )
            if row.id in self.services:
                self.services[row.id].process.adopt(row.identity)

    def _save(self, *, down: bool = False) -> None:
        def row(name: str, url: str, process: Process) -> Row:
            identity = process.identity
            if identity is None:
                return Row(id=name, url=url)
            return Row(id=name, url=url, pid=identity.pid, started=identity.started)

        token_file = next(iter(self._laid_out().values())).token_file
        write_running(
            self.data,
            Running(
                cluster=self.name,
                nodes=tuple(row(node, self.url(node), process) for node, process in self._nodes.items()),
                services=tuple(
                    replace(
                        row(name, service.url, service.process),
                        module=service.process.program.module,
                        arguments=service.process.program.arguments,
                    )
                    for name, service in self.services.items()
                ),
                owner=self._tether,
                down=down,
                ca=None if self.ca is None else str(self.ca.resolve()),
                token_file=None if token_file is None else str(token_file.resolve()),
            ),
        )

    # -------------------------------------------------------------------------------------------- up and down

    async def __aenter__(self) -> "LocalCluster":
        try:
            await self.start()
        except AlreadyRunning:
            raise
        except BaseException:
            # Also when it is cut short: nothing that was started stays.
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._left:
            await self.stop()

    def leave(self) -> None:
        """Let everything run on when the context is left. Only what is not tethered will."""
        self._left = True

    async def start(self, *, within_s: float = LEADER_S) -> Leader:
        """Start every node; on return there is a leader.

        Raises `AlreadyRunning`, and `ProcessTrouble` when a port is in use, a node ends, or there is no leader in time.
        What was started by then keeps running: call `stop`, or use the context manager.
        """
        try:
            self.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ProcessTrouble(f"{self.data} cannot be made: {error.strerror}; use another --data") from error
        async with locked(self.data):
            self._laid_out()
            await self._require_down()
            for config in self._configs.values():
                for address, what in ((config.me.api, "API"), (config.me.raft, "replication")):
                    require_free(split_address(address, what)[1], f"{config.node}'s {what}")
            try:
                for process in self._nodes.values():
                    process.spawn()
            finally:
                self._save()
        await asyncio.gather(*(self._ready(node) for node in self._nodes))
        return await self.wait_for_leader(within_s=within_s)

    async def start_rest(self, *, within_s: float = LEADER_S) -> Leader:
        """Start every node that is not running, beside the services that are; on return there is a leader.

        Raises `ProcessTrouble`.
        """
        async with locked(self.data):
            self.refresh()
            try:
                for node, process in self._nodes.items():
                    if not process.alive:
                        me = self._configs[node].me
                        for address in (me.api, me.raft):
                            require_free(split_address(address, "address")[1], node)
                        process.spawn()
            finally:
                self._save()
        await asyncio.gather(*(self._ready(node) for node in self._nodes))
        return await self.wait_for_leader(within_s=within_s)

    async def _require_down(self) -> None:
        running = read_running(self.data)
        if running is None:
            return
        alive = [row for row in running.nodes if row.identity is not None and row.identity.alive]
        owner = running.owner
        kept = owner is not None and owner.alive and owner != Identity.mine() and not running.down
        orphaned = owner is not None and not owner.alive
        if kept or (alive and not orphaned):
            raise AlreadyRunning(
                f"the cluster in {self.data} is already running "
                f"({', '.join(f'{row.id} pid {row.pid}' for row in alive) or 'no node at the moment'}); "
                f"look at it with `outlast status --data {self.data}`, end it with `outlast down --data {self.data}`"
            )
        self._adopt(running)
        # Their owner was killed, and they are about to notice; the same data must not be opened twice.
        await stop_all([*self._nodes.values(), *(service.process for service in self.services.values())])

    async def stop(self, *, grace_s: float = TERM_GRACE_S) -> None:
        """Stop nodes and services, whoever started them: SIGTERM, then kill -9. Their data stays.

        A cluster that was ended and started by another owner meanwhile is left alone.
        """
        try:
            self.refresh()
        finally:
            # Even when cluster.json was damaged: what we know of must not stay. Services last: a node that stops first
            # finishes what clients wait for, and needs the services for that.
            await stop_all(list(self._nodes.values()), grace_s=grace_s)
            await stop_all([service.process for service in self.services.values()], grace_s=grace_s)
        if (self.data / "cluster.json").exists():
            await self._note(down=True)

    # -------------------------------------------------------------------------------------------- one node

    async def start_node(self, node: str, *, rejoin: bool = False) -> None:
        """Start a node that is not running, on its data; on return its API listens, majority or not.

        rejoin: its data is lost, and it comes back empty. A node that starts empty has then heard, unless it is alone,
        whether it may: the others refuse one that they know, and that was not told to rejoin.

        Raises `KeyError`, and `ProcessTrouble` when it runs, a port is in use, or it ends.
        """
        process = self.process(node)
        is_empty = len(self.nodes) > 1 and not counts(self._configs[node].data / "log")
        async with locked(self.data):
            self.refresh()
            if not process.alive:
                me = self._configs[node].me
                for address in (me.api, me.raft):
                    require_free(split_address(address, "address")[1], node)
            process.spawn(*(["--rejoin"] if rejoin else []))
            self._save()
        await self._ready(node)
        if rejoin or is_empty:
            await self._admitted(node, rejoin=rejoin)

    async def _admitted(self, node: str, *, rejoin: bool) -> None:
        """Return when a node that was started empty will stay, or nobody is there to say. Raises `ProcessTrouble`."""
        process = self.process(node)
        deadline_s = time.monotonic() + ADMITTED_S
        async with self.caller() as caller:
            while time.monotonic() < deadline_s:
                if not process.alive:
                    lines = [line.partition(_LAST_WORD)[2] for line in process.log_tail(20).splitlines()]
                    why = next((line for line in reversed(lines) if line), process.last_words())
                    raise ProcessTrouble(f"{node} has ended: {why}")
                answer = await self._status(caller, node, _STATUS_S)
                role = None if answer is None else answer.get("role")
                if role == "joining" and rejoin:
                    return
                if answer is not None and role != "joining" and answer.get("ready"):
                    return
                await asyncio.sleep(_LOOK_S)

    async def _ready(self, node: str) -> None:
        await listening(self.process(node), f"{self.url(node)}/healthz", within_s=READY_S, ca=self.ca)

    async def stop_node(self, node: str, *, grace_s: float = TERM_GRACE_S) -> bool:
        """SIGTERM, then kill -9. True when it ended by itself in time. Raises `KeyError`."""
        process = self.process(node)
        self.refresh()
        in_time = await process.stop(grace_s=grace_s)
        await self._note()
        return in_time

    async def kill(self, node: str) -> bool:
        """SIGKILL, at the moment of the call. True when it was running. Raises `KeyError`."""
        process = self.process(node)
        self.refresh()
        ran = await process.kill()
        await self._note()
        return ran

    async def kill_leader(self, *, within_s: float = LEADER_S) -> str:
        """SIGKILL for the node that leads; its id. Raises `ProcessTrouble` when nobody does."""
        leader = await self.wait_for_leader(within_s=within_s)
        await self.kill(leader.node)
        return leader.node

    def pause(self, node: str) -> bool:
        """SIGSTOP. False when it is not running. Raises `KeyError`."""
        process = self.process(node)
        self.refresh()
        return process.pause()

    def resume(self, node: str) -> bool:
        """SIGCONT. False when it is not running. Raises `KeyError`."""
        process = self.process(node)
        self.refresh()
        return process.resume()

    async def _note(self, *, down: bool = False) -> None:
        async with locked(self.data):
            running = self.refresh()
            if running is None or self._is_ours(running):
                self._save(down=down)

    async def note_deaths(self) -> Running | None:
        """Bring `cluster.json` up to date when something has ended by itself; what it says now."""
        running = self.refresh()
        if running is not None:
            rows = {row.id: row.pid for row in (*running.nodes, *running.services)}
            processes = [*self._nodes.values(), *(service.process for service in self.services.values())]
            if (
                self._is_ours(running)
                and not running.down
                and any(rows.get(process.name) != process.pid for process in processes)
            ):
                await self._note()
        return running

    # -------------------------------------------------------------------------------------------- services

    async def start_service(self, service: Service | str) -> None:
        """Start a service beside the nodes, to be stopped with them; on return it listens. A name: one of `services`.

        Raises `KeyError` for an unknown name, and `ProcessTrouble`.
        """
        async with locked(self.data):
            self.refresh()
            if isinstance(service, str):
                service = self.services[service]
            self.services[service.name] = service
            service.spawn()
            self._save()
        await service.ready()

    async def kill_service(self, name: str) -> bool:
        """SIGKILL. True when it was running. Raises `KeyError`."""
        self.refresh()
        ran = await self.services[name].kill()
        await self._note()
        return ran

    # -------------------------------------------------------------------------------------------- who leads

    async def status(self, node: str, *, within_s: float = _STATUS_S) -> dict[str, Any] | None:
        """What `node` says of the cluster; None when it does not answer. Raises `KeyError`."""
        async with self.caller() as caller:
            return await self._status(caller, node, within_s)

    async def _status(self, caller: Caller, node: str, within_s: float) -> dict[str, Any] | None:
        try:
            answer = await caller.once("GET", f"{self.url(node)}/v1/cluster", within_s=within_s)
        except Unreachable:
            return None
        return answer.body if answer.status == 200 and isinstance(answer.body, dict) else None

    async def leader(self, *, besides: str | None = None) -> Leader | None:
        """The running node that says of itself that it leads, in the newest epoch if several do; None: none does."""
        async with self.caller() as caller:
            return await self._leader(caller, besides)

    async def _leader(self, caller: Caller, besides: str | None) -> Leader | None:
        asked = [node for node in self.running if node != besides and not self.process(node).paused]
        answers = await asyncio.gather(*(self._status(caller, node, _STATUS_S) for node in asked))
        leaders = [
            Leader(node=node, url=self.url(node), epoch=answer.get("epoch") or 0)
            for node, answer in zip(asked, answers, strict=True)
            # Ready: past its barrier. Before, it shows the epoch of the leader before it.
            if answer is not None and answer.get("role") == "leader" and answer.get("ready")
        ]
        return max(leaders, key=lambda leader: leader.epoch, default=None)

    async def wait_for_leader(
        self, *, within_s: float = LEADER_S, besides: str | None = None, newer_than: int = -1
    ) -> Leader:
        """The leader, as soon as there is one. Raises `ProcessTrouble` when there is none in time.

        besides: a node that does not count, such as one that is paused and does not know that it was deposed.
        newer_than: an epoch; leaders of it and of older ones do not count.
        """
        deadline_s = time.monotonic() + within_s
        self.refresh()
        async with self.caller() as caller:
            while True:
                found = await self._leader(caller, besides)
                if found is not None and found.epoch > newer_than:
                    return found
                if time.monotonic() > deadline_s:
                    up = ", ".join(self.running) or "none"
                    raise ProcessTrouble(
                        f"no leader within {within_s:g} s (running: {up}); a majority of {len(self.nodes)} must run: "
                        f"see {self.data}/n*/log.txt"
                    )
                await asyncio.sleep(_LOOK_S)
