"""A participant that says what a test tells it to, down to the bytes, and remembers what it heard."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgpack

from cluster.ports import free_ports
from coordinator.codec import MSGPACK_TYPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One HTTP request. `items`: the messages in it, one or a whole batch. `connection`: the how-manieth it came on."""

    path: str
    headers: dict[str, str]
    items: Sequence[dict[str, Any]]
    connection: int
    content_type: str

    @property
    def call(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def body(self) -> dict[str, Any]:
        return self.items[0]


Rule = Callable[[Heard], "bytes | Awaitable[bytes | None] | None"]
"""What to answer: bytes as they are, None to hang up."""


def http(status: int, body: object = b"", *, headers: dict[str, str] | None = None, close: bool = False) -> bytes:
    """An HTTP answer; `body` is JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    wanted = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}
    if close:
        wanted["Connection"] = "close"
    lines = "".join(f"{name}: {value}\r\n" for name, value in wanted.items() if value != "-")
    return f"HTTP/1.1 {status} Something\r\n{lines}\r\n".encode() + raw


def batch(answers: Sequence[object]) -> bytes:
    """An answer to a batch, as msgpack."""
    return http(200, msgpack.packb(list(answers)), headers={"Content-Type": MSGPACK_TYPE})


async def hang(_: Heard) -> None:
    """Say nothing, ever."""
    await asyncio.Event().wait()


def vote(heard: Heard, item: dict[str, Any]) -> dict[str, Any]:
    """What a participant without troubles answers to one message."""
    match item.get("call", heard.call):
        case "prepare":
            return {"vote": "prepared"}
        case "commit":
            return {"state": "committed"}
        case _:
            return {"state": "aborted"}


def honest(heard: Heard) -> bytes:
    """A participant without troubles."""
    if heard.call == "batch":
        return batch([{**vote(heard, item), "status": 200} for item in heard.items])
    return http(200, vote(heard, heard.body))


def on(call: str, rule: Rule, otherwise: Rule = honest) -> Rule:
    """`rule` for one kind of message, `otherwise` for the rest."""
    return lambda heard: rule(heard) if heard.call == call else otherwise(heard)


def refusing(reason: str = "out_of_stock", *, retryable: bool = False) -> Rule:
    """Refuses every prepare."""
    return on("prepare", lambda _: http(200, {"vote": "refused", "reason": reason, "retryable": retryable}))


def saying(answer: object, status: int = 200) -> Rule:
    """The same JSON to everything."""
    return lambda _: http(status, answer)


@dataclass(slots=True, eq=False)
class ScriptedParticipant:
    """Listens while its context is open. `rule` may be changed at any time; `heard` is in order of arrival."""

    rule: Rule = honest
    port: int = field(default_factory=lambda: free_ports(1)[0])
    heard: list[Heard] = field(default_factory=list)
    connections: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    @property
    def open(self) -> int:
        """Connections that neither end has closed."""
        return sum(not (reader.at_eof() or writer.is_closing()) for reader, writer in self._streams)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def calls(self, gid: str | None = None) -> list[str]:
        """The calls heard, batches taken apart, perhaps of one transaction only."""
        return [
            item.get("call", heard.call)
            for heard in self.heard
            for item in heard.items
            if gid is None or item["gid"] == gid
        ]

    async def __aenter__(self) -> "ScriptedParticipant":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, again on the same port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def stop(self) -> None:
        """Close everything: connections are refused from now on."""
        if self._server is not None:
            self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for _, writer in self._streams:
            writer.close()  # a task that is cancelled before it began has not
        self._server = None

    def cut(self) -> None:
        """Break off all connections, and go on listening."""
        for task in self._tasks:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._streams.append((reader, writer))
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer, self.connections))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> None:
        try:
            while True:
                heard = await _request(reader, connection)
                self.heard.append(heard)
                answer = self.rule(heard)
                if answer is not None and not isinstance(answer, bytes):
                    answer = await answer
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()
                if b"Connection: close" in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the other end is gone, or the test has ended
        finally:
            writer.close()


async def _request(reader: asyncio.StreamReader, connection: int) -> Heard:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    raw = await reader.readexactly(int(headers.get("content-length", "0")))
    content_type = headers.get("content-type", "")
    value = msgpack.unpackb(raw) if content_type == MSGPACK_TYPE else json.loads(raw or b"{}")
    return Heard(
        path=first.split(" ")[1],
        headers=headers,
        items=value if isinstance(value, list) else [value],
        connection=connection,
        content_type=content_type,
    )
