"""An application in a process of its own that moves money between a PostgreSQL and a MariaDB database, for ever.

    python -m tests.support.application_load <nodes> <token or ""> <postgres dsn> <mariadb dsn> <seed>

It works on its own connections, and says what it was told: `committed <gid>`, `aborted <gid>` or `unknown <gid>`. Some
of its transactions have a deadline that they hardly meet, and some end in an exception of its own.
"""

import asyncio
import random
import sys
from typing import Any

import asyncmy
import asyncmy.errors
import asyncpg

from coordinator.client import Client, ClientError, OutcomeUnknown, TransactionAborted
from participants.mariadb_session import Address
from tests.support.transfers import ACCOUNTS

AT_ONCE = 4


class Enough(Exception):
    """The application thinks better of it."""


async def move(client: Client, here: Any, there: Any, rng: random.Random) -> str:
    """One transfer, and what came of it."""
    account, other, cents = rng.randrange(ACCOUNTS), rng.randrange(ACCOUNTS), rng.randrange(-99, 100)
    tx = client.transaction(timeout_s=rng.choice((5.0, 5.0, 5.0, 0.3)))
    try:
        async with tx:
            async with tx.enlist("here", here) as connection:
                await connection.execute("UPDATE account SET cents = cents - $1 WHERE id = $2", cents, account)
                await connection.execute("INSERT INTO moved VALUES ($1, $2, $3)", tx.gid, account, -cents)
            async with tx.enlist("there", there) as connection, connection.cursor() as cursor:
                await cursor.execute("UPDATE account SET cents = cents + %s WHERE id = %s", (cents, other))
                await cursor.execute("INSERT INTO moved VALUES (%s, %s, %s)", (tx.gid, other, cents))
            if rng.random() < 0.05:
                raise Enough
    except OutcomeUnknown:
        return f"unknown {_gid(tx)}"
    except TransactionAborted:
        return f"aborted {_gid(tx)}"
    except (Enough, ClientError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncmy.errors.MySQLError, OSError):
        # Left with an exception, so it was never asked to commit; or it was not even begun.
        return f"aborted {_gid(tx)}"
    return f"committed {tx.gid}"


def _gid(tx: Any) -> str:
    try:
        return str(tx.gid)
    except RuntimeError:
        return "-"


async def main(nodes: str, token: str, postgres: str, mariadb: str, seed: str) -> None:
    rng, at = random.Random(int(seed)), Address.parse(mariadb)
    here = asyncpg.create_pool(postgres, min_size=0, max_size=AT_ONCE, server_settings={"lock_timeout": "1000"})
    there = asyncmy.create_pool(
        minsize=0,
        maxsize=AT_ONCE,
        unix_socket=at.socket,
        user=at.user,
        database=at.database,
        init_command="SET SESSION innodb_lock_wait_timeout = 1, SESSION tx_isolation = 'READ-COMMITTED'",
    )
    async with here, there as pool, Client(nodes.split(","), token=token or None) as client:

        async def go_on() -> None:
            while True:
                print(await move(client, here, pool, rng), flush=True)

        await asyncio.gather(*(go_on() for _ in range(AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
