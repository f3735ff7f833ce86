"""Accounts on two database servers, and the operations that move money from one to the other."""

from participants.mariadb import MariaDbBranch
from participants.operations import Operations
from participants.postgres import PostgresBranch

on_postgres, on_mariadb = Operations(), Operations()

TABLES = (
    "CREATE TABLE account(id int PRIMARY KEY, cents bigint NOT NULL)",
    "CREATE TABLE moved(gid varchar(64) PRIMARY KEY, account int NOT NULL, cents bigint NOT NULL)",
)


@on_postgres.operation("move")
async def move_there(branch: PostgresBranch, account: int, cents: int) -> None:
    """Adds to one account, and writes it down."""
    assert await branch.execute("UPDATE account SET cents = cents + $1 WHERE id = $2", cents, account) == "UPDATE 1"
    await branch.execute("INSERT INTO moved VALUES ($1, $2, $3)", branch.gid, account, cents)


@on_mariadb.operation("move")
async def move_here(branch: MariaDbBranch, account: int, cents: int) -> None:
    """The same."""
    assert await branch.execute("UPDATE account SET cents = cents + %s WHERE id = %s", (cents, account)) == 1
    await branch.execute("INSERT INTO moved VALUES (%s, %s, %s)", (branch.gid, account, cents))
