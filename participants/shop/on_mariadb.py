"""The shop on MariaDB: what `on_server` needs to know of it."""

import re
from collections.abc import Sequence
from typing import Any

from participants.mariadb import MariaDbBranch, MariaDbManager
from participants.mariadb_names import Xid, named
from participants.mariadb_session import Address, connect
from participants.prepared import PreparedSettings
from participants.shop.on_server import SCHEMAS, Kind, operations_on


class _Books:
    __slots__ = ("_branch", "gid")

    def __init__(self, branch: MariaDbBranch) -> None:
        self._branch, self.gid = branch, branch.gid

    async def one(self, sql: str, *arguments: Any) -> Sequence[Any] | None:
        return await self._branch.one(_with_places(sql), arguments)

    async def change(self, sql: str, *arguments: Any) -> int:
        return await self._branch.execute(_with_places(sql), arguments)


def _with_places(sql: str) -> str:
    return re.sub(r"\$\d+", "%s", sql)


_OPERATIONS = operations_on(_Books)


def _manager(service: str, dsn: str) -> MariaDbManager:
    return MariaDbManager(dsn, _OPERATIONS[service])


async def _fill(dsn: str, service: str, table: str, rows: Sequence[Sequence[Any]]) -> None:
    session = await connect(Address.parse(dsn), PreparedSettings())
    try:
        # Two that fill at once: one after the other. The lock ends with the connection.
        await session.run("SELECT GET_LOCK('outlast shop', 3)")
        for statement in SCHEMAS[service].split(";\n"):
            if statement.strip():
                await session.run(statement)
        await session.run("START TRANSACTION")
        for row in rows:
            await session.run(f"INSERT IGNORE INTO {table} VALUES ({', '.join(['%s'] * len(row))})", tuple(row))  # noqa: S608
        await session.run("COMMIT")
    finally:
        await session.quit()


async def _read(dsn: str, queries: Sequence[str]) -> tuple[list[str], list[list[tuple[Any, ...]]]]:
    address = Address.parse(dsn)
    session = await connect(address, PreparedSettings())
    try:
        found = []
        for _, gtrid_bytes, bqual_bytes, data in await session.rows("XA RECOVER"):
            cut = int(gtrid_bytes)
            its = named(Xid(data[:cut], data[cut : cut + int(bqual_bytes)]), database=address.database)
            if its is not None:
                found.append(its.key.gid)
        await session.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await session.run("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        rows = [list(await session.rows(query)) for query in queries]
        await session.run("COMMIT")
        return found, rows
    finally:
        await session.quit()


MARIADB = Kind(manager=_manager, fill=_fill, read=_read)
