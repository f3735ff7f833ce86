"""Carries messages to participants until each has answered: batched, retried, and never one participant's trouble for
another.

Every participant has a *lane*, and a lane has tracks that do not wait for each other: prepares, prepares that were
answered *pending* (stragglers), and decisions. For a prepare may wait for a lock that only a decision releases, and
that decision for the vote of a prepare that is sent later. On a track a few workers carry what waits: a
whole batch in a request when the participant takes batches, one message in each of more requests when it does not. What
arrives while they are on their way is the next batch; nothing waits for a timer.

A letter stays until it is answered. What counts as an answer is decided by `codec.answer_from_wire`; anything else
means *unknown*, and unknown means: again, later. Later is a backoff that doubles up to a cap, with jitter:

- when a participant cannot be reached, its lane is *down*: one worker tries it at the end of each backoff, and at any
  sign of life (`wake`); when it answers, everything goes at once;
- when it answers one message badly, that letter alone waits;
- when it answers a whole batch badly, the next one is half as long, until the letter that spoils it is alone.

A letter about the same branch replaces an older one, so an abort takes the place of a prepare that was never delivered.
"""

import asyncio
import heapq
import logging
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count, islice
from math import inf
from typing import Any, Final

from cluster.replication.clock import Clock
from coordinator.codec import (
    JSON_TYPE,
    MAX_NESTING,
    MSGPACK_TYPE,
    Malformed,
    answer_from_wire,
    batch_from_bytes,
    batch_to_bytes,
    call_of,
    json_bytes,
    json_value,
    nested_too_deeply,
    request_to_wire,
)
from coordinator.config import Limits, Timing
from coordinator.connections import Connections, PostFailed
from coordinator.facts import Participant
from coordinator.protocol.messages import (
    Answer,
    Contradicted,
    Pending,
    Prepare,
    Prepared,
    ReadOnly,
    Request,
    StaleEpoch,
    Stamp,
)

_log = logging.getLogger(__name__)

BATCH_WORKERS: Final = 2
"""Requests under way at once on a track of a participant that takes batches. More would make the batches smaller."""

STRAGGLER_WORKERS: Final = 8
"""The same for what such a participant was still working on when it was asked before: each may wait for a lock."""

SINGLE_WORKERS: Final = 32
"""The same for a participant that takes one message at a time."""

_SOON_S: Final = 0.005
"""Before a participant is asked again about a prepare that was still at work when others of its batch were answered;
doubled each time, up to `backoff_min_s`, which is how long everything else rests that is pending."""

Key = tuple[str, str]
"""gid and branch."""


@dataclass(slots=True, eq=False)
class _Letter:
    """A message on its way. `expires_s`: on the monotonic clock, of a prepare."""

    message: Request
    expires_s: float | None
    key: Key
    tries: int = 0


