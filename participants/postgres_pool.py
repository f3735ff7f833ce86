"""Connections to one PostgreSQL database, kept open and lent out.

asyncpg's own pool asks the server to reset a connection whenever it comes back, which is a round trip for each branch;
here that is part of the message that begins the next one.
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


class Pool:
    """At most `size` connections, made by `connect` when they are first needed. A broken one is replaced."""

    def __init__(self, size: int, connect: Callable[[], Awaitable[Any]]) -> None:
        self._connect = connect
        self._free: list[Any] = []
        self._room = asyncio.Semaphore(size)
        self._all: set[Any] = set()
        self._closed = False

    async def acquire(self, within_s: float) -> Any:
        """A connection outside of any transaction. Raises `Busy`, `Unavailable`."""
        if self._room.locked():
            try:
                async with asyncio.timeout(within_s):
                    await self._room.acquire()
            except TimeoutError:
                raise Busy from None
        else:
            await self._room.acquire()
        try:
            while self._free:
                connection = self._free.pop()
                if not connection.is_closed():
                    return connection
                self._all.discard(connection)
            if self._closed:
                raise Unavailable("the connections are closed")
            connection = await self._connect()
            self._all.add(connection)
            return connection
        except BaseException:
            self._room.release()
            raise

    def release(self, connection: Any) -> None:
        """Give it back. One that is inside a transaction, or was closed, is dropped; so is the transaction."""
        if connection.is_closed() or connection.is_in_transaction() or self._closed:
            self.drop(connection)
            return
        self._free.append(connection)
        self._room.release()

    def drop(self, connection: Any) -> None:
        """Give it up: the server ends whatever runs on it, sooner or later."""
        connection.terminate()
        self._all.discard(connection)
        self._room.release()

    async def close(self) -> None:
        """Close all; those that are lent out are cut off."""
        self._closed = True
        free, self._free = self._free, []
        for connection in free:
            self._all.discard(connection)
            try:
                await connection.close(timeout=1.0)
            except (*LOST, asyncpg.PostgresError) as error:
                _log.debug("a connection was gone before it was closed: %s", error)
        for connection in self._all:
            connection.terminate()
        self._all.clear()
