"""A network in memory: connections that delay, break and refuse, and carry real frames."""

import asyncio
import random

from cluster.replication.guard import Message
from cluster.replication.transport import Handlers, TransportSettings, decode, encode


class Network:
    """Joins `SimulatedTransport`s.

    An orderly network is TCP: what is sent on one connection arrives in order, or is lost with the connection. An
    unruly one also repeats messages and lets them overtake each other, even into a later connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random, *, unruly: bool = False) -> None:
        self.loop = loop
        self.rng = rng
        self.unruly = unruly
        self.delay_s = (0.0002, 0.01)
        self.lost = 0
        self.repeated = 0
        self.delivered = 0
        self._nodes: dict[str, SimulatedTransport] = {}
        self._cut: set[frozenset[str]] = set()
        self._joined: dict[frozenset[str], int] = {}
        """Pairs that are connected, and the number of their connection."""
        self._connections = 0
        self._free_s: dict[tuple[str, str], float] = {}

    def attach(self, transport: "SimulatedTransport") -> None:
        """A node starts."""
        self._nodes[transport.node] = transport
        for other in sorted(self._nodes):
            if other != transport.node:
                self._connect_soon(transport.node, other)

    def detach(self, transport: "SimulatedTransport") -> None:
        """A node ends. Its connections break, and new ones are refused."""
        if self._nodes.pop(transport.node, None) is None:
            return
        for other in sorted(self._nodes):
            self._disconnect(transport.node, other)
            if frozenset({transport.node, other}) not in self._cut:
                self.loop.call_later(0.001, self._refuse, other, transport.node)

    def cut(self, one: str, other: str) -> None:
        """Nothing passes between these two."""
        self._cut.add(frozenset({one, other}))
        self._disconnect(one, other)

    def mend(self, one: str, other: str) -> None:
        """Between these two it does again."""
        self._cut.discard(frozenset({one, other}))
        self._connect_soon(one, other)

    def heal(self) -> None:
        """Everything passes again."""
        healed, self._cut = self._cut, set()
        for pair in sorted(healed, key=sorted):
            self._connect_soon(*sorted(pair))

    def peers_of(self, node: str) -> frozenset[str]:
        return frozenset(other for pair in self._joined if node in pair for other in pair if other != node)

    def post(self, sender: str, receiver: str, term: int, message: Message) -> bool:
        """Carry a message, later."""
        pair = frozenset({sender, receiver})
        connection = self._joined.get(pair)
        if connection is None:
            return False
        body = encode(term, message)
        times = 1
        if self.unruly and self.rng.random() < 0.1:
            times = 2
            self.repeated += 1
        for _ in range(times):
            arrival_s = self.loop.time() + self.rng.uniform(*self.delay_s)
            if not self.unruly:
                arrival_s = max(arrival_s, self._free_s.get((sender, receiver), 0.0))
                self._free_s[sender, receiver] = arrival_s + 1e-6
            self.loop.call_at(arrival_s, self._arrive, pair, connection, sender, receiver, body)
        return True

    def _arrive(self, pair: frozenset[str], connection: int, sender: str, receiver: str, body: bytes) -> None:
        same = self._joined.get(pair) == connection
        if receiver not in self._nodes or not (same or (self.unruly and pair in self._joined)):
            self.lost += 1
            return
        self.delivered += 1
        handlers = self._nodes[receiver].handlers
        if handlers is not None:
            term, message = decode(body)
            handlers.message(sender, term, message)

    def _connect_soon(self, one: str, other: str) -> None:
        self.loop.call_later(self.rng.uniform(0.001, 0.05), self._connect, one, other)

    def _connect(self, one: str, other: str) -> None:
        pair = frozenset({one, other})
        if pair in self._cut or pair in self._joined or not pair <= set(self._nodes):
            return
        self._connections += 1
        self._joined[pair] = self._connections
        for node, peer in ((one, other), (other, one)):
            handlers = self._nodes[node].handlers
            if handlers is not None:
                handlers.connected(peer)

    def _disconnect(self, one: str, other: str) -> None:
        if self._joined.pop(frozenset({one, other}), None) is None:
            return
        for node, peer in ((one, other), (other, one)):
            transport = self._nodes.get(node)
            if transport is not None and transport.handlers is not None:
                transport.handlers.disconnected(peer)

    def _refuse(self, node: str, dead: str) -> None:
        transport = self._nodes.get(node)
        if dead not in self._nodes and transport is not None and transport.handlers is not None:
            transport.handlers.refused(dead)


class SimulatedTransport:
    """The `Transport` of one node."""

    def __init__(self, network: Network, node: str) -> None:
        self.node = node
        self.handlers: Handlers | None = None
        self._network = network

    @property
    def frame_bytes_max(self) -> int:
        return TransportSettings().frame_bytes_max

    async def start(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self._network.attach(self)

    def send(self, peer: str, term: int, message: Message) -> bool:
        return self.handlers is not None and self._network.post(self.node, peer, term, message)

    def connected(self) -> frozenset[str]:
        return self._network.peers_of(self.node)

    async def stop(self) -> None:
        self._network.detach(self)
        self.handlers = None
