"""The shop on PostgreSQL, with real processes: the leader, the participants and the server are killed under load."""

import asyncpg
import pytest

from cluster.databases.postgres import PostgresServer
from coordinator.protocol.messages import Refused
from participants.shop import SERVICES, audit
from tests.integration.shop_on_server import ServerShop, Till, check_kills, check_till

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


# ------------------------------------------------------------------------------------------------ the operations


@pytest.fixture
async def till(tmp_path, shop_dsns):
    async with Till(tmp_path, shop_dsns) as till:
        yield till


async def test_an_order_moves_goods_and_money_together(till):
    await check_till(till)


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
    async def listed(gid: str) -> bool:
        connection = await asyncpg.connect(shop_dsns["payments"])
        found = await connection.fetch("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        await connection.close()
        return any(gid in row["gid"] for row in found)

    async with ServerShop(tmp_path, shop_dsns, seed=11) as world:
        await check_kills(world, listed)


@pytest.mark.long
async def test_no_order_is_lost_or_torn_when_the_server_is_killed(tmp_path, postgres, shop_dsns):
    async with ServerShop(tmp_path, shop_dsns, seed=12) as world:
        # What participants say of a database that is away.
        world.expected_lines += [r"a batch of \d+ is unknown", r"cannot be listed"]
        async with world.load(clients=4):
            await world.told(30)
            await postgres.kill()
            await postgres.start()
            await world.told(30)
        await world.verify()
