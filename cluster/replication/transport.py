"""The wire between nodes: who may speak, what may be said, and how much of it.

**One connection per pair of nodes**, dialed by the one with the larger id: both directions live and die together, so
that "connected" means the same at both ends, and there is nothing to arbitrate. The other end does not dial; but
while it has no connection it *probes*: connects, and hangs up. The process of a dead node refuses at once, on either
side, and that is the fastest proof of death there is (`Handlers.refused`). A node that lives and is only slow
accepts.

**Nothing is parsed as a message before the peer has proved that it knows the cluster's secret.** Four frames:

    dialer   -> acceptor   hello      (magic, version, cluster, from, to, nonce)
    acceptor -> dialer     challenge  (nonce)
    dialer   -> acceptor   proof      HMAC-SHA256 over all of the above, and over "dialer"
    acceptor -> dialer     proof      the same over "acceptor"

The dialer proves itself first, so that a stranger who connects learns nothing that depends on the secret. Roles and
ids are part of what is proved, so no proof can be used the other way round or for another node. Frames of a stranger
are at most `handshake_bytes_max` long, there is a deadline, and there are at most `strangers_max` strangers at a
time.

**TLS, where it is used, comes before all of that**, and both ends must show a certificate. Its issuer is verified in
the TLS handshake, and the node that it names before the first frame is read: a peer then proves the secret as well, and
as that same node.

**A frame** is its length (4 bytes, big-endian) and msgpack: the sender's term, the type of the message, and its
fields in the order of `SHAPES`. The length is judged before the body is read. `SHAPES` is the whitelist: what is not
in it, or is of another shape, is dropped with a line in the log; bytes that are no frame end the connection.

The secret says who is at the other end; it neither hides nor seals what is said afterwards. Where others can write to
the network between the nodes, TLS carries it all (`ssl_server`, `ssl_client`).

**Versions.** `_VERSION`, in the hello, is of this handshake and of what a frame is. Nodes of two versions would not
speak to each other at all, so it changes in two steps: software that accepts both, and says the old one, reaches all
nodes; only later software says the new one. New types of messages need none of that: a node drops what it does not
know, and nothing may depend on it before the peer has said that it understands their level. `understands`, the first
word on every connection, is the first of them: nodes that never say it know no levels, and count as 1. The fields of a
type do not change; a message that needs others is a new type.

Raft repeats what is lost, so nothing is kept for a peer that is away, and a peer that does not read is disconnected.
"""

import asyncio
import hashlib
import hmac
import logging
import random
import reprlib
import secrets
import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, Protocol, cast

import msgpack

from cluster.replication.door import TlsDoor
from cluster.replication.guard import Message
from cluster.replication.standing import NONCE_BYTES

_log = logging.getLogger(__name__)

_LENGTH = struct.Struct(">I")
_MAGIC = "outlast raft"
_VERSION = 1
_NONCE_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Handlers:
    """Whom a transport tells; all on the event loop."""

    message: Callable[[str, int, Message], None]
    """A valid message: its sender's id, its sender's term, and itself."""

    connected: Callable[[str], None]
    disconnected: Callable[[str], None]

    refused: Callable[[str], None]
    """There is no connection to this node, and its machine refuses new ones: its process is not running."""


class Transport(Protocol):
    """Carries messages between the nodes of one cluster, in order per connection, or not at all."""

    @property
    def frame_bytes_max(self) -> int:
        """The largest encoded message that it carries."""
        ...

    async def start(self, handlers: Handlers) -> None:
        """Listen, and keep connections to all peers. Raises OSError if it cannot listen."""
        ...

    def send(self, peer: str, term: int, message: Message) -> bool:
        """Hand over a message of a node that is in `term`; False: it was not sent."""
        ...

    def connected(self) -> frozenset[str]:
        """Ids of the peers that can be sent to now."""
        ...

    async def stop(self) -> None:
        """Close everything. No handler is called after this returns."""
        ...


class BadFrame(Exception):
    """Bytes that are no frame of ours."""


class BadMessage(Exception):
    """A frame, but not of a message that may be said here."""


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _flag(value: object) -> bool:
    return type(value) is bool


