"""What is possible at most, beside Outlast on databases: no service between the clients and the databases.

All in one process: as many clients as asked for, a participant's connections and settings, and of the statements only
those that do the work. `bare` prepares on both databases, and once both are prepared commits both; when it dies, what
is prepared then stays so for ever. `single` is a transaction of the first database, without any preparing.

    python -m tests.bench.bare '{"way": "bare", "dsns": [...], "clients": 64, "seconds": 4}'
"""

import asyncio
import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from itertools import count
from typing import Any

import asyncpg
import uvloop

from participants import mariadb_session
from participants.postgres_pool import Pool
from participants.prepared import PreparedSettings
from tests.bench.accounts import ACCOUNTS, ON_MARIADB, ON_POSTGRES
from tests.bench.load import Counts, report

_SETTINGS = PreparedSettings()
_PATIENCE_S = 10.0


class Database(ABC):
    """Transactions on one database."""

    @abstractmethod
    async def prepare(self, name: str, account: int) -> Any:
        """Does the work, and leaves it prepared; what `commit` needs."""

    @abstractmethod
    async def commit(self, name: str, held: Any) -> None:
        """Commits what is prepared."""

    @abstractmethod
    async def alone(self, account: int) -> None:
        """The work in a transaction of its own."""


class Postgres(Database):
    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._workers = Pool(_SETTINGS.work_connections, self._connect)
        self._finishers = Pool(_SETTINGS.finish_connections, self._connect)

    async def _connect(self) -> Any:
        return await asyncpg.connect(self._dsn)

    async def prepare(self, name: str, account: int) -> None:
        connection = await self._workers.acquire(_PATIENCE_S, _PATIENCE_S)
        try:
            await connection.execute("BEGIN")
            await connection.execute(ON_POSTGRES, 1, account)
            await connection.execute(f"PREPARE TRANSACTION '{name}'")
        finally:
            self._workers.release(connection)

    async def commit(self, name: str, held: None) -> None:
        connection = await self._finishers.acquire(_PATIENCE_S, _PATIENCE_S)
        try:
            await connection.execute(f"COMMIT PREPARED '{name}'")
        finally:
            self._finishers.release(connection)

    async def alone(self, account: int) -> None:
        connection = await self._workers.acquire(_PATIENCE_S, _PATIENCE_S)
        try:
            await connection.execute("BEGIN")
            await connection.execute(ON_POSTGRES, 1, account)
            await connection.execute("COMMIT")
        finally:
            self._workers.release(connection)


class MariaDb(Database):
    """MariaDB commits a branch soonest on the connection that has prepared it."""

    def __init__(self, dsn: str) -> None:
        address = mariadb_session.Address.parse(dsn)
        self._database = address.database
        most = _SETTINGS.work_connections + _SETTINGS.finish_connections
        self._pool = mariadb_session.Pool(most, lambda: mariadb_session.connect(address, _SETTINGS))

    async def prepare(self, name: str, account: int) -> mariadb_session.Session:
        session = await self._pool.acquire(_PATIENCE_S)
        xid = f"'{name}','{self._database}'"
        await session.script(f"XA START {xid}")
        await session.run(ON_MARIADB, (1, account))
        await session.script(f"XA END {xid}", f"XA PREPARE {xid}")
        return session

    async def commit(self, name: str, held: mariadb_session.Session) -> None:
        await held.script(f"XA COMMIT '{name}','{self._database}'")
        self._pool.release(held)

    async def alone(self, account: int) -> None:
        session = await self._pool.acquire(_PATIENCE_S)
        await session.script("START TRANSACTION")
        await session.run(ON_MARIADB, (1, account))
        await session.script("COMMIT")
        self._pool.release(session)


async def _client(number: int, plan: dict[str, Any], databases: list[Database], until_s: float, counts: Counts) -> None:
    rng = random.Random(number)
    warm_s = time.perf_counter() + plan.get("warm_up", 1.0)
    for sequence in count():
        started_s = time.perf_counter()
        if started_s >= until_s:
            return
        if plan["way"] == "single":
            await databases[0].alone(rng.randrange(ACCOUNTS))
        else:
            names = [f"bare-{os.getpid()}-{number}-{sequence}-{place}" for place in range(len(databases))]
            held = await asyncio.gather(
                *(each.prepare(name, rng.randrange(ACCOUNTS)) for each, name in zip(databases, names, strict=True))
            )
            await asyncio.gather(
                *(each.commit(name, its) for each, name, its in zip(databases, names, held, strict=True))
            )
        if started_s >= warm_s:
            counts.latencies_ms.append((time.perf_counter() - started_s) * 1000)
            counts.add("commit")


async def _main(plan: dict[str, Any]) -> None:
    databases = [Postgres(dsn) if dsn.startswith("postgresql:") else MariaDb(dsn) for dsn in plan["dsns"]]
    counts = Counts()
    until_s = time.perf_counter() + plan["seconds"] + plan.get("warm_up", 1.0)
    await asyncio.gather(*(_client(number, plan, databases, until_s, counts) for number in range(plan["clients"])))
    report(plan, counts)


if __name__ == "__main__":
    uvloop.run(_main(json.loads(sys.argv[1])))
