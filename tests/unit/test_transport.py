"""The wire between nodes: who gets in, what gets through, and what attacks lead to."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import pickle
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replication.guard import Message
from cluster.replication.transport import (
    SHAPES,
    BadFrame,
    BadMessage,
    Handlers,
    SocketTransport,
    TransportSettings,
    decode,
    encode,
)

CLUSTER = "wire"
SECRET = b"known to all nodes, and to nobody else"
LIMIT_S = 20.0

APPEND: Message = {
    "type": "append_entries",
    "term": 3,
    "commit_index": 1,
    "prevLogIdx": 1,
    "prevLogTerm": 0,
    "entries": ((b"\0one", 2, 3), (b"\0two", 3, 3)),
}
MESSAGES: list[Message] = [
    APPEND,
    APPEND | {"entries": ()},
    {"type": "next_node_idx", "next_node_idx": 4, "reset": False, "success": True},
    {"type": "request_vote", "term": 4, "last_log_index": 3, "last_log_term": 3},
    {"type": "response_vote", "term": 4},
    {"type": "timeout_now", "term": 4},
    {"type": "understands", "level": 2},
]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - conditions of the outside have no event
            await asyncio.sleep(0.002)


class Node:
    """A transport, and what it was told."""

    def __init__(self, transport: SocketTransport) -> None:
        self.transport = transport
        self.heard: list[tuple[str, int, Message]] = []
        self.told: list[tuple[str, str]] = []
        self.refused: list[str] = []

    async def start(self) -> None:
        await self.transport.start(
            Handlers(
                message=lambda peer, term, message: self.heard.append((peer, term, message)),
                connected=lambda peer: self.told.append(("connected", peer)),
                disconnected=lambda peer: self.told.append(("disconnected", peer)),
                refused=self.refused.append,
            )
        )


class Wire:
    """Two addresses, and whoever is started on them. n2 dials n1."""

    def __init__(self, addresses: dict[str, tuple[str, int]]) -> None:
        self.addresses = addresses
        self.nodes: dict[str, Node] = {}

    async def start(self, node: str, **named: Any) -> Node:
        wanted = {"cluster": CLUSTER, "secret": SECRET, "settings": TransportSettings(handshake_timeout_s=0.5)} | named
        transport = SocketTransport(node=node, addresses=self.addresses, **wanted)
        self.nodes[node] = Node(transport)
        await self.nodes[node].start()
        return self.nodes[node]

    async def stop(self, node: str) -> None:
        await self.nodes.pop(node).transport.stop()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.addresses["n1"])


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    with contextlib.ExitStack() as stack:
        addresses = {}
        for node in ("n1", "n2"):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            addresses[node] = holder.getsockname()
        wire = Wire(addresses)
        yield wire
        for node in list(wire.nodes):
            await wire.stop(node)


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def hello(**changed: Any) -> bytes:
    fields = {"magic": "outlast raft", "version": 1, "cluster": CLUSTER, "dialer": "n2", "acceptor": "n1"}
    return frame(msgpack.packb([*(fields | changed).values(), bytes(32)]))


async def read_frame(reader: asyncio.StreamReader) -> Any:
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    return msgpack.unpackb(await reader.readexactly(length))


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the other end closes."""
    async with asyncio.timeout(LIMIT_S):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


async def connected(wire: Wire) -> tuple[Node, Node]:
    one, two = await wire.start("n1"), await wire.start("n2")
    await until(lambda: one.transport.connected() == {"n2"} and two.transport.connected() == {"n1"})
    return one, two


async def serves(wire: Wire) -> None:
    """The attack is over: a real peer gets in and is heard."""
    one = wire.nodes["n1"]
    assert not one.heard
    assert not one.told
    two = await wire.start("n2")
    await until(lambda: two.transport.connected() and one.transport.connected())
    assert two.transport.send("n1", 3, APPEND)
    await until(lambda: one.heard)
    assert one.heard == [("n2", 3, APPEND)]


# What goes through.


async def test_messages_go_both_ways_in_order_with_their_senders_term(wire: Wire) -> None:
    one, two = await connected(wire)
    for term, message in enumerate(MESSAGES, start=4):
        assert one.transport.send("n2", term, message)
        assert two.transport.send("n1", term, message)
    await until(lambda: len(one.heard) == len(two.heard) == len(MESSAGES))
    assert one.heard == [("n2", term, message) for term, message in enumerate(MESSAGES, start=4)]
    assert two.heard == [("n1", term, message) for term, message in enumerate(MESSAGES, start=4)]


