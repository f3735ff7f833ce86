"""Connections to participants: kept, bounded, and not to be fooled by what answers."""

import asyncio
import gzip
from collections.abc import AsyncIterator

import pytest

from cluster.ports import free_ports
from coordinator.connections import IDLE_S, Connections, PostFailed
from tests.support.participants import Heard, ScriptedParticipant, hang, http
from tests.support.waiting import eventually

MOST = 1000


@pytest.fixture
async def connections() -> AsyncIterator[Connections]:
    made = Connections(timeout_s=10.0, connect_timeout_s=1.0, headers={"Authorization": "Bearer t"})
    yield made
    made.close()


async def post(connections: Connections, server: ScriptedParticipant) -> tuple[int, str, bytes]:
    return await connections.post(server.url, "/prepare", "application/json", b"{}", most=MOST)


async def test_a_request_is_what_was_meant(connections: Connections, scripted: ScriptedParticipant) -> None:
    scripted.rule = lambda _: http(202, b"done", headers={"Content-Type": "Text/Plain; charset=utf-8"})
    answer = await connections.post(f"{scripted.url}/base/", "/prepare", "application/json", b'{"a":1}', most=MOST)
    assert answer == (202, "text/plain", b"done")
    (heard,) = scripted.heard
    assert (heard.path, heard.body) == ("/base/prepare", {"a": 1})
    assert heard.headers["host"] == scripted.url.removeprefix("http://")
    assert heard.headers["authorization"] == "Bearer t"


async def test_a_connection_is_used_again(connections: Connections, scripted: ScriptedParticipant) -> None:
    for _ in range(5):
        assert (await post(connections, scripted))[0] == 200
    assert scripted.connections == 1


async def test_requests_at_once_have_connections_of_their_own(
    connections: Connections, scripted: ScriptedParticipant
) -> None:
    together = asyncio.Event()

    async def when_all_are_here(heard: Heard) -> bytes:
        if len(scripted.heard) == 4:
            together.set()
        await together.wait()
        return http(200, {"on": heard.connection})

    scripted.rule = when_all_are_here
    answers = await asyncio.gather(*(post(connections, scripted) for _ in range(4)))
    assert len({raw for _, _, raw in answers}) == 4
    assert scripted.connections == 4
    await post(connections, scripted)
    assert scripted.connections == 4


async def test_a_server_that_closes_is_believed(connections: Connections, scripted: ScriptedParticipant) -> None:
    scripted.rule = lambda _: http(200, {}, close=True)
    for _ in range(3):
        assert (await post(connections, scripted))[0] == 200
    assert scripted.connections == 3


async def test_a_connection_that_was_closed_while_idle_costs_nothing(
    connections: Connections, scripted: ScriptedParticipant
) -> None:
    await post(connections, scripted)
    for _ in range(3):
        scripted.cut()
        assert (await post(connections, scripted))[0] == 200


async def test_a_kept_connection_that_breaks_under_the_request_is_tried_anew(
    connections: Connections, scripted: ScriptedParticipant
) -> None:
    await post(connections, scripted)
    scripted.rule = lambda heard: None if heard.connection == 1 else http(200, {"on": heard.connection})
    assert (await post(connections, scripted))[2] == b'{"on": 2}'
    scripted.rule = lambda _: None
    with pytest.raises(PostFailed, match="closed by the participant"):
        await post(connections, scripted)


