"""Kept HTTP/1.1 connections for small POSTs: what carries every message to a participant.

A general HTTP client spends more on such a request than the participant does on answering it, and a transaction has
four of them or more. This one can do a POST with a body of known length and read an answer of bounded length, over TCP
or TLS; httptools parses. It follows no redirect, unpacks no encoding, keeps no cookie.
"""

import asyncio
import ssl
from collections import deque
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from coordinator.config import is_loopback

_MAX_HEADERS_BYTES: Final = 16 << 10
IDLE_S: Final = 30.0
"""A kept connection that was not used for so long is closed: most servers close theirs after a minute or more."""


class PostFailed(Exception):
    """No answer, or not one that HTTP allows: whether the request was dealt with is unknown. The text says why."""


class Connections:
    """A pool of connections, by origin. As many at once as there are requests under way; kept ones are used again.

    tls: for https; None: the issuers that the system trusts. A bearer token among the headers goes beyond loopback only
    over TLS.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        headers: dict[str, str],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._tls = tls
        self._keeps_secret = "Authorization" in headers
        self._connect_timeout_s = connect_timeout_s
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._origins: dict[str, _Origin] = {}

    async def post(self, url: str, path: str, content_type: str, body: bytes, *, most: int) -> tuple[int, str, bytes]:
        """Status, content type and body of the answer to `body` at `url` + `path`; at most `most` bytes are taken.

        Raises `PostFailed`.
        """
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = self._origin(url)
        head = (
            f"POST {origin.path}{path} HTTP/1.1\r\nHost: {origin.authority}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n{self._headers}\r\n"
        )
        request = head.encode("ascii") + body
        while True:
            connection = origin.take_idle()
            kept = connection is not None
            if connection is None:
                connection = await self._connect(origin)
            try:
                answer = await connection.ask(request, self._timeout_s, most)
            except _ClosedEarly as error:
                if kept:
                    continue  # the server closed it while it was idle; a fresh connection tells what is the matter
                raise PostFailed(str(error)) from error
            if connection.reusable:
                if self._origins.get(url) is origin:
                    origin.give_back(connection)
                else:
                    connection.close()
            return answer

    def _origin(self, url: str) -> "_Origin":
        parts = urlsplit(url)
        if parts.scheme != "https":
            if self._keeps_secret and not is_loopback(parts.hostname or ""):
                raise PostFailed("no connection: a token goes beyond loopback only over TLS; register an https URL")
            return _Origin(url, None)
        if self._tls is None:
            # Made when it is needed: reading the system's issuers takes a while.
            self._tls = ssl.create_default_context()
        return _Origin(url, self._tls)

    async def _connect(self, origin: "_Origin") -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(_Connection, origin.host, origin.port, ssl=origin.tls)
        except TimeoutError as error:
            raise PostFailed(f"no connection within {self._connect_timeout_s:g} s") from error
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            raise PostFailed(f"no connection: {error}") from error
        return connection

    def leave(self, url: str) -> None:
        """Nothing goes to `url` any more: close what is idle there; what is under way ends with its request."""
        origin = self._origins.pop(url, None)
        if origin is not None:
            origin.close()

    def close(self) -> None:
        """Close what is idle; what is under way ends with its request."""
        for origin in self._origins.values():
            origin.close()
        self._origins.clear()


class _Origin:
    """Where requests go, and the idle connections there, the one used last on top."""

    def __init__(self, url: str, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.authority = parts.netloc
        self.path = parts.path.rstrip("/")
        self.tls = tls
        self._idle: deque[tuple[float, _Connection]] = deque()

    def take_idle(self) -> "_Connection | None":
        now_s = asyncio.get_running_loop().time()
        while self._idle and self._idle[0][0] < now_s - IDLE_S:
            self._idle.popleft()[1].close()
        while self._idle:
            _, connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    def give_back(self, connection: "_Connection") -> None:
        self._idle.append((asyncio.get_running_loop().time(), connection))

    def close(self) -> None:
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()


class _ClosedEarly(Exception):
    """The connection ended before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. The names of the `on_...` methods are httptools'."""

    def __init__(self) -> None:
        self.reusable = True
        self._transport: asyncio.WriteTransport | None = None
        self._answer: asyncio.Future[tuple[int, str, bytes]] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self, request: bytes, timeout_s: float, most: int) -> tuple[int, str, bytes]:
        """Send `request` and return its answer. Raises `PostFailed`, `_ClosedEarly`."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            self.reusable = False
            raise _ClosedEarly("the connection was closed")
        self._parser: Any = httptools.HttpResponseParser(self)
        self._most, self._began, self._size = most, False, 0
        self._content_type, self._parts = "", list[bytes]()
        self._keep = self._headed = self._framed = False
        answer: asyncio.Future[tuple[int, str, bytes]] = loop.create_future()
        self._answer = answer
        self._timer = loop.call_later(timeout_s, self._too_late, timeout_s)
        self._transport.write(request)
        try:
            return await answer
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._timer.cancel()
            self._answer = None

    def close(self) -> None:
        """Break the connection off."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def _too_late(self, timeout_s: float) -> None:
        self._fail(PostFailed(f"no answer within {timeout_s:g} s"))

    # -------------------------------------------------------------------------------------------- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream transport can be written to

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._answer is not None and not self._answer.done():
            if exc is None and self._headed and not self._framed:
                # Of an answer without a length, the end of the connection is the end.
                self._give_answer()
                return
            text = f"the connection broke: {exc or 'closed by the participant'}"
            self._answer.set_exception(PostFailed(text) if self._began else _ClosedEarly(text))

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # bytes that nobody asked for
            return
        self._began = True
        self._size += len(data)
        if self._size > self._most + _MAX_HEADERS_BYTES:
            self._fail(PostFailed(f"an answer of more than {self._most} bytes"))
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(PostFailed(f"the answer is not HTTP: {error!r:.200}"))

    # -------------------------------------------------------------------------------------------- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """Only the content type matters, and whether the answer's end is told; the rest the parser knows."""
        name = name.lower()
        if name == b"content-type":
            self._content_type = value.partition(b";")[0].strip().lower().decode("latin-1")
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_message_begin(self) -> None:
        """An interim answer is followed by the real one; after that, nothing is awaited."""
        self._content_type, self._parts, self._headed, self._framed = "", [], False, False
        if self._answer is None or self._answer.done():
            self.close()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._parts.append(body)

    def on_headers_complete(self) -> None:
        """Whether the server will take another request is said in the headers."""
        self._keep = self._parser.should_keep_alive()
        self._headed = self._parser.get_status_code() >= 200

    def on_message_complete(self) -> None:
        """The answer is whole, unless it is an interim one: then the real one follows."""
        if self._parser.get_status_code() >= 200:
            self._give_answer()
            if not self._keep:
                self.close()

    def _give_answer(self) -> None:
        if self._answer is not None and not self._answer.done():
            status = self._parser.get_status_code()
            self._answer.set_result((status, self._content_type, b"".join(self._parts)))
