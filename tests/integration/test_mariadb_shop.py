"""The shop on MariaDB, with real processes: the leader, the participants and the server are killed under load."""

import asyncio
import json
from pathlib import Path

import pytest

from coordinator.protocol.messages import Abort, Acked, Commit, Prepare, Prepared, Stamp
from participants.manager import Envelope
from participants.shop import SERVICES, audit, inventory, orders, payments
from participants.shop.places import put_on_server
from tests.integration.shop_world import APART, ShopWorld, decision_of
from tests.integration.world import eventually
from tests.support.mariadb import connect

pytest_plugins = ["tests.support.mariadb_fixtures"]
pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


@pytest.fixture
async def shop_dsns(mariadb, mariadb_database):
    """An empty database for each service."""
    dsns = {}
    for name in SERVICES:
        await mariadb.create_database(f"{mariadb_database}_{name}")
        dsns[name] = f"mariadb://root@localhost/{mariadb_database}_{name}?socket={mariadb.socket}"
    return dsns


class MariaDbShop(ShopWorld):
    """The shop, with all three databases on one server."""

    def __init__(self, folder: Path, server, dsns: dict[str, str], *, seed: int) -> None:
        super().__init__(folder, seed=seed)
        self.server, self.dsns = server, dsns

    def lay_out(self) -> None:
        for name, dsn in self.dsns.items():
            put_on_server(self.books, name, dsn)
        super().lay_out()

    async def listed(self):
        connection = await connect(self.server, "mysql")
        found = await connection.run("XA RECOVER FORMAT='SQL'")
        await connection.close()
        return found

    async def verify(self, *, nodes=None):
        """Also: nothing is prepared."""
        await super().verify(nodes=nodes)
        assert await self.listed() == []


async def test_the_operations_and_the_audit(tmp_path, shop_dsns, mariadb):
    for name, dsn in shop_dsns.items():
        put_on_server(tmp_path, name, dsn)
    for _ in range(2):  # what is there stays as it is
        inventory.seed(tmp_path, {"tea": 10})
        payments.seed(tmp_path, {"ann": 1000})
        orders.seed(tmp_path)
    managers = {name: service.manager(tmp_path) for name, service in SERVICES.items()}

    async def send(name, message):
        (answer,) = await managers[name].handle([Envelope(message, Stamp(epoch=1))])
        return answer

    async def order(gid, decision, **ids):
        goods, money = {"sku": "tea", "quantity": 2}, {"account": "ann", "amount_cents": 250}
        payloads = {
            "inventory": {"op": "reserve", **goods},
            "payments": {"op": "charge", **money},
            "orders": {"op": "place", **goods, **money},
        }
        votes = [
            await send(name, Prepare(gid=gid, branch=name, payload=json.dumps({**payload, **ids}).encode()))
            for name, payload in payloads.items()
        ]
        for name in SERVICES if decision is not None else ():
            assert await send(name, decision(gid=gid, branch=name)) == Acked(gid=gid, branch=name)
        return votes

    for manager in managers.values():
        await manager.open()
    votes = await order("shop-1-1", Commit, order_id="A-17")
    assert [json.loads(vote.result) for vote in votes if isinstance(vote, Prepared)] == [
        {"available": 8},
        {"balance_cents": 750},
        {"order_id": "A-17"},
    ]
    votes = await order("shop-1-2", Abort, order_id="A-17")
    assert [vote.reason for vote in votes] == ["duplicate_order"] * 3
    await order("shop-1-3", None)
    report = audit(tmp_path)
    assert (report.ok, report.orders, report.sold, report.charged_cents, report.in_doubt) == (True, 1, 2, 250, 3)
    for name in SERVICES:
        await send(name, Abort(gid="shop-1-3", branch=name))
    for manager in managers.values():
        await manager.close()
    # Known bad: books that do not add up.
    connection = await connect(mariadb, shop_dsns["orders"].partition("?")[0].rpartition("/")[2])
    await connection.run("DELETE FROM purchase")
    await connection.close()
    assert any("no order" in each for each in audit(tmp_path).discrepancies)


@pytest.mark.long
async def test_no_order_is_lost_or_torn_when_leader_and_participants_are_killed(tmp_path, mariadb, shop_dsns):
    async with MariaDbShop(tmp_path, mariadb, shop_dsns, seed=21) as world:
        async with world.load(clients=4):
            await world.told(30)
            # A branch is prepared, its decision is taken and held back, and everybody who knows of it dies.
            order, branches = world.checkout(APART, APART)
            hold = world.taps["payments"].hold(decision_of(world, order))
            told = await world.ask(order, branches)
            await hold.wait()
            assert told.decision == "commit"
            assert told.gid in await world.prepared("payments")
            assert any(told.gid in row[3] for row in await world.listed())
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


async def test_a_participant_killed_while_its_prepare_waits_leaves_nothing(tmp_path, mariadb, shop_dsns):
    async with MariaDbShop(tmp_path, mariadb, shop_dsns, seed=23) as world:
        # Nothing can be prepared during a backup, nor a tombstone stored.
        world.expected_lines += [r"a batch of \d+ is unknown"]
        async with world.load(clients=2):
            await world.told(10)
        backup = await connect(mariadb, "mysql")
        await backup.run("BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT")
        order, branches = world.checkout(APART, APART)
        asking = asyncio.create_task(world.ask(order, branches, timeout_s=3.0))

        async def waits():
            return await backup.run(
                "SELECT id FROM information_schema.processlist WHERE info LIKE 'XA PREPARE %payments%'"
            )

        await eventually(waits, "the prepare waits for the backup")
        await world.kill_service("payments")
        assert await waits(), "the server does not know that its client is dead"
        await backup.run("BACKUP STAGE END")
        await backup.close()
        await world.start_service("payments")
        told = await asking
        assert told.decision is not None
        async with world.load(clients=2):
            await world.told(10)
        await world.verify()


@pytest.mark.long
async def test_no_order_is_lost_or_torn_when_the_server_is_killed(tmp_path, mariadb, shop_dsns):
    async with MariaDbShop(tmp_path, mariadb, shop_dsns, seed=22) as world:
        # What participants say of a database that is away.
        world.expected_lines += [r"a batch of \d+ is unknown", r"cannot be listed"]
        async with world.load(clients=4):
            await world.told(20)
            await mariadb.kill()
            await asyncio.sleep(0.2)
            await mariadb.start()
            await world.told(20)
        await world.verify()
