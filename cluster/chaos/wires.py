"""Links that can be cut and made slow, without privileges: small proxies in the calling process.

Whoever is to be reached over a `Wire` is given the wire's address. A wire that is cut carries nothing, without a word
to either end: connections stay, new ones seem to come about, and nothing arrives. What was sent meanwhile arrives when
the wire is healed, unless an end has given up by then; that is what TCP makes of lost packets. One direction can be cut
alone. A slow wire holds back what it carries, in order.

Where several are told one and the same address, a `Junction` stands there, which has a wire for each of them.

One thing differs from a network: a process that has died is not refused at once but hung up on, for the wire accepts
before it knows.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from cluster.ports import HOST

_PART_BYTES: Final = 64 << 10
_PARTS: Final = 64
"""Read and not yet passed on, per connection and direction; beyond it the sender's own buffers fill up."""

MAX_CONNECTIONS: Final = 1_000
"""Through one wire at a time; one more is hung up on."""


@dataclass(slots=True, eq=False)
class _Way:
    """One direction of all connections of a wire."""

    open: asyncio.Event
    delay_s: float = 0.0


class _Listener(ABC):
    """Accepts connections on a port of loopback for as long as it is entered."""

    _server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None, "it has not been started"
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self.accept, HOST, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self.close()

    @abstractmethod
    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody has connected."""

    @abstractmethod
    async def close(self) -> None:
        """Break all that goes through it."""


class Wire(_Listener):
    """From `source` to `target`, which listens on `port` of loopback. `port` of the wire itself: where it listens.

    source, target: names, for messages. Use it as an async context manager.
    """

    def __init__(self, source: str, target: str, port: int) -> None:
        self.source, self.target = source, target
        self.carried = 0
        """Bytes, both ways."""
        self._target_port = port
        self._there = _Way(asyncio.Event())
        self._back = _Way(asyncio.Event())
        self._faults: dict[object, tuple[bool, bool, float]] = {}
        self._apply()
        self._connections: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Break all that goes through it."""
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # -------------------------------------------------------------------------------------------- faults

    def cut(self, fault: object, *, there: bool = True, back: bool = True) -> None:
        """Carry nothing from now on, in the directions meant, until `fault` is healed. Several may overlap."""
        self._faults[fault] = (there, back, 0.0)
        self._apply()

    def slow(self, fault: object, each_way_s: float) -> None:
        """Hold back for so long what comes from now on, until `fault` is healed."""
        self._faults[fault] = (False, False, each_way_s)
        self._apply()

    def suffers(self, *, there: bool, back: bool, delay_s: float) -> bool:
        """Whether it is as bad as that, or worse."""
        cut = (not there or not self._there.open.is_set()) and (not back or not self._back.open.is_set())
        return cut and self._there.delay_s >= delay_s <= self._back.delay_s

    def heal(self, fault: object) -> None:
        """Let it be as if `fault` had never been; what was held arrives."""
        self._faults.pop(fault, None)
        self._apply()

    def heal_all(self) -> None:
        """Carry everything, at once."""
        self._faults.clear()
        self._apply()

    def _apply(self) -> None:
        faults = self._faults.values()
        for way, cut in ((self._there, any(each[0] for each in faults)), (self._back, any(each[1] for each in faults))):
            way.delay_s = max((each[2] for each in faults), default=0.0)
            if cut:
                way.open.clear()
            else:
                way.open.set()

    # -------------------------------------------------------------------------------------------- carrying

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry this connection to the target, until it ends."""
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._carry(reader, writer)
        except asyncio.CancelledError:
            # The wire is taken away. Said by us: the server of asyncio would report it as an error.
            writer.transport.abort()
        finally:
            self._connections.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._there.open.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            writer.transport.abort()  # as near to being refused as a wire can come
            return
        try:
            ways = [
                asyncio.create_task(self._one_way(reader, far_writer, self._there)),
                asyncio.create_task(self._one_way(far_reader, writer, self._back)),
            ]
            try:
                await asyncio.wait(ways)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for each in (writer, far_writer):
                each.transport.abort()

    async def _one_way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Way) -> None:
        """Carry until the sender ends or a side breaks; an end is passed on, a break breaks both."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PARTS)
        loop = asyncio.get_running_loop()

        async def read() -> None:
            while True:
                part = await reader.read(_PART_BYTES)
                await waiting.put((loop.time() + way.delay_s, part))
                if not part:
                    return

        reading = asyncio.create_task(read())
        try:
            while True:
                part = await self._next(waiting, reading)
                if part is None:
                    break
                due_s, data = part
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                await way.open.wait()
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                self.carried += len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # broken on the far side: both ends see it, below
        finally:
            reading.cancel()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await reading
        # What breaks here breaks there. A cut wire tells nobody, so this waits until it is healed.
        await way.open.wait()
        writer.transport.abort()

    @staticmethod
    async def _next(
        waiting: "asyncio.Queue[tuple[float, bytes]]", reading: "asyncio.Task[None]"
    ) -> tuple[float, bytes] | None:
        """The next part; None when the reader has broken and nothing is left."""
        while waiting.empty():
            if reading.done() and reading.exception() is not None:
                return None
            getting = asyncio.ensure_future(waiting.get())
            await asyncio.wait({getting, *({reading} if not reading.done() else ())}, return_when="FIRST_COMPLETED")
            if getting.done():
                return getting.result()
            getting.cancel()
        return waiting.get_nowait()


class Junction(_Listener):
    """An address for several, each of whom is carried over its own of `wires`; `port`: where it listens.

    who: whose a connection is, told by the port that it comes from and the one that it came to; None: nobody's who is
    known, and it is hung up on. Use it as an async context manager; the wires are not entered by themselves.
    """

    def __init__(self, wires: Mapping[str, Wire], who: Callable[[int, int], str | None]) -> None:
        self._wires = wires
        self._who = who

    async def close(self) -> None:
        """Break all that goes through it."""
        for wire in self._wires.values():
            await wire.close()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand it to the wire of whoever it is."""
        name = self._who(writer.get_extra_info("peername")[1], self.port)
        if name is None:
            writer.transport.abort()  # whoever it was has died meanwhile
        else:
            await self._wires[name].accept(reader, writer)
