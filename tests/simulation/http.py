"""The smallest HTTP client that tells what is known when there is no answer."""

import asyncio
import json
from typing import Any

import httptools

from coordinator.copies import MAGIC
from tests.simulation.machines import SimLoop


class NoAnswer(Exception):
    """`perhaps_done`: it may have been dealt with all the same."""

    def __init__(self, why: str, *, perhaps_done: bool) -> None:
        super().__init__(why)
        self.perhaps_done = perhaps_done


class _Heard:
    """What the parser tells of. It holds nobody: the collector does not see whom the parser holds, and a circle through
    the two would keep a whole world alive for ever."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


class _Exchange(asyncio.Protocol):
    def __init__(self, answer: "asyncio.Future[tuple[int, bytes]]") -> None:
        self._answer = answer
        self._heard = _Heard()
        self._parser = httptools.HttpResponseParser(self._heard)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._heard.complete and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._heard.parts)))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(NoAnswer("the connection broke", perhaps_done=True))


async def call(
    address: str,
    port: int,
    method: str,
    path: str,
    *,
    body: Any = None,
    headers: dict[str, str] | None = None,
    within_s: float,
) -> tuple[int, Any]:
    """Status and JSON of the answer, or its bytes where it is a copy of a ledger. Raises `NoAnswer`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    answer: asyncio.Future[tuple[int, bytes]] = loop.create_future()
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address}:{port}", f"Content-Length: {len(raw)}"]
    if isinstance(body, bytes):
        lines.append("Content-Type: application/octet-stream")
    elif raw:
        lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    transport = None
    try:
        async with asyncio.timeout(within_s):
            transport, _ = await loop.create_connection(lambda: _Exchange(answer), address, port)
            transport.write("\r\n".join([*lines, "", ""]).encode() + raw)
            status, text = await answer
    except TimeoutError as error:
        raise NoAnswer(f"no answer within {within_s:.2f} s", perhaps_done=transport is not None) from error
    except OSError as error:
        raise NoAnswer(str(error), perhaps_done=transport is not None) from error
    finally:
        if transport is not None:
            transport.close()
    if text.startswith(MAGIC):
        return status, text
    return status, json.loads(text) if text else None
