"""Connections to one PostgreSQL database, kept open and lent out.

asyncpg's own pool asks the server to reset a connection whenever it comes back, which is a round trip for each branch;
here that is part of the message that begins the next one. And a timer for each statement costs as much as sending it;
here one timer looks at all connections that are lent out, and breaks those that are not given back in time.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import asyncpg

from participants.manager import Unavailable

_log = logging.getLogger(__name__)

LOST: Final = (
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    OSError,
    TimeoutError,
)
"""The connection is gone, or no longer to be trusted."""


class Busy(Exception):
    """No connection was free in time."""


_LOOK_S: Final = 0.5
"""Between two looks at what is lent out."""


class Pool:
    """At most `size` connections, made by `connect` when they are first needed. A broken one is replaced."""

    def __init__(self, size: int, connect: Callable[[], Awaitable[Any]]) -> None:
        self._connect = connect
        self._free: list[Any] = []
        self._room = asyncio.Semaphore(size)
        self._lent: dict[Any, float] = {}
        """Until when, by the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def acquire(self, within_s: float, hold_s: float) -> Any:
        """A connection outside of any transaction, for `hold_s`: then it is broken. Raises `Busy`, `Unavailable`."""
        if self._room.locked():
            try:
                async with asyncio.timeout(within_s):
                    await self._room.acquire()
            except TimeoutError:
                raise Busy from None
        else:
            await self._room.acquire()
        try:
            connection = None
            while self._free and connection is None:
                found = self._free.pop()
                connection = None if found.is_closed() else found
            if self._closed:
                raise Unavailable("the connections are closed")
            if connection is None:
                connection = await self._connect()
        except BaseException:
            self._room.release()
            raise
        loop = asyncio.get_running_loop()
        self._lent[connection] = loop.time() + hold_s
        if self._timer is None:
            self._timer = loop.call_later(_LOOK_S, self._look)
        return connection

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection, until in list(self._lent.items()):
            if until < now and not connection.is_closed():
                _log.warning("a connection did not answer in time, and is given up")
                connection.terminate()
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look) if self._lent else None

    def release(self, connection: Any) -> None:
        """Give it back. One that is inside a transaction, or was closed, is dropped; so is the transaction."""
        if connection.is_closed() or connection.is_in_transaction() or self._closed:
            self.drop(connection)
            return
        del self._lent[connection]
        self._free.append(connection)
        self._room.release()

    def drop(self, connection: Any) -> None:
        """Give it up: the server ends whatever runs on it, sooner or later."""
        connection.terminate()
        del self._lent[connection]
        self._room.release()

    async def close(self) -> None:
        """Close all; those that are lent out are cut off."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        free, self._free = self._free, []
        for connection in free:
            try:
                await connection.close(timeout=1.0)
            except (*LOST, asyncpg.PostgresError) as error:
                _log.debug("a connection was gone before it was closed: %s", error)
        for connection in self._lent:
            connection.terminate()
