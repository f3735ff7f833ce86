"""The nodes' own connections: their real frames, each of which may be late, lost, doubled or overtaken.

Harsher than TCP, which the real transport uses: a message may be lost although its connection lives on, and may
overtake others when `Internet.overtake` says so. Who is cut off for long is disconnected, as by a timeout; of a process
that dies its peers are told at once, of a machine without power not before that timeout.
"""

import zlib

from cluster.replication.guard import Message
from cluster.replication.transport import Handlers, TransportSettings, decode, encode
from tests.simulation.internet import Internet
from tests.simulation.machines import LIFE, Life

_SILENCE_S = 1.5
"""A connection on which nothing passes is given up after this, about."""
_AGAIN_S = 0.2
"""Before what met a cut is sent again, if it is."""
_FRAME_BYTES_MAX = TransportSettings().frame_bytes_max


class Wire:
    """Joins the transports of the nodes."""

    def __init__(self, net: Internet) -> None:
        self.net = net
        self.loop = net.loop
        self.ends: dict[str, WireEnd] = {}
        self.joined: dict[frozenset[str], int] = {}
        self._lives: dict[int, dict[str, Life]] = {}
        """Of each connection: whose ends it has."""
        self._numbers = 0
        self._old = 0
        """Connections up to this number were of another generation of the cluster."""
        self._free_s: dict[tuple[str, str], float] = {}
        net.on_change.append(self._changed)

    def post(self, sender: str, receiver: str, term: int, message: Message) -> bool:
        """Carry a message, later."""
        pair = frozenset({sender, receiver})
        number = self.joined.get(pair)
        if number is None:
            return False
        net = self.net
        body = encode(term, message)
        times = 1
        if message["type"] == "understands":
            # The first word on a connection, and the only one that is never said again: it takes what TCP promises.
            self._carry(pair, number, sender, receiver, body, overtake=0.0, again=True)
            return True
        if net.repeat and net.rng.random() < net.repeat:
            net.count("doubled")
            times = 2
        if net.lose and net.rng.random() < net.lose:
            net.count("lost")
            return True
        for _ in range(times):
            self._carry(pair, number, sender, receiver, body, overtake=net.overtake)
        return True

    def _carry(
        self,
        pair: frozenset[str],
        number: int,
        sender: str,
        receiver: str,
        body: bytes,
        *,
        overtake: float,
        again: bool = False,
    ) -> None:
        net = self.net
        arrival_s = self.loop.now_s + net.transit_s()
        if overtake and net.rng.random() < overtake:
            net.count("overtaken")
            arrival_s += net.rng.random() * 0.3
        else:
            arrival_s = max(arrival_s, self._free_s.get((sender, receiver), 0.0))
            self._free_s[sender, receiver] = arrival_s + 1e-7
        token = LIFE.set(None)
        try:
            self.loop.call_at(arrival_s, self._arrive, pair, number, sender, receiver, body, again)
        finally:
            LIFE.reset(token)

    def _arrive(
        self, pair: frozenset[str], number: int, sender: str, receiver: str, body: bytes, again: bool = False
    ) -> None:
        """again: it is sent again when it meets a cut, as long as the connection lasts."""
        overtaken = self.net.overtake > 0 and pair in self.joined and number > self._old
        same = self.joined.get(pair) == number or overtaken
        end = self.ends.get(receiver)
        passes = self.net.passes(sender, receiver)
        if again and same and end is not None and not passes:
            self._later(_AGAIN_S, self._arrive, pair, number, sender, receiver, body, again)
            return
        if not same or end is None or not passes:
            self.net.count("lost with its connection" if not same else "lost in a cut")
            return
        self.net.note(receiver, f"hears {len(body)} bytes of {sender}: {zlib.crc32(body):08x}")
        self.loop.call_soon(end.hear, sender, body, context=end.life.context.copy())

    def forget(self) -> None:
        """The next ones belong to another generation: nothing of the old one is heard there."""
        self._old = self._numbers
        self.joined.clear()
        self._lives.clear()

    # Connections.

    def attach(self, end: "WireEnd") -> None:
        self.ends[end.node] = end
        for other in sorted(self.ends):
            if other != end.node:
                self._connect_soon(end.node, other)

    def detach(self, node: str, *, silent: bool = False) -> None:
        """This node's process is gone; `silent`: so is its machine."""
        if self.ends.pop(node, None) is None:
            return
        for other in sorted(self.ends):
            pair = frozenset({node, other})
            if silent:
                number = self.joined.get(pair)
                if number is not None:
                    self._later(_SILENCE_S * (1 + self.net.rng.random()), self._give_up, pair, number)
                continue
            self._disconnect(pair)
            if self.net.passes(node, other) and self.net.passes(other, node):
                self._later(0.001, self._refuse, other, node)

    def _later(self, delay_s: float, work: object, *arguments: object) -> None:
        token = LIFE.set(None)
        try:
            self.loop.call_later(delay_s, work, *arguments)
        finally:
            LIFE.reset(token)

    def _connect_soon(self, one: str, other: str) -> None:
        self._later(self.net.rng.uniform(0.001, 0.1), self._connect, one, other)

    def _connect(self, one: str, other: str) -> None:
        pair = frozenset({one, other})
        if not pair <= set(self.ends):
            return
        if not (self.net.passes(one, other) and self.net.passes(other, one)):
            return  # healing a cut tries again
        if any(self.ends[node].life.machine.paused for node in (one, other)):
            self._connect_soon(one, other)
            return
        if pair in self.joined:
            if self._still(pair):
                return
            self._disconnect(pair)  # of an earlier life of one of them
        self._numbers += 1
        self.joined[pair] = self._numbers
        self._lives[self._numbers] = {node: self.ends[node].life for node in (one, other)}
        for node, peer in ((one, other), (other, one)):
            end = self.ends[node]
            self.loop.call_soon(end.connected_to, peer, context=end.life.context.copy())

    def _still(self, pair: frozenset[str]) -> bool:
        lives = self._lives[self.joined[pair]]
        return all(self.ends[node].life is lives[node] for node in pair)

    def _disconnect(self, pair: frozenset[str]) -> None:
        number = self.joined.pop(pair, None)
        if number is None:
            return
        lives = self._lives.pop(number)
        one, other = sorted(pair)
        for node, peer in ((one, other), (other, one)):
            end = self.ends.get(node)
            if end is not None and end.life is lives[node]:
                self.loop.call_soon(end.disconnected_from, peer, context=end.life.context.copy())

    def _give_up(self, pair: frozenset[str], number: int) -> None:
        if self.joined.get(pair) != number:
            return
        one, other = sorted(pair)
        dead = any(not life.alive for life in self._lives[number].values())
        if dead or not (self.net.passes(one, other) and self.net.passes(other, one)):
            self._disconnect(pair)
            self._connect_soon(one, other)

    def _refuse(self, node: str, dead: str) -> None:
        end = self.ends.get(node)
        if dead not in self.ends and end is not None and self.net.machines[dead].powered:
            self.loop.call_soon(end.refused_by, dead, context=end.life.context.copy())

    def _changed(self) -> None:
        names = sorted(self.ends)
        for index, one in enumerate(names):
            for other in names[index + 1 :]:
                pair = frozenset({one, other})
                if self.net.passes(one, other) and self.net.passes(other, one):
                    if pair not in self.joined:
                        self._connect_soon(one, other)
                elif pair in self.joined:
                    # Soon, or when the silence has lasted: the real one notices some cuts by an error at once.
                    soon = self.net.rng.random() < 0.3
                    delay_s = 0.01 if soon else _SILENCE_S * (1 + self.net.rng.random())
                    self._later(delay_s, self._give_up, pair, self.joined[pair])


