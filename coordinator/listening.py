"""Where a node's API listens: in plain text, or behind TLS with a bound on handshakes."""

import asyncio
import ssl
from typing import Final

from aiohttp import web

from cluster.replication.door import TlsDoor

HANDSHAKES_MAX: Final = 256
"""TLS handshakes of clients under way at once; more connections are closed at once."""

HANDSHAKE_TIMEOUT_S: Final = 5.0
_BACKLOG: Final = 1024


async def listen(runner: web.AppRunner, host: str, port: int, context: ssl.SSLContext | None) -> None:
    """Serve what `runner` has set up, until it is cleaned up. Raises OSError."""
    if context is None:
        await web.TCPSite(runner, host, port, backlog=_BACKLOG).start()
    else:
        await _TlsSite(runner, host, port, context).start()


class _TlsSite(web.BaseSite):
    """aiohttp's own site leaves a handshake a whole minute, and does not count them."""

    def __init__(self, runner: web.AppRunner, host: str, port: int, context: ssl.SSLContext) -> None:
        super().__init__(runner, ssl_context=context, backlog=_BACKLOG)
        assert runner.server is not None, "aiohttp refuses a runner that is not set up"
        self._where = (host, port)
        self._door = TlsDoor(
            runner.server, context, handshakes_max=HANDSHAKES_MAX, handshake_timeout_s=HANDSHAKE_TIMEOUT_S
        )

    @property
    def name(self) -> str:
        """For aiohttp's listings."""
        return "https://{}:{}".format(*self._where)

    async def start(self) -> None:
        """Listen. Raises OSError."""
        await super().start()
        await self._door.start(*self._where, backlog=_BACKLOG)

    async def stop(self) -> None:
        """Listen no more."""
        await asyncio.shield(self._door.close())
        await super().stop()