@dataclass(slots=True, eq=False)
class _Track:
    """Of one phase. `waiting` is in order of arrival; `parked` letters have a time before which they rest."""

    waiting: dict[Key, _Letter] = field(default_factory=dict)
    parked: list[tuple[float, int, _Letter]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    timer_at_s: float = inf
    workers: int = 0
    starting: int = 0
    """Of the workers, those that have not looked at `waiting` yet."""


class _Phase(IntEnum):  # whose hash takes no call
    PREPARE = 0
    STRAGGLER = 1
    DECISION = 2


@dataclass(slots=True, eq=False)
class _Lane:
    """All that is on its way to one participant. `letters` holds the newest letter of each branch, wherever it is.

    failures: in a row; while there are any, one worker at a time finds out whether the participant is back.
    most: letters in one request, as long as batches are answered well.
    """

    participant: Participant
    most: int
    letters: dict[Key, _Letter] = field(default_factory=dict)
    tracks: Mapping[_Phase, _Track] = field(default_factory=lambda: {phase: _Track() for phase in _Phase})
    failures: int = 0
    down_since: int | None = None
    down_timer: asyncio.TimerHandle | None = None
    trouble: str | None = None

    @property
    def resting(self) -> bool:
        return self.down_timer is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStatus:
    """What people may want to know of a participant.

    trouble: why the last request failed; None when it did not.
    down_since: of the first of the failures in a row, milliseconds since 1970; None while it answers.
    """

    owed: int
    down: bool
    trouble: str | None
    down_since: int | None = None


class Unreachable(Exception):
    """No answer at all, or none that HTTP allows: what the participant did is unknown."""


class Garbled(Unreachable):
    """An answer to a batch that cannot be taken apart: perhaps one of its messages is the reason."""


class Courier:
    """Delivers letters. `stamp` is asked for their stamp each time they leave; `on_answers` hears what comes back."""

    def __init__(
        self,
        *,
        clock: Clock,
        limits: Limits,
        timing: Timing,
        stamp: Callable[[str], Stamp],
        on_answers: Callable[[list[Answer]], None],
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._timing = timing
        self._stamp = stamp
        self._on_answers = on_answers
        self._connections = Connections(
            timeout_s=timing.participant_timeout_s,
            connect_timeout_s=timing.connect_timeout_s,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            tls=tls,
        )
        self._rng = rng if rng is not None else random.Random()  # noqa: S311  # spreads retries, keeps no secret
        self._order = count()
        self._lanes: dict[str, _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -------------------------------------------------------------------------------------------- what the driver says

    def send(self, participant: Participant, message: Request, *, expires_s: float | None = None) -> None:
        """Deliver `message` until it is answered; it replaces what was on its way to the same branch."""
        lane = self._lane(participant)
        key = (message.gid, message.branch)
        letter = _Letter(message, expires_s, key)
        self._drop(lane, key)
        lane.letters[key] = letter
        phase = _Phase.PREPARE if type(message) is Prepare else _Phase.DECISION
        lane.tracks[phase].waiting[key] = letter
        self._pump(lane, phase)

    def withdraw(self, name: str, gid: str, branch: str) -> None:
        """Nothing is owed to the branch any more: an answer to what is under way will not count."""
        lane = self._lanes.get(name)
        if lane is not None:
            self._drop(lane, (gid, branch))

    def wake(self, name: str) -> None:
        """The participant may be alive: if its lane is down, find out now."""
        lane = self._lanes.get(name)
        if lane is not None and lane.down_timer is not None:
            lane.down_timer.cancel()
            self._probe(lane)

    def moved(self, participant: Participant) -> None:
        """The participant is registered anew, perhaps elsewhere: try now whatever waits for it."""
        lane = self._lanes.get(participant.name)
        if lane is None:
            return
        before, lane.participant = lane.participant, participant
        lane.most = self._most(participant)
        self._leave(before.url)
        for track in lane.tracks.values():
            for _, _, letter in track.parked:
                if lane.letters.get(letter.key) is letter:
                    track.waiting[letter.key] = letter
            track.parked.clear()
            _disarm(track)
        if lane.down_timer is not None:
            lane.down_timer.cancel()
            self._probe(lane)
        for phase in _Phase:
            self._pump(lane, phase)

    def forget(self, name: str) -> None:
        """The participant is registered no more, so nothing is owed to it."""
        lane = self._lanes.pop(name, None)
        if lane is not None:
            _stop_timers(lane)
            lane.letters.clear()
            self._leave(lane.participant.url)

    def _leave(self, url: str) -> None:
        """Give up the connections to `url`, unless somebody still listens there."""
        if all(lane.participant.url != url for lane in self._lanes.values()):
            self._connections.leave(url)

    def owed(self, name: str) -> int:
        """Letters that `name` has not answered."""
        lane = self._lanes.get(name)
        return 0 if lane is None else len(lane.letters)

    def status(self) -> dict[str, LaneStatus]:
        """How every lane is."""
        return {name: _status(lane) for name, lane in self._lanes.items()}

    def status_of(self, name: str) -> LaneStatus | None:
        """How the participant's lane is; None where nothing was ever owed to it."""
        lane = self._lanes.get(name)
        return None if lane is None else _status(lane)

    def clear(self) -> None:
        """Leadership is lost: carry nothing any more. Requests that are under way are broken off."""
        for task in self._tasks:
            task.cancel()
        for lane in self._lanes.values():
            _stop_timers(lane)
        self._lanes.clear()

    async def close(self) -> None:
        """`clear`, and give up the connections."""
        self.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._connections.close()

    # -------------------------------------------------------------------------------------------- lanes

    def _lane(self, participant: Participant) -> _Lane:
        lane = self._lanes.get(participant.name)
        if lane is None:
            lane = self._lanes[participant.name] = _Lane(participant, self._most(participant))
        return lane

    def _most(self, participant: Participant) -> int:
        return self._limits.max_batch if participant.batch else 1

    @staticmethod
    def _drop(lane: _Lane, key: Key) -> None:
        """Forget the letter. One that a worker carries is no longer in `letters`, and its answer will not count."""
        if lane.letters.pop(key, None) is not None:
            for track in lane.tracks.values():
                track.waiting.pop(key, None)

    def _pump(self, lane: _Lane, phase: _Phase) -> None:
        """As many workers as there is work for; one, while it is not known whether the participant is back."""
        track = lane.tracks[phase]
        most = 1 if lane.failures else _workers(lane.participant, phase)
        while len(track.waiting) > track.starting * lane.most and not lane.resting and track.workers < most:
            self._hire(lane, track)

    def _hire(self, lane: _Lane, track: _Track) -> None:
        track.workers += 1
        track.starting += 1
        task = asyncio.get_running_loop().create_task(self._work(lane, track))
        self._tasks.add(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("a defect ended a worker", exc_info=error)

    async def _work(self, lane: _Lane, track: _Track) -> None:
        track.starting -= 1
        try:
            while not lane.resting and (letters := self._take(lane, track)):
                try:
                    answers = await self._exchange(lane.participant, letters)
                except Unreachable as error:
                    if isinstance(error, Garbled):
                        self._halve(lane, track, letters)
                    self._failed(lane, track, letters, str(error))
                    return
                except Exception as error:
                    # A defect of ours must not lose letters: that would be a promise broken in silence.
                    self._failed(lane, track, letters, f"a defect of this node: {error!r:.200}")
                    raise
                self._up(lane)
                self._answered(lane, track, letters, answers)
        finally:
            track.workers -= 1

    def _take(self, lane: _Lane, track: _Track) -> list[_Letter]:
        letters = list(islice(track.waiting.values(), lane.most))
        for letter in letters:
            del track.waiting[letter.key]
        return letters

    def _answered(self, lane: _Lane, track: _Track, letters: list[_Letter], answers: list[Answer | str]) -> None:
        heard: list[Answer] = []
        # Where all are pending there was no room for any, or the participant has waited for them long enough.
        has_stragglers = not all(isinstance(answer, Pending) for answer in answers)
        for letter, answer in zip(letters, answers, strict=True):
            if lane.letters.get(letter.key) is not letter:
                continue  # replaced while it was on its way
            if isinstance(answer, str):
                lane.trouble = answer
                self._park(lane, track, letter)
            elif isinstance(answer, Pending):
                is_prepare = isinstance(letter.message, Prepare)
                rest_s = self._timing.backoff_min_s
                if is_prepare and has_stragglers:
                    rest_s = min(rest_s, _SOON_S * 2.0 ** min(letter.tries, 16))
                self._park(lane, lane.tracks[_Phase.STRAGGLER] if is_prepare else track, letter, rest_s)
            elif isinstance(answer, Contradicted):
                heard.append(answer)
                self._park(lane, track, letter)
            else:
                # A stale epoch is no vote, but asking again under the same epoch would only hear it again.
                if isinstance(answer, StaleEpoch):
                    _log.warning("%s has heard from epoch %d: this node is deposed", letter.key, answer.epoch)
                del lane.letters[letter.key]
                heard.append(answer)
        if heard:
            self._on_answers(heard)

    # -------------------------------------------------------------------------------------------- trouble

    def _backoff_s(self, failures: int) -> float:
        ceiling = min(self._timing.backoff_max_s, self._timing.backoff_min_s * 2.0 ** min(failures, 16))
        return ceiling * (0.5 + 0.5 * self._rng.random())

    def _halve(self, lane: _Lane, track: _Track, letters: list[_Letter]) -> None:
        """Make way past the letter that spoils a batch."""
        lane.most = max(1, len(letters) // 2)
        if len(letters) == 1 and lane.letters.get(letters[0].key) is letters[0]:
            self._park(lane, track, letters.pop())

    def _failed(self, lane: _Lane, track: _Track, letters: list[_Letter], trouble: str) -> None:
        if self._lanes.get(lane.participant.name) is not lane:
            return  # forgotten meanwhile
        back = {letter.key: letter for letter in letters if lane.letters.get(letter.key) is letter}
        track.waiting = {**back, **track.waiting}
        if lane.failures == 0:
            _log.warning("participant %s: %s", lane.participant.name, trouble)
            lane.down_since = self._clock.wall_ms()
        lane.trouble = trouble
        if lane.resting:
            return
        lane.failures += 1
        delay_s = self._backoff_s(lane.failures - 1)
        lane.down_timer = asyncio.get_running_loop().call_later(delay_s, self._probe, lane)

    def _probe(self, lane: _Lane) -> None:
        """The backoff is over: let one worker of each track find out."""
        lane.down_timer = None
        for phase in _Phase:
            self._pump(lane, phase)

    def _up(self, lane: _Lane) -> None:
        if lane.down_timer is not None:
            lane.down_timer.cancel()
            lane.down_timer = None
        if lane.failures:
            _log.info("participant %s is back", lane.participant.name)
            lane.failures, lane.down_since = 0, None
            for phase in _Phase:
                self._pump(lane, phase)
        lane.most = min(2 * lane.most, self._most(lane.participant))
        lane.trouble = None

    def _park(self, lane: _Lane, track: _Track, letter: _Letter, rest_s: float | None = None) -> None:
        """Let it rest for so long; None: for a backoff."""
        delay_s = self._backoff_s(letter.tries) if rest_s is None else rest_s
        letter.tries += 1
        due_s = self._clock.monotonic_s() + delay_s
        heapq.heappush(track.parked, (due_s, next(self._order), letter))
        if due_s < track.timer_at_s:
            self._arm(lane, track, due_s, delay_s)

    def _arm(self, lane: _Lane, track: _Track, due_s: float, delay_s: float) -> None:
        _disarm(track)
        track.timer_at_s = due_s
        track.timer = asyncio.get_running_loop().call_later(delay_s, self._unpark, lane, track)

    def _unpark(self, lane: _Lane, track: _Track) -> None:
        track.timer, track.timer_at_s = None, inf
        now_s = self._clock.monotonic_s()
        while track.parked and track.parked[0][0] <= now_s:
            _, _, letter = heapq.heappop(track.parked)
            if lane.letters.get(letter.key) is letter:
                track.waiting[letter.key] = letter
        if track.parked:
            self._arm(lane, track, track.parked[0][0], max(0.0, track.parked[0][0] - now_s))
        for phase, other in lane.tracks.items():
            if other is track:
                self._pump(lane, phase)

    # -------------------------------------------------------------------------------------------- HTTP

    async def _exchange(self, participant: Participant, letters: list[_Letter]) -> list[Answer | str]:
        """An answer, or the text of what is wrong with it, for each letter. Raises `Unreachable`."""
        stamp = self._stamp(participant.name)
        bodies = [request_to_wire(letter.message, self._stamped(stamp, letter)) for letter in letters]
        if not participant.batch:
            (letter,), (body,) = letters, bodies
            path = f"/{call_of(letter.message)}"
            status, content_type, raw = await self._post(participant, path, JSON_TYPE, json_bytes(body), 1)
            return [self._read(letter, status, _json_or_none(content_type, raw))]
        for letter, body in zip(letters, bodies, strict=True):
            body["call"] = call_of(letter.message)
        content_type, raw = batch_to_bytes(bodies)
        status, content_type, raw = await self._post(participant, "/batch", content_type, raw, len(letters))
        if status != 200:
            raise Garbled(f"status {status} to a batch")
        try:
            items = batch_from_bytes(content_type, raw)
        except Malformed as error:
            raise Garbled(f"a batch was answered with something else: {error}") from error
        if len(items) != len(letters):
            raise Garbled(f"{len(items)} answers to {len(letters)} messages")
        return [self._read_item(letter, item) for letter, item in zip(letters, items, strict=True)]

    def _read_item(self, letter: _Letter, item: Any) -> Answer | str:
        status = item.get("status") if isinstance(item, dict) else None
        return self._read(letter, status if type(status) is int else 0, item)

    def _read(self, letter: _Letter, status: int, body: object) -> Answer | str:
        try:
            answer = answer_from_wire(letter.message, status, body)
        except Malformed as error:
            return f"{call_of(letter.message)} was answered with {error}"
        result = answer.result if isinstance(answer, Prepared | ReadOnly) else None
        # The log has to take it, and people to be shown it.
        if result is not None and len(result) > self._limits.max_answer_bytes:
            return f"a result of {len(result)} bytes; at most {self._limits.max_answer_bytes} (max_answer_bytes)"
        if result is not None and nested_too_deeply(result):
            return f"a result that is nested more than {MAX_NESTING} deep"
        return answer

    async def _post(
        self, participant: Participant, path: str, content_type: str, body: bytes, messages: int
    ) -> tuple[int, str, bytes]:
        most = self._limits.max_answer_bytes * messages
        try:
            return await self._connections.post(participant.url, path, content_type, body, most=most)
        except PostFailed as error:
            raise Unreachable(str(error)) from error

    def _stamped(self, stamp: Stamp, letter: _Letter) -> Stamp:
        if letter.expires_s is None:
            return stamp
        left_s = max(0.0, letter.expires_s - self._clock.monotonic_s())
        return Stamp(
            epoch=stamp.epoch, floor=stamp.floor, deadline_ms=int(left_s * 1000), coordinators=stamp.coordinators
        )


def _workers(participant: Participant, phase: _Phase) -> int:
    if not participant.batch:
        return SINGLE_WORKERS
    return STRAGGLER_WORKERS if phase is _Phase.STRAGGLER else BATCH_WORKERS


def _json_or_none(content_type: str, raw: bytes) -> object:
    try:
        return json_value(raw) if content_type != MSGPACK_TYPE else None
    except Malformed:
        return None


def _status(lane: _Lane) -> LaneStatus:
    return LaneStatus(owed=len(lane.letters), down=lane.failures > 0, trouble=lane.trouble, down_since=lane.down_since)


def _disarm(track: _Track) -> None:
    if track.timer is not None:
        track.timer.cancel()
    track.timer, track.timer_at_s = None, inf


def _stop_timers(lane: _Lane) -> None:
    if lane.down_timer is not None:
        lane.down_timer.cancel()
        lane.down_timer = None
    for track in lane.tracks.values():
        _disarm(track)
