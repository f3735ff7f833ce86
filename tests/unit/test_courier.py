"""The courier: everything arrives in the end, and nobody waits for somebody else's participant."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.replication.clock import SystemClock
from coordinator.codec import MSGPACK_TYPE, json_bytes
from coordinator.config import Limits, Timing
from coordinator.courier import BATCH_WORKERS, SINGLE_WORKERS, Courier
from coordinator.facts import Participant
from coordinator.protocol.messages import (
    Abort,
    Acked,
    Answer,
    Commit,
    Contradicted,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    Request,
    StaleEpoch,
    Stamp,
)
from tests.support.nodes import QUICK
from tests.support.participants import (
    Heard,
    ScriptedParticipant,
    batch,
    hang,
    honest,
    http,
    on,
    refusing,
    saying,
    vote,
)
from tests.support.waiting import eventually, turns


def prepare(number: int, payload: bytes = b"null", branch: str = "b") -> Prepare:
    return Prepare(gid=f"test-1-{number}", branch=branch, payload=payload)


def commit(number: int) -> Commit:
    return Commit(gid=f"test-1-{number}", branch="b")


def abort(number: int) -> Abort:
    return Abort(gid=f"test-1-{number}", branch="b")


@dataclass(slots=True, eq=False)
class Post:
    """A courier, and what came back through it."""

    courier: Courier
    answers: list[Answer] = field(default_factory=list)
    floors: dict[str, str] = field(default_factory=dict)

    def send(self, server: ScriptedParticipant, *messages: Request, batch: bool = False, name: str = "stock") -> None:
        for message in messages:
            self.courier.send(Participant(name=name, url=server.url, batch=batch), message)

    def answered(self, *messages: Request) -> Callable[[], bool]:
        wanted = {(message.gid, message.branch) for message in messages}
        return lambda: {(answer.gid, answer.branch) for answer in self.answers} >= wanted


def make(limits: Limits | None = None, timing: Timing | None = None, rng: random.Random | None = None) -> Post:
    answers: list[Answer] = []
    post: Post
    courier = Courier(
        clock=SystemClock(),
        limits=limits or Limits(),
        timing=timing or QUICK,
        stamp=lambda name: Stamp(epoch=7, floor=post.floors.get(name), coordinators=("http://c",)),
        on_answers=answers.extend,
        token="a-token-for-participants",
        rng=rng or random.Random(1),
    )
    post = Post(courier, answers)
    return post


@pytest.fixture
async def post() -> AsyncIterator[Post]:
    made = make()
    yield made
    await made.courier.close()
    assert not made.courier._tasks
    assert not made.courier._lanes


# ------------------------------------------------------------------------------------------------ what is said


async def test_messages_and_answers(post: Post, scripted: ScriptedParticipant) -> None:
    post.floors["stock"] = "test-1-1"
    post.courier.send(
        Participant(name="stock", url=scripted.url, batch=False),
        prepare(1, b'{"a":1}'),
        expires_s=SystemClock().monotonic_s() + 100,
    )
    await eventually(post.answered(prepare(1)))
    post.send(scripted, commit(1), abort(2))
    await eventually(post.answered(commit(1), abort(2)))
    first, *rest = scripted.heard
    assert first.path == "/prepare"
    left_ms = first.body["deadline_ms"]
    assert 90_000 < left_ms <= 100_000
    assert first.body == {
        "gid": "test-1-1",
        "branch": "b",
        "epoch": 7,
        "floor": "test-1-1",
        "payload": {"a": 1},
        "deadline_ms": left_ms,
        "coordinators": ["http://c"],
    }
    assert first.headers["authorization"] == "Bearer a-token-for-participants"
    assert {heard.path for heard in rest} == {"/commit", "/abort"}
    assert rest[0].body == {"gid": rest[0].body["gid"], "branch": "b", "epoch": 7, "floor": "test-1-1"}
    assert set(map(type, post.answers)) == {Prepared, Acked}
    assert post.courier.owed("stock") == 0
    assert post.courier.owed("nobody") == 0


async def test_batches_are_msgpack_and_hold_what_waits(post: Post, scripted: ScriptedParticipant) -> None:
    messages: list[Request] = [prepare(n) for n in range(300)]
    post.send(scripted, *messages, batch=True)
    await eventually(post.answered(*messages))
    assert {heard.path for heard in scripted.heard} == {"/batch"}
    assert {heard.content_type for heard in scripted.heard} == {MSGPACK_TYPE}
    assert sorted((len(heard.items) for heard in scripted.heard), reverse=True) == [256, 44]
    assert len(post.answers) == 300


async def test_what_arrives_meanwhile_is_the_next_batch(post: Post, scripted: ScriptedParticipant) -> None:
    released = asyncio.Event()

    async def when_released(heard: Heard) -> bytes:
        await released.wait()
        return honest(heard)

    scripted.rule = when_released
    post.send(scripted, prepare(1), batch=True)
    await eventually(lambda: len(scripted.heard) == 1)
    post.send(scripted, prepare(2), batch=True)
    await eventually(lambda: len(scripted.heard) == BATCH_WORKERS)
    more: list[Request] = [prepare(n) for n in range(3, 103)]
    for message in more:
        post.send(scripted, message, batch=True)
        await turns(1)
    assert len(scripted.heard) == BATCH_WORKERS
    released.set()
    await eventually(post.answered(*more))
    assert len(scripted.heard) == BATCH_WORKERS + 1
    assert len(scripted.heard[-1].items) == 100


async def test_a_payload_that_msgpack_cannot_hold_makes_the_batch_json(
    post: Post, scripted: ScriptedParticipant
) -> None:
    values = [2**70, "\ud800", [[["deep"]]]]
    messages: list[Request] = [prepare(n, json_bytes(value)) for n, value in enumerate(values)]
    post.send(scripted, *messages, batch=True)
    await eventually(post.answered(*messages))
    assert scripted.heard[0].content_type == "application/json"
    assert [item["payload"] for item in scripted.heard[0].items] == values


async def test_single_messages_go_side_by_side_up_to_a_limit(post: Post, scripted: ScriptedParticipant) -> None:
    released = asyncio.Event()

    async def when_released(heard: Heard) -> bytes:
        await released.wait()
        return honest(heard)

    scripted.rule = when_released
    messages: list[Request] = [prepare(n) for n in range(100)]
    post.send(scripted, *messages)
    await eventually(lambda: len(scripted.heard) == SINGLE_WORKERS)
    await turns(20)
    assert len(scripted.heard) == SINGLE_WORKERS
    post.send(scripted, commit(999))
    await eventually(lambda: len(scripted.heard) == SINGLE_WORKERS + 1)
    assert scripted.heard[-1].call == "commit", "decisions do not wait for prepares: they may be what those wait for"
    released.set()
    await eventually(post.answered(*messages, commit(999)))
    assert scripted.connections == SINGLE_WORKERS + 1


# ------------------------------------------------------------------------------------------------ replaced


async def test_an_abort_takes_the_place_of_a_prepare_that_never_left(post: Post) -> None:
    gone = ScriptedParticipant()
    post.send(gone, prepare(1))
    await eventually(lambda: post.courier.status()["stock"].down)
    post.send(gone, abort(1))
    assert post.courier.owed("stock") == 1
    async with gone:
        await eventually(post.answered(abort(1)))
        assert gone.calls() == ["abort"]


async def test_the_answer_to_a_replaced_message_does_not_count(post: Post, scripted: ScriptedParticipant) -> None:
    released = asyncio.Event()

    async def when_released(heard: Heard) -> bytes:
        await released.wait()
        return honest(heard)

    scripted.rule = on("prepare", when_released)
    post.send(scripted, prepare(1))
    await eventually(lambda: scripted.heard)
    post.send(scripted, abort(1))
    await eventually(lambda: post.answers)
    released.set()
    post.send(scripted, prepare(2))
    await eventually(post.answered(prepare(2)))
    assert [type(answer) for answer in post.answers] == [Acked, Prepared]
    assert post.courier.owed("stock") == 0


async def test_a_letter_that_is_replaced_before_its_worker_starts(post: Post, scripted: ScriptedParticipant) -> None:
    post.send(scripted, prepare(1))
    post.send(scripted, abort(1))
    post.send(scripted, prepare(2))
    await eventually(post.answered(abort(1), prepare(2)))
    assert sorted(scripted.calls()) == ["abort", "prepare"]


# ------------------------------------------------------------------------------------------------ down and up


async def test_a_participant_that_is_down_is_tried_until_it_is_back(post: Post) -> None:
    late = ScriptedParticipant()
    messages: list[Request] = [prepare(n) for n in range(200)]
    post.send(late, *messages)
    await eventually(lambda: post.courier._lanes["stock"].failures > 3)
    status = post.courier.status()["stock"]
    assert (status.owed, status.down) == (200, True)
    assert "no connection" in str(status.trouble)
    async with late:
        await eventually(post.answered(*messages))
        status = post.courier.status()["stock"]
        assert (status.owed, status.down, status.trouble) == (0, False, None)
        assert late.connections == SINGLE_WORKERS, "once it is back, everything goes at once"


async def test_while_it_is_down_one_worker_at_a_time_tries(post: Post, scripted: ScriptedParticipant) -> None:
    tried: list[int] = []

    async def break_off(heard: Heard) -> None:
        tried.append(scripted.open)

    scripted.rule = break_off
    messages: list[Request] = [prepare(n) for n in range(100)]
    post.send(scripted, *messages)
    await eventually(lambda: post.courier._lanes["stock"].failures > 2)
    del tried[:]
    more: list[Request] = [prepare(n) for n in range(100, 120)]
    post.send(scripted, *more)
    await eventually(lambda: len(tried) > 10)
    assert max(tried) <= 1
    scripted.rule = honest
    await eventually(post.answered(*messages, *more))


async def test_the_backoff_doubles_up_to_its_cap_with_jitter() -> None:
    timing = Timing(backoff_min_s=0.05, backoff_max_s=2.0)
    post = make(timing=timing, rng=random.Random(42))
    for failures in range(200):
        ceiling = min(2.0, 0.05 * 2**failures) if failures < 10 else 2.0
        delays = [post.courier._backoff_s(failures) for _ in range(20)]
        assert all(ceiling / 2 <= delay <= ceiling for delay in delays), failures
        assert len(set(delays)) == 20
    again = make(timing=timing, rng=random.Random(42))
    assert [again.courier._backoff_s(3) for _ in range(3)] != [post.courier._backoff_s(3) for _ in range(3)]
    await post.courier.close()
    await again.courier.close()


async def test_a_sign_of_life_is_answered_at_once() -> None:
    post = make(timing=Timing(backoff_min_s=2.0, backoff_max_s=2.0))
    late = ScriptedParticipant()
    post.send(late, prepare(1), commit(2))
    await eventually(lambda: post.courier.status()["stock"].down and post.courier._lanes["stock"].down_timer)
    timer = post.courier._lanes["stock"].down_timer
    assert timer is not None
    async with late:
        post.courier.wake("stock")
        assert timer.cancelled()
        await eventually(post.answered(prepare(1), commit(2)))
        assert post.courier._lanes["stock"].failures == 0
        post.courier.wake("stock")
        post.courier.wake("nobody")
        await post.courier.close()


async def test_a_false_sign_of_life_does_not_reset_the_backoff(post: Post, caplog: pytest.LogCaptureFixture) -> None:
    gone = ScriptedParticipant()
    post.send(gone, prepare(1))
    for count in range(1, 8):
        await eventually(lambda count=count: post.courier._lanes["stock"].failures >= count)  # type: ignore[misc]
        post.courier.wake("stock")
    assert "is back" not in caplog.text
    assert caplog.text.count("participant stock") == 1


async def test_who_moves_is_found_at_the_new_place(scripted: ScriptedParticipant) -> None:
    post = make(timing=Timing(backoff_min_s=2.0, backoff_max_s=2.0))
    gone = ScriptedParticipant()
    scripted.rule = lambda heard: http(503, {}) if not post.answers else honest(heard)
    post.send(gone, prepare(1), commit(2))
    await eventually(lambda: post.courier._lanes["stock"].down_timer)
    post.courier.moved(Participant(name="stock", url=scripted.url, batch=True))
    await eventually(lambda: scripted.heard)
    assert gone.url not in post.courier._connections._origins
    scripted.rule = honest
    post.courier.moved(Participant(name="stock", url=scripted.url, batch=True))
    await eventually(post.answered(prepare(1), commit(2)))
    assert {heard.call for heard in scripted.heard} == {"batch"}
    post.courier.moved(Participant(name="nobody", url=scripted.url, batch=True))
    await post.courier.close()


async def test_who_moves_is_asked_again_what_was_answered_badly(scripted: ScriptedParticipant) -> None:
    post = make(timing=Timing(backoff_min_s=2.0, backoff_max_s=2.0))
    scripted.rule = saying({"vote": "perhaps"})
    post.send(scripted, prepare(1), prepare(2))
    await eventually(lambda: len(post.courier._lanes["stock"].tracks) and _parked(post) == 2)
    scripted.rule = honest
    post.courier.moved(Participant(name="stock", url=scripted.url, batch=False))
    await eventually(post.answered(prepare(1), prepare(2)))
    assert _parked(post) == 0
    await post.courier.close()


def _parked(post: Post) -> int:
    return sum(len(track.parked) for track in post.courier._lanes["stock"].tracks.values())


async def test_a_dead_participant_never_delays_a_healthy_one(post: Post, scripted: ScriptedParticipant) -> None:
    async with ScriptedParticipant(hang) as hanging:
        gone = ScriptedParticipant()
        post.send(gone, *[prepare(n, branch="gone") for n in range(50)], name="gone")
        post.send(hanging, *[prepare(n, branch="hanging") for n in range(50)], name="hanging")
        for number in range(50):
            post.send(scripted, prepare(number))
            await eventually(post.answered(prepare(number)))
        assert {answer.branch for answer in post.answers} == {"b"}
        assert (post.courier.owed("gone"), post.courier.owed("hanging")) == (50, 50)
        post.courier.clear()


async def test_a_participant_that_hangs_is_given_up_and_tried_again(scripted: ScriptedParticipant) -> None:
    post = make(timing=Timing(backoff_min_s=0.005, backoff_max_s=0.05, participant_timeout_s=0.05))
    scripted.rule = hang
    post.send(scripted, prepare(1))
    await eventually(lambda: len(scripted.heard) > 1)
    scripted.rule = honest
    await eventually(post.answered(prepare(1)))
    await post.courier.close()


# ------------------------------------------------------------------------------------------------ bad answers

HOSTILE: list[tuple[str, bytes | None]] = [
    ("garbage", b"\x00\xff\x00\xff"),
    ("hanging up", None),
    ("500", http(500, {"vote": "prepared"})),
    ("redirect", http(307, b"", headers={"Location": "http://127.0.0.1:9/"})),
    ("404", http(404, {"vote": "prepared"})),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ("huge", http(200, b'{"vote":"prepared","x":"' + b"x" * (1 << 20) + b'"}')),
    ("bomb", http(200, b"\x1f\x8b\x08\x00", headers={"Content-Encoding": "gzip"})),
    ("empty", http(200, b"")),
    ("not JSON", http(200, b"{")),
    ("not UTF-8", http(200, b'{"vote":"\xff"}')),
    ("NaN", http(200, b'{"vote":"prepared","result":NaN}')),
    ("infinity", http(200, b'{"vote":"prepared","result":1e999}')),
    ("deep", http(200, b'{"vote":"prepared","result":' + b"[" * 5000 + b"]" * 5000 + b"}")),
    ("quite deep", http(200, b'{"vote":"prepared","result":' + b"[" * 300 + b"]" * 300 + b"}")),
    ("large result", http(200, {"vote": "prepared", "result": "\u6f22" * 20_000})),
    ("a list", http(200, [])),
    ("null", http(200, None)),
    ("no vote", http(200, {})),
    ("an unknown vote", http(200, {"vote": "maybe"})),
    ("a vote that is none", http(200, {"vote": ["prepared"]})),
    ("an ack to a prepare", http(200, {"state": "committed"})),
    ("committed to a prepare", http(409, {"state": "committed"})),
    ("a refusal without sense", http(200, {"vote": "refused", "reason": 7})),
    ("a refusal that may be tried", http(200, {"vote": "refused", "reason": "x", "retryable": "yes"})),
    ("a stale epoch without one", http(409, {"code": "stale_epoch"})),
    ("pending", http(503, {"code": "pending"})),
]


@pytest.mark.parametrize("raw", [case[1] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
async def test_what_is_no_answer_is_no_vote_and_is_asked_again(
    post: Post, scripted: ScriptedParticipant, raw: bytes | None, batched: bool
) -> None:
    scripted.rule = lambda _: raw
    post.send(scripted, prepare(1), batch=batched)
    await eventually(lambda: len(scripted.heard) > 2)
    assert post.answers == []
    assert post.courier.owed("stock") == 1
    scripted.rule = honest
    await eventually(post.answered(prepare(1)))


@pytest.mark.parametrize(
    "item",
    [
        None,
        [],
        "prepared",
        {},
        {"vote": "prepared"},
        {"vote": "prepared", "status": "200"},
        {"vote": "prepared", "status": True},
        {"vote": "prepared", "status": 500},
        {"vote": "prepared", "status": 200, "result": "x" * (70 << 10)},
        {"vote": "prepared", "status": 200, "result": b"bytes"},
    ],
    ids=lambda item: repr(item)[:40],
)
async def test_one_bad_item_of_a_batch_holds_up_itself_alone(
    post: Post, scripted: ScriptedParticipant, item: Any
) -> None:
    def spoil(heard: Heard) -> bytes:
        return batch([item if one["gid"] == "test-1-2" else {**vote(heard, one), "status": 200} for one in heard.items])

    scripted.rule = spoil
    post.send(scripted, prepare(1), prepare(2), prepare(3), batch=True)
    await eventually(post.answered(prepare(1), prepare(3)))
    await eventually(lambda: scripted.calls("test-1-2").count("prepare") > 2)
    assert scripted.calls("test-1-1") == ["prepare"]
    scripted.rule = honest
    await eventually(post.answered(prepare(2)))


@pytest.mark.parametrize("raw", [batch([]), batch([{}] * 9), http(200, {}), http(400, {}), http(413, b""), b"\x00"])
async def test_one_message_that_spoils_its_batch_does_not_hold_up_the_others(
    post: Post, scripted: ScriptedParticipant, raw: bytes
) -> None:
    def spoiled(heard: Heard) -> bytes:
        return raw if any(item["gid"] == "test-1-7" for item in heard.items) else honest(heard)

    scripted.rule = spoiled
    others: list[Request] = [prepare(n) for n in range(20) if n != 7]
    post.send(scripted, *[prepare(n) for n in range(20)], batch=True)
    if raw == b"\x00":
        # No HTTP at all is the connection's trouble, and says nothing about the batch.
        await eventually(lambda: len(scripted.heard) > 3)
        assert {len(heard.items) for heard in scripted.heard} == {20}
        scripted.rule = honest
        others.append(prepare(7))
    await eventually(post.answered(*others))
    scripted.rule = honest
    await eventually(post.answered(prepare(7)))
    lane = post.courier._lanes["stock"]
    more = 100
    while lane.most < 256:
        post.send(scripted, prepare(more), batch=True)
        await eventually(post.answered(prepare(more)))
        more += 1


async def test_a_participant_that_answers_every_batch_badly_is_tried_once_in_a_while(
    post: Post, scripted: ScriptedParticipant
) -> None:
    scripted.rule = saying({}, status=500)
    messages: list[Request] = [prepare(n) for n in range(64)]
    post.send(scripted, *messages, batch=True)
    await eventually(lambda: post.courier._lanes["stock"].failures > 12)
    assert len(scripted.heard) < 20, "not one request for each message"
    assert post.courier.owed("stock") == 64
    scripted.rule = honest
    await eventually(post.answered(*messages))


async def test_refusals_and_read_only_votes_are_answers(post: Post, scripted: ScriptedParticipant) -> None:
    scripted.rule = refusing("x" * 5000)
    post.send(scripted, prepare(1))
    await eventually(lambda: post.answers)
    (refused,) = post.answers
    assert isinstance(refused, Refused)
    assert len(refused.reason) == 1000
    scripted.rule = saying({"vote": "read_only", "result": {"rows": 3}})
    post.send(scripted, prepare(2))
    await eventually(post.answered(prepare(2)))
    assert post.answers[-1] == ReadOnly(gid="test-1-2", branch="b", result=b'{"rows":3}')
    assert post.courier.owed("stock") == 0


async def test_a_contradiction_is_told_and_asked_about_for_ever(post: Post, scripted: ScriptedParticipant) -> None:
    scripted.rule = saying({"state": "aborted"}, status=409)
    post.send(scripted, commit(1))
    await eventually(lambda: len(post.answers) > 2)
    assert set(post.answers) == {Contradicted(gid="test-1-1", branch="b", state="aborted")}
    assert post.courier.owed("stock") == 1
    scripted.rule = honest
    await eventually(lambda: post.courier.owed("stock") == 0)
    assert post.answers[-1] == Acked(gid="test-1-1", branch="b")


async def test_a_stale_epoch_is_no_vote_and_is_not_asked_again(post: Post, scripted: ScriptedParticipant) -> None:
    scripted.rule = saying({"code": "stale_epoch", "epoch": 9}, status=409)
    post.send(scripted, prepare(1))
    await eventually(lambda: post.answers)
    assert post.answers == [StaleEpoch(gid="test-1-1", branch="b", epoch=9)]
    assert post.courier.owed("stock") == 0


async def test_who_waits_shortly_is_not_held_up_by_who_waits_long(scripted: ScriptedParticipant) -> None:
    post = make(timing=Timing(backoff_min_s=0.01, backoff_max_s=2.0))
    scripted.rule = saying({})
    post.send(scripted, prepare(1))
    track = next(iter(post.courier._lanes["stock"].tracks.values()))
    await eventually(lambda: track.parked and track.parked[0][2].tries > 6)
    scripted.rule = lambda heard: honest(heard) if len(scripted.calls("test-1-2")) > 1 else http(200, {})
    long = track.timer_at_s
    post.send(scripted, prepare(2))
    await eventually(lambda: len(scripted.calls("test-1-2")) == 1 and track.timer_at_s < long)
    await eventually(post.answered(prepare(2)))
    assert not post.answered(prepare(1))()
    await post.courier.close()


async def test_who_straggles_leaves_its_track_to_others(post: Post, scripted: ScriptedParticipant) -> None:
    """More branches wait for a lock than requests may be under way, and their locks' holder has not voted yet."""
    released = asyncio.Event()
    waiting = {f"test-1-{n}" for n in range(1, 2 * BATCH_WORKERS + 2)}

    async def locked(heard: Heard) -> bytes:
        if waiting.isdisjoint(item["gid"] for item in heard.items):
            return honest(heard)
        if not any(scripted.calls(item["gid"])[1:] for item in heard.items):
            return batch([{"code": "pending", "status": 503} for _ in heard.items])
        await released.wait()
        return honest(heard)

    scripted.rule = locked
    for number in range(1, 2 * BATCH_WORKERS + 2):
        post.send(scripted, prepare(number), batch=True)
        await eventually(lambda number=number: len(scripted.calls(f"test-1-{number}")) > 1)
    post.send(scripted, prepare(100), batch=True)
    await eventually(post.answered(prepare(100)))
    assert len(post.answers) == 1
    released.set()
    await eventually(lambda: len(post.answers) == len(waiting) + 1)