async def test_an_idle_connection_is_not_kept_for_ever(
    connections: Connections, scripted: ScriptedParticipant, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert IDLE_S <= 60, "most servers close theirs after a minute or more"
    await post(connections, scripted)
    monkeypatch.setattr("coordinator.connections.IDLE_S", -1.0)
    await post(connections, scripted)
    assert scripted.connections == 2
    (origin,) = connections._origins.values()
    assert len(origin._idle) == 1


async def test_a_left_origin_keeps_nothing(connections: Connections, scripted: ScriptedParticipant) -> None:
    await post(connections, scripted)
    connections.leave(scripted.url)
    assert connections._origins == {}
    await eventually(lambda: not scripted.open)
    connections.leave(scripted.url)
    assert (await post(connections, scripted))[0] == 200

    arrived, released = asyncio.Event(), asyncio.Event()

    async def when_released(_: Heard) -> bytes:
        arrived.set()
        await released.wait()
        return http(200, {})

    scripted.rule = when_released
    under_way = asyncio.create_task(post(connections, scripted))
    await arrived.wait()
    connections.leave(scripted.url)
    released.set()
    assert (await under_way)[0] == 200
    assert connections._origins == {}
    await eventually(lambda: not scripted.open)


async def test_nobody_listens(connections: Connections) -> None:
    (port,) = free_ports(1)
    with pytest.raises(PostFailed, match="no connection"):
        await connections.post(f"http://127.0.0.1:{port}", "/prepare", "application/json", b"{}", most=MOST)
    for url in ("http://" + "a" * 64 + ".invalid", "http://a..b", "http://127.0.0.1.invalid."):
        with pytest.raises(PostFailed, match="no connection"):
            await connections.post(url, "/prepare", "application/json", b"{}", most=MOST)


async def test_nothing_answers(scripted: ScriptedParticipant) -> None:
    connections = Connections(timeout_s=0.05, connect_timeout_s=1.0, headers={})
    scripted.rule = hang
    with pytest.raises(PostFailed, match=r"no answer within 0\.05 s"):
        await post(connections, scripted)
    await eventually(lambda: not scripted.open)
    connections.close()


async def test_an_answer_that_trickles_in_is_too_late(scripted: ScriptedParticipant) -> None:
    connections = Connections(timeout_s=0.1, connect_timeout_s=1.0, headers={})

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 10_000:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.005)
        finally:
            writer.close()

    server = await asyncio.start_server(trickle, "127.0.0.1", scripted.port + 1)
    tasks = asyncio.all_tasks()
    try:
        with pytest.raises(PostFailed, match="no answer within"):
            await connections.post(f"http://127.0.0.1:{scripted.port + 1}", "/", "application/json", b"{}", most=MOST)
    finally:
        connections.close()
        server.close()
        for task in asyncio.all_tasks() - tasks:
            task.cancel()
            await asyncio.wait([task])


GARBAGE = [
    b"\x00\xff\x00\xff",
    b"SSH-2.0-OpenSSH_9.9\r\n",
    b"HTTP/1.1 abc OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
]


@pytest.mark.parametrize("raw", GARBAGE, ids=lambda raw: raw[:20].decode("latin-1"))
async def test_what_is_no_http(connections: Connections, scripted: ScriptedParticipant, raw: bytes) -> None:
    scripted.rule = lambda _: raw
    with pytest.raises(PostFailed, match="the answer is not HTTP"):
        await post(connections, scripted)
    scripted.rule = lambda _: http(200, {})
    assert (await post(connections, scripted))[0] == 200, "and the next request is none the worse"


@pytest.mark.parametrize(
    "raw",
    [
        http(200, b"x" * (MOST + (20 << 10))),
        b"HTTP/1.1 200 OK\r\n" + b"X: aaaaaaaaaa\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n" * 40,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 2000,
    ],
    ids=["body", "headers", "chunks", "interim answers"],
)
async def test_too_large_an_answer_is_not_taken(
    connections: Connections, scripted: ScriptedParticipant, raw: bytes
) -> None:
    scripted.rule = lambda _: raw + (b"x" * 100_000)
    with pytest.raises(PostFailed, match=r"more than 1000 bytes|not HTTP"):
        await post(connections, scripted)


