"""A participant's server, over real sockets: what callers see, what is joined, batched, limited, and asked about."""

import asyncio
import contextlib
import json
import logging
import random
import time
from collections import Counter

import aiohttp
import msgpack
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.codec import Malformed, answer_from_wire, batch_from_bytes, batch_to_bytes, call_of, request_to_wire
from coordinator.protocol.messages import (
    Abort,
    Acked,
    Commit,
    Contradicted,
    Pending,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    StaleEpoch,
    Stamp,
)
from participants.manager import BranchId, Envelope, InDoubt, Unavailable
from participants.null import NullManager
from participants.operations import Refuse
from participants.per_branch import Held, PerBranchManager, Unchanged
from participants.server import envelope_from_wire, start
from participants.settings import ServerSettings, SettingsError

STAMP = Stamp(epoch=1)
DEADLINE_S = 20.0


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # conditions of other people's code have no event
            await asyncio.sleep(0.002)


def prepare(number=1, branch="b", payload=b"{}"):
    return Prepare(gid=f"shop-1-{number}", branch=branch, payload=payload)


def commit(number=1, branch="b"):
    return Commit(gid=f"shop-1-{number}", branch=branch)


def abort(number=1, branch="b"):
    return Abort(gid=f"shop-1-{number}", branch=branch)


