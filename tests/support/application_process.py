"""An application in a process of its own, which stops at the moment that it is told, and waits there to be killed.

    python -m tests.support.application_process <kind> <nodes> <dsn> <moment> <account> <timeout_s>

kind: of `SOURCES`.
moment: `working`, with its branch enlisted and its work done; `unprepared`, at the end of the block; `prepared`, with
its branch prepared and the commit not asked for yet. It says `here <gid>` then.
"""

import asyncio
import sys
from typing import Any

from coordinator.client import Client

MOMENTS = ("working", "unprepared", "prepared")


class Stops:
    """A source of branches that go no further than `moment`."""

    def __init__(self, source: Any, moment: str) -> None:
        self._source, self._moment = source, moment

    async def outlast_begin(self, gid: str, branch: str) -> "StoppingWork":
        return StoppingWork(await self._source.outlast_begin(gid, branch), gid, self._moment)


class StoppingWork:
    def __init__(self, work: Any, gid: str, moment: str) -> None:
        self._work, self._gid, self._moment = work, gid, moment

    @property
    def connection(self) -> Any:
        return self._work.connection

    async def prepare(self) -> None:
        if self._moment == "unprepared":
            await here(self._gid)
        await self._work.prepare()
        await here(self._gid)

    async def close(self) -> None:
        await self._work.close()


async def here(gid: str) -> None:
    print(f"here {gid}", flush=True)
    await asyncio.Event().wait()


STATEMENT = "UPDATE account SET balance = balance - 10 WHERE name = "


async def postgres(dsn: str) -> tuple[Any, Any]:
    import asyncpg

    from participants.postgres_application import Postgres

    async def work(connection: Any, account: str) -> None:
        await connection.execute(f"{STATEMENT}$1", account)

    return Postgres(await asyncpg.create_pool(dsn, min_size=1, max_size=2)), work


async def mariadb(dsn: str) -> tuple[Any, Any]:
    import asyncmy

    from participants.mariadb_application import MariaDb
    from participants.mariadb_session import Address

    async def work(connection: Any, account: str) -> None:
        async with connection.cursor() as cursor:
            await cursor.execute(f"{STATEMENT}%s", (account,))

    at = Address.parse(dsn)
    return MariaDb(await asyncmy.create_pool(unix_socket=at.socket, user=at.user, database=at.database)), work


SOURCES = {"postgres": postgres, "mariadb": mariadb}
"""What is enlisted, and the work on its connection."""


async def main(kind: str, nodes: str, dsn: str, moment: str, account: str, timeout_s: str) -> None:
    source, work = await SOURCES[kind](dsn)
    async with (
        Client(nodes.split(",")) as client,
        client.transaction(timeout_s=float(timeout_s)) as tx,
        tx.enlist("bank", Stops(source, moment)) as connection,
    ):
        await work(connection, account)
        if moment == "working":
            await here(tx.gid)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
