"""Ends the doubt: asks the coordinators what became of prepared branches that were not told.

A prepared branch has given up the right to decide, so it can only ask, and ask again, until somebody who knows answers.
Only configured coordinators are asked, and only two answers count: 200 with `{"outcome": "committed"}` or `"aborted"`.
Everything else leaves the branch prepared: not known yet (503), forgotten (410), never heard of (404), a redirect,
garbage, silence. The middle two cannot happen while everybody keeps the rules, so they raise an alarm.

One task looks after all branches. It sleeps until the next question is due or something changes; a heap holds what is
due, and entries of branches that ended meanwhile are dropped when they surface.
"""

import asyncio
import heapq
import itertools
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import aiohttp

from coordinator.codec import Malformed, json_value
from coordinator.protocol.messages import (
    Abort,
    Acked,
    Answer,
    Commit,
    Contradicted,
    Prepared,
    ReadOnly,
    Refused,
    Stamp,
)
from participants.manager import BranchId, Envelope, InDoubt, Unavailable
from participants.settings import ServerSettings

_log = logging.getLogger(__name__)

_ANSWER_LIMIT_BYTES: Final = 4096
_ALARMS: Final = {404: "never heard of it", 410: "has forgotten it"}
_OUTCOMES: Final[dict[str, type[Commit] | type[Abort]]] = {"committed": Commit, "aborted": Abort}


class _Doubt:
    """One prepared branch, since when (seconds since 1970, as far as is known here).

    asked: how many questions were put. alarmed: it is in the log already.
    """

    __slots__ = ("alarmed", "asked", "backoff_s", "since")

    def __init__(self, backoff_s: float, since: float) -> None:
        self.asked, self.backoff_s, self.alarmed, self.since = 0, backoff_s, False, since


class _Coordinator:
    """One node, and until when it is left alone because it did not answer at all (the loop's clock)."""

    __slots__ = ("failures", "rests_until", "url")

    def __init__(self, url: str) -> None:
        self.url, self.failures, self.rests_until = url.rstrip("/"), 0, 0.0