async def test_nothing_is_unpacked(connections: Connections, scripted: ScriptedParticipant) -> None:
    bomb = gzip.compress(b" " * (1 << 20))
    scripted.rule = lambda _: http(200, bomb, headers={"Content-Encoding": "gzip"})
    connections_most = await connections.post(scripted.url, "/", "application/json", b"{}", most=len(bomb))
    assert connections_most[2] == bomb


async def test_no_redirect_is_followed(connections: Connections, scripted: ScriptedParticipant) -> None:
    scripted.rule = lambda _: http(307, b"", headers={"Location": f"{scripted.url}/elsewhere"})
    assert (await post(connections, scripted))[0] == 307
    assert len(scripted.heard) == 1


async def test_interim_answers_are_skipped(connections: Connections, scripted: ScriptedParticipant) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nContent-Type: text/html\r\n\r\n"
    scripted.rule = lambda _: interim * 2 + http(200, {"a": 1}, headers={"Content-Type": "application/json"})
    for _ in range(2):
        assert await post(connections, scripted) == (200, "application/json", b'{"a": 1}')
    assert scripted.connections == 1


async def test_chunked_answers_are_put_together(connections: Connections, scripted: ScriptedParticipant) -> None:
    scripted.rule = lambda _: (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n'
    )
    for _ in range(2):
        assert await post(connections, scripted) == (200, "application/json", b'{"a":1}')
    assert scripted.connections == 1


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_the_end_of_the_connection_may_end_an_answer(
    connections: Connections, scripted: ScriptedParticipant, version: bytes
) -> None:
    raw = b"HTTP/%s 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{}" % version
    scripted.rule = lambda _: raw
    for _ in range(2):
        assert await post(connections, scripted) == (200, "application/json", b"{}")


async def test_an_answer_that_breaks_off_is_none(connections: Connections, scripted: ScriptedParticipant) -> None:
    for raw in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\n{}\r\n",
    ):

        async def break_off(_: Heard, raw: bytes = raw) -> bytes:
            return raw + b"" if b"Connection: close" in raw else raw

        scripted.rule = break_off
        under_way = asyncio.create_task(post(connections, scripted))
        if b"Connection: close" not in raw:
            count = len(scripted.heard)
            await eventually(lambda count=count: len(scripted.heard) > count)  # type: ignore[misc]
            scripted.cut()
        with pytest.raises(PostFailed, match=r"the connection broke|closed"):
            await under_way


async def test_what_follows_an_answer_is_not_taken_for_the_next_one(
    connections: Connections, scripted: ScriptedParticipant
) -> None:
    for extra in (b"garbage", http(500, {"smuggled": True}), http(200, {"smuggled": True}) * 3):
        first = http(200, {"first": True})
        scripted.rule = lambda _, extra=extra, first=first: first + extra  # type: ignore[misc]
        assert (await post(connections, scripted))[2] == b'{"first": true}'
        scripted.rule = lambda _: http(200, {"second": True})
        assert (await post(connections, scripted))[2] == b'{"second": true}'


async def test_bytes_that_nobody_asked_for_end_an_idle_connection(
    connections: Connections, scripted: ScriptedParticipant
) -> None:
    asked = asyncio.Event()

    async def answer_twice(_: Heard) -> bytes:
        return http(200, {"first": True})

    scripted.rule = answer_twice
    assert (await post(connections, scripted))[2] == b'{"first": true}'
    (origin,) = connections._origins.values()
    ((_, idle),) = origin._idle
    idle.data_received(http(200, {"late": True}))
    assert not idle.reusable
    asked.set()
    assert (await post(connections, scripted))[0] == 200
    assert scripted.connections == 2


async def test_a_request_that_is_given_up_breaks_its_connection_off(
    connections: Connections, scripted: ScriptedParticipant
) -> None:
    scripted.rule = hang
    under_way = asyncio.create_task(post(connections, scripted))
    await eventually(lambda: scripted.heard)
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    await eventually(lambda: not scripted.open)
    (origin,) = connections._origins.values()
    assert not origin._idle
