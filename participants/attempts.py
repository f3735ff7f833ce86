"""Connecting to a database that may be away: one attempt at a time, and not all the time.

While it is away, all that is owed to its branches is asked for again and again, and each time somebody would connect in
vain. So as long as the last attempt has failed, one is made at a time, and not before `REST_S` have passed since;
everybody else hears at once how that one ended.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from participants.manager import Unavailable

REST_S: Final = 0.1
"""Between the end of an attempt that has failed and the next one."""

_Connection = TypeVar("_Connection")


class Attempts(Generic[_Connection]):
    """Makes connections by `connect`, which raises `Unavailable`. Used from one event loop."""

    def __init__(self, connect: Callable[[], Awaitable[_Connection]]) -> None:
        self._connect = connect
        self._trouble: str | None = None
        """How the last attempt that ended has failed; None: it has not."""
        self._again_at = 0.0
        self._trying = False

    async def connect(self) -> _Connection:
        """A connection. Raises `Unavailable`, and whatever else `connect` raises."""
        if self._trouble is None:
            return await self._attempt()
        if self._trying or asyncio.get_running_loop().time() < self._again_at:
            raise Unavailable(self._trouble)
        self._trying = True
        try:
            return await self._attempt()
        finally:
            self._trying = False

    async def _attempt(self) -> _Connection:
        try:
            connection = await self._connect()
        except Unavailable as error:
            self._trouble, self._again_at = str(error), asyncio.get_running_loop().time() + REST_S
            raise
        self._trouble = None
        return connection