@pytest.mark.parametrize(
    ("messages", "in_batches", "rests_s"),
    [
        ([prepare(1), prepare(2)], True, 0.005),
        ([prepare(1)], True, 0.5),  # there was no room, or it has been waited for already
        ([prepare(1)], False, 0.5),
        ([commit(1), commit(2)], True, 0.5),
        ([abort(1), commit(2)], True, 0.5),
    ],
)
async def test_only_stragglers_are_asked_for_again_at_once(
    scripted: ScriptedParticipant,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[Request],
    in_batches: bool,
    rests_s: float,
) -> None:
    def first_is_pending(heard: Heard) -> bytes:
        if heard.call != "batch":
            return http(503, {"code": "pending"})
        said = [{**vote(heard, item), "status": 200} for item in heard.items[1:]]
        return batch([{"code": "pending", "status": 503}, *said])

    scripted.rule = first_is_pending
    post = make(timing=Timing(backoff_min_s=0.5))
    rests: list[float] = []
    monkeypatch.setattr(post.courier, "_arm", lambda _lane, _track, _due_s, delay_s: rests.append(delay_s))
    post.send(scripted, *messages, batch=in_batches)
    await eventually(lambda: rests)
    assert rests == [rests_s]
    await post.courier.close()


async def test_a_commit_answered_with_an_abort_is_no_ack(post: Post, scripted: ScriptedParticipant) -> None:
    scripted.rule = saying({"state": "aborted"})
    post.send(scripted, commit(1))
    await eventually(lambda: len(scripted.heard) > 2)
    assert post.answers == []


