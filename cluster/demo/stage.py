"""The scenery: nodes, the shop's three services, each a process of its own, and a tap in front of each service."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

from cluster.demo.databases import Databases
from cluster.local import LocalCluster
from cluster.ports import free_ports
from cluster.service import Service
from cluster.tap import Tap
from participants.shop import inventory, orders, payments

SERVICES: Final = ("inventory", "payments", "orders")


class Stage:
    """Everything that runs, in `folder`; up when its context is entered, gone when it is left.

    nodes: 3, or 1 for a coordinator without replication.
    stock: pieces by SKU. balances_cents: by account.
    databases: servers that are up, and outlive this; None: the shop is in files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int,
        stock: dict[str, int],
        balances_cents: dict[str, int],
        databases: Databases | None = None,
    ) -> None:
        self._folder = folder
        self.databases = databases
        self.shop = folder / "shop"
        """Where the three databases are."""
        self.cluster = LocalCluster(folder / "cluster", nodes=nodes)
        self.taps: dict[str, Tap] = {}
        self._stock = stock
        self._balances_cents = balances_cents
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> "Stage":
        async with AsyncExitStack() as stack:
            if self.databases is not None:
                await self.databases.place(self.shop, prefix=self._folder.name)
            await asyncio.to_thread(self._seed)
            self.cluster.lay_out()
            services = [
                Service.shop(name, data=self.shop, port=port, coordinators=self.cluster.urls)
                for name, port in zip(SERVICES, free_ports(len(SERVICES)), strict=True)
            ]
            for service in services:
                stack.push_async_callback(service.stop)
                service.spawn()
            # Entered last, so that nodes stop first: what they still owe needs the services.
            for service in services:
                self.taps[service.name] = await stack.enter_async_context(Tap(service.url, name=service.name))
            await stack.enter_async_context(self.cluster)
            await asyncio.gather(*(service.ready() for service in services))
            for service in services:
                await service.register(self.cluster.urls, url=self.taps[service.name].url)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    def _seed(self) -> None:
        inventory.seed(self.shop, self._stock)
        payments.seed(self.shop, self._balances_cents)
        orders.seed(self.shop)

    def prepared_now(self) -> int:
        """Branches that the taps have seen prepared and not finished."""
        return sum(len(tap.prepared_now()) for tap in self.taps.values())

    def longest_prepared_s(self) -> float:
        """The longest time that any branch was, or has been by now, prepared, as seen on the wire."""
        return max(tap.longest_prepared_s() for tap in self.taps.values())
