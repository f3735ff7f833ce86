"""The shop on a network that can be cut: each node on a host of its own, clients and services on another."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import pytest

from cluster.calls import Unreachable
from cluster.process import Program, arguments
from tests.integration.shop_world import ShopWorld
from tests.support.net_cluster import NetCluster
from tests.support.networks import HERE, Network, NoNetworks

NODES = ("n1", "n2", "n3")


@dataclass(slots=True)
class Watch:
    """What one node said of itself, again and again: (monotonic time, role, ready, epoch); None for no answer."""

    seen: list[tuple[float, str | None, bool, int]] = field(default_factory=list)

    @property
    def leads_now(self) -> bool:
        """By its last word."""
        return bool(self.seen) and self.seen[-1][1] == "leader"

    def last_led_s(self) -> float | None:
        """When it last said that it leads."""
        return max((at_s for at_s, role, _, _ in self.seen if role == "leader"), default=None)

    def times_elected(self) -> int:
        """How often it began to lead, as far as was seen."""
        roles = [role for _, role, _, _ in self.seen if role is not None]
        return sum(before != "leader" and after == "leader" for before, after in itertools.pairwise(roles))


class NetShopWorld(ShopWorld):
    """A `ShopWorld` on `network`. Clients reach every node unless a test cuts that, too."""

    def __init__(self, folder: Path, *, seed: int, slow_disks: bool = False) -> None:
        self.network = Network(*NODES)
        super().__init__(folder, seed=seed)
        self.cluster = NetCluster(folder / "c", self.network, slow_disks=slow_disks)
        self.host = self.network.here

    async def __aenter__(self) -> "NetShopWorld":
        try:
            self.network.__enter__()
        except NoNetworks as error:
            pytest.skip(str(error))
        try:
            await super().__aenter__()
        except BaseException:
            self.network._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Who is asked to stop shall be able to say good-bye.
            self.network.heal()
            await super().__aexit__(kind, error, trace)
        finally:
            self.network.__exit__(kind, error, trace)

    def lay_out(self) -> None:
        super().lay_out()
        tls = self.cluster.data / "tls"
        words = arguments("--coordinator-ca", tls / "ca.pem", "--coordinator-token-file", tls / "token")
        for service in self.services.values():
            program = service.process.program
            service.process.program = Program(
                module=program.module, arguments=(*program.arguments, *words), log=program.log
            )

    async def say(self, node: str) -> tuple[str | None, bool, int]:
        """Role, whether it is ready, and the epoch of what it has applied."""
        try:
            answer = await self.get(f"{self.cluster.url(node)}/v1/cluster", within_s=0.5)
        except Unreachable:
            return None, False, 0
        if answer.status != 200:
            return None, False, 0
        return answer.body["role"], answer.body["ready"], answer.body["epoch"] or 0

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[dict[str, Watch]]:
        """Ask every node all the time who it is."""
        watches = {node: Watch() for node in self.cluster.nodes}
        over = asyncio.Event()

        async def watch(node: str) -> None:
            while not over.is_set():
                role, ready, epoch = await self.say(node)
                # As late as it can have been true of what led: when the answer is here.
                watches[node].seen.append((time.monotonic(), role, ready, epoch))
                await asyncio.sleep(0.02)

        tasks = [asyncio.create_task(watch(node)) for node in self.cluster.nodes]
        try:
            yield watches
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def check_agreement(self, nodes: Sequence[str], *, at_most: int = 100) -> None:
        """TLS makes every question dearer."""
        await super().check_agreement(nodes, at_most=at_most)

    def cut_off(self, node: str, *, besides: Sequence[str] = (HERE,)) -> None:
        """From the other nodes; clients and services still reach it unless `besides` is empty."""
        self.network.cut_off(node, besides=besides)
