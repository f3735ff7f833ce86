"""What comes in on the port between the nodes: from strangers, who have proved nothing, and from peers."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from typing import Any, cast

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
    _Link,
    decode,
    encode,
)
from tests.fuzz import HUNT, examples
from tests.fuzz.mutations import altered, damaged, in_parts, pack

SECRET = b"s" * 16
SETTINGS = TransportSettings(frame_bytes_max=4096, send_buffer_bytes_max=16384)
ENTRIES = [[b"one", 2, 3], [b"two", 3, 3]]
MESSAGES: list[Any] = [
    [3, "append_entries", 3, 1, 1, 3, ENTRIES],
    [3, "next_node_idx", 4, False, True],
    [3, "request_vote", 3, 5, 2],
    [3, "response_vote", 3],
    [3, "timeout_now", 3],
    [3, "pre_vote", 4, 5, 2],
    [3, "pre_vote_answer", 4, True],
    [3, "snapshot_piece", 3, 9, 2, 100, 0, b"piece"],
    [3, "snapshot_got", 9, 5, False],
    [3, "understands", 2],
    [3, "standing", True, b"n" * 16, True, b"", False],
    [3, "progress", 7],
]
HELLO = ["outlast raft", 1, "m", "n2", "n1", b"n" * 32]
BODIES = altered(st.sampled_from(MESSAGES)).map(pack) | damaged(st.sampled_from(MESSAGES).map(pack))
Decode = Callable[[bytes], tuple[int, Message]]


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def decodes(body: bytes, decode: Decode = decode) -> None:
    try:
        term, message = decode(body)
    except (BadFrame, BadMessage) as error:
        assert len(str(error)) < 300
        return
    assert decode(encode(term, message)) == (term, message)
    assert term >= 0
    if message["type"] == "append_entries":
        indices = [index for _command, index, _term in message["entries"]]
        assert indices == list(range(message["prevLogIdx"] + 1, message["prevLogIdx"] + 1 + len(indices)))


@examples(150)
@given(BODIES)
def test_a_message_is_of_its_shape_or_refused(body: bytes) -> None:
    decodes(body)


class _Wire:
    """The half of a connection that a link writes to; nothing is lost, and an end is noted."""

    def __init__(self) -> None:
        self.said = bytearray()
        self.ended = False

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        self.said += data

    def abort(self) -> None:
        self.ended = True


class _Timeless:
    """A transport that is never started: links are made by hand, and nothing is dialed."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        addresses = dict.fromkeys(("n1", "n2", "n3"), ("127.0.0.1", 1))
        self.owner = SocketTransport(node="n1", addresses=addresses, cluster="m", secret=SECRET, settings=SETTINGS)

        def ignore(_peer: str) -> None:
            return

        self.owner._missing = {name: asyncio.Event() for name in addresses}
        self.owner._handlers = Handlers(
            message=lambda _peer, _term, message: self.heard.append(message),
            connected=ignore,
            disconnected=ignore,
            refused=ignore,
        )


class _Deadline:
    def cancel(self) -> None:
        return


def _link(bench: _Timeless, *, proved: bool) -> tuple[_Link, _Wire]:
    link, wire = _Link(bench.owner, None), _Wire()
    link._transport = cast("Any", wire)
    link._vouched = bench.owner.peers
    link._deadline = cast("Any", _Deadline())
    if proved:
        link.peer, link.established = "n2", True
    return link, wire


def hears(parts: list[bytes], *, proved: bool, link_type: Callable[..., Any] = _link) -> None:
    bench = _Timeless()
    link, wire = link_type(bench, proved=proved)
    most = SETTINGS.frame_bytes_max if proved else SETTINGS.handshake_bytes_max
    for part in parts:
        if wire.ended:
            break
        link.data_received(part)
        assert len(link._rest) <= most + 4 + len(part), "a length is judged before its frame is kept"
    assert proved or not link.established, "nobody proves a secret by chance"
    assert proved or not bench.heard
    assert all(message["type"] in SHAPES for message in bench.heard)
    assert link._dropped == wire.ended


@examples(100)
@given(st.lists(altered(st.just(HELLO)).map(pack) | damaged(st.just(pack(HELLO))), min_size=1, max_size=3), st.data())
def test_a_stranger_says_what_it_likes(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(framed, frames))
    hears(data.draw(in_parts(stream) | damaged(st.just(stream)).map(lambda bad: [bad])), proved=False)


@examples(100)
@given(st.lists(BODIES | st.sampled_from(MESSAGES).map(pack), min_size=1, max_size=4), st.data())
def test_a_peer_says_what_it_likes(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(framed, frames))
    hears(data.draw(in_parts(stream) | damaged(st.just(stream)).map(lambda bad: [bad])), proved=True)


@pytest.mark.parametrize("place", range(1, 6))
def test_a_deep_hello_does_not_exhaust_the_stack(place: int) -> None:
    # As little as possible beside it, so that it is as deep as a stranger's frame can be.
    packed = [pack(field if at < place or at == 4 else None) for at, field in enumerate(HELLO)]
    packed[place] = b""
    depth = SETTINGS.handshake_bytes_max - len(b"".join(packed)) - 2
    packed[place] = b"\x91" * depth + b"\xc0"
    hears([framed(b"\x96" + b"".join(packed))], proved=False)


def test_who_knows_the_secret_is_let_in() -> None:
    bench = _Timeless()
    link, wire = _link(bench, proved=False)
    link.data_received(framed(pack(HELLO)))
    nonce = msgpack.unpackb(bytes(wire.said[4:]))[0]
    proved = msgpack.packb(("dialer", "outlast raft", 1, "m", "n2", "n1", b"n" * 32, nonce))
    link.data_received(framed(pack([hmac.digest(SECRET, proved, hashlib.sha256)])))
    assert link.established
    for message in MESSAGES:
        link.data_received(framed(pack(message)))
        decodes(pack(message))
    assert [message["type"] for message in bench.heard] == [message[1] for message in MESSAGES]


# ------------------------------------------------------------------------------------------------ known to be bad


def _believing(body: bytes) -> tuple[int, Message]:
    """Takes as many fields as there are."""
    term, kind, *values = msgpack.unpackb(body, use_list=False)
    return decode(body) if kind in SHAPES and values else (term, {"type": kind})


def test_a_decoder_without_checks_is_found() -> None:
    @HUNT
    @given(BODIES)
    def hunt(body: bytes) -> None:
        decodes(body, _believing)

    with pytest.raises((TypeError, ValueError, KeyError)):
        hunt()


class _Hoarding(_Link):
    """Waits for a whole frame, however long it is said to be."""

    def _take_frames(self, data: bytes | bytearray) -> int:
        length = int.from_bytes(data[:4], "big")
        return 0 if len(data) < 4 + length else super()._take_frames(data)


def test_a_link_without_the_length_check_is_found() -> None:
    def made(bench: _Timeless, *, proved: bool) -> tuple[_Link, _Wire]:
        link, wire = _link(bench, proved=proved)
        link.__class__ = _Hoarding
        return link, wire

    parts = [b"\xff\xff\xff\x7f" + bytes(1000)] * 8
    hears(parts, proved=True)
    with pytest.raises(AssertionError, match="judged"):
        hears(parts, proved=True, link_type=made)
