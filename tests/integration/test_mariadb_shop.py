"""The shop on MariaDB, with real processes: the leader, the participants and the server are killed under load."""

import asyncio
from pathlib import Path

import pytest

from participants.shop import SERVICES, audit
from tests.integration.shop_on_server import ServerShop, Till, check_kills, check_till
from tests.integration.shop_world import APART
from tests.integration.world import eventually
from tests.support.mariadb import connect

pytest_plugins = ["tests.support.mariadb_fixtures"]
pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


@pytest.fixture
async def shop_dsns(mariadb, mariadb_database):
    """An empty database for each service."""
    return {name: await mariadb.create_database(f"{mariadb_database}_{name}") for name in SERVICES}


class MariaDbShop(ServerShop):
    """What the server itself shows, too."""

    def __init__(self, folder: Path, server, dsns: dict[str, str], *, seed: int) -> None:
        super().__init__(folder, dsns, seed=seed)
        self.server = server

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
    async with Till(tmp_path, shop_dsns) as till:
        await check_till(till)
    # Known bad: books that do not add up.
    connection = await connect(mariadb, shop_dsns["orders"].partition("?")[0].rpartition("/")[2])
    await connection.run("DELETE FROM purchase")
    await connection.close()
    assert any("no order" in each for each in audit(tmp_path).discrepancies)


@pytest.mark.long
async def test_no_order_is_lost_or_torn_when_leader_and_participants_are_killed(tmp_path, mariadb, shop_dsns):
    async with MariaDbShop(tmp_path, mariadb, shop_dsns, seed=21) as world:

        async def listed(gid: str) -> bool:
            return any(gid in row[3] for row in await world.listed())

        await check_kills(world, listed)


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
            await mariadb.start()
            await world.told(20)
        await world.verify()
