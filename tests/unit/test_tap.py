"""The tap in front of a real participant server: sees all, and interferes as told."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from cluster.tap import (
    Reply,
    Tap,
    error,
    garbage,
    hang_up,
    huge,
    is_commit,
    is_decision,
    is_prepare,
    of_gid,
    redirect,
    says,
    silence,
)
from coordinator.codec import JSON_TYPE, MSGPACK_TYPE, batch_from_bytes, batch_to_bytes, json_bytes
from participants.null import NullManager
from participants.server import start
from participants.settings import ServerSettings

GIDS = tuple(f"test-1-{sequence}" for sequence in range(1, 9))


class Coordinator:
    """Says what a coordinator says, by hand."""

    def __init__(self, session: aiohttp.ClientSession, tap: Tap) -> None:
        self.session, self.tap = session, tap

    async def raw(self, path: str, body: bytes, content_type: str = JSON_TYPE) -> tuple[int, str, bytes]:
        async with self.session.post(
            f"{self.tap.url}/{path}", data=body, headers={"Content-Type": content_type}, allow_redirects=False
        ) as response:
            return response.status, response.content_type, await response.read()

    async def say(self, call: str, gid: str) -> tuple[int, Any]:
        status, _, raw = await self.raw(call, json_bytes(message(call, gid)))
        return status, batch_from_bytes(JSON_TYPE, b"[" + raw + b"]")[0]

    async def batch(self, *messages: dict[str, Any], msgpack: bool = True) -> list[Any]:
        content_type, body = batch_to_bytes(list(messages)) if msgpack else (JSON_TYPE, json_bytes(list(messages)))
        status, content_type, raw = await self.raw("batch", body, content_type)
        assert status == 200
        return batch_from_bytes(content_type, raw)


def message(call: str, gid: str) -> dict[str, Any]:
    body: dict[str, Any] = {"call": call, "gid": gid, "branch": "b", "epoch": 1}
    if call == "prepare":
        body |= {"payload": None, "deadline_ms": 10_000, "coordinators": []}
    return body


@pytest.fixture
async def tap() -> AsyncIterator[Tap]:
    participant = await start(NullManager(), host="127.0.0.1", port=0, settings=ServerSettings())
    async with Tap(participant.url) as tap:
        yield tap
    await participant.stop()


@pytest.fixture
async def coordinator(tap: Tap) -> AsyncIterator[Coordinator]:
    async with aiohttp.ClientSession() as session:
        yield Coordinator(session, tap)


async def test_it_sees_a_branch_from_vote_to_ack(tap: Tap, coordinator: Coordinator) -> None:
    assert await coordinator.say("prepare", GIDS[0]) == (200, {"vote": "prepared"})
    assert list(tap.prepared_now()) == [(GIDS[0], "b")]
    assert await coordinator.say("commit", GIDS[0]) == (200, {"state": "committed"})
    assert tap.prepared_now() == {}
    times = tap.branches[GIDS[0], "b"]
    assert times.outcome == "committed"
    assert times.prepared_s is not None
    assert times.finished_s is not None
    assert times.finished_s > times.prepared_s
    assert tap.longest_prepared_s() == times.finished_s - times.prepared_s
    assert tap.messages == 2


@pytest.mark.parametrize("msgpack", [True, False])
async def test_it_sees_batches(tap: Tap, coordinator: Coordinator, msgpack: bool) -> None:
    seen: list[tuple[str, str, int]] = []
    tap.watchers.append(lambda message, status, _: seen.append((message.call, message.gid, status)))
    answers = await coordinator.batch(*(message("prepare", gid) for gid in GIDS[:3]), msgpack=msgpack)
    assert [answer["vote"] for answer in answers] == ["prepared"] * 3
    await coordinator.batch(message("commit", GIDS[0]), message("abort", GIDS[1]), msgpack=msgpack)
    assert list(tap.prepared_now()) == [(GIDS[2], "b")]
    assert [times.outcome for times in tap.branches.values()] == ["committed", "aborted", None]
    assert seen[3:] == [("commit", GIDS[0], 200), ("abort", GIDS[1], 200)]


async def test_held_messages_wait_and_go_on(tap: Tap, coordinator: Coordinator) -> None:
    await coordinator.say("prepare", GIDS[0])
    hold = tap.hold(is_decision)
    commit = asyncio.create_task(coordinator.say("commit", GIDS[0]))
    held = await hold.wait(1)
    assert [(message.call, message.gid) for message in held] == [("commit", GIDS[0])]
    assert tap.prepared_now()
    # What does not match goes by meanwhile.
    assert (await coordinator.say("prepare", GIDS[1]))[0] == 200
    assert not commit.done()
    hold.release()
    assert await commit == (200, {"state": "committed"})
    assert (await coordinator.say("abort", GIDS[1]))[0] == 200


async def test_a_dropped_message_never_arrives(tap: Tap, coordinator: Coordinator) -> None:
    await coordinator.say("prepare", GIDS[0])
    hold = tap.hold(of_gid(GIDS[0]))
    commit = asyncio.create_task(coordinator.say("commit", GIDS[0]))
    await hold.wait(1)
    hold.drop()
    with pytest.raises(aiohttp.ClientError):
        await commit
    assert list(tap.prepared_now()) == [(GIDS[0], "b")]
    assert (await coordinator.say("commit", GIDS[0]))[0] == 200


async def test_a_held_message_can_fail(tap: Tap, coordinator: Coordinator) -> None:
    hold = tap.hold()
    prepare = asyncio.create_task(coordinator.raw("prepare", json_bytes(message("prepare", GIDS[0]))))
    await hold.wait(1)
    hold.fail(error(503))
    assert (await prepare)[0] == 503
    assert tap.branches == {}


async def test_part_of_a_batch_can_be_held(tap: Tap, coordinator: Coordinator) -> None:
    await coordinator.batch(*(message("prepare", gid) for gid in GIDS[:3]))
    hold = tap.hold(lambda message: message.gid == GIDS[1])
    commits = asyncio.create_task(coordinator.batch(*(message("commit", gid) for gid in GIDS[:3])))
    await hold.wait(1)
    async with asyncio.timeout(10):
        while len(tap.prepared_now()) > 1:  # noqa: ASYNC110  # a condition over what the tap saw, with a deadline
            await asyncio.sleep(0.001)
    assert list(tap.prepared_now()) == [(GIDS[1], "b")]
    assert not commits.done()
    hold.release()
    assert [answer["state"] for answer in await commits] == ["committed"] * 3


async def test_waiting_for_what_does_not_come_ends(tap: Tap) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 messages held"):
        await tap.hold().wait(1, within_s=0.01)


@pytest.mark.parametrize(
    ("reply", "status", "beginning"),
    [
        (garbage(), 200, b"\x00\xff"),
        (error(502), 502, b"oops"),
        (redirect("http://127.0.0.1:1/"), 307, b""),
        (huge(1 << 20), 200, b'{"vote":"prepared"'),
        (says({"state": "committed"}), 200, b'{"state":"committed"}'),
    ],
)
async def test_misbehaviour(tap: Tap, coordinator: Coordinator, reply: Reply, status: int, beginning: bytes) -> None:
    tap.misbehave(reply, is_prepare)
    got, _, raw = await coordinator.raw("prepare", json_bytes(message("prepare", GIDS[0])))
    assert got == status
    assert raw.startswith(beginning)
    assert tap.branches == {}
    tap.behave()
    assert await coordinator.say("prepare", GIDS[0]) == (200, {"vote": "prepared"})


async def test_an_answer_can_be_lost_after_the_work_was_done(tap: Tap, coordinator: Coordinator) -> None:
    tap.misbehave(hang_up(delivered=True), is_prepare)
    with pytest.raises(aiohttp.ClientError):
        await coordinator.say("prepare", GIDS[0])
    assert list(tap.prepared_now()) == [(GIDS[0], "b")]


async def test_silence_lasts_until_the_sender_gives_up(tap: Tap, coordinator: Coordinator) -> None:
    tap.misbehave(silence())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await coordinator.say("prepare", GIDS[0])
    tap.behave()
    assert (await coordinator.say("prepare", GIDS[0]))[0] == 200


async def test_a_tap_that_stops_ends_its_silence(tap: Tap, coordinator: Coordinator) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    tap.misbehave(silence())
    for ask in (coordinator.say("prepare", GIDS[0]), coordinator.batch(message("prepare", GIDS[1]))):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ask
    await tap.stop()
    gc.collect()
    assert not complaints, "a request was thrown away unfinished"


async def test_one_of_a_batch_can_get_a_wrong_answer(tap: Tap, coordinator: Coordinator) -> None:
    tap.misbehave(says({"state": "committed"}), of_gid(GIDS[1]))
    answers = await coordinator.batch(*(message("prepare", gid) for gid in GIDS[:3]))
    assert [answer.get("vote") for answer in answers] == ["prepared", None, "prepared"]
    assert answers[1] == {"status": 200, "state": "committed"}
    tap.misbehave(garbage(), of_gid(GIDS[2]))
    _, _, raw = await coordinator.raw("batch", json_bytes([message("prepare", gid) for gid in GIDS[:3]]))
    assert raw.startswith(b"\x00\xff")


async def test_what_is_no_message_of_ours_passes_unchanged(tap: Tap, coordinator: Coordinator) -> None:
    async with coordinator.session.get(f"{tap.url}/branches") as response:
        assert response.status == 200
        assert (await response.json())["branches"] == []
    assert (await coordinator.raw("prepare", b"{"))[0] == 400
    assert (await coordinator.raw("batch", b"\xc1", MSGPACK_TYPE))[0] == 400
    assert tap.messages == 0


async def test_a_participant_that_is_gone_cuts_the_connection() -> None:
    async with Tap("http://127.0.0.1:9") as tap, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await Coordinator(session, tap).say("prepare", GIDS[0])


async def test_a_tap_that_stops_drops_what_it_holds(tap: Tap, coordinator: Coordinator) -> None:
    hold = tap.hold(is_commit)
    commit = asyncio.create_task(coordinator.say("commit", GIDS[0]))
    await hold.wait(1)
    port = tap.url
    await tap.stop()
    with pytest.raises(aiohttp.ClientError):
        await commit
    await tap.start()
    assert tap.url == port
