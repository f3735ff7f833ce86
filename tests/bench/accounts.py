"""The work of a branch in `tests.bench.databases`: one row's balance, on either kind of server."""

from typing import Any, Final

import asyncpg

from participants.mariadb import MariaDbBranch
from participants.mariadb_session import Address, connect
from participants.operations import Operations
from participants.postgres import PostgresBranch
from participants.prepared import PreparedSettings

ACCOUNTS: Final = 10_000
"""Rows, so many that clients seldom want the same one."""

ON_POSTGRES: Final = "UPDATE account SET cents = cents + $1 WHERE id = $2"
ON_MARIADB: Final = "UPDATE account SET cents = cents + %s WHERE id = %s"

on_postgres = Operations()
on_mariadb = Operations()


@on_postgres.operation("add")
async def _add_on_postgres(branch: PostgresBranch, account: str, cents: int) -> None:
    await branch.execute(ON_POSTGRES, cents, int(account))


@on_mariadb.operation("add")
async def _add_on_mariadb(branch: MariaDbBranch, account: str, cents: int) -> None:
    await branch.execute(ON_MARIADB, (cents, int(account)))


async def fill(dsn: str) -> None:
    """Makes the table, with nothing on any account."""
    create = "CREATE TABLE account (id BIGINT PRIMARY KEY, cents BIGINT NOT NULL)"
    rows = ", ".join(f"({number}, 0)" for number in range(ACCOUNTS))
    connection: Any
    if dsn.startswith("postgresql:"):
        connection = await asyncpg.connect(dsn)
        await connection.execute(f"{create}; INSERT INTO account VALUES {rows}")
        await connection.close()
        return
    connection = await connect(Address.parse(dsn), PreparedSettings())
    await connection.run(create)
    await connection.run(f"INSERT INTO account VALUES {rows}")
    await connection.quit()


async def total(dsn: str) -> int:
    """The sum of all balances."""
    connection: Any
    if dsn.startswith("postgresql:"):
        connection = await asyncpg.connect(dsn)
        found = await connection.fetchval("SELECT sum(cents) FROM account")
        await connection.close()
        return int(found)
    connection = await connect(Address.parse(dsn), PreparedSettings())
    rows = await connection.rows("SELECT SUM(cents) FROM account")
    await connection.quit()
    return int(rows[0][0])
