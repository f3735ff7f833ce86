"""All that runs: three nodes, the shop's services on SQLite and PostgreSQL, an application that does transactions of
its own in two databases, and the wires between them.

Every node reaches every other over wires of its own, one for replication and one for requests that are passed on. Every
node reaches each service over its own wire, and every service each node. Clients, the application among them, share one
wire to each node.
"""

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cluster.chaos.disks import Disk
from cluster.chaos.leftovers import watch_over
from cluster.chaos.node import set_clock
from cluster.chaos.sockets import owner
from cluster.chaos.wires import Junction, Wire
from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder
from cluster.layout import Settings, read_layout
from cluster.local import LocalCluster
from cluster.ports import HOST, free_ports
from cluster.process import Identity, Process, ProcessTrouble, Program, arguments
from cluster.service import Service
from coordinator.config import split_address
from participants.shop import inventory, orders, payments
from participants.shop.places import put_on_server

SERVICES: Final = ("inventory", "payments", "orders")
"""The shop's."""

ON_SERVER: Final = "payments"
"""The one of them whose database is on PostgreSQL; the others are in SQLite files."""

LEDGER: Final = "ledger"
"""Another participant on PostgreSQL, in another database: the application moves money there from that of payments."""

SERVER: Final = "postgres"
"""What the server is called in plans and reports; so is its disk."""

SHOP: Final = "shop"
"""The disk with the SQLite files."""

CLIENTS: Final = "clients"
"""All of them, as an end of links."""

APPLICATION: Final = "application"

RETENTION_S: Final = 86_400.0
"""How long nodes remember, by their calendars; these are set by several hours."""

SETTINGS: Final[Settings] = {"limits": {"compact_log_bytes": 512 << 10, "retention_s": RETENTION_S}}
"""Logs so short that they are compacted many times in a run."""

SERVER_SETTINGS: Final = {"max_wal_size": "48MB", "min_wal_size": "32MB", "wal_recycle": "off"}
"""PostgreSQL on a small disk, that needs room as soon as there is none."""