class Gated(NullManager):
    """Answers like `NullManager`, but a batch with a gid in `held` waits until it is let go; remembers its batches."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.held = {}
        self.failing = None
        self.closed = False
        self.found = ()

    def hold(self, number=1):
        gate = self.held[f"shop-1-{number}"] = asyncio.Event()
        return gate

    async def open(self):
        for each in self.found:
            await super().handle([Envelope(Prepare(gid=each.gid, branch=each.branch, payload=b""), STAMP)])
        return self.found

    async def handle(self, batch):
        self.batches.append([(call_of(each.message), each.message.gid) for each in batch])
        for each in batch:
            if each.message.gid in self.held:
                await self.held[each.message.gid].wait()
        if self.failing is not None:
            raise self.failing
        return await super().handle(batch)

    async def in_doubt(self):
        if self.failing is not None:
            raise self.failing
        return await super().in_doubt()

    async def close(self):
        self.closed = True

    def handled(self, call, number=1):
        return Counter(item for batch in self.batches for item in batch)[call, f"shop-1-{number}"]


class Caller:
    """Speaks to a participant as a coordinator does."""

    def __init__(self, participant, session):
        self.participant, self.session = participant, session
        self.url = participant.url

    async def post(self, path, body, content_type="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(
            self.url + path, data=data, headers={"Content-Type": content_type, **headers}
        ) as response:
            return response.status, json.loads(await response.read()), response

    async def send(self, message, stamp=STAMP):
        status, body, _ = await self.post(f"/{call_of(message)}", request_to_wire(message, stamp))
        return answer_from_wire(message, status, body)

    async def send_all(self, *messages, stamp=STAMP, as_json=False):
        items = [{"call": call_of(message), **request_to_wire(message, stamp)} for message in messages]
        content_type, data = batch_to_bytes(items)
        if as_json:
            content_type, data = "application/json", json.dumps(items).encode()
        async with self.session.post(
            self.url + "/batch", data=data, headers={"Content-Type": content_type}
        ) as response:
            assert response.status == 200
            assert response.content_type == content_type
            answers = batch_from_bytes(response.content_type, await response.read())
        return [
            answer_from_wire(message, item["status"], item) for message, item in zip(messages, answers, strict=True)
        ]

    async def get(self, path, **headers):
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, json.loads(await response.read())


@contextlib.asynccontextmanager
async def serving(manager=None, **settings):
    participant = await start(manager or Gated(), settings=ServerSettings(**settings))
    async with aiohttp.ClientSession() as session:
        try:
            yield Caller(participant, session)
        finally:
            await participant.stop()


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("as_json", [False, True])
async def test_messages_and_batches_are_answered_as_the_codec_reads_them(as_json):
    async with serving() as caller:
        assert await caller.send(prepare(1)) == Prepared(gid="shop-1-1", branch="b")
        assert await caller.send(commit(1)) == Acked(gid="shop-1-1", branch="b")
        assert await caller.send(commit(2)) == Contradicted(gid="shop-1-2", branch="b", state="unknown")
        newer = Stamp(epoch=3)
        answers = await caller.send_all(
            abort(1), prepare(4), prepare(4, "other"), abort(5), stamp=newer, as_json=as_json
        )
        assert [type(answer) for answer in answers] == [Contradicted, Prepared, Prepared, Acked]
        assert await caller.send(prepare(6)) == StaleEpoch(gid="shop-1-6", branch="b", epoch=3)
        status, body = await caller.get("/branches")
        assert (status, body["total"]) == (200, 2)
        assert {(each["gid"], each["branch"], each["state"]) for each in body["branches"]} == {
            ("shop-1-4", "b", "prepared"),
            ("shop-1-4", "other", "prepared"),
        }


async def test_an_empty_batch_is_an_empty_answer():
    async with serving() as caller:
        assert await caller.send_all() == []


GOOD = {"gid": "shop-1-1", "branch": "b", "epoch": 1}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/prepare", b"{", 400, "malformed"),
        ("/prepare", b"\xff\xfe", 400, "malformed"),
        ("/prepare", b"", 400, "malformed"),
        ("/prepare", b"[" * 100_000, 400, "malformed"),
        ("/prepare", b'{"epoch": ' + b"9" * 5000 + b"}", 400, "malformed"),
        ("/prepare", [], 400, "malformed"),
        ("/prepare", {}, 400, "malformed"),
        ("/prepare", {**GOOD, "gid": "shop-1-01"}, 400, "malformed"),
        ("/prepare", {**GOOD, "branch": ""}, 400, "malformed"),
        ("/prepare", {**GOOD, "branch": "a\nb"}, 400, "malformed"),
        ("/prepare", {**GOOD, "branch": "\ud800"}, 400, "malformed"),
        ("/prepare", {**GOOD, "epoch": -1}, 400, "malformed"),
        ("/prepare", {**GOOD, "epoch": 10**30}, 400, "malformed"),
        ("/prepare", {**GOOD, "epoch": True}, 400, "malformed"),
        ("/prepare", {**GOOD, "deadline_ms": "soon"}, 400, "malformed"),
        ("/commit", {**GOOD, "floor": "x"}, 400, "malformed"),
        ("/batch", {}, 400, "malformed"),
        ("/batch", [{}] * 9, 413, "too_large"),
        ("/prepare", b" " * 3000, 413, "too_large"),
        ("/nowhere", {}, 404, "not_found"),
        ("/branches", {}, 405, "method_not_allowed"),
    ],
)
async def test_bad_input_is_answered_with_a_problem_that_names_it(path, body, status, code):
    limits = {"body_limit_bytes": 2000} if body == b" " * 3000 else {}
    async with serving(batch_items_limit=8, **limits) as caller:
        answered, problem, response = await caller.post(path, body)
        assert (answered, problem["code"]) == (status, code)
        assert response.content_type == "application/problem+json"
        assert problem["status"] == status
        assert set(problem) == {"type", "title", "status", "detail", "code"}
        assert "Traceback" not in problem["detail"]


async def test_a_web_page_cannot_send_forms_here():
    async with serving() as caller:
        for content_type in ("text/plain", "application/x-www-form-urlencoded"):
            status, problem, _ = await caller.post("/abort", GOOD, content_type)
            assert (status, problem["code"]) == (415, "unsupported_media_type")
        status, _, _ = await caller.post("/abort", msgpack.packb(GOOD), "application/msgpack")
        assert status == 415


async def test_a_bad_item_does_not_spoil_its_batch():
    async with serving() as caller:
        items = [{"call": "prepare", **GOOD}, 7, {"call": ["prepare"], **GOOD}, {"call": "abort", **GOOD, "gid": "x"}]
        status, answers, _ = await caller.post("/batch", items)
        assert status == 200
        assert [answer["status"] for answer in answers] == [200, 400, 400, 400]
        assert answers[0]["vote"] == "prepared"
        assert {answer["code"] for answer in answers[1:]} == {"malformed"}


async def test_a_method_that_is_not_allowed_is_told_which_is():
    async with serving() as caller, caller.session.get(caller.url + "/prepare") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


PREPARE = b"POST /prepare HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x00\xff\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (PREPARE + b"Transfer-Encoding: rot13\r\n\r\n", 400),
        (PREPARE + b"Content-Encoding: br\r\nContent-Length: 1\r\n\r\nx", 415),
        (PREPARE + b"Expect: tea\r\nContent-Length: 2\r\n\r\n{}", 417),
        (PREPARE + b"X: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (PREPARE + b"".join(b"X%d: y\r\n" % i for i in range(300)) + b"\r\n", 431),
    ],
    ids=lambda raw: repr(raw[-25:]) if isinstance(raw, bytes) else None,
)
async def test_errors_of_http_itself_are_problems_and_no_news(caplog, raw, status):
    caplog.set_level(logging.INFO)
    async with serving() as caller:
        reader, writer = await asyncio.open_connection("127.0.0.1", caller.participant.port)
        caplog.clear()
        writer.write(raw)
        async with asyncio.timeout(DEADLINE_S):
            head, _, text = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        assert caplog.records == []  # anybody can send this, as often as they like
    assert head.split()[1] == b"%d" % status
    assert b"Content-Type: application/problem+json" in head
    problem = json.loads(text)
    assert (problem["status"], problem["code"]) == (status, "malformed")
    assert problem["detail"]


async def test_a_body_that_never_ends_is_given_up():
    async with serving(body_within_s=0.05) as caller:
        reader, writer = await asyncio.open_connection("127.0.0.1", caller.participant.port)
        writer.write(
            b"POST /prepare HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        async with asyncio.timeout(DEADLINE_S):
            answer = await reader.readline()
        assert b"408" in answer
        writer.close()
        await writer.wait_closed()


async def dial(caller):
    return await asyncio.open_connection("127.0.0.1", caller.participant.port)


async def healthy(reader, writer):
    """What `GET /healthz` brings on a connection that is kept; of one that is closed at once, its last words."""
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(DEADLINE_S):
            return await reader.readuntil(b"}")
    except (ConnectionError, asyncio.IncompleteReadError):
        return b""


async def test_connections_are_bounded_and_who_is_connected_is_answered(caplog):
    async with serving(connections_limit=2) as caller:
        first, idler = await dial(caller), await dial(caller)
        assert b" 200 OK" in await healthy(*first)
        for _ in range(3):
            reader, writer = await dial(caller)
            async with asyncio.timeout(DEADLINE_S):
                head, _, text = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            lines = head.split(b"\r\n")
            assert lines[0] == b"HTTP/1.1 503 Service Unavailable"
            assert {b"Retry-After: 1", b"Content-Type: application/problem+json"} <= set(lines)
            assert b"Content-Length: %d" % len(text) in lines
            problem = json.loads(text)
            assert (problem["status"], problem["code"]) == (503, "too_many_connections")
        # However many are turned away, the log tells it once in a while.
        assert [record.levelname for record in caplog.records if "turned away" in record.message] == ["WARNING"]
        assert b" 200 OK" in await healthy(*first)
        idler[1].close()
        answer = b""
        while b" 200 OK" not in answer:  # it notices in its own time that there is room
            reader, writer = await dial(caller)
            answer = await healthy(reader, writer)
            writer.close()
        first[1].close()


@pytest.mark.parametrize("half", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
async def test_who_sends_no_request_is_cut_off(half):
    async with serving(first_request_within_s=0.05) as caller:
        reader, writer = await dial(caller)
        writer.write(half)
        async with asyncio.timeout(DEADLINE_S):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("half", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
async def test_who_sends_no_other_request_is_cut_off(half):
    async with serving(first_request_within_s=0.05, idle_within_s=0.3) as caller:
        reader, writer = await dial(caller)
        assert b" 200 OK" in await healthy(reader, writer)
        writer.write(half)
        async with asyncio.timeout(DEADLINE_S):
            assert await reader.read() == b""
        writer.close()


async def test_a_body_that_breaks_off_or_is_badly_packed_is_malformed(monkeypatch, caplog):
    begun, ends = [0], []
    read = web.Request.read

    async def noted(request):
        begun[0] += 1
        try:
            return await read(request)
        except BaseException as error:
            ends.append(type(error))
            raise

    monkeypatch.setattr(web.Request, "read", noted)
    async with serving() as caller:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        async with caller.session.post(caller.url + "/prepare", data=b"{}", headers=headers) as response:
            assert (response.status, (await response.json(content_type=None))["code"]) == (400, "malformed")
        caplog.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", caller.participant.port)
        writer.write(
            b"POST /prepare HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        await until(lambda: begun[0] == 2)
        writer.close()
        await until(lambda: len(ends) == 2)
    assert issubclass(ends[1], ConnectionError)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["call", "gid", "branch", "epoch", "floor", "payload", "deadline_ms", "coordinators"]),
                inner | st.sampled_from(["prepare", "commit", "abort", "shop-1-1", "b", 1]),
            )
        ),
        max_leaves=20,
    )
)
def test_whatever_arrives_becomes_a_message_or_is_malformed(value):
    for call in ("prepare", "commit", value):
        try:
            envelope = envelope_from_wire(call, value)
        except Malformed:
            continue
        assert isinstance(envelope.message, (Prepare, Commit, Abort))


@pytest.mark.parametrize("content_type", ["application/json", "application/msgpack"])
async def test_random_bytes_never_make_a_server_error(content_type):
    rng = random.Random(7)
    good = msgpack.packb([{"call": "prepare", **GOOD, "payload": {"a": [1, 2.5, None]}}])
    if content_type == "application/json":
        good = json.dumps(msgpack.unpackb(good)).encode()
    async with serving() as caller:
        for _ in range(150):
            body = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            async with caller.session.post(
                caller.url + "/batch",
                data=bytes(body[: rng.randint(0, len(body))]),
                headers={"Content-Type": content_type},
            ) as response:
                assert response.status in (200, 400), await response.text()


# ------------------------------------------------------------------------------------------------ who may call


async def test_callers_must_show_the_token():
    async with serving(caller_token="right") as caller:
        status, problem, response = await caller.post("/abort", GOOD)
        assert (status, problem["code"]) == (401, "unauthenticated")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert (await caller.post("/abort", GOOD, Authorization="Basic right"))[0] == 401
        for wrong in ("wrong", "righ", "right ", "rightt"):
            status, problem, _ = await caller.post("/abort", GOOD, Authorization=f"Bearer {wrong}x")
            assert (status, problem["code"]) == (403, "forbidden")
        assert (await caller.post("/abort", GOOD, Authorization="Bearer right"))[0] == 200
        assert (await caller.get("/healthz"))[0] == 200
        assert (await caller.get("/branches"))[0] == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
async def test_a_server_stays_on_loopback(host):
    manager = Gated()
    with pytest.raises(SettingsError, match="beyond loopback"):
        await start(manager, host=host)
    assert manager.closed


async def test_a_port_that_is_taken_closes_the_manager():
    async with serving() as caller:
        manager = Gated()
        with pytest.raises(OSError, match="address already in use"):
            await start(manager, port=caller.participant.port)
        assert manager.closed


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"answer_within_s": 0}, "answer_within_s must be positive"),
        ({"working_limit": 9000}, "room is kept for commits"),
        ({"batch_items_limit": 9000}, "one batch must fit"),
        ({"ask_backoff_s": 3.0}, "ask_backoff_s must not be above"),
        ({"coordinators": ("node1:7401",)}, "must be an http URL"),
        ({"caller_token": "two words"}, "printable ASCII"),
    ],
)
def test_settings_assert_their_relations(setting, why):
    with pytest.raises(SettingsError, match=why):
        ServerSettings(**setting)


def test_tokens_are_not_shown():
    assert "secret" not in repr(ServerSettings(caller_token="secret", coordinator_token="secret"))


# ------------------------------------------------------------------------------------------------ slow work and joins


async def test_work_that_takes_longer_is_pending_and_a_repeat_joins_it():
    manager = Gated()
    gate = manager.hold(1)
    async with serving(manager, answer_within_s=0.02) as caller:
        assert await caller.send(prepare(1)) == Pending(gid="shop-1-1", branch="b")
        assert await caller.send(prepare(1)) == Pending(gid="shop-1-1", branch="b")
        gate.set()
        await until(lambda: caller.participant._intake.waiting == 0)
        assert manager.handled("prepare", 1) == 1, "the work ran once"
        assert isinstance(await caller.send(prepare(1)), Prepared)


async def test_a_repeat_that_waits_gets_the_answer_of_the_first():
    manager = Gated()
    gate = manager.hold(1)
    async with serving(manager, answer_within_s=DEADLINE_S) as caller:
        both = [asyncio.ensure_future(caller.send(prepare(1))) for _ in range(2)]
        await until(lambda: manager.batches)
        gate.set()
        assert await asyncio.gather(*both) == [Prepared(gid="shop-1-1", branch="b")] * 2
        assert manager.handled("prepare", 1) == 1


async def test_an_abort_is_not_acked_while_its_prepare_runs():
    manager = Gated()
    gate = manager.hold(1)
    async with serving(manager, answer_within_s=0.02) as caller:
        assert isinstance(await caller.send(prepare(1)), Pending)
        assert isinstance(await caller.send(abort(1)), Pending)
        assert manager.handled("abort", 1) == 0
        gate.set()
        await until(lambda: manager.handled("abort", 1) == 1)
        assert isinstance(await caller.send(abort(1)), Acked)
        assert (await caller.send(prepare(1))).reason == "aborted"


async def test_a_prepare_of_another_epoch_is_not_joined():
    manager = Gated()
    gate = manager.hold(1)
    async with serving(manager, answer_within_s=DEADLINE_S) as caller:
        running = asyncio.ensure_future(caller.send(prepare(1), Stamp(epoch=2)))
        await until(lambda: manager.batches)
        newer = asyncio.ensure_future(caller.send(prepare(1), Stamp(epoch=3)))
        older = asyncio.ensure_future(caller.send(prepare(1), Stamp(epoch=1)))
        await until(lambda: caller.participant._intake.waiting == 3)
        gate.set()
        assert isinstance(await running, Prepared)
        assert isinstance(await newer, Prepared), "and the manager has heard of the newer epoch"
        assert isinstance(await older, StaleEpoch)
        assert isinstance(await caller.send(prepare(2), Stamp(epoch=2)), StaleEpoch)


async def test_what_waits_becomes_one_batch():
    manager = Gated()
    gate = manager.hold(0)
    async with serving(manager, answer_within_s=DEADLINE_S) as caller:
        first = asyncio.ensure_future(caller.send(prepare(0)))
        await until(lambda: manager.batches)
        others = [asyncio.ensure_future(caller.send(prepare(n))) for n in range(1, 21)]
        await until(lambda: caller.participant._intake.waiting == 21)
        gate.set()
        await asyncio.gather(first, *others)
        assert [len(batch) for batch in manager.batches] == [1, 20]


async def test_one_slow_branch_does_not_delay_the_others_of_its_batch(tmp_path):
    manager = Counter_(tmp_path / "records.db")
    slow = manager.gates["slow"] = asyncio.Event()
    async with serving(manager, answer_within_s=0.2) as caller:
        answers = await caller.send_all(
            prepare(1, payload=b'{"gate": "slow"}'), *(prepare(n) for n in range(2, 12)), abort(1)
        )
        assert [type(answer) for answer in answers] == [Pending, *[Prepared] * 10, Pending]
        slow.set()
        await until(lambda: caller.participant._intake.waiting == 0)
        assert manager.done == Counter({("abort", "shop-1-1"): 1})


async def test_votes_do_not_wait_for_a_branch_that_may_wait_for_them(tmp_path):
    """The slow one may wait for a lock that is freed only once the other votes have been heard."""
    manager = Counter_(tmp_path / "records.db")
    slow = manager.gates["slow"] = asyncio.Event()
    async with serving(manager, answer_within_s=10 * DEADLINE_S) as caller:
        async with asyncio.timeout(DEADLINE_S):
            answers = await caller.send_all(prepare(1, payload=b'{"gate": "slow"}'), prepare(2), prepare(3))
        assert [type(answer) for answer in answers] == [Pending, Prepared, Prepared]
        repeated = asyncio.ensure_future(caller.send_all(prepare(1, payload=b'{"gate": "slow"}')))
        slow.set()
        assert [type(answer) for answer in await repeated] == [Prepared], "there was nothing else to be told of"


@pytest.mark.parametrize("why", ["its deadline has passed", "there is no room"])
async def test_what_is_not_even_tried_does_not_hurry_the_others_of_its_batch(why):
    manager = Gated()
    gate, late = manager.hold(1), Stamp(epoch=1, deadline_ms=0)
    limits = {"answer_within_s": 10 * DEADLINE_S, "stragglers_within_s": 0.001, "working_limit": 1}
    async with serving(manager, **limits) as caller, asyncio.timeout(DEADLINE_S):
        if why == "there is no room":
            asked = [asyncio.ensure_future(caller.send(prepare(1)))]
            await until(lambda: manager.batches)
            asked.append(asyncio.ensure_future(caller.send_all(prepare(2), abort(3))))
        else:
            asked = [asyncio.ensure_future(caller.send_all(prepare(2), abort(1), stamp=late))]
        for _ in range(20):
            await caller.get("/healthz")
        gate.set()
        (*_, answers) = await asyncio.gather(*asked)
        assert [type(answer) for answer in answers] == [Pending, Acked]


async def test_no_answer_is_waited_for_after_its_coordinator_gave_up():
    manager = Gated()
    gate = manager.hold(1)
    async with serving(manager, answer_within_s=0.05) as caller:
        assert isinstance(await caller.send(prepare(1)), Pending)
        assert isinstance(await caller.send(prepare(2), Stamp(epoch=1, deadline_ms=0)), Pending)
        gate.set()
        await until(lambda: caller.participant._intake.waiting == 0)
        assert manager.handled("prepare", 2) == 0


async def test_too_much_work_is_refused_and_decisions_have_room():
    manager = Gated()
    gate = manager.hold(1)
    async with serving(manager, answer_within_s=0.02, working_limit=2, waiting_limit=4, batch_items_limit=4) as caller:
        for number in (1, 2):
            assert isinstance(await caller.send(prepare(number)), Pending)
        assert await caller.send(prepare(3)) == Pending(gid="shop-1-3", branch="b")
        assert isinstance(await caller.send(prepare(2)), Pending), "joining costs nothing"
        for number in (4, 5, 6):
            assert isinstance(await caller.send(abort(number)), Pending)
        _, health = await caller.get("/healthz")
        assert (health["working"], health["waiting"]) == (2, 4)
        gate.set()
        await until(lambda: caller.participant._intake.waiting == 0)
        assert manager.handled("abort", 5) == 1
        assert manager.handled("abort", 6) == 0, "it found no room, and will be sent again"


async def test_a_caller_that_repeats_blindly_is_bounded():
    manager = Gated()
    gate = manager.hold(1)
    async with serving(manager, answer_within_s=0.02) as caller:
        answers = [await caller.send_all(*(prepare(1) for _ in range(2)), stamp=Stamp(epoch=n)) for n in range(40)]
        assert {type(answer) for pair in answers for answer in pair} == {Pending}
        assert caller.participant._intake.waiting <= 16
        gate.set()
        await until(lambda: caller.participant._intake.waiting == 0)


# ------------------------------------------------------------------------------------------------ failing managers


@pytest.mark.parametrize("error", [Unavailable("the disk is full"), RuntimeError("a secret bug")])
async def test_a_manager_that_fails_makes_the_answer_unknown(caplog, error):
    manager = Gated()
    manager.failing = error
    async with serving(manager) as caller:
        with caplog.at_level(logging.ERROR):
            status, problem, response = await caller.post("/prepare", GOOD)
        assert (status, problem["code"]) == (503, "unavailable")
        assert response.headers["Retry-After"] == "1"
        assert "secret" not in json.dumps(problem)
        assert str(error) in caplog.text
        with pytest.raises(Malformed, match="503"):
            await caller.send(prepare(1))
        status, answers, _ = await caller.post("/batch", [{"call": "abort", **GOOD}])
        assert (status, answers[0]["status"], answers[0]["code"]) == (200, 503, "unavailable")
        if isinstance(error, Unavailable):
            assert (await caller.get("/branches"))[0] == 503
        manager.failing = None
        assert isinstance(await caller.send(prepare(1)), Prepared)


async def test_a_manager_that_can_do_nothing_is_said_once_and_then_counted(caplog, monkeypatch):
    manager = Gated()
    manager.failing = Unavailable("the disk is full")
    async with serving(manager) as caller:
        with caplog.at_level(logging.ERROR, logger="participants.intake"):
            monkeypatch.setattr("participants.intake._SAY_AGAIN_S", 3600.0)
            for _ in range(20):
                assert (await caller.post("/prepare", GOOD))[0] == 503
            caller.participant._intake._say_again_at = 0.0
            assert (await caller.post("/prepare", GOOD))[0] == 503
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "a batch of 1 is unknown: the disk is full"
    assert second == "a batch of 1 is unknown: the disk is full; 19 more batches since the last such line"


async def test_a_manager_that_loses_answers_is_found_out(caplog):
    class Forgetful(Gated):
        async def handle(self, batch):
            return (await super().handle(batch))[:-1]

    async with serving(Forgetful()) as caller:
        with caplog.at_level(logging.ERROR):
            assert (await caller.post("/prepare", GOOD))[0] == 503
        assert "resource manager failed" in caplog.text


async def test_a_stop_finishes_the_batch_that_runs_and_closes_the_manager():
    manager = Gated()
    gate = manager.hold(1)
    async with aiohttp.ClientSession() as session:
        participant = await start(manager, settings=ServerSettings(answer_within_s=DEADLINE_S))
        caller = Caller(participant, session)
        running = asyncio.ensure_future(caller.send(prepare(1)))
        await until(lambda: manager.batches)
        waiting = asyncio.ensure_future(caller.post("/prepare", {**GOOD, "gid": "shop-1-2"}))
        await until(lambda: participant._intake.waiting == 2)
        stopping = asyncio.ensure_future(participant.stop())
        await until(lambda: participant._intake._stopped)
        assert not manager.closed
        gate.set()
        assert isinstance(await running, Prepared)
        assert (await waiting)[0] == 503
        await stopping
        assert manager.closed
        assert manager.handled("prepare", 2) == 0


# ------------------------------------------------------------------------------------------------ in doubt


class Coordinator:
    """Answers outcome queries by script: a function from how often a gid was asked about to a response."""

    def __init__(self, answer):
        self.answer, self.asked, self.tokens, self.at_once, self.most = answer, Counter(), set(), 0, 0

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/v1/outcomes/{gid}", self._handle)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def _handle(self, request):
        gid = request.match_info["gid"]
        self.asked[gid] += 1
        self.tokens.add(request.headers.get("Authorization"))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(0)
            response = self.answer(self.asked[gid])
            return await response if asyncio.iscoroutine(response) else response
        finally:
            self.at_once -= 1


def committed(_times=0):
    return web.json_response({"outcome": "committed"})


def aborted(_times=0):
    return web.json_response({"outcome": "aborted"})


def unknown(_times=0):
    return web.json_response({"code": "unknown"}, status=503, headers={"Retry-After": "0"})


FAST = {"in_doubt_after_s": 0.01, "ask_backoff_s": 0.005, "ask_backoff_cap_s": 0.02}


@pytest.mark.parametrize(("answer", "call"), [(committed, "commit"), (aborted, "abort")])
async def test_a_branch_in_doubt_asks_and_does_what_it_is_told(answer, call):
    async with Coordinator(answer) as node:
        manager = Gated()
        async with serving(manager, coordinators=(node.url + "/",), **FAST) as caller:
            await caller.send(prepare(1))
            await until(lambda: manager.handled(call, 1) == 1)
            await until(lambda: caller.participant._resolver.held == 0)
            assert node.asked["shop-1-1"] == 1
            again = await caller.send(prepare(1))
            assert type(again) is (Prepared if call == "commit" else Refused)


@pytest.mark.parametrize(
    "answer",
    [
        unknown,
        lambda _: web.json_response({"outcome": "committed"}, status=503),
        lambda _: web.json_response({"outcome": "perhaps"}),
        lambda _: web.json_response({"outcome": ["committed"]}),
        lambda _: web.json_response({"outcome": "committed", "gid": "shop-1-999"}),
        lambda _: web.json_response(["committed"]),
        lambda _: web.Response(text="committed"),
        lambda _: web.Response(body=b" " * 5000 + b'{"outcome": "committed"}'),
        lambda _: web.Response(status=302, headers={"Location": "/v1/outcomes/other"}),
        lambda _: web.Response(status=500, text='{"outcome": "committed"}'),
        lambda _: web.json_response({"outcome": "aborted"}, status=404),
        lambda _: web.json_response({"outcome": "aborted"}, status=410),
        lambda _: web.json_response({"outcome": "aborted"}, status=401),
    ],
)
async def test_anything_but_an_outcome_leaves_it_prepared_and_asking(answer, caplog):
    told = asyncio.Event()
    with caplog.at_level(logging.ERROR):
        async with Coordinator(lambda times: committed() if told.is_set() else answer(times)) as node:
            manager = Gated()
            async with serving(manager, coordinators=(node.url,), **FAST) as caller:
                await caller.send(prepare(1))
                await until(lambda: node.asked["shop-1-1"] >= 3)
                assert [each.gid for each in await manager.in_doubt()] == ["shop-1-1"]
                assert manager.batches == [[("prepare", "shop-1-1")]]
                told.set()
                await until(lambda: manager.handled("commit", 1) == 1)
    alarms = [record for record in caplog.records if "ALARM" in record.message]
    assert len(alarms) == (1 if answer(0).status in (404, 410) else 0)


async def ends_unheard(manager, number=1):
    """Ended, as by the database's owner, or by a request whose answer was lost."""
    await NullManager.handle(manager, [Envelope(abort(number), STAMP)])


