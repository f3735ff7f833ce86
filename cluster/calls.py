"""HTTP as the `outlast` command and the demo need it: one request, or one that goes round the nodes until answered.

Applications use `coordinator.client`. This here is smaller, and shows bodies as they came.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from coordinator.codec import MAX_NESTING, json_value, nested_too_deeply
from coordinator.config import ConfigError, is_loopback

MAX_ANSWER_BYTES: Final = 16 << 20
"""A page of a thousand transactions is far below it."""

_PART_BYTES: Final = 64 << 10
_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class Unreachable(Exception):
    """No answer. Whether the request was heard is unknown."""


class Unverified(Unreachable):
    """Who answers could not prove to be who was asked for. Nothing was said to it, and asking again changes nothing."""


class NotConnected(Unreachable):
    """No connection came about, so nothing was said to anybody: it was not done."""


class Answer(NamedTuple):
    """What came back. `body` is parsed JSON, or text when it was something else."""

    status: int
    body: Any
    retry_after_s: float | None = None

    @property
    def trouble(self) -> str:
        """What a problem document says, in one line."""
        if isinstance(self.body, dict):
            return str(self.body.get("detail") or self.body.get("title") or f"status {self.status}")
        return f"status {self.status}"


class Caller:
    """Connections to several nodes that all answer alike. Use it as an async context manager.

    token: shown to all of them. ca: a file with the authority that issued their certificates; None: the system's count.
    """

    def __init__(self, urls: Sequence[str] = (), *, token: str | None = None, ca: Path | None = None) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._token = token
        self._tls: ssl.SSLContext | bool = True if ca is None else trusting(ca)
        self._session: aiohttp.ClientSession | None = None
        self.repeated = 0
        """Requests that `anywhere` made after a first one that was not answered."""

    async def __aenter__(self) -> "Caller":
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        self._session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0, ssl=self._tls))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def once(
        self,
        method: str,
        url: str,
        *,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        within_s: float,
    ) -> Answer:
        """One request to one URL. Raises `Unreachable` when no answer came within `within_s`.

        Where that is certain it is the kind that says that nothing was heard: `NotConnected` or `Unverified`.
        """
        session = self._session_for(url)
        data = None if body is None else json.dumps(body).encode()
        wanted = {"Content-Type": "application/json", **(headers or {})} if data is not None else headers
        try:
            async with session.request(
                method,
                url,
                data=data,
                headers=wanted,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=within_s),
            ) as response:
                text = await response.content.read(MAX_ANSWER_BYTES)
                while not response.content.at_eof():
                    if len(text) >= MAX_ANSWER_BYTES:
                        response.close()
                        raise Unreachable(f"{url} answers more than {MAX_ANSWER_BYTES} bytes")
                    text += await response.content.read(MAX_ANSWER_BYTES)
                return Answer(response.status, _parsed(text), _seconds(response.headers.get("Retry-After")))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(url, error, f"did not answer within {within_s:g} s") from error

    def _session_for(self, url: str) -> aiohttp.ClientSession:
        """Raises `Unverified` where the token must not go."""
        assert self._session is not None, "used outside of its context"
        parts = urlsplit(url)
        if self._token is not None and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise Unverified(f"{url}: a token goes beyond loopback only over TLS; use an https URL")
        return self._session

    async def download(self, url: str, take: Callable[[bytes], object], *, stall_s: float) -> Answer | None:
        """GET a body of any length, part by part; what was answered instead if it was not 200.

        stall_s: until nothing moving counts as no answer. Raises `Unreachable`, also when the body breaks off, and what
        `take` raises.
        """
        session = self._session_for(url)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        try:
            async with session.get(url, allow_redirects=False, timeout=timeout) as response:
                if response.status != 200:
                    text = await response.content.read(MAX_ANSWER_BYTES)
                    return Answer(response.status, _parsed(text), _seconds(response.headers.get("Retry-After")))
                async for part in response.content.iter_chunked(_PART_BYTES):
                    take(part)
                return None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(url, error, f"said nothing for {stall_s:g} s") from error

    async def upload(self, url: str, parts: Iterable[bytes], *, size: int, stall_s: float) -> Answer:
        """POST a body of `size` bytes, part by part. Raises `Unreachable`."""
        session = self._session_for(url)

        async def body() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        try:
            async with session.post(
                url, data=body(), headers=headers, allow_redirects=False, timeout=timeout
            ) as response:
                text = await response.content.read(MAX_ANSWER_BYTES)
                return Answer(response.status, _parsed(text), _seconds(response.headers.get("Retry-After")))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(url, error, f"said nothing for {stall_s:g} s") from error

    async def anywhere(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        within_s: float,
        try_s: float = 5.0,
        start: int = 0,
    ) -> Answer:
        """The same request to node after node until one answers with something else than 429 or 503.

        Only for requests that may be heard twice. When time is up: the last answer, or what the last node raised. That
        is `NotConnected` only if all tries were, for a node that was heard of before may have done it.
        Pauses double up to a second, so that many who wait for one node do not keep it from starting.

        within_s: for all of it. try_s: for one node. start: which node is asked first.
        """
        deadline_s = time.monotonic() + within_s
        last: Answer | Unreachable = Unreachable("no node to ask")
        tries = 0
        perhaps_heard = False
        while self.urls:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            url = self.urls[(start + tries) % len(self.urls)]
            self.repeated += tries > 0
            tries += 1
            try:
                last = await self.once(method, url + path, body=body, headers=headers, within_s=min(try_s, left_s))
            except Unverified:
                raise
            except Unreachable as error:
                last = error
                perhaps_heard |= not isinstance(error, NotConnected)
            else:
                perhaps_heard = True
                if last.status not in (429, 503):
                    return last
            # The other nodes are asked at once; a whole round without an answer is followed by a pause.
            rounds, turn = divmod(tries, len(self.urls))
            if turn == 0:
                pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** min(rounds - 1, 10))
                await asyncio.sleep(max(0.0, min(pause_s, deadline_s - time.monotonic())))
        if isinstance(last, NotConnected) and perhaps_heard:
            raise Unreachable(str(last)) from last
        if isinstance(last, Unreachable):
            raise last
        return last


def _unreachable(url: str, error: Exception, silence: str) -> Unreachable:
    match error:
        case TimeoutError():
            return Unreachable(f"{url} {silence}")
        case aiohttp.ClientConnectorCertificateError():
            why = error.certificate_error
            return Unverified(f"{url} cannot prove who it is ({why}); --ca names the authority to trust")
        case aiohttp.ClientConnectorError():
            return NotConnected(f"{url} cannot be reached: {error}")
        case _:
            return Unreachable(f"{url} cannot be reached: {error}")


def trusting(ca: Path) -> ssl.SSLContext:
    """Verifies servers by the authority in the file `ca` alone. Raises `ConfigError`."""
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # an SSLError is one
        raise ConfigError(f"{ca} holds no certificate authority: {error.strerror or error}") from error


def _parsed(text: bytes) -> Any:
    try:
        # What is nested more deeply is none of ours, and could not be shown.
        return text.decode(errors="replace") if nested_too_deeply(text, 2 * MAX_NESTING) else json_value(text)
    except ValueError:
        return text.decode(errors="replace")


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:  # a date, which none of our nodes sends
        return None