async def test_a_defect_loses_no_letters(
    post: Post, scripted: ScriptedParticipant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([RuntimeError("planted")] * 2)

    def planted(name: str) -> Stamp:
        if (error := next(failures, None)) is not None:
            raise error
        return Stamp(epoch=7)

    monkeypatch.setattr(post.courier, "_stamp", planted)
    messages: list[Request] = [prepare(n) for n in range(10)]
    post.send(scripted, *messages, batch=True)
    await eventually(post.answered(*messages))
    assert "a defect ended a worker" in caplog.text
    assert next(failures, None) is None, "the planted failures were reached"


# ------------------------------------------------------------------------------------------------ the end


async def test_clearing_breaks_everything_off_and_hears_nothing_more(post: Post, scripted: ScriptedParticipant) -> None:
    gone = ScriptedParticipant()
    scripted.rule = on("prepare", hang, otherwise=saying({}))
    post.send(scripted, prepare(1), commit(2))
    post.send(gone, prepare(3), name="gone")
    await eventually(lambda: len(scripted.heard) >= 2 and post.courier.status()["gone"].down)
    lanes = list(post.courier._lanes.values())
    post.courier.clear()
    assert post.courier.status() == {}
    await eventually(lambda: not post.courier._tasks)
    for lane in lanes:
        assert lane.down_timer is None
        assert all(track.timer is None for track in lane.tracks.values())
    assert post.answers == []
    post.send(scripted, commit(5))
    scripted.rule = honest
    await eventually(post.answered(commit(5)))


async def test_clearing_between_an_answer_and_its_being_heard(post: Post, scripted: ScriptedParticipant) -> None:
    for number in range(20):
        post.send(scripted, prepare(number))
        await turns(number % 7)
        post.courier.clear()
        before = len(post.answers)
        await turns(3)
        assert len(post.answers) == before
    await eventually(lambda: not post.courier._tasks)


async def test_a_forgotten_participant_leaves_nothing_behind(post: Post, scripted: ScriptedParticipant) -> None:
    for number in range(30):
        name = f"p{number}"
        post.send(scripted, prepare(number), name=name)
        await eventually(post.answered(prepare(number)))
        post.courier.forget(name)
    assert post.courier._lanes == {}
    assert post.courier._connections._origins == {}
    gone = ScriptedParticipant()
    post.send(gone, prepare(1), name="gone")
    await eventually(lambda: post.courier._lanes["gone"].down_timer)
    lane = post.courier._lanes["gone"]
    post.courier.forget("gone")
    post.courier.forget("gone")
    assert lane.down_timer is None
    assert post.courier.status() == {}


async def test_no_memory_per_message_remains(post: Post, scripted: ScriptedParticipant) -> None:
    for number in range(300):
        post.send(scripted, prepare(number), batch=number % 2 == 0)
    for number in range(300):
        post.send(scripted, commit(number), batch=number % 2 == 0)
    await eventually(lambda: post.courier.owed("stock") == 0)
    (lane,) = post.courier._lanes.values()
    assert not lane.letters
    for track in lane.tracks.values():
        assert not track.waiting
        assert not track.parked
    await eventually(lambda: not post.courier._tasks)
    assert all(track.workers == 0 and track.starting == 0 for track in lane.tracks.values())
