"""MariaDB servers for tests, and plain connections with them."""

import asyncio

import asyncmy
import pytest

from cluster.databases.mariadb import MariaDbServer
from cluster.databases.server import server_folder
from cluster.process import ProcessTrouble


class Connection:
    """A plain connection of a test: what the server does, not what the adapter makes of it."""

    def __init__(self, connection):
        self.raw = connection
        self.id = connection.thread_id()

    async def run(self, *statements):
        """The rows of the last one, or how many it changed."""
        for statement in statements:
            async with self.raw.cursor() as cursor:
                changed = await cursor.execute(statement)
                answer = list(await cursor.fetchall()) if cursor.description else changed
        return answer

    async def error(self, statement):
        """The number of the error that it raises."""
        with pytest.raises(asyncmy.errors.MySQLError) as caught:
            await self.run(statement)
        return caught.value.args[0]

    async def close(self):
        await self.raw.ensure_closed()


_LOOK_S = 0.15
"""What InnoDB shows of its transactions is a copy, made anew only when nobody has looked for a tenth of a second."""


async def innodb_shows(connection, condition):
    """Whether it shows a transaction with that; looks once, when there is something new to be seen."""
    await asyncio.sleep(_LOOK_S)
    return bool(await connection.run(f"SELECT 1 FROM information_schema.innodb_trx WHERE {condition}"))


async def connect(server, database):
    """As the owner of all."""
    raw = await asyncmy.connect(unix_socket=str(server.socket), user="root", database=database, autocommit=True)
    return Connection(raw)


def new_server(**settings) -> MariaDbServer:
    """One that is not started yet. Skips where MariaDB is not installed."""
    try:
        return MariaDbServer(
            server_folder("outlast-mdb-"), settings={name.replace("_", "-"): value for name, value in settings.items()}
        )
    except ProcessTrouble as error:
        pytest.skip(str(error))
