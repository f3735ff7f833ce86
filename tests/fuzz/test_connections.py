"""Answers over the courier's own connections, as bytes: understood, or a failure, and never more than was allowed."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.connections import _MAX_HEADERS_BYTES, PostFailed, _ClosedEarly, _Connection
from tests.fuzz import HUNT, examples
from tests.fuzz.mutations import damaged, in_parts

MOST: Final = 4096
BODY = b'{"vote":"prepared","result":{"a":[1,null]}}'
CHUNKS = b"5\r\n\x91\x81\xa1a\x01\r\n3;x=y\r\nabc\r\n0\r\nAfter: all\r\n\r\n"
FRAMED: list[bytes] = [
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 43\r\n\r\n" + BODY,
    b'HTTP/1.1 409 Conflict\r\nServer: x\r\nConnection: close\r\nContent-Length: 21\r\n\r\n{"state":"committed"}',
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: application/msgpack\r\n\r\n" + CHUNKS,
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 204 No Content\r\nDate: today\r\n\r\n",
]
"""They say where they end."""
UNFRAMED = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nso it goes"
ANSWERS = st.sampled_from([*FRAMED, UNFRAMED])
LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 40_000
NOISY = b"HTTP/1.1 200 OK\r\n" + b"X-Word: y\r\n" * 4_000
ENDLESS = b"HTTP/1.1 102 Processing\r\n\r\n" * 1_500


class _Line:
    """The half of a connection that is written to."""

    def __init__(self) -> None:
        self.ended = False

    def is_closing(self) -> bool:
        return self.ended

    def write(self, data: bytes) -> None:
        return

    def abort(self) -> None:
        self.ended = True


Made = Callable[[], _Connection]


async def _heard(parts: list[bytes], made: Made) -> tuple[int, str, bytes] | None:
    connection, line = made(), _Line()
    connection.connection_made(cast("Any", line))
    asking = asyncio.ensure_future(connection.ask(b"POST / HTTP/1.1\r\n\r\n", 60.0, MOST))
    await asyncio.sleep(0)
    for part in parts:
        if line.ended:
            break
        connection.data_received(part)
        assert sum(map(len, connection._parts)) <= MOST + _MAX_HEADERS_BYTES, "no more is kept than was allowed"
    connection.connection_lost(None)
    try:
        async with asyncio.timeout(5):
            return await asking
    except (PostFailed, _ClosedEarly) as error:
        assert len(str(error)) < 500
        return None
    finally:
        assert not connection.reusable


def hears(parts: list[bytes], made: Made = _Connection) -> tuple[int, str, bytes] | None:
    found = asyncio.run(_heard(parts, made))
    if found is not None:
        status, content_type, body = found
        assert 200 <= status <= 999, "an interim answer is not the answer"
        assert ";" not in content_type
        assert len(body) <= MOST + _MAX_HEADERS_BYTES
    return found


@examples(120)
@given(st.data(), damaged(ANSWERS) | st.lists(ANSWERS, min_size=1, max_size=3).map(b"".join))
@example(None, LONG)
@example(None, NOISY)
@example(None, ENDLESS)
def test_an_answer_is_understood_or_a_failure_however_it_comes(data: st.DataObject | None, stream: bytes) -> None:
    if data is None:
        parts = [stream[at : at + 1000] for at in range(0, len(stream), 1000)]
    else:
        parts = data.draw(in_parts(stream))
    found = hears(parts)
    if len(stream) <= MOST:
        assert found == hears([stream]), "however it comes"


@examples(60)
@given(st.sampled_from(FRAMED), st.data())
def test_half_an_answer_is_none(whole: bytes, data: st.DataObject) -> None:
    assert hears([whole]) is not None
    half = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert hears(data.draw(in_parts(half))) is None


def test_the_undamaged_are_understood() -> None:
    assert hears([FRAMED[0]]) == (200, "application/json", BODY)
    assert hears([FRAMED[2]]) == (200, "application/msgpack", b"\x91\x81\xa1a\x01abc")
    assert hears([FRAMED[3]]) == (503, "", b"{}")
    assert hears([FRAMED[4]]) == (204, "", b"")
    assert hears([UNFRAMED]) == (200, "text/plain", b"so it goes")


# ------------------------------------------------------------------------------------------------ known to be bad


class _Hoarding(_Connection):
    """Takes whatever comes."""

    def data_received(self, data: bytes) -> None:
        self._most = 2**40
        super().data_received(data)


class _Credulous(_Connection):
    """The end of the connection is the end of the answer, whatever its length was to be."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._framed = False
        super().connection_lost(exc)


class _Hasty(_Connection):
    """The first head is the answer's, and what comes is a whole one."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answer is not None and not self._answer.done() and data.endswith(b"}"):
            self._give_answer()


def test_a_connection_that_keeps_whatever_comes_is_found() -> None:
    parts = [LONG[at : at + 1000] for at in range(0, len(LONG), 1000)]
    assert hears(parts) is None
    with pytest.raises(AssertionError, match="no more is kept"):
        hears(parts, _Hoarding)


@pytest.mark.parametrize("made", [_Credulous, _Hasty])
def test_a_connection_that_believes_half_an_answer_is_found(made: Made) -> None:
    @HUNT
    @given(st.sampled_from(FRAMED), st.data())
    def hunt(whole: bytes, data: st.DataObject) -> None:
        half = whole[: data.draw(st.integers(0, len(whole) - 1))]
        assert hears(data.draw(in_parts(half)), made) is None

    with pytest.raises(AssertionError):
        hunt()


def test_a_connection_that_depends_on_how_it_comes_is_found() -> None:
    class Splitting(_Connection):
        """Takes each part for a message."""

        def data_received(self, data: bytes) -> None:
            if self._began and data.startswith((b"\r\n", b"HTTP")):
                self._fail(PostFailed("another answer"))
            super().data_received(data)

    @HUNT
    @given(ANSWERS, st.data())
    def hunt(stream: bytes, data: st.DataObject) -> None:
        assert hears(data.draw(in_parts(stream)), Splitting) == hears([stream], Splitting)

    with pytest.raises(AssertionError):
        hunt()