async def test_while_its_database_is_away_nothing_is_said_of_a_forgotten_branch(caplog):
    async with Coordinator(lambda _: web.Response(status=410)) as node:
        manager = Gated()
        async with serving(manager, coordinators=(node.url,), **FAST) as caller:
            await caller.send(prepare(1))
            manager.failing = Unavailable("the database is away")
            await until(lambda: node.asked["shop-1-1"] >= 4)
            assert caller.participant._resolver.held == 1
            await ends_unheard(manager)
            manager.failing = None
            await until(lambda: caller.participant._resolver.held == 0)
    assert "ALARM" not in caplog.text


async def test_a_branch_that_ends_after_its_alarm_is_asked_about_no_more(caplog):
    async with Coordinator(lambda _: web.Response(status=410)) as node:
        manager = Gated()
        async with serving(manager, coordinators=(node.url,), **FAST) as caller:
            await caller.send(prepare(1))
            await until(lambda: "ALARM" in caplog.text)
            await ends_unheard(manager)
            await until(lambda: caller.participant._resolver.held == 0)


async def test_many_that_are_asked_about_at_once_cost_two_listings(caplog, monkeypatch):
    wanted = listings = 0
    gate = asyncio.Event()
    manager = Gated()
    listed = manager.in_doubt

    async def counted():
        nonlocal listings
        listings += 1
        await gate.wait()
        return await listed()

    slow = {"in_doubt_after_s": 0.01, "ask_backoff_s": 1e3, "ask_backoff_cap_s": 1e3, "sweep_every_s": 1e3}
    async with Coordinator(lambda _: web.Response(status=410)) as node:
        manager.in_doubt = counted
        async with serving(manager, coordinators=(node.url,), asks_at_once=20, **slow) as caller:
            resolver = caller.participant._resolver
            list_held = resolver._list_held

            async def wanting():
                nonlocal wanted
                wanted += 1
                return await list_held()

            monkeypatch.setattr(resolver, "_list_held", wanting)
            await caller.send_all(*(prepare(number) for number in range(20)))
            await until(lambda: wanted == 20)
            gate.set()
            await until(lambda: caplog.text.count("ALARM") == 20)
    assert listings == 2, "the one that was on its way, and one for all who came meanwhile"


