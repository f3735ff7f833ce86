"""The shop on PostgreSQL: what `on_server` needs to know of it."""

from collections.abc import Sequence
from typing import Any

import asyncpg

from participants.postgres import PostgresBranch, PostgresManager
from participants.postgres_names import PREFIX, branch_of
from participants.shop.on_server import SCHEMAS, Kind, operations_on


class _Books:
    __slots__ = ("_branch", "gid")

    def __init__(self, branch: PostgresBranch) -> None:
        self._branch, self.gid = branch, branch.gid

    async def one(self, sql: str, *arguments: Any) -> Sequence[Any] | None:
        row: Sequence[Any] | None = await self._branch.fetchrow(sql, *arguments)
        return row

    async def change(self, sql: str, *arguments: Any) -> int:
        return int((await self._branch.execute(sql, *arguments)).rpartition(" ")[2])


_OPERATIONS = operations_on(_Books)


def _manager(service: str, dsn: str) -> PostgresManager:
    return PostgresManager(dsn, _OPERATIONS[service])


async def _fill(dsn: str, service: str, table: str, rows: Sequence[Sequence[Any]]) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            # Two that fill at once: one after the other.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('outlast shop'))")
            await connection.execute(SCHEMAS[service])
            if rows:
                places = ", ".join(f"${number + 1}" for number in range(len(rows[0])))
                insert = f"INSERT INTO {table} VALUES ({places}) ON CONFLICT DO NOTHING"  # noqa: S608  # our own words
                await connection.executemany(insert, rows)
    finally:
        await connection.close()


async def _read(dsn: str, queries: Sequence[str]) -> tuple[list[str], list[list[tuple[Any, ...]]]]:
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            listed = await connection.fetch(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND starts_with(gid, $1)", PREFIX
            )
            rows = [[tuple(row) for row in await connection.fetch(query)] for query in queries]
        found = [branch_of(row["gid"]) for row in listed]
        return [key.gid for key in found if key is not None], rows
    finally:
        await connection.close()


POSTGRES = Kind(manager=_manager, fill=_fill, read=_read)