class Resolver:
    """Asks about prepared branches. `finish` is given the decision, and says what the resource manager answered.

    held: lists what is prepared, and raises `Unavailable`.

    `hear` must be called with every answer that the manager gives.
    """

    def __init__(
        self,
        settings: ServerSettings,
        finish: Callable[[Envelope], Awaitable[Answer | None]],
        *,
        held: Callable[[], Awaitable[Sequence[InDoubt]]],
        rng: random.Random | None = None,
    ) -> None:
        self._held = held
        self._one_listing = asyncio.Lock()
        self._listings = 0
        """That have begun; `_listed` is what the last one has found, None if it has failed."""
        self._listed: frozenset[BranchId] | None = None
        self._settings = settings
        self._finish = finish
        self._random = rng if rng is not None else random.Random()  # noqa: S311  # spreads questions, keeps no secret
        self._loop = asyncio.get_running_loop()
        self._coordinators = [_Coordinator(url) for url in settings.coordinators]
        self._tls: ssl.SSLContext | bool = True
        self._doubts: dict[BranchId, _Doubt] = {}
        self._due: list[tuple[float, int, BranchId, _Doubt]] = []
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        """Prepared branches, in doubt or not yet."""
        return len(self._doubts)

    def oldest_s(self) -> float:
        """For how long the oldest of them has been prepared; 0 when there is none."""
        since = min((doubt.since for doubt in self._doubts.values()), default=None)
        return 0.0 if since is None else max(0.0, time.time() - since)

    def start(self, found: Sequence[InDoubt], *, tls: ssl.SSLContext | bool = True) -> None:
        """Begins; what a restart `found` prepared is asked about at once.

        tls: how coordinators are verified whose URL is https; True: by the issuers that the system trusts.
        """
        self._tls = tls
        for branch in found:
            self._watch(BranchId(branch.gid, branch.branch), 0.0, branch.prepared_at)
        if self._coordinators:
            self._task = self._loop.create_task(self._run())
            # The task ends only by `stop`; if it ever failed, its branches would stay in doubt without a word.
            self._task.add_done_callback(_report)
        elif found:
            _log.error("%d branches are in doubt, and no coordinator is configured that could be asked", len(found))

    async def stop(self) -> None:
        """Stops asking. Branches that are still in doubt are found again by the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def hear(self, envelope: Envelope, answer: Answer) -> None:
        """The manager has given `answer`: is the branch prepared now, or no longer?"""
        match answer:
            case Prepared():
                if envelope.id not in self._doubts:
                    self._watch(envelope.id, self._settings.in_doubt_after_s, time.time())
            case Acked() | Refused() | ReadOnly():
                self._doubts.pop(envelope.id, None)
            case Contradicted() if answer.state != "prepared":
                self._doubts.pop(envelope.id, None)
            case _:
                pass

    def found(self, prepared: Sequence[InDoubt]) -> None:
        """The manager lists these as prepared: perhaps some of them without anybody having heard its vote."""
        for branch in prepared:
            key = BranchId(branch.gid, branch.branch)
            if key not in self._doubts:
                self._watch(key, self._settings.in_doubt_after_s, branch.prepared_at)

    def _watch(self, key: BranchId, delay_s: float, since: float) -> None:
        doubt = self._doubts[key] = _Doubt(self._settings.ask_backoff_s, since)
        self._push(key, doubt, delay_s)

    def _push(self, key: BranchId, doubt: _Doubt, delay_s: float) -> None:
        if not self._coordinators:
            return
        due = self._loop.time() + delay_s
        if not self._due or due < self._due[0][0]:
            self._changed.set()
        heapq.heappush(self._due, (due, next(self._numbers), key, doubt))

    # --------------------------------------------------------------------------------------------- the task

    async def _run(self) -> None:
        asking: dict[asyncio.Task[None], tuple[BranchId, _Doubt]] = {}
        headers = {"Accept": "application/json"}
        if self._settings.coordinator_token is not None:
            headers["Authorization"] = f"Bearer {self._settings.coordinator_token}"
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._settings.ask_within_s),
            connector=aiohttp.TCPConnector(limit=0, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
        ) as session:
            try:
                while True:
                    self._changed.clear()
                    now = self._loop.time()
                    while self._due and len(asking) < self._settings.asks_at_once:
                        due, _, key, doubt = self._due[0]
                        live = self._doubts.get(key) is doubt
                        if live and due > now:
                            break
                        heapq.heappop(self._due)
                        if live:
                            asking[self._loop.create_task(self._ask(session, key, doubt))] = key, doubt
                    full = len(asking) >= self._settings.asks_at_once
                    until_due_s = self._due[0][0] - now if self._due and not full else None
                    changed = self._loop.create_task(self._changed.wait())
                    done, _ = await asyncio.wait(
                        {changed, *asking}, timeout=until_due_s, return_when=asyncio.FIRST_COMPLETED
                    )
                    changed.cancel()
                    for task in [each for each in asking if each in done]:
                        key, doubt = asking.pop(task)
                        if (error := task.exception()) is not None:
                            _log.error("asking about %s failed; it is asked about again", key.gid, exc_info=error)
                            self._push(key, doubt, self._pause_s(doubt))
            finally:
                for task in asking:
                    task.cancel()
                if asking:
                    await asyncio.wait(asking)

    async def _ask(self, session: aiohttp.ClientSession, key: BranchId, doubt: _Doubt) -> None:
        """Puts one question to one coordinator, and acts on the answer or comes back later."""
        coordinator = self._next_coordinator(doubt)
        doubt.asked += 1
        try:
            status, retry_after, outcome = await _question(session, coordinator.url, key.gid)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            # ValueError: a header or an address that the client library cannot make sense of.
            self._failed(coordinator, error)
            self._push(key, doubt, self._pause_s(doubt))
            return
        coordinator.failures, coordinator.rests_until = 0, 0.0
        if outcome is not None:
            await self._end(key, doubt, outcome)
            return
        # It may have ended, and the answer that said so was lost. Looked at each time: that may also come later.
        held = await self._list_held() if status in _ALARMS else None
        if held is not None and key not in held:
            if self._doubts.get(key) is doubt:
                del self._doubts[key]
            return
        if held is not None and not doubt.alarmed:
            doubt.alarmed = True
            _log.error(
                "ALARM: branch %s of %s is prepared, and the coordinator at %s %s; it stays in doubt",
                key.branch,
                key.gid,
                coordinator.url,
                _ALARMS[status],
            )
        pause_s = self._pause_s(doubt)
        if retry_after is not None:
            pause_s = max(pause_s, min(retry_after, self._settings.ask_backoff_cap_s))
        self._push(key, doubt, pause_s)

    async def _list_held(self) -> frozenset[BranchId] | None:
        """What is prepared, at a moment after the call; None while that cannot be listed.

        Whoever calls while a listing is on its way shares the next one.
        """
        wanted = self._listings + 1
        async with self._one_listing:
            if self._listings < wanted:
                self._listings, self._listed = wanted, None
                with suppress(Unavailable):
                    self._listed = frozenset(BranchId(each.gid, each.branch) for each in await self._held())
            return self._listed

    def _next_coordinator(self, doubt: _Doubt) -> _Coordinator:
        """In turn, but those that do not answer are left alone for a while, unless none else is there."""
        now, count = self._loop.time(), len(self._coordinators)
        in_turn = [self._coordinators[(doubt.asked + i) % count] for i in range(count)]
        return next((each for each in in_turn if each.rests_until <= now), in_turn[0])

    def _failed(self, coordinator: _Coordinator, error: Exception) -> None:
        if coordinator.failures == 0:
            _log.warning("the coordinator at %s does not answer: %s", coordinator.url, error or type(error).__name__)
        coordinator.failures = min(coordinator.failures + 1, 16)
        rest_s = self._settings.ask_backoff_s * 2.0 ** (coordinator.failures - 1)
        coordinator.rests_until = self._loop.time() + min(rest_s, self._settings.ask_backoff_cap_s)

    def _pause_s(self, doubt: _Doubt) -> float:
        pause_s = doubt.backoff_s
        doubt.backoff_s = min(2 * pause_s, self._settings.ask_backoff_cap_s)
        return pause_s * (0.5 + 0.5 * self._random.random())

    async def _end(self, key: BranchId, doubt: _Doubt, outcome: type[Commit] | type[Abort]) -> None:
        message = outcome(gid=key.gid, branch=key.branch)
        # Epoch 0: this participant says it to itself, and learns nothing about any leader.
        answer = await self._finish(Envelope(message, Stamp(epoch=0)))
        if isinstance(answer, Contradicted) and not doubt.alarmed:
            doubt.alarmed = True
            _log.error(
                "ALARM: the outcome of %s asks branch %s for a %s, but it is %s",
                key.gid,
                key.branch,
                outcome.__name__.lower(),
                answer.state,
            )
        if self._doubts.get(key) is doubt:
            self._push(key, doubt, self._pause_s(doubt))


async def _question(
    session: aiohttp.ClientSession, url: str, gid: str
) -> tuple[int, float | None, type[Commit] | type[Abort] | None]:
    """Status, the pause that was asked for in seconds, and the outcome if this answer is one."""
    async with session.get(f"{url}/v1/outcomes/{gid}", allow_redirects=False) as response:
        raw = await response.content.read(_ANSWER_LIMIT_BYTES)
        while len(raw) < _ANSWER_LIMIT_BYTES and not response.content.at_eof():
            raw += await response.content.read(_ANSWER_LIMIT_BYTES - len(raw))
        pause = response.headers.get("Retry-After", "")
        retry_after = float(pause) if pause.isascii() and pause.isdigit() else None
        return response.status, retry_after, _outcome_of(raw, gid) if response.status == 200 else None


def _outcome_of(raw: bytes, gid: str) -> type[Commit] | type[Abort] | None:
    try:
        body: Any = json_value(raw)
    except Malformed:
        return None
    if not isinstance(body, dict) or body.get("gid", gid) != gid:
        return None
    told = body.get("outcome")
    return _OUTCOMES.get(told) if isinstance(told, str) else None


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("nothing asks about branches in doubt any more", exc_info=error)
