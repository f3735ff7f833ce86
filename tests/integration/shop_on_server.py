"""The shop on a database server: what its tests have in common, whichever server it is."""

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from coordinator.protocol.messages import Abort, Acked, Commit, Prepare, Prepared, Stamp
from participants.manager import Envelope
from participants.shop import SERVICES, audit, inventory, orders, payments
from participants.shop.places import put_on_server
from tests.integration.shop_world import APART, ShopWorld, decision_of
from tests.integration.world import eventually


class ServerShop(ShopWorld):
    """The shop, with all three databases on one server. dsns: by service."""

    def __init__(self, folder: Path, dsns: Mapping[str, str], *, seed: int) -> None:
        super().__init__(folder, seed=seed)
        self.dsns = dsns

    def lay_out(self) -> None:
        for name, dsn in self.dsns.items():
            put_on_server(self.books, name, dsn)
        super().lay_out()


class Till:
    """The three managers on one folder, without a network between. Use it as an async context manager."""

    def __init__(self, folder: Path, dsns: Mapping[str, str]) -> None:
        self.folder = folder
        for name, dsn in dsns.items():
            put_on_server(folder, name, dsn)
        inventory.seed(folder, {"tea": 10})
        payments.seed(folder, {"ann": 1000})
        orders.seed(folder)
        self.managers = {name: service.manager(folder) for name, service in SERVICES.items()}

    async def __aenter__(self) -> "Till":
        for manager in self.managers.values():
            await manager.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        for manager in self.managers.values():
            await manager.close()

    async def send(self, name: str, message: Any) -> Any:
        (answer,) = await self.managers[name].handle([Envelope(message, Stamp(epoch=1))])
        return answer

    async def prepare(self, name: str, gid: str, **payload: Any) -> Any:
        return await self.send(name, Prepare(gid=gid, branch=name, payload=json.dumps(payload).encode()))

    async def order(
        self, gid: str, decision: Any = Commit, *, quantity: int = 2, amount_cents: int = 250, **ids: str
    ) -> list[Any]:
        """The votes on one order; all that were asked are told the decision, if there is one."""
        goods = {"sku": "tea", "quantity": quantity}
        money = {"account": "ann", "amount_cents": amount_cents}
        votes = [
            await self.prepare("inventory", gid, op="reserve", **goods, **ids),
            await self.prepare("payments", gid, op="charge", **money, **ids),
            await self.prepare("orders", gid, op="place", **goods, **money, **ids),
        ]
        if decision is not None:
            for name in SERVICES:
                assert await self.send(name, decision(gid=gid, branch=name)) == Acked(gid=gid, branch=name)
        return votes


async def check_till(till: Till) -> None:
    """An order moves goods and money together, or nothing; what is there stays as it is."""
    votes = await till.order("shop-1-1", order_id="A-17")
    assert [json.loads(vote.result) for vote in votes if isinstance(vote, Prepared)] == [
        {"available": 8},
        {"balance_cents": 750},
        {"order_id": "A-17"},
    ]
    report = audit(till.folder)
    assert (report.ok, report.orders, report.sold, report.charged_cents, report.in_doubt) == (True, 1, 2, 250, 0)
    # It is filled once.
    inventory.seed(till.folder, {"tea": 99, "cup": 1})
    payments.seed(till.folder, {"ann": 1})
    orders.seed(till.folder)
    assert audit(till.folder).stock_initial == 11
    votes = await till.order("shop-1-2", Abort, order_id="A-17")
    assert [vote.reason for vote in votes] == ["duplicate_order"] * 3
    await till.order("shop-1-3", None)
    report = audit(till.folder)
    assert (report.ok, report.in_doubt, report.orders) == (True, 3, 1)
    for name in SERVICES:
        await till.send(name, Abort(gid="shop-1-3", branch=name))


async def check_kills(world: ServerShop, listed: Callable[[str], Awaitable[bool]]) -> None:
    """Leader and participants are killed under load. listed: whether the server shows branches of a gid as prepared."""
    async with world.load(clients=4):
        await world.told(30)
        # A branch is prepared, its decision is taken and held back, and everybody who knows of it dies.
        order, branches = world.checkout(APART, APART)
        hold = world.taps["payments"].hold(decision_of(world, order))
        told = await world.ask(order, branches)
        await hold.wait()
        assert told.decision == "commit"
        assert told.gid is not None
        gid = told.gid
        assert gid in await world.prepared("payments")
        assert await listed(gid)
        await world.kill_service("payments")
        leader = await world.cluster.wait_for_leader()
        await world.cluster.kill(leader.node)
        hold.drop()
        await world.new_leader(leader)
        await world.start_service("payments")

        async def resolved() -> bool:
            return gid not in await world.prepared("payments")

        await eventually(resolved, "the branch in doubt is resolved")
        await world.kill_service("inventory")
        await world.start_service("inventory")
        await world.cluster.start_node(leader.node)
        await world.told(30)
    await world.verify()
