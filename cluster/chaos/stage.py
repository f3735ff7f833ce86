"""All that runs: three nodes, the shop's services on SQLite and PostgreSQL, and the wires between them.

Every node reaches every other over wires of its own, one for replication and one for requests that are passed on; all
nodes reach a service over one wire, and a service reaches each node over another. Clients reach the nodes directly.
"""

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cluster.chaos.disks import Disk, watch_over
from cluster.chaos.node import set_clock
from cluster.chaos.wires import Wire
from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder
from cluster.layout import Settings, read_layout
from cluster.local import LocalCluster
from cluster.ports import HOST, free_ports
from cluster.process import Process, ProcessTrouble, Program, arguments
from cluster.service import Service
from coordinator.config import split_address
from participants.shop import inventory, orders, payments
from participants.shop.places import put_on_server

SERVICES: Final = ("inventory", "payments", "orders")
ON_SERVER: Final = "payments"
"""The service whose database is on PostgreSQL; the others are in SQLite files."""

SERVER: Final = "postgres"
"""What the server is called in plans and reports."""

SETTINGS: Final[Settings] = {"limits": {"compact_log_bytes": 512 << 10}}
"""So little that logs are compacted many times in a run."""

_REGISTER_S: Final = 30.0


class WiredCluster(LocalCluster):
    """Nodes that reach each other over wires, with calendars that can be set.

    Call `wire` between `lay_out` and `start`.
    """

    def wire(self, raft: Mapping[tuple[str, str], int], api: Mapping[tuple[str, str], int]) -> None:
        """Tell every node where it finds the others: ports by source and target."""
        for config in self.configs:
            path = self.data / config.node / "node.toml"
            text = path.read_text()
            for peer in config.nodes:
                way = (config.node, peer.id)
                if peer.id != config.node:
                    text = text.replace(f'raft = "{peer.raft}"', f'raft = "{HOST}:{raft[way]}"')
                    text = text.replace(f'api = "{peer.api}"', f'api = "{HOST}:{api[way]}"')
            path.write_text(text)
            set_clock(self.ahead(config.node), 0)
        self._take(read_layout(self.data))
        for node, process in self._nodes.items():
            words = arguments("--ahead", self.ahead(node), "--config", self.data / node / "node.toml")
            program = Program(module="cluster.chaos.node", arguments=words, log=process.program.log)
            self._nodes[node] = Process(node, program, tether=self._tether)

    def ahead(self, node: str) -> Path:
        """The file that sets a node's calendar."""
        return self.data / node / "ahead_ms"


