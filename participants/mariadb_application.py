"""A MariaDB connection of an application, as a branch of its transaction: asyncmy's pools and connections.

    async with client.transaction() as tx:
        async with tx.enlist("stock", pool) as connection:
            async with connection.cursor() as cursor: ...

What happens on the application's connection:

    XA START <xid>; <its own work>; <the marker>; XA END <xid>; XA PREPARE <xid>; and it is closed

It is closed because a prepared branch belongs to its connection for as long as that one is open (`mariadb_names`). A
pool replaces it; a connection that was enlisted by itself is of no more use after its branch was prepared.

The marker is the last change, so nobody waits for the application's locks to abort the branch: once it is aborted the
marker fails, and the work is rolled back with it. After a statement that failed MariaDB would prepare what was done
before it: an application that goes on after an error of a statement must mean it.
"""

import asyncio
import logging
from typing import Any, Final

import asyncmy
import asyncmy.errors

from participants.mariadb_names import Xid, marker_statement, xid_of

_log = logging.getLogger(__name__)

ROLL_BACK_WITHIN_S: Final = 5.0
"""A connection that takes longer is closed: the server then rolls back by itself."""


class MariaDb:
    """A pool or connection that can be enlisted. The database is the one that the connection uses."""

    def __init__(self, source: Any) -> None:
        self._source = source

    async def outlast_begin(self, gid: str, branch: str) -> "MariaDbWork":
        """Opens the branch's transaction. Raises ValueError for a name or a connection that cannot be used."""
        pool = self._source if isinstance(self._source, asyncmy.Pool) else None
        if pool is None and self._source.get_transaction_status():
            raise ValueError("the connection is in a transaction already; give one that is not, or a pool")
        connection = self._source if pool is None else await pool.acquire()
        try:
            database, number, isolation = await _row(
                connection, "SELECT DATABASE(), CONNECTION_ID(), @@SESSION.tx_isolation"
            )
            if database is None:
                raise ValueError("the connection uses no database")
            if isolation == "SERIALIZABLE":
                # The marker reads the floor, and would lock it until the commit: which may have to raise it before.
                raise ValueError("a branch cannot be SERIALIZABLE in MariaDB; use another isolation level")
            xid = xid_of(gid, branch, database=database, connection=int(number))
            marker = marker_statement(gid, branch, database=database, connection=int(number))
            await _run(connection, f"XA START {xid.sql}")
        except BaseException:
            if pool is not None:
                connection.close()
                pool.release(connection)
            raise
        return MariaDbWork(connection, pool, xid, marker)


class MariaDbWork:
    """A branch on its connection; `coordinator.client.OpenBranch` says what each method promises."""

    def __init__(self, connection: Any, pool: Any, xid: Xid, marker: str) -> None:
        self.connection = connection
        self._pool = pool
        self._xid = xid
        self._marker = marker
        self._closed = False

    async def prepare(self) -> None:
        """Leaves the marker, prepares, and disconnects. Raises what asyncmy raises."""
        try:
            await _run(self.connection, self._marker)
            await _run(self.connection, f"XA END {self._xid.sql}")
            await _run(self.connection, f"XA PREPARE {self._xid.sql}")
            await self.connection.ensure_closed()
        except asyncmy.errors.MySQLError:
            raise  # the server says that it was not done: `close` rolls back
        except BaseException:
            # What becomes of it is not known here. Whatever is not prepared the server rolls back with the connection.
            self.connection.close()
            raise

    async def close(self) -> None:
        """Rolls back what is not prepared, and gives the connection back."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(ROLL_BACK_WITHIN_S):
                if self.connection.connected:
                    await _run(self.connection, f"XA END {self._xid.sql}")
                    await _run(self.connection, f"XA ROLLBACK {self._xid.sql}")
        except (asyncmy.errors.MySQLError, OSError, EOFError, TimeoutError) as error:
            _log.info("a connection of an application was closed, because its transaction did not end: %r", error)
            self.connection.close()
        except BaseException:
            self.connection.close()
            raise
        finally:
            if self._pool is not None:
                self._pool.release(self.connection)


async def _run(connection: Any, statement: str) -> None:
    async with connection.cursor() as cursor:
        await cursor.execute(statement)


async def _row(connection: Any, query: str) -> tuple[Any, ...]:
    async with connection.cursor() as cursor:
        await cursor.execute(query)
        row = await cursor.fetchone()
    # A pool may have been made with cursors that give dicts.
    return tuple(row.values()) if isinstance(row, dict) else tuple(row)
