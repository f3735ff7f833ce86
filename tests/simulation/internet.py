"""What lies between machines: which of them reach each other, how long it takes, what is lost; and TCP on it.

TCP keeps its promises, and no others. Bytes arrive in order or not at all. What is sent into a cut waits for it to be
healed, or for the connection to be given up. A process that dies resets its connections, a machine without power says
nothing: its peers learn of it when they next send something and it is up again, or by their own timeouts. So there are
connections of which only one end knows that they are no more.
"""

import asyncio
import random
import zlib
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from tests.simulation.machines import LIFE, Life, Machine, SimLoop

_SYN_AGAIN_S = 0.5
USUAL_DELAY_S = (0.0002, 0.005)


class Internet:
    """Joins machines. `delay_s` and the chances may be changed at any time; then call `changed`."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.delay_s = USUAL_DELAY_S
        self.lose = 0.0
        """Of messages between nodes; TCP sends again, which costs time."""
        self.repeat = 0.0
        self.overtake = 0.0
        self.machines: dict[str, Machine] = {}
        self.by_address: dict[str, Machine] = {}
        self.cuts: dict[tuple[str, str], int] = {}
        """From whom to whom nothing passes, and how many faults have seen to that."""
        self.on_change: list[Callable[[], None]] = []
        self.counts: dict[str, int] = {}
        self.note: Callable[[str, str], None] = lambda _who, _what: None
        """A fine line of the trace."""

    def add(self, machine: Machine) -> None:
        self.machines[machine.name] = machine
        self.by_address[machine.address] = machine

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def cut(self, sender: str, receiver: str) -> None:
        """Nothing passes that way."""
        self.cuts[sender, receiver] = self.cuts.get((sender, receiver), 0) + 1
        self.changed()

    def mend(self, sender: str, receiver: str) -> None:
        """As before that cut."""
        left = self.cuts.get((sender, receiver), 0) - 1
        if left > 0:
            self.cuts[sender, receiver] = left
        else:
            self.cuts.pop((sender, receiver), None)
        self.changed()

    def heal(self) -> None:
        self.cuts.clear()
        self.lose = self.repeat = self.overtake = 0.0
        self.delay_s = USUAL_DELAY_S
        self.changed()

    def changed(self) -> None:
        for told in self.on_change:
            told()

    def passes(self, sender: str, receiver: str) -> bool:
        return (sender, receiver) not in self.cuts

    def transit_s(self) -> float:
        return self.rng.uniform(*self.delay_s)


class Tcp:
    """Connections and listeners; `SimLoop`s of this world connect and listen through it."""

    def __init__(self, net: Internet) -> None:
        self.net = net
        self.loop = net.loop
        self.listeners: dict[tuple[str, int], tuple[Life, Callable[[], Any]]] = {}
        self.connections: dict[int, Connection] = {}
        self._numbers = 0
        self._ports = 40_000
        net.on_change.append(self._changed)

    async def connect(self, address: str, port: int) -> "End":
        """The near end of a new connection. Raises `ConnectionRefusedError`; takes for ever where nobody answers."""
        life = LIFE.get()
        assert life is not None, "who connects is on a machine"
        near, far = life.machine, self.net.by_address[address]
        while True:
            await asyncio.sleep(self.net.transit_s() + self.net.transit_s())
            if self.net.passes(near.name, far.name) and self.net.passes(far.name, near.name) and far.powered:
                break
            await asyncio.sleep(_SYN_AGAIN_S)
        listener = self.listeners.get((address, port))
        if listener is None or not listener[0].alive:
            raise ConnectionRefusedError(111, f"{address}:{port} refuses connections")
        self._numbers += 1
        self._ports += 1
        connection = Connection(self, self._numbers, life, listener[0], (near.address, self._ports), (address, port))
        self.connections[self._numbers] = connection
        near_end, far_end = connection.ends
        protocol = listener[1]

        def accept() -> None:
            far_end.attach(protocol())

        self.loop.call_soon(accept, context=listener[0].context.copy())
        return near_end

    def listen(self, factory: Callable[[], Any], address: str, port: int) -> "Server":
        life = LIFE.get()
        assert life is not None, "who listens is on a machine"
        if port == 0:
            self._ports += 1
            port = self._ports
        held = self.listeners.get((address, port))
        if held is not None and held[0].alive:
            raise OSError(98, f"{address}:{port} is in use")
        self.listeners[address, port] = (life, factory)
        return Server(self, (address, port), life)

    def ended(self, life: Life, *, power: bool) -> None:
        """A process is gone: its system says so, unless that is gone, too."""
        for connection in list(self.connections.values()):
            for end in connection.ends:
                if end.life is life and not end.closed:
                    end.closed = True
                    if not power:
                        end.say("reset", None)

    def sever(self, machines: Collection[str]) -> None:
        """Of what these said when they lived, nothing is heard any more."""
        for connection in self.connections.values():
            if any(end.machine.name in machines and not end.life.alive for end in connection.ends):
                connection.severed = True
                for end in connection.ends:
                    end.held = deque(each for each in end.held if each[0] != "data")

    def _changed(self) -> None:
        for connection in list(self.connections.values()):
            for end in connection.ends:
                if end.held and self.net.passes(end.peer.machine.name, end.machine.name):
                    if self.net.rng.random() < 0.2:
                        self.net.count("tcp reset after a cut")
                        end.held.clear()
                        end.arrives("reset", None)
                    else:
                        held, end.held = end.held, deque()
                        for kind, data in held:
                            end.arrives(kind, data)


class Connection:
    """Two ends, and what is on its way between them."""

    def __init__(
        self, tcp: Tcp, number: int, near: Life, far: Life, near_name: tuple[str, int], far_name: tuple[str, int]
    ) -> None:
        self.tcp = tcp
        self.number = number
        one, other = End(self, near, near_name, far_name), End(self, far, far_name, near_name)
        one.peer, other.peer = other, one
        self.ends = (one, other)
        self.severed = False
        """What is still on its way never arrives."""

    def gone(self) -> None:
        if all(end.closed for end in self.ends) and not any(end.held for end in self.ends):
            self.tcp.connections.pop(self.number, None)


class End(asyncio.Transport):
    """One end, as its protocol sees it."""

    peer: "End"

    def __init__(self, connection: Connection, life: Life, name: tuple[str, int], peer_name: tuple[str, int]) -> None:
        super().__init__({"sockname": name, "peername": peer_name})
        self.connection = connection
        self.loop = connection.tcp.loop
        self.net = connection.tcp.net
        self.life = life
        self.machine = life.machine
        self.protocol: Any = None
        self.closed = False
        """This end sends and hears nothing any more."""
        self.told = False
        self.reading = True
        self.unread: deque[tuple[str, bytes | None]] = deque()
        self.held: deque[tuple[str, bytes | None]] = deque()
        """What has come as far as the cut before this end."""
        self._free_s = 0.0

    def attach(self, protocol: Any) -> None:
        """In the life of this end."""
        self.protocol = protocol
        protocol.connection_made(self)
        self._read()

    # What is sent.

    def say(self, kind: str, data: bytes | None) -> None:
        """To the other end."""
        other = self.peer
        transit_s = self.net.transit_s()
        if self.net.lose and self.net.rng.random() < self.net.lose:
            self.net.count("tcp segment sent again")
            transit_s += 0.2 + self.net.rng.random() * 0.4
        arrival_s = max(self.loop.now_s + transit_s, other._free_s)
        other._free_s = arrival_s + 1e-7
        token = LIFE.set(None)
        try:
            self.loop.call_at(arrival_s, other.arrives, kind, data)
        finally:
            LIFE.reset(token)

    def write(self, data: Any) -> None:
        if not self.closed:
            self.say("data", bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        raise NotImplementedError

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def close(self) -> None:
        self._end("end")

    def abort(self) -> None:
        self._end("reset")

    def is_closing(self) -> bool:
        return self.closed

    def _end(self, kind: str, error: Exception | None = None, *, silent: bool = False) -> None:
        if self.closed:
            return
        self.closed = True
        if not silent:
            self.say(kind, None)
        self.held.clear()
        self.unread.clear()
        self._tell(error)
        self.connection.gone()

    def _tell(self, error: Exception | None) -> None:
        if self.protocol is not None and not self.told:
            self.told = True
            self.loop.call_soon(self.protocol.connection_lost, error, context=self.life.context.copy())

    # What arrives. World's business: no life.

    def arrives(self, kind: str, data: bytes | None) -> None:
        if kind == "data" and self.connection.severed:
            return
        if self.held or not self.net.passes(self.peer.machine.name, self.machine.name):
            if not self.closed:
                self.net.count("tcp held by a cut")
                self.held.append((kind, data))
            return
        if self.closed or not self.life.alive:
            self.closed = True
            if kind == "data" and self.machine.powered and not self.peer.closed:
                self.say("reset", None)  # nobody is there any more
            self.connection.gone()
            return
        self.net.note(self.machine.name, f"tcp {self.connection.number} {kind} {zlib.crc32(data or b''):08x}")
        self.unread.append((kind, data))
        self.loop.call_soon(self._read, context=self.life.context.copy())

    def _read(self) -> None:
        """In the life of this end."""
        while self.unread and self.reading and self.protocol is not None and not self.closed:
            kind, data = self.unread.popleft()
            if kind == "data":
                self.protocol.data_received(data)
            elif kind == "reset":
                self._end("reset", ConnectionResetError(104, "Connection reset by peer"), silent=True)
            else:
                self.protocol.eof_received()
                self._end("end")

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self.loop.call_soon(self._read)

    def is_reading(self) -> bool:
        return self.reading

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol


class _Listening:
    """As much of a socket as is asked for."""

    def __init__(self, name: tuple[str, int]) -> None:
        self._name = name

    def getsockname(self) -> tuple[str, int]:
        return self._name


class Server(asyncio.AbstractServer):
    def __init__(self, tcp: Tcp, name: tuple[str, int], life: Life) -> None:
        self._tcp = tcp
        self._name = name
        self._life = life
        self.sockets = (_Listening(name),)

    def close(self) -> None:
        held = self._tcp.listeners.get(self._name)
        if held is not None and held[0] is self._life:
            del self._tcp.listeners[self._name]

    async def wait_closed(self) -> None:
        pass

    def is_serving(self) -> bool:
        return self._name in self._tcp.listeners


class ConnectedLoop(SimLoop):
    """A loop whose connections are those of `tcp`."""

    tcp: Tcp

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._dialled: dict[int, End] = {}

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **how: Any) -> Any:  # type: ignore[override]
        sock = how.get("sock")
        if sock is None:
            end = await self.tcp.connect(host, port)
        else:
            end = self._dialled.pop(id(sock))
            sock.close()
        protocol = protocol_factory()
        end.attach(protocol)
        return end, protocol

    async def sock_connect(self, sock: Any, address: Any) -> None:
        end = await self.tcp.connect(address[0], address[1])
        self._dialled[id(sock)] = end

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **how: Any) -> Any:  # type: ignore[override]
        return self.tcp.listen(protocol_factory, host, port)