class WireEnd:
    """The `Transport` of one node, in one life."""

    def __init__(self, wire: Wire, node: str) -> None:
        self.node = node
        self._wire = wire
        self._handlers: Handlers | None = None
        life = LIFE.get()
        assert life is not None, "a transport is on a machine"
        self.life = life

    @property
    def frame_bytes_max(self) -> int:
        return _FRAME_BYTES_MAX

    async def start(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._wire.attach(self)

    def send(self, peer: str, term: int, message: Message) -> bool:
        return self._handlers is not None and self._wire.post(self.node, peer, term, message)

    def connected(self) -> frozenset[str]:
        return frozenset(other for pair in self._wire.joined if self.node in pair for other in pair - {self.node})

    async def stop(self) -> None:
        self._handlers = None
        if self._wire.ends.get(self.node) is self:
            self._wire.detach(self.node)

    # What the wire tells, in the life of this end.

    def hear(self, sender: str, body: bytes) -> None:
        if self._handlers is not None:
            term, message = decode(body)
            self._handlers.message(sender, term, message)

    def connected_to(self, peer: str) -> None:
        if self._handlers is not None:
            self._handlers.connected(peer)

    def disconnected_from(self, peer: str) -> None:
        if self._handlers is not None:
            self._handlers.disconnected(peer)

    def refused_by(self, peer: str) -> None:
        if self._handlers is not None:
            self._handlers.refused(peer)