async def test_a_redirect_is_not_followed():
    async with Coordinator(committed) as elsewhere:
        there = {"Location": f"{elsewhere.url}/v1/outcomes/shop-1-1"}
        async with (
            Coordinator(lambda _: web.Response(status=302, headers=there)) as node,
            serving(coordinators=(node.url,), **FAST) as caller,
        ):
            await caller.send(prepare(1))
            await until(lambda: node.asked["shop-1-1"] >= 3)
        assert not elsewhere.asked


async def test_coordinators_are_asked_in_turn_and_the_dead_are_passed_over():
    async with Coordinator(unknown) as first, Coordinator(lambda n: committed() if n > 1 else unknown()) as second:
        dead = "http://127.0.0.1:1"
        manager = Gated()
        async with serving(
            manager, coordinators=(dead, first.url, second.url), coordinator_token="t", **FAST
        ) as caller:
            await caller.send(prepare(1))
            await until(lambda: manager.handled("commit", 1) == 1)
        assert first.asked["shop-1-1"] >= 1
        assert first.tokens | second.tokens == {"Bearer t"}


async def test_a_coordinator_that_hangs_is_not_waited_for():
    async def hang():
        await asyncio.sleep(DEADLINE_S)
        return committed()

    async with Coordinator(lambda _: hang()) as hanging, Coordinator(aborted) as node:
        manager = Gated()
        async with serving(manager, coordinators=(hanging.url, node.url), ask_within_s=0.05, **FAST) as caller:
            await caller.send(prepare(1))
            await until(lambda: manager.handled("abort", 1) == 1)