def _bytes(value: object) -> bool:
    return type(value) is bytes


def _nonce(value: object) -> bool:
    """Of an empty node (see `standing.py`), or none."""
    return type(value) is bytes and len(value) in (0, NONCE_BYTES)


def _entries(value: object) -> bool:
    """A tuple of (command, index, term), indexes one by one, terms never falling."""
    if type(value) is not tuple:
        return False
    expected, least = None, 0
    for entry in value:
        if type(entry) is not tuple or len(entry) != 3:
            return False
        command, index, term = entry
        if type(command) is not bytes or not command or type(index) is not int or type(term) is not int:
            return False
        if term < least or (index != expected and expected is not None):
            return False
        expected, least = index + 1, term
    return True


_Shape = tuple[tuple[str, Callable[[object], bool]], ...]

SHAPES: Final[Mapping[str, _Shape]] = {
    "append_entries": (
        ("term", _count),
        ("commit_index", _count),
        ("prevLogIdx", _count),
        ("prevLogTerm", _count),
        ("entries", _entries),
    ),
    "next_node_idx": (("next_node_idx", _count), ("reset", _flag), ("success", _flag)),
    "request_vote": (("term", _count), ("last_log_index", _count), ("last_log_term", _count)),
    "response_vote": (("term", _count),),
    "timeout_now": (("term", _count),),
    "pre_vote": (("term", _count), ("last_log_index", _count), ("last_log_term", _count)),
    "pre_vote_answer": (("term", _count), ("granted", _flag)),
    "snapshot_piece": (
        ("term", _count),
        ("index", _count),
        ("entry_term", _count),
        ("size", _count),
        ("offset", _count),
        ("data", _bytes),
    ),
    "snapshot_got": (("index", _count), ("offset", _count), ("done", _flag)),
    "understands": (("level", _count),),
    "standing": (("voter", _flag), ("nonce", _nonce), ("history", _flag), ("echo", _nonce), ("knows", _flag)),
    "progress": (("next_node_idx", _count),),
}
"""All that nodes may say to each other. Commands to run, commands in pieces and requests of operators are not in it."""


_VALUES: Final = {kind: itemgetter("type", *(name for name, _check in shape)) for kind, shape in SHAPES.items()}
"""By kind: what reads a message in the order of its shape, the kind itself first."""


def encode(term: int, message: Message) -> bytes:
    """The body of a frame. Raises `BadMessage` for what is not in `SHAPES`."""
    kind = message["type"]
    shape = SHAPES.get(kind)
    if shape is None or len(message) != len(shape) + 1:
        raise BadMessage(f"{kind!r} with {sorted(message)} is not for the wire")
    packed: bytes = msgpack.packb((term, *_VALUES[kind](message)))
    return packed


def decode(body: bytes | bytearray) -> tuple[int, Message]:
    """The sender's term and the message. Raises `BadFrame`, `BadMessage`."""
    fields = _unpack(body)
    if type(fields) is not tuple or len(fields) < 2 or not _count(fields[0]) or type(fields[1]) is not str:
        raise BadFrame("not an envelope")
    kind = fields[1]
    shape = SHAPES.get(kind)
    if shape is None:
        raise BadMessage(f"unknown message {kind[:40]!r}")
    if len(fields) != len(shape) + 2:
        raise BadMessage(f"{kind} with {len(fields) - 2} fields")
    message: Message = {"type": kind}
    for place, (name, check) in enumerate(shape, start=2):
        message[name] = value = fields[place]
        if not check(value):
            raise BadMessage(f"{kind} with a bad {name}")
    if kind == "append_entries":
        entries = message["entries"]
        if entries and (entries[0][1] != message["prevLogIdx"] + 1 or entries[0][2] < message["prevLogTerm"]):
            raise BadMessage("append_entries whose entries do not follow their previous one")
        if entries and entries[-1][2] > message["term"]:
            raise BadMessage("append_entries with entries of a later term")
    return fields[0], message


