"""Where a participant listens: connections are counted, and who says nothing on one is cut off.

What is no HTTP is answered with a problem, as all else. aiohttp answers that in plain text, and logs a trace of it as
if it were a defect; but anybody can send it, and often.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong

from participants.settings import ServerSettings

_log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S: Final = 5.0

Malformed = Callable[[int, str], web.Response]
"""Makes the answer, of a status and a text for people."""


_LAST_WORD_S: Final = 1.0
"""For who is turned away to take its answer; with TLS a close would wait for an answer to it."""

_TELL_EVERY_S: Final = 60.0


class Crowd:
    """How many are connected, and what is said to one too many: `refusal`, and then the connection is closed."""

    def __init__(self, settings: ServerSettings, refusal: web.Response) -> None:
        self.settings = settings
        self._count = 0
        self._told_at_s: float | None = None
        assert isinstance(refusal.body, bytes)
        headers = {**refusal.headers, "Content-Length": str(len(refusal.body)), "Connection": "close"}
        lines = [
            f"HTTP/1.1 {refusal.status} {refusal.reason}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.refusal: Final = "\r\n".join([*lines, "", ""]).encode() + refusal.body

    def enter(self, now_s: float) -> bool:
        """Whether there is room for one more, who is counted then."""
        if self._count < self.settings.connections_limit:
            self._count += 1
            return True
        # Whoever connects too often must not fill the log with it.
        if self._told_at_s is None or now_s >= self._told_at_s + _TELL_EVERY_S:
            self._told_at_s = now_s
            limit = self.settings.connections_limit
            _log.warning("%d callers are connected (connections_limit); more are turned away", limit)
        return False

    def leave(self) -> None:
        """Whoever had entered is gone."""
        self._count -= 1
        assert self._count >= 0


class Connection(web.RequestHandler):
    """One connection with a caller."""

    __slots__ = ("_crowd", "_cut_off", "_malformed")

    def __init__(self, manager: web.Server, malformed: Malformed, crowd: Crowd) -> None:
        loop = asyncio.get_running_loop()
        idle_s = crowd.settings.idle_within_s
        super().__init__(manager, loop=loop, access_log=None, keepalive_timeout=idle_s)  # type: ignore[arg-type]
        self._malformed = malformed
        self._crowd = crowd
        self._cut_off: asyncio.TimerHandle | None = None
        """Set from the beginning to the end of a connection that was let in."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in, or turn it away."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        if self._crowd.enter(self._loop.time()):
            super().connection_made(transport)
            within_s = self._crowd.settings.first_request_within_s
            self._cut_off = self._loop.call_later(within_s, self._check_first_request)
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
        """The answer to a request that could not be parsed, or that a defect has ended."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already, so there can be no other")
        _log.debug("%s sent what is no HTTP: %s", request.remote, type(exc).__name__)
        response = self._malformed(*_what_is_wrong(exc))
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send it. An error that aiohttp raised outside of the application becomes a problem like all others."""
        if isinstance(resp, web.HTTPException):
            detail = "Expect: 100-continue is all that can be expected" if resp.status == 417 else resp.reason
            resp = self._malformed(resp.status, detail)
            resp.force_close()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            # A shutdown that has waited long enough cancels this, and aiohttp would set its result all the same.
            if self._handler_waiter is not None and self._handler_waiter.done():
                self._handler_waiter = None

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """A defect, with its trace; but a body that turns out to be none after its answer was sent is the caller's."""
        error = kw.get("exc_info")
        if isinstance(error, (HttpProcessingError, web.RequestPayloadError, ConnectionError)):
            _log.debug("%s broke off a request: %s", self.peername, type(error).__name__)
        else:
            super().log_exception(*args, **kw)


def _what_is_wrong(error: HttpProcessingError) -> tuple[int, str]:
    if isinstance(error, LineTooLong):
        return 431, "the request line, or a header, is too long"
    if isinstance(error, ContentEncodingError):
        return 415, "the body's Content-Encoding is none that is understood here"
    if str(error.message).startswith("Too many headers"):
        return 431, "there are too many headers"
    return 400, "this is no HTTP request"


class Site(web.BaseSite):
    """A listening place with connections as above; and with a deadline for handshakes: aiohttp leaves them a minute."""

    def __init__(
        self,
        runner: web.AppRunner,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        malformed: Malformed,
        crowd: Crowd,
    ) -> None:
        super().__init__(runner, ssl_context=context)
        self._where = (host, port)
        self._malformed = malformed
        self._crowd = crowd

    @property
    def name(self) -> str:
        """For aiohttp's listings."""
        return "http{}://{}:{}".format("" if self._ssl_context is None else "s", *self._where)

    async def start(self) -> None:
        """Listen. Raises OSError."""
        await super().start()
        server, malformed, crowd = self._runner.server, self._malformed, self._crowd
        assert server is not None, "aiohttp refuses a runner that is not set up"
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(server, malformed, crowd),
            *self._where,
            ssl=self._ssl_context,
            ssl_handshake_timeout=None if self._ssl_context is None else HANDSHAKE_TIMEOUT_S,
            backlog=self._backlog,
        )