async def test_a_hint_in_a_prepare_is_never_asked():
    async with Coordinator(unknown) as configured, Coordinator(committed) as forged:
        manager = Gated()
        async with serving(manager, coordinators=(configured.url,), **FAST) as caller:
            await caller.send(prepare(1), Stamp(epoch=1, coordinators=(forged.url,)))
            await until(lambda: configured.asked["shop-1-1"] >= 3)
        assert not forged.asked


async def test_what_a_restart_finds_is_asked_about_at_once():
    manager = Gated()
    manager.found = [InDoubt(gid=f"shop-1-{n}", branch="b", prepared_at=0.0) for n in range(200)]
    async with Coordinator(committed) as node:
        async with serving(manager, coordinators=(node.url,), in_doubt_after_s=1e6, asks_at_once=4) as caller:
            await until(lambda: caller.participant._resolver.held == 0)
        assert sum(node.asked.values()) == 200
        assert node.most <= 4


async def test_a_branch_that_is_told_in_time_never_asks():
    async with Coordinator(committed) as node:
        async with serving(coordinators=(node.url,), **{**FAST, "in_doubt_after_s": 1.0}) as caller:
            await caller.send_all(*(prepare(number) for number in range(1, 30)))
            await caller.send_all(*(commit(number) for number in range(1, 30)))
            await caller.send(prepare(99))
            await until(lambda: node.asked["shop-1-99"] == 1)
        assert set(node.asked) == {"shop-1-99"}