class Stage:
    """See the module's text. Up when its context is entered, gone when it is left.

    stock, balances_cents: what the shop begins with. disks: nodes get disks that can be filled. modules: what to run in
    the place of a service, for tests. postgres: None: there is none, and everything is on SQLite.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stock: Mapping[str, int],
        balances_cents: Mapping[str, int],
        postgres: bool,
        disks: bool,
        modules: Mapping[str, str] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.folder = folder
        self.shop = folder / "shop"
        self.cluster = WiredCluster(folder / "cluster", settings=SETTINGS)
        self.services: dict[str, Service] = {}
        self.servers: dict[str, PostgresServer] = {}
        self.disks: dict[str, Disk] = {}
        self.wires: list[Wire] = []
        self._stock, self._balances_cents = stock, balances_cents
        self._postgres, self._with_disks = postgres, disks
        self._modules = modules or {}
        self._on_end = on_end
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> "Stage":
        async with AsyncExitStack() as stack:
            if self._postgres:
                await self._start_server(stack)
            await asyncio.to_thread(self._seed)
            self.cluster.lay_out()
            if self._with_disks:
                watch = watch_over([config.data for config in self.cluster.configs])
                stack.callback(watch.wait)
                stack.callback(watch.terminate)
                for config in self.cluster.configs:
                    disk = self.disks[config.node] = Disk(config.data)
                    disk.mount()
                    stack.callback(disk.unmount)
            if self._on_end is not None:
                stack.callback(self._on_end)  # when all has stopped, and nothing is gone yet
            to_nodes = await self._wire_nodes(stack)
            ports = free_ports(len(SERVICES))
            to_services: dict[str, Wire] = {}
            for name, port in zip(SERVICES, ports, strict=True):
                to_services[name] = await self._wire(stack, "nodes", name, port)
                service = self.services[name] = self._service(name, port, to_nodes[name])
                stack.push_async_callback(service.stop)
                service.spawn()
            # Entered last, so that nodes stop first: what they still owe needs the services.
            await stack.enter_async_context(self.cluster)
            await asyncio.gather(*(service.ready() for service in self.services.values()))
            for name, service in self.services.items():
                url = f"http://{HOST}:{to_services[name].port}"
                await service.register(self.cluster.urls, url=url, within_s=_REGISTER_S)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for wire in self.wires:
            wire.heal_all()
        await self._exit.aclose()

    async def _start_server(self, stack: AsyncExitStack) -> None:
        server = PostgresServer(server_folder("outlast-chaos-pg-"))
        stack.callback(server.remove)
        stack.push_async_callback(server.stop)
        await server.start()
        put_on_server(self.shop, ON_SERVER, await server.create_database("shop"))
        self.servers[SERVER] = server

    def _seed(self) -> None:
        inventory.seed(self.shop, dict(self._stock))
        payments.seed(self.shop, dict(self._balances_cents))
        orders.seed(self.shop)

    def _service(self, name: str, port: int, nodes: list[Wire]) -> Service:
        words: tuple[Any, ...] = (name, "--data", self.shop.absolute(), "--port", port)
        for wire in nodes:
            words += ("--coordinator", f"http://{HOST}:{wire.port}")
        return Service(
            name,
            module=self._modules.get(name, "participants.shop"),
            arguments=arguments(*words),
            url=f"http://{HOST}:{port}",
            folder=self.folder / "services" / name,
        )

    async def _wire(self, stack: AsyncExitStack, source: str, target: str, port: int) -> Wire:
        wire = await stack.enter_async_context(Wire(source, target, port))
        self.wires.append(wire)
        return wire

    async def _wire_nodes(self, stack: AsyncExitStack) -> dict[str, list[Wire]]:
        """Join the nodes; the wires over which each service asks them."""
        raft: dict[tuple[str, str], int] = {}
        api: dict[tuple[str, str], int] = {}
        asking: dict[str, list[Wire]] = {name: [] for name in SERVICES}
        for target in self.cluster.configs:
            addresses = {"raft": target.me.raft, "api": target.me.api}
            ports = {kind: split_address(address, kind)[1] for kind, address in addresses.items()}
            for source in self.cluster.nodes:
                if source != target.node:
                    way = (source, target.node)
                    raft[way] = (await self._wire(stack, *way, ports["raft"])).port
                    api[way] = (await self._wire(stack, *way, ports["api"])).port
            for name in SERVICES:
                asking[name].append(await self._wire(stack, name, target.node, ports["api"]))
        self.cluster.wire(raft, api)
        return asking

    def between(self, one: str, other: str) -> list[tuple[Wire, bool]]:
        """Every wire between two, and whether it leads from the first to the second.

        All nodes share one wire to a service, so between one node and a service is that wire, too.
        """
        found = []
        for wire in self.wires:
            ends = (wire.source, wire.target)
            if ends in ((one, other), (other, one)):
                found.append((wire, wire.source == one))
            elif ends in (("nodes", one), ("nodes", other)) and {one, other} & set(self.cluster.nodes):
                found.append((wire, wire.target == other))
        return found

    def process(self, name: str) -> Process:
        """Of a node or a service."""
        return self.services[name].process if name in self.services else self.cluster.process(name)


def has_postgres() -> str | None:
    """Why there is no PostgreSQL here; None: there is."""
    try:
        import asyncpg  # noqa: F401
    except ImportError:
        return "asyncpg is not installed"
    folder = server_folder("outlast-chaos-pg-")
    try:
        PostgresServer(folder)
    except ProcessTrouble as error:
        return str(error)
    finally:
        os.rmdir(folder)
    return None


def well(names: Collection[str], busy: Collection[str]) -> list[str]:
    """Those of `names` that nothing has happened to, in order."""
    return [name for name in names if name not in busy]
