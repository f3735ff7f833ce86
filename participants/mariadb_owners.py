"""Which connections still have an open transaction in InnoDB: the proof that a branch's owner has let go of it.

A prepared branch belongs to its connection until that one has ended; others are told that there is none of this name
(1397). When the connection ends, the server first offers the branch to everybody, and a moment later takes it away from
the connection. Whoever asks to commit it in between is told that it was done, *and it was not*: the branch has lost its
name, holds its locks, and comes back as prepared when the server is started again. So nobody here finishes a branch
that another connection has prepared before InnoDB itself no longer shows that connection.

InnoDB shows a copy that may be old: it makes a new one only when nobody has looked for a tenth of a second. A look
counts only if it shows a transaction that was begun for it, on a connection that is new. And as the participants of
one server would keep each other's copies old, only one of them looks at a time: a named lock sees to that.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import asyncmy.errors

from participants.manager import Unavailable
from participants.mariadb_errors import LOST, said
from participants.mariadb_session import Session

_PAUSE_S: Final = 0.12
_LOOKS: Final = 20
_BLOCKING_LOOKS: Final = 5
_LOCK: Final = "SELECT GET_LOCK('outlast_owners', 3)"


class Owners:
    """Looks, once for all who wait for a look."""

    def __init__(self, dial: Callable[[], Awaitable[Session]]) -> None:
        self._dial = dial
        self._looking = asyncio.Lock()
        self._begun = 0
        self._ended = 0
        self._seen: frozenset[int] = frozenset()

    async def now(self) -> frozenset[int]:
        """The ids of connections with open transactions, at some moment after this call. Raises `Unavailable`."""
        arrived = self._begun
        async with self._looking:
            if self._ended <= arrived:
                self._begun += 1
                self._seen = await self._look()
                self._ended = self._begun
            return self._seen

    async def blocking(self, waiter: int) -> frozenset[int]:
        """The ids of connections that hold what connection `waiter` waits for, once it does. Raises `Unavailable`."""
        session = await self._dial()
        find = (
            "SELECT b.trx_mysql_thread_id FROM information_schema.innodb_lock_waits AS w"
            " JOIN information_schema.innodb_trx AS r ON r.trx_id = w.requesting_trx_id"
            " JOIN information_schema.innodb_trx AS b ON b.trx_id = w.blocking_trx_id WHERE r.trx_mysql_thread_id = %s"
        )
        try:
            await session.run(_LOCK)
            for _ in range(_BLOCKING_LOOKS):
                await asyncio.sleep(_PAUSE_S)
                found = frozenset(int(row[0] or 0) for row in await session.rows(find, (waiter,))) - {0}
                if found:
                    return found
        except (asyncmy.errors.MySQLError, *LOST) as error:
            raise Unavailable(f"who holds a lock was not found out: {said(error)}") from error
        finally:
            await session.quit()
        return frozenset()

    async def _look(self) -> frozenset[int]:
        session = await self._dial()
        try:
            # Whoever does not get the lock in time looks all the same. It ends with the connection.
            await session.run(_LOCK)
            await session.script("START TRANSACTION", "SELECT 1 FROM outlast_horizons LIMIT 1")
            for _ in range(_LOOKS):
                rows = await session.rows("SELECT trx_mysql_thread_id FROM information_schema.innodb_trx")
                seen = frozenset(int(row[0] or 0) for row in rows)
                if session.id in seen:
                    return seen - {0, session.id}
                await asyncio.sleep(_PAUSE_S)
        except (asyncmy.errors.MySQLError, *LOST) as error:
            raise Unavailable(f"the owners of branches were not found out: {said(error)}") from error
        finally:
            await session.quit()
        raise Unavailable(
            "information_schema.INNODB_TRX stays old because somebody reads it all the time: look there less often than"
            " ten times a second"
        )
