"""Passes a request on to the leader: a client may talk to any node, and never has to follow a redirect.

A request is passed on once. When the leader dies meanwhile, or loses its leadership, the request goes to the next one:
all requests that come through here may be repeated, because a new transaction carries an idempotency key by then.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from cluster.replication.clock import Clock
from cluster.replication.log import ReplicatedLog
from coordinator.config import NodeConfig
from coordinator.driver import Driver
from coordinator.errors import NoLeader, NotLeader, OutcomeUnknown, OutlastError, ShuttingDown

PASSED_ON: Final = "Outlast-Passed-On"
"""Header: this request comes from another node, and is not passed on again."""

LEADER_PATIENCE_S: Final = 2.5
"""How long a request waits for somebody to lead; keeps "503 within 3 s"."""

_NOT_THERE_CODES: Final = ("no_leader", "shutting_down", "too_many_connections")
"""Of answers that say that the node asked has not even begun."""

PASSED_ON_PATIENCE_S: Final = 0.5
"""The same for a request that another node has passed on, and that will look elsewhere then."""

_LOOK_AGAIN_S: Final = 0.1
_LOOK_ANYHOW_S: Final = 1.0
_PIPED_BYTES: Final = 64 << 10
_COPIED: Final = ("Content-Type", "Retry-After", "Outlast-Code")

LEADER: Final = "Outlast-Leader"
"""Header of an answer that was passed on: where the leader is, so that a client may ask it directly next time."""


class _TryNext(Exception):
    """That node gave no answer that counts. `perhaps_done`: it may have dealt with the request all the same."""

    def __init__(self, *, perhaps_done: bool) -> None:
        super().__init__()
        self.perhaps_done = perhaps_done
        self.led_s = 0.0
        """How long that node led, as far as this one knew, while it was asked."""


class Relay:
    """Runs a request here if this node leads, and where the leader is if not."""

    def __init__(
        self,
        *,
        config: NodeConfig,
        driver: Driver,
        log: ReplicatedLog,
        clock: Clock,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._tls = tls
        self._driver = driver
        self._log = log
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def close(self) -> None:
        """Give up the connections. Who still waits for a leader is told to ask elsewhere."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def run(
        self,
        request: web.Request,
        here: Callable[[], Awaitable[web.Response]],
        *,
        body: bytes = b"",
        extra: Callable[[], dict[str, str]] = dict,
        wait_s: float = 0.0,
    ) -> web.Response:
        """The answer of `here`, or of the leader's own `here`.

        body, extra: what the leader is to see; `extra` makes headers to add. wait_s: how long the answer may take
        beyond finding a leader. Raises `NoLeader` when nobody led for `LEADER_PATIENCE_S`, or `OutcomeUnknown` if
        somebody may have done it before that; and whatever `here` raises.
        """
        passed_on = PASSED_ON in request.headers
        patience_s = PASSED_ON_PATIENCE_S if passed_on else LEADER_PATIENCE_S
        deadline_s = self._clock.monotonic_s() + patience_s
        perhaps_done = False
        last: OutlastError
        while True:
            try:
                return await here()
            except (NotLeader, ShuttingDown) as error:
                last = error
            except OutcomeUnknown as error:
                if not error.repeatable:
                    raise
                last, perhaps_done = error, True
            leader = self._log.leadership().leader
            if not passed_on and leader is not None and leader != self._config.node:
                left_s = deadline_s - self._clock.monotonic_s()
                try:
                    return await self._pass_on(request, leader, body, extra(), wait_s, left_s)
                except _TryNext as error:
                    # Time that a leader spent on the request does not count as time without one.
                    deadline_s += error.led_s
                    wait_s = max(0.0, wait_s - error.led_s)
                    perhaps_done = perhaps_done or error.perhaps_done
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0 or self._closed:
                if perhaps_done and request.method != "GET":
                    raise OutcomeUnknown(
                        "a node that led took this and did not answer, and now no node leads; it may have been done. "
                        "Ask again with the same Idempotency-Key"
                    )
                if not isinstance(last, NotLeader):
                    raise last
                raise NoLeader("no node leads, or none that this one can reach; nothing was done, try again")
            await self._driver.leadership_changed(min(left_s, _LOOK_AGAIN_S))

    async def stream(
        self,
        request: web.Request,
        here: Callable[[], Awaitable[web.StreamResponse]],
        *,
        upload: bool,
        stall_s: float,
    ) -> web.StreamResponse:
        """`run`, for bodies that no node should hold as a whole: they are passed on as they come.

        `here` raises `NotLeader` or `ShuttingDown` only before it has read or written any of it. upload: the request's
        body is passed on; it is read once, so nothing is repeated after its beginning. stall_s: until a connection on
        which nothing moves is given up.
        """
        passed_on = PASSED_ON in request.headers
        deadline_s = self._clock.monotonic_s() + (PASSED_ON_PATIENCE_S if passed_on else LEADER_PATIENCE_S)
        last: OutlastError
        while True:
            try:
                return await here()
            except (NotLeader, ShuttingDown) as error:
                last = error
            leader = self._log.leadership().leader
            if not passed_on and leader is not None and leader != self._config.node:
                try:
                    return await self._pipe(request, leader, upload=upload, stall_s=stall_s)
                except _TryNext as error:
                    if error.perhaps_done and upload:
                        raise OutcomeUnknown(
                            "the connection with the leader broke before it had answered; it may have been done"
                        ) from error
                    if error.perhaps_done:
                        raise NoLeader("the connection with the leader broke; ask again") from error
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0 or self._closed:
                if not isinstance(last, NotLeader):
                    raise last
                raise NoLeader("no node leads, or none that this one can reach; nothing was done, try again")
            await self._driver.leadership_changed(min(left_s, _LOOK_AGAIN_S))

    async def _pipe(self, request: web.Request, leader: str, *, upload: bool, stall_s: float) -> web.StreamResponse:
        """What `leader` answers, as it comes. Raises `_TryNext` while nothing has been answered."""
        headers = self._headers(request, {})
        if upload and request.content_length is not None:
            headers["Content-Length"] = str(request.content_length)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=0.5, sock_read=stall_s)
        session, url = self._connected(), self._config.peer(leader).url
        answer: web.StreamResponse | None = None
        try:
            async with session.request(
                request.method,
                URL(url + request.rel_url.raw_path_qs, encoded=True),
                data=request.content if upload else None,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                if not upload and response.status == 503 and response.headers.get("Outlast-Code") in _NOT_THERE_CODES:
                    raise _TryNext(perhaps_done=False)
                kept = {name: response.headers[name] for name in _COPIED if name in response.headers}
                answer = web.StreamResponse(status=response.status, headers={**kept, LEADER: url})
                await answer.prepare(request)
                async for part in response.content.iter_chunked(_PIPED_BYTES):
                    async with asyncio.timeout(stall_s):
                        await answer.write(part)
                await answer.write_eof()
                return answer
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _TryNext(perhaps_done=False) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if answer is None:
                raise _TryNext(perhaps_done=True) from error
            break_off(request)
            return answer

    async def _pass_on(
        self,
        request: web.Request,
        leader: str,
        body: bytes,
        extra: dict[str, str],
        wait_s: float,
        leaderless_s: float,
    ) -> web.Response:
        """What `leader` answers. Raises `_TryNext`, also when another leads, or nobody has for `leaderless_s`."""
        exchange = asyncio.ensure_future(self._exchange(request, leader, body, extra, wait_s))
        began_s = led_until_s = self._clock.monotonic_s()
        try:
            while not exchange.done():
                # A leader that hangs answers nothing, and breaks no connection: look whether it still leads.
                leads, now_s = self._log.leadership().leader, self._clock.monotonic_s()
                if leads == leader:
                    led_until_s = now_s
                elif leads is not None or now_s - led_until_s >= leaderless_s:
                    raise _TryNext(perhaps_done=True)
                # Thousands may wait here: a change wakes them, and they look by themselves only now and then.
                changed = self._driver.leadership_change()
                events: set[asyncio.Future[Any]] = {exchange, changed}
                look_s = _LOOK_ANYHOW_S if leads == leader else led_until_s + leaderless_s - now_s
                try:
                    await asyncio.wait(events, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if leads == leader:
                    led_until_s = self._clock.monotonic_s()
            return exchange.result()
        except _TryNext as error:
            error.led_s = led_until_s - began_s
            raise
        finally:
            exchange.cancel()

    def _connected(self) -> aiohttp.ClientSession:
        """Raises `_TryNext` when this node is on its way out."""
        if self._closed:
            raise _TryNext(perhaps_done=False)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._tls or True),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session

    def _headers(self, request: web.Request, extra: dict[str, str]) -> "CIMultiDict[str]":
        headers = CIMultiDict(extra)
        headers[PASSED_ON] = self._config.node
        for name in ("Authorization", "Content-Type"):
            if name in request.headers:
                headers[name] = request.headers[name]
        if self._config.token is not None:
            # Whoever gets this far was let in here, perhaps by a certificate, or by an older token.
            headers["Authorization"] = f"Bearer {self._config.token}"
        return headers

    async def _exchange(
        self, request: web.Request, leader: str, body: bytes, extra: dict[str, str], wait_s: float
    ) -> web.Response:
        session, headers = self._connected(), self._headers(request, extra)
        url = self._config.peer(leader).url
        timeout = aiohttp.ClientTimeout(total=wait_s + LEADER_PATIENCE_S, sock_connect=0.5)
        try:
            async with session.request(
                request.method,
                # Not `raw_path`: that may be a whole URL, as clients of proxies send it.
                URL(url + request.rel_url.raw_path_qs, encoded=True),
                data=body or None,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                answer = await response.read()
                if response.status == 503 and response.headers.get("Outlast-Code") in _NOT_THERE_CODES:
                    raise _TryNext(perhaps_done=False)
                kept = {name: response.headers[name] for name in _COPIED if name in response.headers}
                kept[LEADER] = url
                return web.Response(status=response.status, body=answer, headers=kept)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _TryNext(perhaps_done=False) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _TryNext(perhaps_done=True) from error


def break_off(request: web.Request) -> None:
    """End the connection in the middle of an answer, so that nobody takes what has come of it for the whole."""
    if request.transport is not None:
        request.transport.abort()