SERVER_DISK_MIB: Final = 256

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

    seed: of what the application does. stock, balances_cents: what the shop begins with. disks: nodes and databases get
    disks that can be filled. modules: what to run in the place of a service, for tests. postgres: otherwise everything
    is on SQLite, and there is no application. on_end: is told, when all has stopped and nothing is gone
    yet, what has gone wrong by then, in stopping too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        stock: Mapping[str, int],
        balances_cents: Mapping[str, int],
        postgres: bool,
        disks: bool,
        modules: Mapping[str, str] | None = None,
        on_end: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        self.folder = folder
        self.shop = folder / "shop"
        self.dsns: list[str] = []
        """Of the two databases in which the application works."""
        self.application: Process | None = None
        """None without PostgreSQL."""
        self.client_urls: dict[str, str] = {}
        """Where clients find each node."""
        self.cluster = WiredCluster(folder / "cluster", settings=SETTINGS)
        self.services: dict[str, Service] = {}
        self.servers: dict[str, PostgresServer] = {}
        self.disks: dict[str, Disk] = {}
        self.wires: list[Wire] = []
        self._seed_number = seed
        self._stock, self._balances_cents = stock, balances_cents
        self._postgres, self._with_disks = postgres, disks
        self._modules = modules or {}
        self._on_end = on_end
        self._exit = AsyncExitStack()

    @property
    def participants(self) -> tuple[str, ...]:
        """Names of all services."""
        return (*SERVICES, *((LEDGER,) if self._postgres else ()))

    @property
    def books(self) -> dict[str, list[str]]:
        """By sort of transaction: the participants at which one leaves its mark."""
        return {SHOP: [*SERVICES]} | ({APPLICATION: [ON_SERVER, LEDGER]} if self._postgres else {})

    async def __aenter__(self) -> "Stage":
        async with AsyncExitStack() as stack:
            self.cluster.lay_out()
            server = self._make_server(stack)
            if self._with_disks:
                self._make_disks(server)
            made = [self.folder, *([] if server is None else [server.folder])]
            watch = watch_over([disk.folder for disk in self.disks.values()], made)
            stack.callback(watch.wait)
            stack.callback(watch.terminate)
            for disk in self.disks.values():
                disk.mount()
                stack.callback(disk.unmount)
            stack.push(self._ended)
            if server is not None:
                await self._start_server(stack, server)
            await asyncio.to_thread(self._seed)
            to_nodes = await self._wire_nodes(stack)
            ports = dict(zip(self.participants, free_ports(len(self.participants)), strict=True))
            urls: dict[str, str] = {}
            for name, port in ports.items():
                urls[name] = f"http://{HOST}:{await self._junction(stack, name, port)}"
                service = self.services[name] = self._service(name, port, to_nodes[name])
                stack.push_async_callback(service.stop)
                service.spawn()
            # Entered last, so that nodes stop first: what they still owe needs the services.
            await stack.enter_async_context(self.cluster)
            await asyncio.gather(*(service.ready() for service in self.services.values()))
            for name, service in self.services.items():
                await service.register(self.cluster.urls, url=urls[name], within_s=_REGISTER_S)
            if self._postgres:
                self.application = self._application()
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for wire in self.wires:
            wire.heal_all()
        await self._exit.__aexit__(kind, error, trace)

    def _ended(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._on_end is not None:
            self._on_end(error)

    def _make_server(self, stack: AsyncExitStack) -> PostgresServer | None:
        if not self._postgres:
            return None
        server = PostgresServer(server_folder("outlast-chaos-pg-"), settings=SERVER_SETTINGS)
        stack.callback(server.remove)
        return server

    def _make_disks(self, server: PostgresServer | None) -> None:
        for config in self.cluster.configs:
            self.disks[config.node] = Disk(config.data)
        self.disks[SHOP] = Disk(self.shop)
        if server is not None:
            self.disks[SERVER] = Disk(server.folder, size_mib=SERVER_DISK_MIB)

    async def _start_server(self, stack: AsyncExitStack, server: PostgresServer) -> None:
        from cluster.chaos.books import lay_out  # it needs asyncpg

        self.servers[SERVER] = server
        stack.push_async_callback(server.stop)
        await server.start()
        put_on_server(self.shop, ON_SERVER, await server.create_database("shop"))
        put_on_server(self.ledger, ON_SERVER, await server.create_database("ledger"))
        self.dsns = [server.dsn("shop"), server.dsn("ledger")]
        for dsn in self.dsns:
            await lay_out(dsn)

    @property
    def ledger(self) -> Path:
        """The folder of the participant of that name."""
        return self.folder / LEDGER

    def relies_on(self, disk: str) -> list[str]:
        """Who is impaired when there is no room on `disk`."""
        if disk == SHOP:
            return [name for name in SERVICES if name != ON_SERVER or not self._postgres]
        return [SERVER, ON_SERVER, LEDGER] if disk == SERVER else [disk]

    def _seed(self) -> None:
        inventory.seed(self.shop, dict(self._stock))
        payments.seed(self.shop, dict(self._balances_cents))
        orders.seed(self.shop)
        if self._postgres:
            payments.seed(self.ledger, {})

    def _service(self, name: str, port: int, nodes: list[Wire]) -> Service:
        # The ledger is what payments are, in a database of its own.
        what, data = (ON_SERVER, self.ledger) if name == LEDGER else (name, self.shop)
        words: tuple[Any, ...] = (what, "--data", data.absolute(), "--port", port)
        for wire in nodes:
            words += ("--coordinator", f"http://{HOST}:{wire.port}")
        return Service(
            name,
            module=self._modules.get(name, "participants.shop"),
            arguments=arguments(*words),
            url=f"http://{HOST}:{port}",
            folder=self.folder / "services" / name,
        )

    def _application(self) -> Process:
        words = arguments(self._seed_number, ",".join(self.client_urls.values()), *self.dsns)
        program = Program(
            module="cluster.chaos.application", arguments=words, log=self.folder / APPLICATION / "log.txt"
        )
        return Process(APPLICATION, program, tether=Identity.mine())

    async def _junction(self, stack: AsyncExitStack, name: str, port: int) -> int:
        """A wire from each node to a service, all behind one port: nodes are told one URL of it."""
        wires = {node: Wire(node, name, port) for node in self.cluster.nodes}
        self.wires += wires.values()

        def who(source: int, target: int) -> str | None:
            return owner({node: self.cluster.process(node).pid for node in wires}, source, target)

        return (await stack.enter_async_context(Junction(wires, who))).port

    async def _wire(self, stack: AsyncExitStack, source: str, target: str, port: int) -> Wire:
        wire = await stack.enter_async_context(Wire(source, target, port))
        self.wires.append(wire)
        return wire

    async def _wire_nodes(self, stack: AsyncExitStack) -> dict[str, list[Wire]]:
        """Join the nodes; the wires over which each service asks them."""
        raft: dict[tuple[str, str], int] = {}
        api: dict[tuple[str, str], int] = {}
        asking: dict[str, list[Wire]] = {name: [] for name in self.participants}
        for target in self.cluster.configs:
            addresses = {"raft": target.me.raft, "api": target.me.api}
            ports = {kind: split_address(address, kind)[1] for kind, address in addresses.items()}
            for source in self.cluster.nodes:
                if source != target.node:
                    way = (source, target.node)
                    raft[way] = (await self._wire(stack, *way, ports["raft"])).port
                    api[way] = (await self._wire(stack, *way, ports["api"])).port
            for name in self.participants:
                asking[name].append(await self._wire(stack, name, target.node, ports["api"]))
            wire = await self._wire(stack, CLIENTS, target.node, ports["api"])
            self.client_urls[target.node] = f"http://{HOST}:{wire.port}"
        self.cluster.wire(raft, api)
        return asking

    def between(self, one: str, other: str) -> list[tuple[Wire, bool]]:
        """Every wire between two, and whether it leads from the first to the second."""
        return [
            (wire, wire.source == one)
            for wire in self.wires
            if (wire.source, wire.target) in ((one, other), (other, one))
        ]

    def process(self, name: str) -> Process:
        """Of a node, a service or the application."""
        if name == APPLICATION:
            assert self.application is not None, "it needs PostgreSQL"
            return self.application
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
