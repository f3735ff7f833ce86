"""MariaDB as a resource manager, on a real server."""

import asyncmy
import pytest

from participants.mariadb import MariaDbBranch, MariaDbManager, MariaDbSettings
from participants.mariadb_names import marker_statement, xid_of
from participants.operations import Operations, Refuse
from tests.integration.prepared_contract import Bench, PreparedContract
from tests.support.mariadb import connect

pytest_plugins = ["tests.support.mariadb_fixtures"]

operations = Operations()


@operations.operation("pay")
async def pay(branch: MariaDbBranch, account: str, amount: int) -> dict:
    changed = await branch.execute(
        "UPDATE account SET balance = balance - %s WHERE name = %s AND balance >= %s", (amount, account, amount)
    )
    if not changed:
        raise Refuse("poor")
    return {"left": (await branch.one("SELECT balance FROM account WHERE name = %s", (account,)))[0]}


@operations.operation("look")
async def look(branch: MariaDbBranch, account: str) -> dict:
    return {"balance": (await branch.one("SELECT balance FROM account WHERE name = %s", (account,)))[0]}


class MariaDbBench(Bench):
    late_enlisting_fails = asyncmy.errors.IntegrityError

    def __init__(self, server, database, **settings):
        super().__init__()
        self.server, self.database = server, database
        self.settings = MariaDbSettings(**settings)

    @property
    def dsn(self):
        return f"mariadb://root@localhost/{self.database}?socket={self.server.socket}"

    def new_manager(self):
        return MariaDbManager(self.dsn, operations, settings=self.settings)

    async def connect(self):
        return await connect(self.server, self.database)

    async def sql(self, *statements):
        return await self.other.run(*statements)

    async def balance(self, account):
        return (await self.sql(f"SELECT balance FROM account WHERE name = '{account}'"))[0][0]

    async def rows(self):
        rows = await self.sql("SELECT cluster, number, branch, state FROM outlast_branches ORDER BY number")
        return {(f"{row[0]}-{row[1] >> 40}-{row[1] & (1 << 40) - 1}", row[2]): row[3] for row in rows}

    async def enlist(self, gid, branch, account, amount):
        connection = await self.connect()
        try:
            xid = xid_of(gid, branch, database=self.database, connection=connection.id).sql
            await connection.run(
                f"XA START {xid}",
                f"UPDATE account SET balance = balance - {amount} WHERE name = '{account}'",
                marker_statement(gid, branch, database=self.database, connection=connection.id),
                f"XA END {xid}",
                f"XA PREPARE {xid}",
            )
        finally:
            await connection.close()


ACCOUNTS = (
    "CREATE TABLE account(name varchar(20) PRIMARY KEY, balance int NOT NULL) ENGINE=InnoDB",
    "INSERT INTO account VALUES ('ann', 100), ('bob', 100), ('cy', 100)",
)


@pytest.fixture
async def bench(mariadb, mariadb_database):
    bench = MariaDbBench(mariadb, mariadb_database)
    bench.other = await bench.connect()
    await bench.sql(*ACCOUNTS)
    await bench.start()
    yield bench
    await bench.restart()
    for each in await bench.manager.in_doubt():
        await bench.abort(each.gid)
    await bench.stop()
    assert await bench.sql("XA RECOVER") == []
    await bench.other.close()


class TestMariaDb(PreparedContract):
    pass
