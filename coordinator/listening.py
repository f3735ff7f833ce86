"""Where a node's API listens: in plain text, or behind TLS with a bound on handshakes.

What goes wrong before there is a request, such as a line that is no HTTP, never reaches the application. It is answered
here, in the same form as all else, and not logged as a defect: anybody can send it, as often as they like.
"""

import asyncio
import logging
import ssl
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, InvalidURLError, LineTooLong

from cluster.replication.door import TlsDoor
from coordinator.api import problem

_log = logging.getLogger(__name__)

HANDSHAKES_MAX: Final = 256
"""TLS handshakes of clients under way at once; more connections are closed at once."""

HANDSHAKE_TIMEOUT_S: Final = 5.0
_BACKLOG: Final = 1024


async def listen(runner: web.AppRunner, host: str, port: int, context: ssl.SSLContext | None) -> None:
    """Serve what `runner` has set up, until it is cleaned up. Raises OSError."""
    await _Site(runner, host, port, context).start()


class Connection(web.RequestHandler):
    """One connection with a client. What is no HTTP is answered as a problem, and is no defect of this node."""

    __slots__ = ()

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
        return await super().finish_response(request, resp, start_time)

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

    def __init__(self, runner: web.AppRunner, host: str, port: int, context: ssl.SSLContext | None) -> None:
        super().__init__(runner, ssl_context=context, backlog=_BACKLOG)
        self._where = (host, port)
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
        return Connection(self._runner.server, loop=asyncio.get_running_loop(), access_log=None)  # type: ignore[arg-type]

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