async def test_a_decision_that_the_manager_cannot_take_now_is_taken_later():
    async with Coordinator(committed) as node:
        manager = Gated()
        async with serving(manager, coordinators=(node.url,), **FAST) as caller:
            await caller.send(prepare(1))
            manager.failing = Unavailable("the disk is full")
            await until(lambda: manager.handled("commit", 1) >= 2)
            manager.failing = None
            await until(lambda: caller.participant._resolver.held == 0)
            assert isinstance(await caller.send(commit(1)), Acked)


async def test_a_vote_that_was_lost_on_its_way_is_found_again():
    class Losing(Gated):
        losing = True

        async def handle(self, batch):
            answers = await super().handle(batch)
            if self.losing:
                raise Unavailable("it was durable, but nobody knows")
            return answers

    async with Coordinator(aborted) as node:
        manager = Losing()
        async with serving(manager, coordinators=(node.url,), **FAST) as caller:
            with pytest.raises(Malformed, match="503"):
                await caller.send(prepare(1))
            manager.losing = False
            await caller.send(abort(2))
            await until(lambda: manager.handled("abort", 1) == 1)


async def test_a_branch_that_nobody_here_has_heard_of_is_swept_up():
    async with Coordinator(aborted) as node:
        manager = Gated()
        async with serving(manager, coordinators=(node.url,), sweep_every_s=0.02, **FAST) as caller:
            # Prepared behind the server's back, as by a connection that outlived its client.
            await NullManager.handle(manager, [Envelope(prepare(1), STAMP)])
            await until(lambda: manager.handled("abort", 1) == 1)
            assert caller.participant._resolver.held == 0


