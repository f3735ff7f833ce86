"""Watches, and can hold up, what a coordinator and one participant say to each other.

A `Tap` is a small reverse proxy in the calling process. Register the participant under the tap's URL, and every
prepare, commit and abort goes through it, alone or in a batch, JSON or msgpack. The tap notes when each branch was seen
prepared and finished, and can be told to interfere:

    hold = tap.hold(is_decision)          # from now on no commit and no abort gets through
    held = await hold.wait(1)             # ... one is waiting: the decision is made, and not delivered
    await cluster.kill_leader()           # the worst moment
    hold.drop()                           # lost on the wire, as if the sender had died a moment earlier

    tap.misbehave(garbage(), is_prepare)  # the participant answers prepares with nonsense, until `tap.behave()`

Production code knows nothing of this: it sees a participant that is slow, or mad, or gone.

When only some messages of a batch are held, the others go to the participant at once and take effect there, as they
would if the batch had been cut in two; the one answer to the whole batch waits for the last of them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Final, NamedTuple

import aiohttp
from aiohttp import web

from cluster.ports import HOST
from coordinator.codec import MSGPACK_TYPE, Malformed, batch_from_bytes, batch_to_bytes, json_bytes, json_value

MAX_BODY_BYTES: Final = 64 << 20
MAX_BRANCHES: Final = 1_000_000
"""Branches whose times are kept; a tap is for tests and demonstrations, and says so by failing beyond it."""

_CALLS: Final = frozenset({"prepare", "commit", "abort"})
_HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "host"}
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Message:
    """One prepare, commit or abort on its way. `at_s`: on the monotonic clock, when it reached the tap."""

    call: str
    gid: str
    branch: str
    body: dict[str, Any]
    at_s: float
    batched: bool


Match = Callable[[Message], bool]
"""Which messages are meant."""


def is_any(_: Message) -> bool:
    """Every message."""
    return True


def is_prepare(message: Message) -> bool:
    """Prepares."""
    return message.call == "prepare"


def is_decision(message: Message) -> bool:
    """Commits and aborts."""
    return message.call != "prepare"


def is_commit(message: Message) -> bool:
    """Commits."""
    return message.call == "commit"


def of_gid(gid: str) -> Match:
    """Messages of one transaction."""
    return lambda message: message.gid == gid


@dataclass(slots=True, kw_only=True)
class BranchTimes:
    """What was seen of one branch; seconds on the monotonic clock, taken when the participant's answer was here.

    prepared_s: of the first vote "prepared".
    finished_s: of the first ack of a commit or an abort, or of a read-only vote or a refusal.
    outcome: committed, aborted, read_only or refused.
    """

    prepared_s: float | None = None
    finished_s: float | None = None
    outcome: str | None = None

    def locked_s(self, now_s: float) -> float:
        """How long it was, or has been by now, prepared."""
        if self.prepared_s is None:
            return 0.0
        # Answers on two connections can overtake each other; nothing was prepared for less than no time.
        return max(0.0, (now_s if self.finished_s is None else self.finished_s) - self.prepared_s)


class _Verdict(Enum):
    FORWARD = "forward"
    DROP = "drop"


class Hold:
    """Messages that wait here, and the rule that more shall. End it with `release`, `drop` or `fail`."""

    def __init__(self, match: Match, forget: Callable[["Hold"], None]) -> None:
        self.match = match
        self.held: list[Message] = []
        """Every message that was stopped by this, in order of arrival; repeats of one message are many."""
        self._forget = forget
        self._verdict: asyncio.Future[_Verdict | Reply] = asyncio.get_running_loop().create_future()
        self._arrived = asyncio.Condition()

    async def wait(self, count: int = 1, *, within_s: float = 10.0) -> list[Message]:
        """The first messages held, once there are `count`. Raises `TimeoutError`."""

        async def arrived() -> None:
            async with self._arrived:
                await self._arrived.wait_for(lambda: len(self.held) >= count)

        try:
            await asyncio.wait_for(arrived(), within_s)
        except TimeoutError as error:
            raise TimeoutError(f"{len(self.held)} of {count} messages held within {within_s:g} s") from error
        return self.held[:]

    def release(self) -> None:
        """Let them go on to the participant, and hold no more. Those whose sender is gone go on too, as on a wire."""
        self._end(_Verdict.FORWARD)

    def drop(self) -> None:
        """Lose them: the participant hears nothing, the sender's connection is cut. Hold no more."""
        self._end(_Verdict.DROP)

    def fail(self, answer: "Reply | None" = None) -> None:
        """Reply them without asking the participant, with status 500 unless told otherwise. Hold no more."""
        self._end(answer or error())

    def _end(self, verdict: "_Verdict | Reply") -> None:
        self._forget(self)
        if not self._verdict.done():
            self._verdict.set_result(verdict)

    async def stop(self, message: Message) -> "_Verdict | Reply":
        """Keep `message` until this ends. For the tap's own use."""
        self.held.append(message)
        async with self._arrived:
            self._arrived.notify_all()
        return await asyncio.shield(self._verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a mad participant says: see `garbage`, `error`, `redirect`, `huge`, `says`, `silence`, `hang_up`.

    delivered: whether the real participant gets the message first, and only its answer is lost.
    item: for one message within a batch. None: the whole batch is answered with `status` and `raw`.
    """

    status: int = 200
    raw: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    item: Any = None
    delivered: bool = False


def garbage(*, delivered: bool = False) -> Reply:
    """Status 200, and bytes that are nothing."""
    return Reply(raw=b"\x00\xff<html>{", headers=(("Content-Type", "application/json"),), delivered=delivered)


def error(status: int = 500, *, delivered: bool = False) -> Reply:
    """An error status with a text of no use."""
    return Reply(status=status, raw=b"oops", headers=(("Content-Type", "text/plain"),), delivered=delivered)


def redirect(to: str, status: int = 307) -> Reply:
    """Sends the coordinator elsewhere, where it must not go."""
    return Reply(status=status, raw=b"", headers=(("Location", to),))


def huge(size: int = 32 << 20) -> Reply:
    """A well-formed JSON answer of `size` bytes."""
    return Reply(
        raw=b'{"vote":"prepared","result":"' + b"x" * size + b'"}', headers=(("Content-Type", "application/json"),)
    )


def says(body: Any, status: int = 200, *, delivered: bool = False) -> Reply:
    """Valid JSON that may be the answer to another question, such as `{"state": "committed"}` to a prepare."""
    return Reply(
        status=status,
        raw=json_bytes(body),
        headers=(("Content-Type", "application/json"),),
        item=body,
        delivered=delivered,
    )


def silence(*, delivered: bool = False) -> Reply:
    """Never an answer, until the sender gives up."""
    return Reply(status=0, delivered=delivered)


def hang_up(*, delivered: bool = False) -> Reply:
    """The connection is cut."""
    return Reply(status=-1, delivered=delivered)


class _Rule(NamedTuple):
    answer: Reply
    match: Match


class _HangUp(Exception):
    """Cut the connection."""


class Tap:
    """A proxy in front of the participant at `target`. Use it as an async context manager, or `start` and `stop`.

    port: where it listens; 0: a free one. A tap that is started again keeps its port. host: on which address.
    """

    def __init__(self, target: str, *, name: str = "participant", port: int = 0, host: str = HOST) -> None:
        self.name = name
        self.target = target.rstrip("/")
        self.messages = 0
        """How many prepares, commits and aborts have come by, repeats included."""
        self.branches: dict[tuple[str, str], BranchTimes] = {}
        """By gid and branch."""
        self.watchers: list[Callable[[Message, int, Any], None]] = []
        """Called with each message, the status and the body that the participant answered it with."""
        self._host = host
        self._port = port
        self._holds: list[Hold] = []
        self._rules: list[_Rule] = []
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """Under which to register the participant. Known once it has started, or with a port of one's choice."""
        assert self._port, "the tap has not been started"
        return f"http://{self._host}:{self._port}"

    async def __aenter__(self) -> "Tap":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. Raises `OSError` when the port is in use."""
        self._stopping.clear()
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # What is still held when the tap stops has nobody left to wait for.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def stop(self) -> None:
        """Stop listening; whatever is held is dropped."""
        self._stopping.set()
        for hold in self._holds[:]:
            hold.drop()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -------------------------------------------------------------------------------------------- what one can ask

    def hold(self, match: Match = is_any) -> Hold:
        """Hold what matches from now on, until the hold is ended. The first of several that match keeps a message."""
        hold = Hold(match, lambda ended: self._holds.remove(ended) if ended in self._holds else None)
        self._holds.append(hold)
        return hold

    def misbehave(self, answer: Reply, match: Match = is_any) -> None:
        """Reply so to what matches from now on, in the participant's place. The newest of several rules wins."""
        self._rules.insert(0, _Rule(answer, match))

    def behave(self) -> None:
        """Forget every `misbehave`."""
        self._rules.clear()

    def prepared_now(self) -> dict[tuple[str, str], BranchTimes]:
        """Branches that were seen prepared and not finished yet."""
        return {
            key: times
            for key, times in self.branches.items()
            if times.prepared_s is not None and times.finished_s is None
        }

    def longest_prepared_s(self) -> float:
        """The longest time that any branch was, or has been by now, seen prepared."""
        now_s = time.monotonic()
        return max((times.locked_s(now_s) for times in self.branches.values()), default=0.0)

    # -------------------------------------------------------------------------------------------- the proxy

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        path = request.match_info["path"]
        try:
            if request.method == "POST" and path in _CALLS:
                body = json_value(raw)
                if isinstance(body, dict):
                    return await self._single(request, path, body)
            elif request.method == "POST" and path == "batch":
                items = batch_from_bytes(request.content_type, raw)
                if items and all(isinstance(item, dict) for item in items):
                    return await self._batch(request, items)
        except Malformed:
            pass  # not ours to judge: the participant shall see it
        except _HangUp:
            return self._cut(request)
        try:
            status, headers, answer = await self._ask(request, request.path_qs, raw)
        except _HangUp:
            return self._cut(request)
        return web.Response(status=status, body=answer, headers=headers)

    def _cut(self, request: web.Request) -> web.Response:
        """An answer that never gets anywhere, for the connection is closed first."""
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _single(self, request: web.Request, call: str, body: dict[str, Any]) -> web.StreamResponse:
        message = self._message(call, body, batched=False)
        verdict = await self._judge(message)
        if isinstance(verdict, Reply):
            if verdict.delivered:
                await self._relay_single(request, message)
            return await self._bad(verdict)
        if verdict is _Verdict.DROP:
            raise _HangUp
        status, headers, raw = await self._relay_single(request, message)
        return web.Response(status=status, body=raw, headers=headers)

    async def _relay_single(self, request: web.Request, message: Message) -> tuple[int, list[tuple[str, str]], bytes]:
        status, headers, raw = await self._ask(request, f"/{message.call}", await request.read())
        try:
            answer = json_value(raw)
        except Malformed:
            answer = None
        self._saw(message, status, answer)
        return status, headers, raw

    async def _batch(self, request: web.Request, items: list[dict[str, Any]]) -> web.StreamResponse:
        messages = [self._message(str(item.get("call")), item, batched=True) for item in items]
        holds = [self._hold_for(message) for message in messages]
        if not any(holds) and not any(self._rule_for(message) for message in messages):
            status, headers, raw, _ = await self._relay_batch(request, messages)
            return web.Response(status=status, body=raw, headers=headers)
        # Two waves at most are told apart: what passes at once, and what waits for a hold.
        groups: dict[int, list[int]] = {}
        for index, hold in enumerate(holds):
            groups.setdefault(id(hold), []).append(index)
        results = await asyncio.gather(
            *(self._wave(request, [messages[index] for index in wave]) for wave in groups.values())
        )
        answers: list[Any] = [None] * len(items)
        for wave, got in zip(groups.values(), results, strict=True):
            if isinstance(got, web.StreamResponse):
                return got
            for index, answer in zip(wave, got, strict=True):
                answers[index] = answer
        content_type, raw = batch_to_bytes(answers)
        return web.Response(body=raw, content_type=content_type)

    async def _wave(self, request: web.Request, messages: list[Message]) -> list[Any] | web.StreamResponse:
        """The answers to messages of a batch that share their fate."""
        verdicts = await asyncio.gather(*(self._judge(message) for message in messages))
        if _Verdict.DROP in verdicts:
            raise _HangUp
        through = [
            message
            for message, verdict in zip(messages, verdicts, strict=True)
            if not isinstance(verdict, Reply) or verdict.delivered
        ]
        real: dict[int, Any] = {}
        if through:
            status, headers, raw, answers = await self._relay_batch(request, through)
            if answers is None:
                return web.Response(status=status, body=raw, headers=headers)
            real = {id(message): answer for message, answer in zip(through, answers, strict=True)}
        merged: list[Any] = []
        for message, verdict in zip(messages, verdicts, strict=True):
            if isinstance(verdict, Reply):
                if not isinstance(verdict.item, dict):
                    return await self._bad(verdict)
                merged.append({"status": verdict.status, **verdict.item})
            else:
                merged.append(real[id(message)])
        return merged

    async def _relay_batch(
        self, request: web.Request, messages: Sequence[Message]
    ) -> tuple[int, list[tuple[str, str]], bytes, list[Any] | None]:
        """The participant's answer, and its items when it is one to a batch."""
        content_type, body = batch_to_bytes([message.body for message in messages])
        status, headers, raw = await self._ask(request, "/batch", body, content_type)
        try:
            answers = batch_from_bytes(_content_type(headers), raw) if status == 200 else None
        except Malformed:
            answers = None
        if answers is None or len(answers) != len(messages):
            return status, headers, raw, None
        for message, answer in zip(messages, answers, strict=True):
            known = answer.get("status") if isinstance(answer, dict) else None
            self._saw(message, known if isinstance(known, int) else 0, answer)
        return status, headers, raw, answers

    async def _ask(
        self, request: web.Request, path: str, body: bytes, content_type: str | None = None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the participant answers. Raises `_HangUp` when it does not."""
        assert self._session is not None, "the tap is listening"
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        if content_type is not None:
            headers = [pair for pair in headers if pair[0].lower() != "content-type"]
            headers.append(("Content-Type", content_type))
        try:
            async with self._session.request(
                request.method,
                self.target + path,
                data=body or None,
                headers=headers,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept", "Content-Type"),
            ) as response:
                raw = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise _HangUp from error
        kept = [(name, value) for name, value in response.headers.items() if name.lower() not in _HOP_BY_HOP]
        return response.status, kept, raw

    # -------------------------------------------------------------------------------------------- judging and noting

    def _message(self, call: str, body: dict[str, Any], *, batched: bool) -> Message:
        self.messages += 1
        return Message(
            call=call,
            gid=str(body.get("gid")),
            branch=str(body.get("branch")),
            body=body,
            at_s=time.monotonic(),
            batched=batched,
        )

    def _hold_for(self, message: Message) -> Hold | None:
        return next((hold for hold in self._holds if hold.match(message)), None)

    def _rule_for(self, message: Message) -> _Rule | None:
        return next((rule for rule in self._rules if rule.match(message)), None)

    async def _judge(self, message: Message) -> _Verdict | Reply:
        hold = self._hold_for(message)
        if hold is not None:
            verdict = await hold.stop(message)
            if verdict is not _Verdict.FORWARD:
                return verdict
        rule = self._rule_for(message)
        return _Verdict.FORWARD if rule is None else rule.answer

    async def _bad(self, answer: Reply) -> web.StreamResponse:
        if answer.status == 0:
            # Until the tap stops: the server forgets requests whose sender has given up, and does not end them.
            await self._stopping.wait()
        if answer.status in (0, -1):
            raise _HangUp
        return web.Response(status=answer.status, body=answer.raw, headers=list(answer.headers))

    def _saw(self, message: Message, status: int, answer: Any) -> None:
        if isinstance(answer, dict) and status == 200:
            now_s = time.monotonic()
            key = (message.gid, message.branch)
            assert len(self.branches) < MAX_BRANCHES, "a tap is for runs of limited length"
            times = self.branches.setdefault(key, BranchTimes())
            vote = answer.get("vote") if message.call == "prepare" else None
            state = answer.get("state") if message.call != "prepare" else None
            if vote == "prepared":
                if times.prepared_s is None:
                    times.prepared_s = now_s
            elif (vote or state) and times.finished_s is None:
                times.finished_s, times.outcome = now_s, vote or state
        for watcher in self.watchers:
            watcher(message, status, answer)


def _content_type(headers: list[tuple[str, str]]) -> str:
    value = next((value for name, value in headers if name.lower() == "content-type"), "")
    return MSGPACK_TYPE if value.partition(";")[0].strip() == MSGPACK_TYPE else value
