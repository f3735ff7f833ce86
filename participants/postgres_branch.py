"""What an operation is given: the names of its branch, and the connection inside the branch's transaction."""

import itertools
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

_CHANGES: Final = re.compile(r"\s*(?:insert|update|delete|merge)\b", re.IGNORECASE)
_CHANGED: Final = re.compile(r"(?:INSERT \d+|UPDATE|DELETE|MERGE|COPY) [1-9]")


class PostgresBranch:
    """asyncpg's calls, inside the branch's transaction; valid until the operation returns.

    gid, branch: the names of the branch. connection: asyncpg's own object, for what is not here; an operation must not
    begin, end or prepare a transaction on it, nor close it.
    """

    __slots__ = ("_over", "_savepoints", "branch", "connection", "gid", "wrote")

    def __init__(self, gid: str, branch: str, connection: Any) -> None:
        self.gid, self.branch, self.connection = gid, branch, connection
        self.wrote = False
        """It has certainly changed something; else the database is asked."""
        self._over = False
        self._savepoints = itertools.count(1)

    async def execute(self, query: str, *arguments: Any) -> str:
        """Runs SQL; several statements when there are no arguments. The tag of the last one, such as `UPDATE 1`."""
        tag = str(await self._usable().execute(query, *arguments))
        self.wrote = self.wrote or _CHANGED.match(tag) is not None
        return tag

    async def executemany(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        """Runs one statement for each of `rows`."""
        await self._usable().executemany(query, rows)

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        """All rows."""
        rows: list[Any] = await self._usable().fetch(query, *arguments)
        self._returned(query, bool(rows))
        return rows

    async def fetchrow(self, query: str, *arguments: Any) -> Any:
        """The first row, or None."""
        row = await self._usable().fetchrow(query, *arguments)
        self._returned(query, row is not None)
        return row

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        """The first column of the first row, or None."""
        row = await self.fetchrow(query, *arguments)
        return None if row is None else row[0]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """A savepoint: what happens inside is undone when an exception leaves it, and the branch goes on."""
        name = f"outlast_{next(self._savepoints)}"
        await self._usable().execute(f"SAVEPOINT {name}")
        try:
            yield
        except BaseException:
            await self._usable().execute(f"ROLLBACK TO SAVEPOINT {name}")
            raise
        await self._usable().execute(f"RELEASE SAVEPOINT {name}")

    def end(self) -> None:
        """The operation is over."""
        self._over = True

    def _returned(self, query: str, anything: bool) -> None:
        # A row that an INSERT, UPDATE or DELETE returns is a row that it wrote.
        self.wrote = self.wrote or (anything and _CHANGES.match(query) is not None)

    def _usable(self) -> Any:
        if self._over:
            raise RuntimeError("the operation is over")
        return self.connection