async def test_what_one_look_alone_has_seen_is_not_asked_about():
    class Fleeting(Gated):
        looks = 0

        async def in_doubt(self):
            self.looks += 1
            return [InDoubt(gid="shop-1-1", branch="b", prepared_at=0.0)] if self.looks == 1 else []

    async with Coordinator(aborted) as node:
        manager = Fleeting()
        async with serving(manager, coordinators=(node.url,), sweep_every_s=0.01, **FAST):
            await until(lambda: manager.looks > 5)
        assert not node.asked


@pytest.mark.parametrize("error", [Unavailable("the database is away"), KeyError("a defect")])
async def test_a_sweep_that_fails_is_told_of_once_and_tried_again(caplog, error):
    async with Coordinator(aborted) as node:
        manager = Gated()
        manager.failing = error
        looks = 0
        listed = manager.in_doubt

        async def counted():
            nonlocal looks
            looks += 1
            return await listed()

        manager.in_doubt = counted
        async with serving(manager, coordinators=(node.url,), sweep_every_s=0.01, **FAST):
            await until(lambda: looks > 3)
            assert caplog.text.count("cannot be listed for now") == 1
            manager.failing = None
            await NullManager.handle(manager, [Envelope(prepare(1), STAMP)])
            await until(lambda: manager.handled("abort", 1) == 1)


async def test_without_coordinators_a_restart_with_doubts_is_an_error_in_the_log(caplog):
    manager = Gated()
    manager.found = [InDoubt(gid="shop-1-1", branch="b", prepared_at=0.0)]
    with caplog.at_level(logging.ERROR):
        async with serving(manager):
            assert "no coordinator is configured" in caplog.text