async def test_large_frames_and_many_small_ones(wire: Wire) -> None:
    one, two = await connected(wire)
    large = APPEND | {"entries": ((os.urandom(4 * 1024 * 1024), 2, 3),)}
    sent = [large, *[APPEND] * 500, large]
    for message in sent:
        assert two.transport.send("n1", 3, message)
    await until(lambda: len(one.heard) == len(sent))
    assert [message for _peer, _term, message in one.heard] == sent


async def test_a_message_cut_into_single_bytes_arrives() -> None:
    """Whatever the pieces, the frames are the same: the parser is fed by hand."""
    from cluster.replication.transport import _Link

    class Owner:
        settings = TransportSettings()
        bodies: list[bytes] = []

        def received(self, link: object, body: bytes) -> None:
            self.bodies.append(bytes(body))

    link = _Link(Owner(), "n2")  # type: ignore[arg-type]
    link.established = True
    stream = frame(b"one") + frame(b"") + frame(b"three") * 3
    for position in range(len(stream)):
        link.data_received(stream[position : position + 1])
    assert Owner.bodies == [b"one", b"", b"three", b"three", b"three"]


async def test_both_ends_hear_of_the_end_and_of_the_death(wire: Wire) -> None:
    one, two = await connected(wire)
    one.refused.clear()
    await wire.stop("n2")
    await until(lambda: one.refused)  # n1 does not dial, but probes
    assert one.told == [("connected", "n2"), ("disconnected", "n2")]
    two = await wire.start("n2")
    await until(two.transport.connected)
    two.refused.clear()
    await wire.stop("n1")
    await until(lambda: two.refused)
    assert two.told == [("connected", "n1"), ("disconnected", "n1")]
    await wire.start("n1")
    await until(two.transport.connected)


class Mute(asyncio.Transport):
    """Closes without a word."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        pass


@pytest.mark.parametrize(("connect_timeout_s", "dials"), [(60.0, 1), (0.01, 3)])
async def test_a_dial_that_is_cut_short_ends(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, connect_timeout_s: float, dials: int
) -> None:
    links: list[Any] = []

    async def as_uvloop_does(factory: Callable[[], asyncio.BaseProtocol], *_: object, **__: object) -> None:
        """Connected already when it is cancelled, and `connection_lost` never comes."""
        links.append(factory())
        links[-1].connection_made(Mute())
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", as_uvloop_does)
    two = await wire.start("n2", settings=TransportSettings(connect_timeout_s=connect_timeout_s))
    await until(lambda: len(links) >= dials)
    async with asyncio.timeout(LIMIT_S):
        await wire.stop("n2")
    assert all(link.ended.is_set() for link in links)
    assert not two.told


async def test_a_newer_connection_replaces_the_older(wire: Wire) -> None:
    one, _two = await connected(wire)
    _second = SocketTransport(
        node="n2", addresses=wire.addresses | {"n2": ("127.0.0.1", 0)}, cluster=CLUSTER, secret=SECRET
    )
    second = Node(_second)
    await second.start()
    try:
        await until(lambda: one.told.count(("connected", "n2")) >= 2)
        assert ("disconnected", "n2") in one.told
    finally:
        await second.transport.stop()


async def test_nothing_can_be_sent_to_who_is_away(wire: Wire) -> None:
    one = await wire.start("n1")
    assert not one.transport.send("n2", 1, APPEND)
    assert not one.transport.send("n9", 1, APPEND)


async def test_a_peer_that_does_not_read_is_disconnected(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    small = TransportSettings(frame_bytes_max=1024 * 1024, send_buffer_bytes_max=2 * 1024 * 1024)
    one = await wire.start("n1", settings=small)
    reader, writer = await wire.connect()
    await authenticate(reader, writer)
    await until(one.transport.connected)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    large = APPEND | {"entries": ((bytes(512 * 1024), 2, 3),)}
    sent = 0
    while one.transport.send("n2", 3, large):
        sent += 1
        assert sent < 1000
        await asyncio.sleep(0)
    await until(lambda: ("disconnected", "n2") in one.told)
    assert "does not read" in caplog.text
    writer.close()


# What does not.


async def authenticate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The dialer's half of the handshake, by hand."""
    writer.write(hello())
    (nonce,) = await read_frame(reader)
    proved = ("outlast raft", 1, CLUSTER, "n2", "n1", bytes(32), nonce)
    writer.write(frame(msgpack.packb([hmac.digest(SECRET, msgpack.packb(("dialer", *proved)), hashlib.sha256)])))
    (answer,) = await read_frame(reader)
    assert answer == hmac.digest(SECRET, msgpack.packb(("acceptor", *proved)), hashlib.sha256)


