"""`/v1/backup`: the whole ledger as one stream, taken while the cluster works.

The leader logs a barrier, so that all that was told to anybody before the call is in the copy, freezes the ledger,
which takes less than a millisecond, and encodes it piece by piece on another thread: the next piece is made when the
client has taken the one before. Nothing waits for a slow client but its own connection, which is given up when nothing
moves on it.
"""

import asyncio
import logging
from typing import Final

from aiohttp import web

from cluster.replication.clock import Clock
from coordinator.config import NodeConfig
from coordinator.copies import CopyHeader, cut, written
from coordinator.driver import Driver
from coordinator.errors import TooMany
from coordinator.ledger import Ledger
from coordinator.relay import Relay, break_off

_log = logging.getLogger(__name__)

COPY_TYPE: Final = "application/octet-stream"


class Copying:
    """The routes that carry whole ledgers."""

    def __init__(self, *, config: NodeConfig, driver: Driver, ledger: Ledger, clock: Clock, relay: Relay) -> None:
        self._config = config
        self._driver = driver
        self._ledger = ledger
        self._clock = clock
        self._relay = relay
        self._backups = 0
        """Streams under way."""

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        return [web.get("/v1/backup", self._backup)]

    async def _backup(self, request: web.Request) -> web.StreamResponse:
        async def here() -> web.StreamResponse:
            most = self._config.limits.max_backups
            if self._backups >= most:
                raise TooMany(
                    f"{most} backups are under way (max_backups); nothing was begun, try again later",
                    code="too_many_backups",
                )
            self._backups += 1
            try:
                await self._driver.barrier()
                return await self._stream(request)
            finally:
                self._backups -= 1

        return await self._relay.stream(request, here, upload=False, stall_s=self._config.timing.copy_stall_s)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        ledger = self._ledger
        newest = ledger.newest()
        header = CopyHeader(
            cluster=ledger.cluster,
            level=ledger.level,
            epoch=ledger.epoch,
            generation=self._config.generation,
            made_at=self._clock.wall_ms(),
            transactions=len(ledger),
            undecided=sum(txn.decision is None for txn in ledger.unfinished.values()),
            newest=None if newest is None else str(newest),
        )
        # In one turn with the header: nothing is applied between them.
        parts = written(header, cut(ledger.snapshot()()))
        answer = web.StreamResponse(headers={"Content-Type": COPY_TYPE})
        loop = asyncio.get_running_loop()
        try:
            await answer.prepare(request)
            while (part := await loop.run_in_executor(None, next, parts, None)) is not None:
                async with asyncio.timeout(self._config.timing.copy_stall_s):
                    await answer.write(part)
            await answer.write_eof()
        except (OSError, TimeoutError) as error:
            # It has no trailer, so nobody takes it for whole; and there is nobody left to tell.
            _log.warning("a backup was broken off: %s", error or "its reader has stalled")
            break_off(request)
        return answer
