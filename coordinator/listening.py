"""Where a node's API listens: in plain text, or behind TLS with a bound on handshakes.

Connections are counted, and who says nothing on one is cut off: a node must have room for those who do.

What goes wrong before there is a request, such as a line that is no HTTP, never reaches the application. It is answered
here, in the same form as all else, and not logged as a defect: anybody can send it, as often as they like.
"""

import asyncio
import logging
import ssl
from http import HTTPStatus
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, InvalidURLError, LineTooLong

from cluster.replication.door import TlsDoor
from coordinator.api import problem
from coordinator.config import Limits, Timing

_log = logging.getLogger(__name__)

HANDSHAKES_MAX: Final = 256
"""TLS handshakes of clients under way at once; more connections are closed at once."""

HANDSHAKE_TIMEOUT_S: Final = 5.0
_BACKLOG: Final = 1024

_LAST_WORD_S: Final = 1.0
"""For who is turned away to take its answer; with TLS a close would wait for an answer to it."""

_TELL_EVERY_S: Final = 60.0


async def listen(
    runner: web.AppRunner, host: str, port: int, context: ssl.SSLContext | None, *, limits: Limits, timing: Timing
) -> None:
    """Serve what `runner` has set up, until it is cleaned up. Raises OSError."""
    await _Site(runner, host, port, context, _Crowd(limits.max_connections, timing)).start()


class _Crowd:
    """How many are connected, and what holds for each of them."""

    def __init__(self, max_connections: int, timing: Timing) -> None:
        assert max_connections >= 1
        self.timing = timing
        self._max = max_connections
        self._count = 0
        self._told_at_s: float | None = None
        response = problem(
            503,
            "Too many connections",
            f"{max_connections} clients are connected (max_connections); nothing was done. Ask another node, or again",
            code="too_many_connections",
            retry_after_s=1.0,
        )
        assert isinstance(response.body, bytes)
        headers = {**response.headers, "Content-Length": str(len(response.body)), "Connection": "close"}
        lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.refusal: Final = "\r\n".join(lines).encode() + response.body

    def enter(self, now_s: float) -> bool:
        """Whether there is room for one more, who is counted then."""
        if self._count < self._max:
            self._count += 1
            return True
        # Whoever connects too often must not fill the log with it.
        if self._told_at_s is None or now_s >= self._told_at_s + _TELL_EVERY_S:
            self._told_at_s = now_s
            _log.warning("%d clients are connected (max_connections); more are turned away", self._max)
        return False

    def leave(self) -> None:
        """Whoever had entered is gone."""
        self._count -= 1
        assert self._count >= 0


class Connection(web.RequestHandler):
    """One connection with a client. What is no HTTP is answered as a problem, and is no defect of this node."""

    __slots__ = ("_crowd", "_cut_off")

    def __init__(self, server: web.Server, crowd: _Crowd) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, access_log=None, keepalive_timeout=crowd.timing.idle_s)  # type: ignore[arg-type]
        self._crowd = crowd
        self._cut_off: asyncio.TimerHandle | None = None
        """Set from the beginning to the end of a connection that was let in."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in, or turn it away."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        if self._crowd.enter(self._loop.time()):
            super().connection_made(transport)
            self._cut_off = self._loop.call_later(self._crowd.timing.first_request_s, self._check_first_request)
        else:
            self.force_close()  # hears nothing from now on
            transport.write(self._crowd.refusal)
            transport.close()
            self._loop.call_later(_LAST_WORD_S, transport.abort)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Make room for another one."""
        if self._cut_off is not None:
            self._cut_off.cancel()
            self._cut_off = None
            self._crowd.leave()
            super().connection_lost(exc)

    def _check_first_request(self) -> None:
        # From the first request on aiohttp closes what is idle, half a head included.
        if self._request_count == 0 and self.transport is not None:
            _log.debug("%s sent no request in time", self.peername)
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that could not be parsed; aiohttp's own logs a trace of it, and tells it in text."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already, so there can be no other")
        # What was sent is quoted nowhere in the log: it is long, and made up by whoever sends it.
        _log.debug("%s sent what is no HTTP: %s", request.remote, type(exc).__name__)
        status, detail = _what_is_wrong(exc)
        response = problem(status, HTTPStatus(status).phrase, detail, code="malformed")
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send it. An error that aiohttp raised outside of the application becomes a problem like all others."""
        if isinstance(resp, web.HTTPException):
            detail = "Expect: 100-continue is all that can be expected" if resp.status == 417 else resp.reason
            resp = problem(resp.status, HTTPStatus(resp.status).phrase, detail, code="malformed")
            resp.force_close()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            # A shutdown that has waited long enough cancels this, and aiohttp would set its result all the same.
            if self._handler_waiter is not None and self._handler_waiter.done():
                self._handler_waiter = None

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """A defect, with its trace; but a body that turns out to be none after its answer was sent is the client's."""
        error = kw.get("exc_info")
        if isinstance(error, (HttpProcessingError, web.RequestPayloadError, ConnectionError)):
            _log.debug("%s broke off a request: %s", self.peername, type(error).__name__)
        else:
            super().log_exception(*args, **kw)


def _what_is_wrong(error: HttpProcessingError) -> tuple[int, str]:
    """Status, and a text for people: the parser's own, up to where it quotes what was sent."""
    if isinstance(error, LineTooLong):
        return 431, "the request line, or a header, is too long"
    if isinstance(error, ContentEncodingError):
        return 415, "the body's Content-Encoding is none that is understood here"
    if isinstance(error, InvalidURLError):
        return 400, "this is no HTTP request: its target is no URL"
    lines = str(error.message).strip().splitlines()
    said = lines[0].strip().rstrip(":")[:200] if lines else ""
    if said.startswith("Too many headers"):
        return 431, "there are too many headers"
    return 400, f"this is no HTTP request: {said or type(error).__name__}"


class _Site(web.BaseSite):
    """Makes connections of our own kind; and with TLS, aiohttp's site leaves a handshake a minute, and counts none."""

    def __init__(
        self, runner: web.AppRunner, host: str, port: int, context: ssl.SSLContext | None, crowd: _Crowd
    ) -> None:
        super().__init__(runner, ssl_context=context, backlog=_BACKLOG)
        self._where = (host, port)
        self._crowd = crowd
        self._door: TlsDoor | None = None
        if context is not None:
            self._door = TlsDoor(
                self._connection, context, handshakes_max=HANDSHAKES_MAX, handshake_timeout_s=HANDSHAKE_TIMEOUT_S
            )

    @property
    def name(self) -> str:
        """For aiohttp's listings."""
        return "http{}://{}:{}".format("" if self._door is None else "s", *self._where)

    def _connection(self) -> Connection:
        assert self._runner.server is not None, "aiohttp refuses a runner that is not set up"
        return Connection(self._runner.server, self._crowd)

    async def start(self) -> None:
        """Listen. Raises OSError."""
        await super().start()
        if self._door is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._connection, *self._where, backlog=_BACKLOG)
        else:
            await self._door.start(*self._where, backlog=_BACKLOG)

    async def stop(self) -> None:
        """Listen no more."""
        if self._door is not None:
            await asyncio.shield(self._door.close())
        await super().stop()
