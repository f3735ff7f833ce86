"""A PostgreSQL connection of an application, as a branch of its transaction: asyncpg's pools and connections.

    async with client.transaction() as tx:
        async with tx.enlist("orders", pool) as connection: ...

What happens on the application's connection:

    BEGIN; <its own work>; <the marker>; PREPARE TRANSACTION '<the branch's name>'

The marker (`postgres_names`) is the last change, so nobody waits for the application's locks to abort the branch: once
it is aborted the marker fails, and the work is rolled back with it.

The application and the participant server must connect as the same user: PostgreSQL lets nobody else finish what is
prepared. `Postgres(pool, schema="app")` is for tables of branches that are not in `public`.
"""

import asyncio
import logging
from typing import Any, Final, Literal

import asyncpg

from participants.postgres_names import marker_statement, transaction_name

_log = logging.getLogger(__name__)

ROLL_BACK_WITHIN_S: Final = 5.0
"""A connection that takes longer is closed: the server then rolls back by itself."""

Isolation = Literal["read_committed", "repeatable_read", "serializable"]


class Postgres:
    """A pool or connection that can be enlisted.

    schema: where the participant has its table of branches. isolation: of the transaction; the database's default when
    left out.
    """

    def __init__(self, source: Any, *, schema: str = "public", isolation: Isolation | None = None) -> None:
        self._source = source
        self._schema = schema
        self._isolation = isolation

    async def outlast_begin(self, gid: str, branch: str) -> "PostgresWork":
        """Opens the branch's transaction. Raises ValueError for a name or a connection that cannot be used."""
        marker = marker_statement(gid, branch, schema=self._schema)
        pool = self._source if isinstance(self._source, asyncpg.Pool) else None
        if pool is None and self._source.is_in_transaction():
            raise ValueError("the connection is in a transaction already; give one that is not, or a pool")
        connection = self._source if pool is None else await pool.acquire()
        transaction = connection.transaction(isolation=self._isolation)
        try:
            await transaction.start()
        except BaseException:
            connection.terminate()
            if pool is not None:
                await pool.release(connection)
            raise
        statement = f"{marker}; PREPARE TRANSACTION '{transaction_name(gid, branch)}'"
        return PostgresWork(connection, transaction, pool, statement)


class PostgresWork:
    """A branch on its connection; `coordinator.client.OpenBranch` says what each method promises."""

    def __init__(self, connection: Any, transaction: Any, pool: Any, statement: str) -> None:
        self.connection = connection
        self._transaction = transaction
        self._pool = pool
        self._statement = statement
        self._prepared = False
        self._closed = False

    async def prepare(self) -> None:
        """Leaves the marker and prepares. Raises what asyncpg raises."""
        if not self.connection.is_in_transaction():
            raise asyncpg.InterfaceError("the branch's transaction was ended within its block, with all that it did")
        try:
            tag = await self.connection.execute(self._statement)
        except asyncpg.PostgresError:
            raise  # the server has undone it, and says so
        except BaseException:
            # What becomes of it is not known here. The server must not go on with it for nobody.
            self.connection.terminate()
            raise
        if tag != "PREPARE TRANSACTION":
            raise asyncpg.InFailedSQLTransactionError("the branch's transaction had failed, and was rolled back")
        self._prepared = True

    async def close(self) -> None:
        """Rolls back what is not prepared, and gives the connection back."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(ROLL_BACK_WITHIN_S):
                await self._end()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            _log.warning("a connection of an application was closed, because its transaction did not end: %r", error)
            self.connection.terminate()
        except BaseException:
            self.connection.terminate()
            raise
        finally:
            if self._pool is not None:
                await asyncio.shield(self._pool.release(self.connection))

    async def _end(self) -> None:
        if self.connection.is_closed():
            return
        if self._prepared:
            # asyncpg counts the transaction as open until it is ended by its own object: give that one to end.
            await self.connection.execute("BEGIN")
            await self._transaction.commit()
        elif self.connection.is_in_transaction():
            await self._transaction.rollback()
        else:
            # Ended behind asyncpg's back, which such a connection is then of no use to.
            self.connection.terminate()
