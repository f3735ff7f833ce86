"""Where TLS connections come in: so many handshakes at a time, and each with a deadline.

A server that is handed a TLS context by asyncio learns of a connection only once its handshake is over. Whoever
connects and says half a word, or nothing, is invisible until then, has a minute for it, and may do so a thousand times.
Here connections are counted from the moment they are accepted.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Final

_log = logging.getLogger(__name__)

_BREATH_S: Final = 0.2
"""Until connections are accepted again after that failed, as when descriptors have run out."""


class TlsDoor:
    """Listens, shakes hands, and gives each connection that comes of it to a protocol of its own.

    protocol: makes one. It sees a connection only after its handshake, so with what the context demands verified.
    handshakes_max: under way at once; more are closed at once. handshake_timeout_s: for each.
    """

    def __init__(
        self,
        protocol: Callable[[], asyncio.BaseProtocol],
        context: ssl.SSLContext,
        *,
        handshakes_max: int,
        handshake_timeout_s: float,
    ) -> None:
        assert handshakes_max >= 1
        assert handshake_timeout_s > 0
        self._protocol = protocol
        self._context = context
        self._handshakes_max = handshakes_max
        self._handshake_timeout_s = handshake_timeout_s
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._unclaimed: set[socket.socket] = set()
        """Accepted, and not in the hands of the event loop yet."""

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """Where it listens."""
        return tuple(self._sockets)

    async def start(self, host: str, port: int, *, backlog: int = 128) -> None:
        """Listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, kind, number, _, address in dict.fromkeys(found):
                listener = socket.socket(family, kind, number)
                self._sockets.append(listener)
                listener.setblocking(False)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(address)
                listener.listen(backlog)
        except OSError:
            await self.close()
            raise
        self._accepting = [loop.create_task(self._accept(listener)) for listener in self._sockets]

    async def close(self) -> None:
        """Listen no more, and break off handshakes. Connections whose handshake is over belong to their protocols."""
        tasks = [*self._accepting, *self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in (*self._sockets, *self._unclaimed):
            each.close()
        self._accepting, self._sockets = [], []
        self._unclaimed.clear()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                _log.error("no connection can be accepted: %s", error)
                await asyncio.sleep(_BREATH_S)
                continue
            if len(self._handshakes) >= self._handshakes_max:
                _log.warning("%d TLS handshakes are under way; closed another connection", len(self._handshakes))
                connection.close()
                continue
            self._unclaimed.add(connection)
            task = loop.create_task(self._shake(connection))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _shake(self, connection: socket.socket) -> None:
        who = _address(connection)
        self._unclaimed.discard(connection)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, connection, ssl=self._context, ssl_handshake_timeout=self._handshake_timeout_s
            )
        except ssl.SSLError as error:
            _log.warning("no TLS with %s: %s", who, error.reason or error)
        except (ConnectionResetError, BrokenPipeError) as error:
            # Who only looks whether somebody listens is no news.
            _log.debug("%s hung up in the TLS handshake: %s", who, error)
        except OSError as error:
            _log.warning("no TLS with %s: %s", who, error or "its handshake took too long")


def _address(connection: socket.socket) -> str:
    try:
        return f"{connection.getpeername()}"
    except OSError:
        return "somebody who has left"