class _Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (99,)


STRANGERS = {
    "random bytes": os.urandom(4096),
    "zeros": bytes(4096),
    "a huge length": b"\xff\xff\xff\xff" + bytes(100),
    "a length just above the limit": struct.pack(">I", 1025),
    "a pickle": pickle.dumps(_Bomb()),
    "a framed pickle": frame(pickle.dumps(_Bomb())),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "not msgpack": frame(b"\xc1\xc1\xc1"),
    "a number": frame(msgpack.packb(7)),
    "an empty frame": frame(b""),
    "a deep nest": frame(b"\x91" * 1000),
    "a lie about its size": frame(b"\xdd\xff\xff\xff\xff"),
    "a message before the handshake": frame(encode(3, APPEND)),
    "another magic": hello(magic="raft"),
    "another version": hello(version=2),
    "another cluster": hello(cluster="other"),
    "an unknown node": hello(dialer="n9"),
    "this node itself": hello(dialer="n1"),
    "no name": hello(dialer=7),
    "a list for a name": hello(dialer=["n2"]),
    "the wrong number": hello(acceptor="n3"),
    "a short nonce": frame(msgpack.packb(["outlast raft", 1, CLUSTER, "n2", "n1", b"short"])),
}


@pytest.mark.parametrize("attack", STRANGERS)
async def test_a_stranger_is_shown_the_door(wire: Wire, attack: str, caplog: pytest.LogCaptureFixture) -> None:
    await wire.start("n1")
    reader, writer = await wire.connect()
    caplog.clear()
    writer.write(STRANGERS[attack])
    assert await closed(reader) == b""
    lines = [record for record in caplog.records if record.name == "cluster.replication.transport"]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    writer.close()
    await serves(wire)


@pytest.mark.parametrize("half", [b"", b"\x00", frame(b"half of it")[:7]])
async def test_half_a_frame_has_a_deadline(wire: Wire, half: bytes, caplog: pytest.LogCaptureFixture) -> None:
    await wire.start("n1")
    reader, writer = await wire.connect()
    writer.write(half)
    assert await closed(reader) == b""
    assert "took too long" in caplog.text
    writer.close()
    await serves(wire)


@pytest.mark.parametrize(
    "proof", [bytes(32), b"", hmac.digest(SECRET, b"something else", hashlib.sha256), "text", 7, None]
)
async def test_who_does_not_know_the_secret_is_not_let_in(wire: Wire, proof: object) -> None:
    await wire.start("n1")
    reader, writer = await wire.connect()
    writer.write(hello())
    await read_frame(reader)
    writer.write(frame(msgpack.packb([proof])) + frame(encode(3, APPEND)))
    assert await closed(reader) == b""
    writer.close()
    await serves(wire)


async def test_the_acceptors_proof_is_not_the_dialers(wire: Wire) -> None:
    """What one role proves opens nothing for the other, with the same nonces."""
    await wire.start("n1")
    reader, writer = await wire.connect()
    writer.write(hello())
    (nonce,) = await read_frame(reader)
    proved = ("acceptor", "outlast raft", 1, CLUSTER, "n2", "n1", bytes(32), nonce)
    writer.write(frame(msgpack.packb([hmac.digest(SECRET, msgpack.packb(proved), hashlib.sha256)])))
    assert await closed(reader) == b""
    writer.close()
    await serves(wire)