# ------------------------------------------------------------------------------------------------ three coroutines


class Counter_(PerBranchManager):  # noqa: N801  # a counter that is not collections'
    """A resource manager as users write it: adds to a counter when committed."""

    def __init__(self, records, **more):
        super().__init__(records, **more)
        self.gates, self.pieces, self.done, self.ran = {}, {}, Counter(), Counter()
        self.failing = False

    async def prepare(self, branch, payload):
        self.ran[branch] += 1
        self.pieces[branch] = payload.get("add", 1)
        if "gate" in payload:
            await self.gates[payload["gate"]].wait()
        if payload.get("refuse"):
            raise Refuse("enough", retryable=True)
        if payload.get("read"):
            return Unchanged(result=sum(self.done.values()))
        return Held(result={"at": self.ran[branch]})

    async def commit(self, branch):
        if self.failing:
            raise OSError("away")
        if branch in self.pieces:
            self.done["commit", branch.gid] += self.pieces.pop(branch)

    async def abort(self, branch):
        if self.pieces.pop(branch, None) is not None:
            self.done["abort", branch.gid] += 1


async def test_three_coroutines_make_a_participant(tmp_path):
    manager = Counter_(tmp_path / "records.db")
    async with serving(manager) as caller:
        vote = await caller.send(prepare(1, payload=b'{"add": 5}'))
        assert json.loads(vote.result) == {"at": 1}
        assert await caller.send(prepare(1, payload=b'{"add": 5}')) == vote
        assert isinstance(await caller.send(commit(1)), Acked)
        assert isinstance(await caller.send(commit(1)), Acked)
        assert manager.done == {("commit", "shop-1-1"): 5}

        refused = await caller.send(prepare(2, payload=b'{"refuse": true}'))
        assert (refused.reason, refused.retryable) == ("enough", True)
        assert BranchId("shop-1-2", "b") not in manager.pieces, "what a refused prepare left behind is tidied up"
        assert isinstance(await caller.send(prepare(3, payload=b'{"read": true}')), ReadOnly)
        assert (await caller.send(prepare(4, payload=b"[]"))).reason == "operation_failed"
        assert isinstance(await caller.send(abort(5)), Acked)
        assert (await caller.send(prepare(5))).reason == "aborted"
        assert manager.ran[BranchId("shop-1-5", "b")] == 0


async def test_records_of_three_coroutines_survive_a_restart(tmp_path):
    first = Counter_(tmp_path / "records.db")
    async with serving(first) as caller:
        assert isinstance(await caller.send(prepare(1), Stamp(epoch=4)), Prepared)
        assert isinstance(await caller.send(abort(2)), Acked)
        await caller.send(abort(3), Stamp(epoch=4, floor="shop-1-3"))
    second = Counter_(tmp_path / "records.db")
    second.pieces = first.pieces
    async with Coordinator(committed) as node, serving(second, coordinators=(node.url,)) as caller:
        await until(lambda: second.done == {("commit", "shop-1-1"): 1})
        assert isinstance(await caller.send(prepare(9), Stamp(epoch=3)), StaleEpoch)
        late = await caller.send(prepare(2), Stamp(epoch=4))
        assert isinstance(late, Refused)
        assert late.reason == "ended", "its record is pruned, and the floor is not forgotten"


async def test_a_commit_that_fails_is_unknown_and_repeated(tmp_path):
    manager = Counter_(tmp_path / "records.db")
    async with serving(manager) as caller:
        await caller.send(prepare(1))
        manager.failing = True
        with pytest.raises(Malformed, match="503"):
            await caller.send(commit(1))
        assert [each.gid for each in await manager.in_doubt()] == ["shop-1-1"]
        manager.failing = False
        assert isinstance(await caller.send(commit(1)), Acked)


async def test_work_beyond_its_time_is_cancelled_tidied_up_and_refused(tmp_path):
    manager = Counter_(tmp_path / "records.db", work_within_s=0.02)
    manager.gates["never"] = asyncio.Event()
    async with serving(manager) as caller:
        refused = await caller.send(prepare(1, payload=b'{"gate": "never"}'))
        assert (refused.reason, refused.retryable) == ("too_slow", True)
        assert manager.done == {("abort", "shop-1-1"): 1}


async def test_a_crash_between_work_and_record_is_cleaned_up_by_the_abort(tmp_path):
    manager = Counter_(tmp_path / "records.db")
    manager.pieces[BranchId("shop-1-1", "b")] = 1  # durable in its own way, and no record of it
    async with serving(manager) as caller:
        assert isinstance(await caller.send(abort(1)), Acked)
        assert manager.done == {("abort", "shop-1-1"): 1}


# ------------------------------------------------------------------------------------------------ the null manager


async def test_the_null_manager_forgets_only_below_the_floor():
    manager = NullManager(now=time.time)
    await manager.open()

    async def handle(message, floor=None):
        (answer,) = await manager.handle([Envelope(message, Stamp(epoch=1, floor=floor))])
        return answer

    for number in range(1, 6):
        await handle(prepare(number))
        await handle(commit(number))
    await handle(prepare(6))
    assert len(manager._branches) == 6
    await handle(abort(7), floor="shop-1-5")
    assert {key.gid for key in manager._branches} == {"shop-1-5", "shop-1-6", "shop-1-7"}
    assert isinstance(await handle(commit(1)), Acked)
    assert isinstance(await handle(prepare(1)), Refused)
    assert isinstance(await handle(commit(6)), Acked)
