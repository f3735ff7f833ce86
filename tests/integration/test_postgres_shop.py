"""The shop on PostgreSQL, with real processes: the leader, the participants and the server are killed under load."""

import json
from pathlib import Path

import asyncpg
import pytest

from cluster.databases.postgres import PostgresServer
from coordinator.protocol.messages import Abort, Acked, Commit, Prepare, Prepared, Refused, Stamp
from participants.manager import Envelope
from participants.shop import SERVICES, audit, inventory, orders, payments
from participants.shop.places import put_on_server
from tests.integration.shop_world import APART, ShopWorld, decision_of
from tests.integration.world import eventually

pytest_plugins = ["tests.support.postgres"]
pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


async def emptied(postgres: PostgresServer) -> dict[str, str]:
    """An empty database for each service; their DSNs."""
    dsns = {}
    for name in SERVICES:
        if name not in postgres.databases:
            await postgres.create_database(name)
        dsns[name] = postgres.dsn(name)
        connection = await asyncpg.connect(dsns[name])
        for row in await connection.fetch("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
            await connection.execute(f"ROLLBACK PREPARED '{row['gid']}'")
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        await connection.close()
    return dsns


@pytest.fixture
async def shop_dsns(postgres):
    return await emptied(postgres)


class PostgresShop(ShopWorld):
    """The shop, with all three databases on one server."""

    def __init__(self, folder: Path, dsns: dict[str, str], *, seed: int) -> None:
        super().__init__(folder, seed=seed)
        self.dsns = dsns

    def lay_out(self) -> None:
        for name, dsn in self.dsns.items():
            put_on_server(self.books, name, dsn)
        super().lay_out()


# ------------------------------------------------------------------------------------------------ the operations


class Till:
    """The three managers on one folder, without a network between."""

    def __init__(self, folder, dsns):
        self.folder = folder
        for name, dsn in dsns.items():
            put_on_server(folder, name, dsn)
        inventory.seed(folder, {"tea": 10})
        payments.seed(folder, {"ann": 1000})
        orders.seed(folder)
        self.managers = {name: service.manager(folder) for name, service in SERVICES.items()}

    async def send(self, name, message):
        (answer,) = await self.managers[name].handle([Envelope(message, Stamp(epoch=1))])
        return answer

    async def prepare(self, name, gid, **payload):
        return await self.send(name, Prepare(gid=gid, branch=name, payload=json.dumps(payload).encode()))

    async def order(self, gid, decision=Commit, *, quantity=2, amount_cents=250, **ids):
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


@pytest.fixture
async def till(tmp_path, shop_dsns):
    till = Till(tmp_path, shop_dsns)
    for manager in till.managers.values():
        await manager.open()
    yield till
    for manager in till.managers.values():
        await manager.close()


async def test_an_order_moves_goods_and_money_together(till):
    votes = await till.order("shop-1-1", order_id="A-17")
    assert [json.loads(vote.result) for vote in votes if isinstance(vote, Prepared)] == [
        {"available": 8},
        {"balance_cents": 750},
        {"order_id": "A-17"},
    ]
    report = audit(till.folder)
    assert (report.ok, report.orders, report.sold, report.charged_cents, report.in_doubt) == (True, 1, 2, 250, 0)
    # It is filled once: what is there stays as it is.
    inventory.seed(till.folder, {"tea": 99, "cup": 1})
    assert audit(till.folder).stock_initial == 11
    votes = await till.order("shop-1-2", Abort, order_id="A-17")
    assert [vote.reason for vote in votes] == ["duplicate_order"] * 3
    await till.order("shop-1-3", None)
    report = audit(till.folder)
    assert (report.ok, report.in_doubt, report.orders) == (True, 3, 1)


@pytest.mark.parametrize(
    ("service", "payload", "reason"),
    [
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": 11}, "out_of_stock"),
        ("inventory", {"op": "reserve", "sku": "gold", "quantity": 1}, "unknown_sku"),
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": 0}, "bad_arguments"),
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": 1, "order_id": "a\0b"}, "bad_arguments"),
        ("payments", {"op": "charge", "account": "ann", "amount_cents": 1001}, "insufficient_funds"),
        ("payments", {"op": "charge", "account": "eve", "amount_cents": 1}, "unknown_account"),
        ("orders", {"op": "place", "account": "ann", "sku": "tea", "quantity": 1}, "bad_arguments"),
    ],
)
async def test_what_cannot_be_is_refused_for_good(till, service, payload, reason):
    refused = await till.prepare(service, "shop-1-1", **payload)
    assert isinstance(refused, Refused)
    assert refused.reason.startswith(reason)
    assert not refused.retryable


@pytest.mark.parametrize(
    ("service", "tampering", "complaint"),
    [
        ("orders", "DELETE FROM purchase", "no order"),
        ("inventory", "UPDATE stock SET available = available - 1", "do not make the initial"),
        ("payments", "UPDATE charge SET amount_cents = 1", "1 charged"),
    ],
)
async def test_an_audit_finds_what_was_tampered_with(till, shop_dsns, service, tampering, complaint):
    await till.order("shop-1-1")
    connection = await asyncpg.connect(shop_dsns[service])
    await connection.execute(tampering)
    await connection.close()
    assert any(complaint in each for each in audit(till.folder).discrepancies)


# ------------------------------------------------------------------------------------------------ kills under load


async def test_no_order_is_lost_or_torn_when_leader_and_participants_are_killed(tmp_path, shop_dsns):
    async with PostgresShop(tmp_path, shop_dsns, seed=11) as world:
        async with world.load(clients=4):
            await world.told(30)
            # A branch is prepared, its decision is taken and held back, and everybody who knows of it dies.
            order, branches = world.checkout(APART, APART)
            hold = world.taps["payments"].hold(decision_of(world, order))
            told = await world.ask(order, branches)
            await hold.wait()
            assert told.decision == "commit"
            assert told.gid in await world.prepared("payments")
            await world.kill_service("payments")
            leader = await world.cluster.wait_for_leader()
            await world.cluster.kill(leader.node)
            hold.drop()
            await world.new_leader(leader)
            await world.start_service("payments")

            async def resolved() -> bool:
                return told.gid not in await world.prepared("payments")

            await eventually(resolved, "the branch in doubt is resolved")
            await world.kill_service("inventory")
            await world.start_service("inventory")
            await world.cluster.start_node(leader.node)
            await world.told(30)
        await world.verify()


@pytest.mark.long
async def test_no_order_is_lost_or_torn_when_the_server_is_killed(tmp_path, postgres, shop_dsns):
    async with PostgresShop(tmp_path, shop_dsns, seed=12) as world:
        # What participants say of a database that is away.
        world.expected_lines += [r"a batch of \d+ is unknown", r"cannot be listed"]
        async with world.load(clients=4):
            await world.told(30)
            await postgres.kill()
            await postgres.start()
            await world.told(30)
        await world.verify()
