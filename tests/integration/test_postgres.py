"""PostgreSQL as a resource manager, on a real server."""

import asyncpg
import pytest

from participants.operations import Operations, Refuse
from participants.postgres import PostgresBranch, PostgresManager, PreparedSettings
from participants.postgres_names import marker_statement, transaction_name
from tests.integration.prepared_contract import Bench, PreparedContract

pytest_plugins = ["tests.support.postgres"]

operations = Operations()


@operations.operation("pay")
async def pay(branch: PostgresBranch, account: str, amount: int) -> dict:
    left = await branch.fetchval(
        "UPDATE account SET balance = balance - $2 WHERE name = $1 AND balance >= $2 RETURNING balance", account, amount
    )
    if left is None:
        raise Refuse("poor")
    return {"left": left}


@operations.operation("look")
async def look(branch: PostgresBranch, account: str) -> dict:
    return {"balance": await branch.fetchval("SELECT balance FROM account WHERE name = $1", account)}


class PostgresBench(Bench):
    late_enlisting_fails = asyncpg.UniqueViolationError

    def __init__(self, dsn, **settings):
        super().__init__()
        self.dsn = dsn
        self.settings = PreparedSettings(**settings)

    def new_manager(self):
        return PostgresManager(self.dsn, operations, settings=self.settings)

    async def sql(self, statement, *arguments):
        return await self.other.fetch(statement, *arguments)

    async def balance(self, account):
        return await self.other.fetchval("SELECT balance FROM account WHERE name = $1", account)

    async def rows(self):
        rows = await self.sql("SELECT cluster, number, branch, state FROM outlast_branches ORDER BY number")
        return {
            (f"{row['cluster']}-{row['number'] >> 40}-{row['number'] & (1 << 40) - 1}", row["branch"]): row["state"]
            for row in rows
        }

    async def enlist(self, gid, branch, account, amount):
        connection = await asyncpg.connect(self.dsn)
        try:
            await connection.execute("BEGIN")
            await connection.execute("UPDATE account SET balance = balance - $2 WHERE name = $1", account, amount)
            await connection.execute(marker_statement(gid, branch))
            assert await connection.execute(f"PREPARE TRANSACTION '{transaction_name(gid, branch)}'") != "ROLLBACK"
        finally:
            await connection.close()


@pytest.fixture
async def bench(dsn):
    bench = PostgresBench(dsn)
    bench.other = await asyncpg.connect(dsn)
    await bench.other.execute(
        "CREATE TABLE account(name text PRIMARY KEY, balance int NOT NULL);"
        "INSERT INTO account VALUES ('ann', 100), ('bob', 100), ('cy', 100)"
    )
    await bench.start()
    yield bench
    await bench.stop()
    for row in await bench.sql("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
        await bench.other.execute(f"ROLLBACK PREPARED '{row['gid']}'")
    await bench.other.close()


class TestPostgres(PreparedContract):
    pass