def _shown(value: object) -> str:
    """What a stranger sent, for people; `repr` would go as deep as it is nested."""
    return reprlib.repr(value)[:80]


def _unpack(body: bytes | bytearray) -> Any:
    try:
        return msgpack.unpackb(body, use_list=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadFrame(f"not msgpack ({type(error).__name__})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """Limits and times of a `SocketTransport`."""

    frame_bytes_max: int = 8 * 1024 * 1024
    """The longest frame of a peer."""
    send_buffer_bytes_max: int = 32 * 1024 * 1024
    """A peer that leaves more than this unread is disconnected."""
    handshake_bytes_max: int = 1024
    """The longest frame of a stranger."""
    handshake_timeout_s: float = 2.0
    strangers_max: int = 32
    """How many connections may be in their handshake; more are closed at once."""
    connect_timeout_s: float = 1.0
    retry_s: float = 0.2
    """Dial and probe again after half of this to all of it; the first times sooner."""
    unanswered_timeout_s: float = 10.0
    """A connection whose other end has vanished without a word is given up after this."""

    def __post_init__(self) -> None:
        assert 0 < self.handshake_bytes_max < self.frame_bytes_max < 2**32
        assert self.send_buffer_bytes_max >= 2 * self.frame_bytes_max
        assert self.strangers_max >= 1
        assert min(self.handshake_timeout_s, self.connect_timeout_s, self.retry_s, self.unanswered_timeout_s) > 0


class SocketTransport:
    """`Transport` over TCP.

    `addresses` holds host and port of every node of the cluster, this one's too: it listens there. `secret` is shared
    by the nodes of one cluster, and by nobody else. With `ssl_server`, `ssl_client` and `identify` (all or none), TLS
    carries it all; both contexts must demand a certificate, and `identify` says which nodes one (DER) names.
    """

    def __init__(
        self,
        *,
        node: str,
        addresses: Mapping[str, tuple[str, int]],
        cluster: str,
        secret: bytes,
        settings: TransportSettings | None = None,
        ssl_server: ssl.SSLContext | None = None,
        ssl_client: ssl.SSLContext | None = None,
        identify: Callable[[bytes], frozenset[str]] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        assert node in addresses
        assert len(secret) >= 16, "a secret of less than 16 bytes can be guessed"
        assert (ssl_server is None) == (ssl_client is None) == (identify is None)
        assert ssl_server is None or ssl_server.verify_mode is ssl.CERT_REQUIRED
        assert ssl_client is None or ssl_client.verify_mode is ssl.CERT_REQUIRED
        self.node = node
        self.cluster = cluster
        self.secret = secret
        self.settings = settings or TransportSettings()
        self.peers = frozenset(addresses) - {node}
        self._addresses = dict(addresses)
        self._ssl_server = ssl_server
        self._ssl_client = ssl_client
        self._identify = identify
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._handlers: Handlers | None = None
        self._server: asyncio.Server | None = None
        self._door: TlsDoor | None = None
        self._pursuits: list[asyncio.Task[None]] = []
        self._links: dict[str, _Link] = {}
        self._missing: dict[str, asyncio.Event] = {}
        self._strangers: set[_Link] = set()

    @property
    def frame_bytes_max(self) -> int:
        """The largest encoded message that it carries."""
        return self.settings.frame_bytes_max

    async def start(self, handlers: Handlers) -> None:
        """Listen, and keep connections to all peers. Raises OSError if it cannot listen."""
        loop = asyncio.get_running_loop()
        host, port = self._addresses[self.node]
        self._handlers = handlers
        if self._ssl_server is None:
            self._server = await loop.create_server(lambda: _Link(self, None), host, port)
        else:
            self._door = TlsDoor(
                lambda: _Link(self, None),
                self._ssl_server,
                handshakes_max=self.settings.strangers_max,
                handshake_timeout_s=self.settings.handshake_timeout_s,
            )
            await self._door.start(host, port)
        for peer in sorted(self.peers):
            self._missing[peer] = asyncio.Event()
            self._missing[peer].set()
            self._pursuits.append(loop.create_task(self._pursue(peer)))

    def send(self, peer: str, term: int, message: Message) -> bool:
        """Hand over a message of a node that is in `term`; False: it was not sent."""
        link = self._links.get(peer)
        if link is None:
            return False
        try:
            body = encode(term, message)
        except BadMessage as error:
            _log.error("%s: not sent to %s: %s", self.node, peer, error)
            return False
        return link.send(body)

    def connected(self) -> frozenset[str]:
        """Ids of the peers that can be sent to now."""
        return frozenset(self._links)

    async def stop(self) -> None:
        """Close everything. No handler is called after this returns."""
        self._handlers = None
        server, self._server = self._server, None
        if server is not None:
            # The listening socket first: whoever loses a connection to us and dials again is refused.
            server.close()
        door, self._door = self._door, None
        if door is not None:
            await door.close()
        for pursuit in self._pursuits:
            pursuit.cancel()
        await asyncio.gather(*self._pursuits, return_exceptions=True)
        self._pursuits = []
        links = [*self._links.values(), *self._strangers]
        for link in links:
            link.drop(None)
        for link in links:
            await link.ended.wait()
        if server is not None:
            await server.wait_closed()

    async def _pursue(self, peer: str) -> None:
        """Dial this peer, or probe it, for as long as there is no connection to it."""
        loop = asyncio.get_running_loop()
        host, port = self._addresses[peer]
        dials = self.node > peer
        # Soon again at first: a dying process may still accept while its sockets are closed one after the other.
        pause_s = first_pause_s = self.settings.retry_s / 16
        said = ""
        while True:
            if not self._missing[peer].is_set():
                await self._missing[peer].wait()
                pause_s = first_pause_s
            try:
                async with asyncio.timeout(self.settings.connect_timeout_s):
                    if dials:
                        link = await self._dial(peer)
                    else:
                        probe, _ = await loop.create_connection(asyncio.Protocol, host, port)
                        probe.abort()
            except ConnectionRefusedError:
                if self._handlers is not None and peer not in self._links:
                    self._handlers.refused(peer)
            except ssl.SSLError as error:
                # Somebody is there, and is not who we take for our peer: that does not pass by itself. Said once.
                if said != (said := f"{error.reason}"):
                    _log.warning("%s: no TLS with %s: %s", self.node, peer, error)
            except (OSError, TimeoutError) as error:
                _log.debug("%s: cannot reach %s: %r", self.node, peer, error)
            else:
                if dials:
                    began_s = loop.time()
                    await link.ended.wait()
                    if link.established and loop.time() - began_s > self.settings.retry_s:
                        pause_s = first_pause_s
                        continue  # it was a good connection: find out at once whether the peer still lives
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, self.settings.retry_s)

    async def _dial(self, peer: str) -> "_Link":
        host, port = self._addresses[peer]
        link = _Link(self, peer)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: link,
                host,
                port,
                ssl=self._ssl_client,
                server_hostname=None if self._ssl_client is None else peer,
            )
        except BaseException:
            # Also when it is cut short, by `stop` or by the time limit.
            link.give_up()
            raise
        return link

    # What links tell their transport.

    def vouched(self, transport: asyncio.Transport) -> frozenset[str]:
        """The peers that the other end may be, as far as its certificate goes; without TLS, any."""
        if self._identify is None:
            return self.peers
        der = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return self.peers & self._identify(der) if der else frozenset()

    def admit(self, link: "_Link", *, accepted: bool) -> bool:
        """A connection begins its handshake; False: there are too many strangers."""
        if accepted and sum(1 for other in self._strangers if other.accepted) >= self.settings.strangers_max:
            return False
        self._strangers.add(link)
        return True

    def joined(self, link: "_Link") -> None:
        """A connection has proved whose it is. A newer one replaces an older: the peer no longer has that."""
        assert link.peer is not None
        self._strangers.discard(link)
        if self._handlers is None:
            link.drop(None)
            return
        older = self._links.pop(link.peer, None)
        if older is not None:
            older.drop("the peer has connected anew")
            self._handlers.disconnected(link.peer)
        self._links[link.peer] = link
        self._missing[link.peer].clear()
        _log.info("%s: connected to %s", self.node, link.peer)
        self._handlers.connected(link.peer)

    def left(self, link: "_Link") -> None:
        """A connection has ended."""
        self._strangers.discard(link)
        if link.peer is None or self._links.get(link.peer) is not link:
            return
        del self._links[link.peer]
        self._missing[link.peer].set()
        _log.info("%s: lost the connection to %s", self.node, link.peer)
        if self._handlers is not None:
            self._handlers.disconnected(link.peer)

    def received(self, link: "_Link", body: bytes | bytearray) -> None:
        """A frame of a peer. Raises `BadFrame`."""
        assert link.peer is not None
        try:
            term, message = decode(body)
        except BadMessage as error:
            _log.warning("%s: dropped from %s: %s", self.node, link.peer, error)
            return
        if self._handlers is not None:
            self._handlers.message(link.peer, term, message)


class _Link(asyncio.Protocol):
    """One connection, from either end: first the handshake, then frames. `dialed` is the peer, None if we accepted."""

    def __init__(self, owner: SocketTransport, dialed: str | None) -> None:
        self.peer: str | None = dialed
        self.accepted = dialed is None
        self.established = False
        self.ended = asyncio.Event()
        self._owner = owner
        self._settings = owner.settings
        self._transport: asyncio.Transport | None = None
        self._dropped = False
        self._silent = True
        self._rest = bytearray()
        self._vouched: frozenset[str] = frozenset()
        self._nonces: tuple[bytes, bytes] = (b"", b"")  # the dialer's, the acceptor's
        self._expected: Callable[[Any], None] = self._hello if self.accepted else self._challenge
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = made = cast("asyncio.Transport", transport)
        if not self._owner.admit(self, accepted=self.accepted):
            self.drop("too many strangers")
            return
        self._vouched = self._owner.vouched(made)
        if not self._vouched or (self.peer is not None and self.peer not in self._vouched):
            self.drop(f"its certificate is not that of {self.peer or 'a peer'}")
            return
        _set_options(made.get_extra_info("socket"), self._settings.unanswered_timeout_s)
        self._deadline = asyncio.get_running_loop().call_later(
            self._settings.handshake_timeout_s, self.drop, "its handshake took too long"
        )
        if not self.accepted:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            self._nonces = (nonce, b"")
            self._say((_MAGIC, _VERSION, self._owner.cluster, self._owner.node, self.peer, nonce))

    def data_received(self, data: bytes) -> None:
        self._silent = False
        unread: bytes | bytearray = data
        if self._rest:
            self._rest += data
            unread = self._rest
        try:
            position = self._take_frames(unread)
        except BadFrame as error:
            self.drop(str(error))
            return
        if position or unread is not self._rest:
            self._rest = bytearray(unread[position:])

    def connection_lost(self, exc: Exception | None) -> None:
        refused = isinstance(exc, ssl.SSLError)
        if not self.established and not self._dropped and (refused or not self._silent):
            # A probe says nothing at all, and is no news.
            why = f": {exc}" if refused else ""
            _log.warning("%s: %s hung up in the handshake%s", self._owner.node, self._name(), why)
        self._dropped = True
        self._rest = bytearray()
        if self._deadline is not None:
            self._deadline.cancel()
        self.ended.set()
        self._owner.left(self)

    def send(self, body: bytes) -> bool:
        """Queue one frame; False: the connection is gone, or goes now because the peer does not read."""
        if self._dropped or self._transport is None:
            return False
        assert len(body) <= self._settings.frame_bytes_max
        if self._transport.get_write_buffer_size() + len(body) > self._settings.send_buffer_bytes_max:
            self.drop("it does not read what it is sent")
            return False
        self._transport.write(_LENGTH.pack(len(body)) + body)
        return True

    def drop(self, why: str | None) -> None:
        """Close at once, what is unsent is lost; with a line in the log if there is a reason."""
        if self._dropped:
            return
        self._dropped = True
        if why is not None:
            _log.warning("%s: closed the connection with %s: %s", self._owner.node, self._name(), why)
        if self._transport is not None:
            self._transport.abort()

    def give_up(self) -> None:
        """End a dial that was cut short: uvloop may have connected it, and then closes it without `connection_lost`."""
        if self._transport is not None and not self.ended.is_set():
            self.drop(None)
            self.connection_lost(None)

    def _take_frames(self, data: bytes | bytearray) -> int:
        """Handle all whole frames; return where the rest begins."""
        position = 0
        while len(data) - position >= _LENGTH.size and not self._dropped:
            (length,) = _LENGTH.unpack_from(data, position)
            limit = self._settings.frame_bytes_max if self.established else self._settings.handshake_bytes_max
            if length > limit:
                raise BadFrame(f"a frame of {length} bytes, where {limit} are allowed")
            end = position + _LENGTH.size + length
            if end > len(data):
                break
            body = data[position + _LENGTH.size : end]
            position = end
            if self.established:
                self._owner.received(self, body)
            else:
                self._expected(_unpack(bytes(body)))
        return position

    # The handshake. Each step checks one frame of the other end.

    def _hello(self, frame: Any) -> None:
        if type(frame) is not tuple or len(frame) != 6 or frame[0] != _MAGIC:
            raise BadFrame("not a hello")
        _magic, version, cluster, dialer, acceptor, nonce = frame
        if version != _VERSION:
            raise BadFrame(f"it speaks version {_shown(version)}, this node {_VERSION}")
        if cluster != self._owner.cluster:
            raise BadFrame(f"it is of cluster {_shown(cluster)}, this node of {self._owner.cluster!r}")
        if acceptor != self._owner.node:
            raise BadFrame(f"it wants to speak to {_shown(acceptor)}")
        if type(dialer) is not str or dialer not in self._owner.peers or dialer < self._owner.node:
            raise BadFrame(f"node {_shown(dialer)} does not dial here")
        if dialer not in self._vouched:
            raise BadFrame(f"it says that it is {dialer}, and its certificate says otherwise")
        if type(nonce) is not bytes or len(nonce) != _NONCE_BYTES:
            raise BadFrame("a bad nonce")
        self.peer = dialer
        self._nonces = (nonce, secrets.token_bytes(_NONCE_BYTES))
        self._expected = self._proof
        self._say((self._nonces[1],))

    def _challenge(self, frame: Any) -> None:
        if type(frame) is not tuple or len(frame) != 1 or type(frame[0]) is not bytes or len(frame[0]) != _NONCE_BYTES:
            raise BadFrame("not a challenge")
        self._nonces = (self._nonces[0], frame[0])
        self._expected = self._proof
        self._say((self._prove("dialer"),))

    def _proof(self, frame: Any) -> None:
        """The other end's proof; the acceptor answers with its own."""
        if type(frame) is not tuple or len(frame) != 1 or type(frame[0]) is not bytes:
            raise BadFrame("not a proof")
        if not hmac.compare_digest(frame[0], self._prove("dialer" if self.accepted else "acceptor")):
            raise BadFrame("it does not know the secret")
        if self.accepted:
            self._say((self._prove("acceptor"),))
        assert self._deadline is not None
        self._deadline.cancel()
        self.established = True
        self._owner.joined(self)

    def _prove(self, role: str) -> bytes:
        ends = (self._owner.node, self.peer)
        acceptor, dialer = ends if self.accepted else ends[::-1]
        proved = (role, _MAGIC, _VERSION, self._owner.cluster, dialer, acceptor, *self._nonces)
        return hmac.digest(self._owner.secret, msgpack.packb(proved), hashlib.sha256)

    def _say(self, frame: tuple[object, ...]) -> None:
        self.send(msgpack.packb(frame))

    def _name(self) -> str:
        where = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{self.peer or 'a stranger'} at {where}"


def _set_options(sock: socket.socket | None, unanswered_timeout_s: float) -> None:
    """No delay for small frames, and an end for connections whose other end has vanished."""
    if sock is None:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(unanswered_timeout_s / 2)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, int(unanswered_timeout_s / 2)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unanswered_timeout_s * 1000))
