"""Where a participant listens, and connections that answer what is no HTTP with a problem, as all else.

aiohttp answers that in plain text, and logs a trace of it as if it were a defect; but anybody can send it, and often.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong

_log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S: Final = 5.0

Malformed = Callable[[int, str], web.Response]
"""Makes the answer, of a status and a text for people."""


class Connection(web.RequestHandler):
    """One connection with a caller."""

    __slots__ = ("_malformed",)

    def __init__(self, manager: web.Server, malformed: Malformed) -> None:
        super().__init__(manager, loop=asyncio.get_running_loop(), access_log=None)  # type: ignore[arg-type]
        self._malformed = malformed

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
        return await super().finish_response(request, resp, start_time)

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
        self, runner: web.AppRunner, host: str, port: int, context: ssl.SSLContext | None, malformed: Malformed
    ) -> None:
        super().__init__(runner, ssl_context=context)
        self._where = (host, port)
        self._malformed = malformed

    @property
    def name(self) -> str:
        """For aiohttp's listings."""
        return "http{}://{}:{}".format("" if self._ssl_context is None else "s", *self._where)

    async def start(self) -> None:
        """Listen. Raises OSError."""
        await super().start()
        server, malformed = self._runner.server, self._malformed
        assert server is not None, "aiohttp refuses a runner that is not set up"
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(server, malformed),
            *self._where,
            ssl=self._ssl_context,
            ssl_handshake_timeout=None if self._ssl_context is None else HANDSHAKE_TIMEOUT_S,
            backlog=self._backlog,
        )