@pytest.mark.parametrize("named", [{"secret": b"not the secret of this cluster"}, {"cluster": "other"}])
async def test_nodes_of_different_clusters_do_not_connect(
    wire: Wire, named: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    one = await wire.start("n1")
    two = await wire.start("n2", **named)
    await until(lambda: caplog.text.count("closed the connection") >= 2)
    assert not one.told
    assert not two.told


async def test_a_dialer_tells_nothing_to_who_cannot_prove_itself(wire: Wire) -> None:
    """Somebody else listens on the address of n1."""
    done = asyncio.Event()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_frame(reader)
        writer.write(frame(msgpack.packb([bytes(32)])))
        await read_frame(reader)
        writer.write(frame(msgpack.packb([bytes(32)])) + frame(encode(3, APPEND)))
        assert await closed(reader) == b""
        writer.close()
        done.set()

    server = await asyncio.start_server(impostor, *wire.addresses["n1"])
    two = await wire.start("n2")
    async with asyncio.timeout(LIMIT_S):
        await done.wait()
    assert not two.told
    assert not two.heard
    await wire.stop("n2")
    server.close()
    await server.wait_closed()


async def test_strangers_are_counted(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    await wire.start("n1", settings=TransportSettings(strangers_max=3, handshake_timeout_s=1.0))
    silent = [await wire.connect() for _ in range(3)]
    reader, writer = await wire.connect()
    assert await closed(reader) == b""
    assert "too many strangers" in caplog.text
    for _reader, each in [*silent, (reader, writer)]:
        each.close()
    await serves(wire)


async def test_who_connects_and_hangs_up_is_no_news(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    await wire.start("n1")
    _reader, writer = await wire.connect()
    writer.close()
    await writer.wait_closed()
    await serves(wire)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


PEERS = {
    "a command to run": {"type": "apply_command", "command": b"x"},
    "a command in pieces": APPEND | {"transmission": "start", "data": b"x"},
    "a request of an operator": {"type": "status"},
}


@pytest.mark.parametrize("message", PEERS.values(), ids=PEERS)
async def test_what_is_not_for_the_wire_is_not_sent(
    wire: Wire, message: Message, caplog: pytest.LogCaptureFixture
) -> None:
    _one, two = await connected(wire)
    assert not two.transport.send("n1", 3, message)
    assert "not for the wire" in caplog.text


BAD_MESSAGES = {
    "unknown": (3, "apply_command", b"x"),
    "a field too many": (3, "response_vote", 3, 4),
    "a field too few": (3, "response_vote"),
    "text for a number": (3, "response_vote", "3"),
    "a flag for a number": (3, "response_vote", True),
    "a number for a flag": (3, "next_node_idx", 3, 0, 1),
    "below zero": (3, "response_vote", -1),
    "a fraction": (3, "response_vote", 1.5),
    "entries that are text": (3, "append_entries", 3, 1, 1, 0, "entries"),
    "an entry of two": (3, "append_entries", 3, 1, 1, 0, [[b"\0", 2]]),
    "an entry of text": (3, "append_entries", 3, 1, 1, 0, [["\0", 2, 3]]),
    "an entry of nothing": (3, "append_entries", 3, 1, 1, 0, [[b"", 2, 3]]),
    "a gap": (3, "append_entries", 3, 1, 1, 0, [[b"\0", 2, 3], [b"\0", 4, 3]]),
    "a gap before": (3, "append_entries", 3, 1, 1, 0, [[b"\0", 3, 3]]),
    "falling terms": (3, "append_entries", 3, 1, 1, 0, [[b"\0", 2, 3], [b"\0", 3, 2]]),
    "a term before the previous": (3, "append_entries", 3, 1, 1, 2, [[b"\0", 2, 1]]),
    "a term after the leader's": (3, "append_entries", 3, 1, 1, 0, [[b"\0", 2, 4]]),
    "no previous entry": (3, "append_entries", 3, 1, None, None, []),
}


@pytest.mark.parametrize("attack", BAD_MESSAGES)
async def test_a_peers_bad_message_is_dropped_and_the_next_one_heard(
    wire: Wire, attack: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = await wire.start("n1")
    reader, writer = await wire.connect()
    await authenticate(reader, writer)
    caplog.clear()
    writer.write(frame(msgpack.packb(BAD_MESSAGES[attack])) + frame(encode(3, APPEND)))
    await until(lambda: one.heard)
    assert one.heard == [("n2", 3, APPEND)]
    assert caplog.text.count("dropped from n2") == 1
    writer.close()


@pytest.mark.parametrize(
    "junk",
    [
        frame(b"\xc1"),
        frame(msgpack.packb([])),
        frame(msgpack.packb(["3", "x"])),
        frame(pickle.dumps(_Bomb())),
        b"\xff" * 4,
    ],
)
async def test_a_peers_junk_ends_its_connection(wire: Wire, junk: bytes) -> None:
    one = await wire.start("n1")
    reader, writer = await wire.connect()
    await authenticate(reader, writer)
    writer.write(junk + frame(encode(3, APPEND)))
    assert await closed(reader) == b""
    await until(lambda: one.told == [("connected", "n2"), ("disconnected", "n2")])
    assert not one.heard
    writer.close()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    try:
        _term, message = decode(body)
    except (BadFrame, BadMessage):
        return
    assert message["type"] in SHAPES


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["type"])
@given(st.data())
def test_a_flipped_byte_is_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(3, message))
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(BadFrame, BadMessage):
        decode(bytes(body))
