"""Finds out from the participants what a restored ledger is not sure of, until nothing is open any more.

Runs on every node, and acts on the one that leads while a range is open (`lost.py`). In rounds: ask every registered
participant what it holds prepared of the range; ask about each transaction that is not decided here; log what follows
from the answers (`reconcile.py`), before anybody can hear of it. What is logged is carried out as always. When in two
rounds, one after the other, all have answered and nothing of the range is prepared or undecided, the range is closed:
two, because a prepare may have been under way in the first. Between them all are told that the range is over.

All of it is soft state but what is logged: the next leader begins with a round of its own.
"""

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp

from coordinator.codec import Malformed, json_value
from coordinator.config import NodeConfig, is_loopback, valid_name
from coordinator.driver import Driver
from coordinator.errors import OutlastError
from coordinator.facts import Participant, Verdict
from coordinator.ledger import Ledger
from coordinator.lost import LostRange
from coordinator.protocol.entries import Enlisted, LostRangeNoted, Reconciled
from coordinator.protocol.messages import Gid
from coordinator.protocol.transaction import Decision, Transaction
from coordinator.reconcile import Found, Judgement, Release, Testimony, Wait, judge_active, judge_copied, judge_unknown

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_GIDS_AT_ONCE: Final = 50
"""In one question; a participant of ours takes up to 100."""
_PER_ROUND: Final = 1_000
"""Transactions that a round looks at."""
_ANSWER_BYTES_MAX: Final = 8 << 20
_BRANCHES_MAX: Final = 1_000
"""Of one transaction at one participant, or as many as this node allows a transaction: they go into one entry."""
_QUIET_ROUNDS: Final = 2
_PATIENT_ROUNDS: Final = 10
"""For decisions to be carried out that the copy holds, before the range is closed without that."""
_LOOK_S: Final = 0.5
"""Between looks whether there is anything to find out."""
_PAUSE_S: Final = 0.2
_PAUSE_MAX_S: Final = 2.0
_ASKS_AT_ONCE: Final = 16


class _NoAnswer(Exception):
    """The participant said nothing that could be understood."""


@dataclass(slots=True)
class _View:
    """One participant, as of the last round. prepared: of the range; exhaustive: whether that is all."""

    answered: bool = False
    exhaustive: bool = False
    can_tell: bool | None = None
    trouble: str | None = None
    prepared: dict[str, list[str]] = field(default_factory=dict)


class Inquiry:
    """See the module's text. All methods belong to the event loop's thread."""

    def __init__(self, *, config: NodeConfig, driver: Driver, ledger: Ledger, tls: ssl.SSLContext | None) -> None:
        self._config = config
        self._driver = driver
        self._ledger = ledger
        self._tls = tls
        self._task: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._views: dict[str, _View] = {}
        self._settled: Counter[str] = Counter()
        self._waits: dict[str, tuple[str, ...]] = {}
        self._quiet = 0
        self._patience = _PATIENT_ROUNDS
        self._fenced: int | None = None
        """The end of the range of which all were told that it is over."""
        self._rounds = 0
        self._ahead: dict[str, int] = {}
        """Participants that have heard from a newer epoch than this node knows of, and from which."""
        self._alarmed: set[str] = set()

    def start(self) -> None:
        """Begin to look whether there is anything to find out."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(_report)

    async def stop(self) -> None:
        """Ask nobody any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._session is not None:
            await self._session.close()

    # -------------------------------------------------------------------------------------------- what is seen

    def status(self) -> dict[str, Any]:
        """How far it is, for people and programs; complete on the leader only."""
        lost = self._ledger.lost
        if lost is None:
            waits = self._driver.awaits_copy
            return {"open": False, "awaits_copy": waits, "fresh": self._ledger.is_fresh, "settled": self._counts()}
        open_ones = [
            txn.gid for number, txn in self._ledger.unfinished.items() if number in lost and txn.decision is None
        ]
        return {
            "open": True,
            "awaits_copy": False,
            "fresh": False,
            "range": [str(Gid.of_number(self._ledger.cluster, number)) for number in (lost.low, lost.high)],
            "without": list(lost.without),
            "undecided": len(open_ones),
            "prepared": len({gid for view in self._views.values() for gid in view.prepared}),
            "settled": self._counts(),
            "waiting_for": sorted({name for names in self._waits.values() for name in names} | self._silent(lost)),
            "participants": {
                name: {
                    "answered": view.answered,
                    "can_tell": view.can_tell,
                    "prepared": len(view.prepared),
                    "trouble": view.trouble,
                }
                for name, view in self._views.items()
            },
        }

    def _counts(self) -> dict[str, int]:
        return {name: self._settled[name] for name in ("committed", "aborted", "forgotten")}

    def _silent(self, lost: LostRange) -> set[str]:
        return {name for name, view in self._views.items() if not view.answered and name not in lost.without}

    # -------------------------------------------------------------------------------------------- rounds

    async def _run(self) -> None:
        pause_s = _PAUSE_S
        while True:
            lost = self._ledger.lost
            if lost is None or not self._driver.leading:
                self._quiet, self._fenced, self._views, self._waits = 0, None, {}, {}
                self._patience = _PATIENT_ROUNDS
                await asyncio.sleep(_LOOK_S)
                continue
            try:
                progress = await self._round(lost)
            except OutlastError as error:
                # Leadership was lost, or the log does not answer: whoever leads then begins anew.
                _log.info("finding out what was lost is tried again: %s", error)
                progress = False
            except Exception as error:  # noqa: BLE001  # never the end of it: what is open would stay open for ever
                _log.critical("a defect of this node: finding out what was lost is tried again", exc_info=error)
                progress, pause_s, self._quiet = False, _PAUSE_MAX_S, 0
            pause_s = _PAUSE_S if progress or self._quiet else min(2 * pause_s, _PAUSE_MAX_S)
            await asyncio.sleep(pause_s)

    async def _round(self, lost: LostRange) -> bool:
        """Ask, judge and log; True if something came of it."""
        asked = dict(self._ledger.participants)
        views = await asyncio.gather(*(self._look(participant, lost) for participant in asked.values()))
        self._views = dict(zip(asked, views, strict=True))
        if not self._open(lost):
            return False
        held = [txn for number, txn in self._ledger.unfinished.items() if number in lost and txn.decision is None]
        unknown = sorted(
            {gid for view in views for gid in view.prepared if self._ledger.get(gid) is None},
            key=lambda gid: Gid.parse(gid) or Gid("", 0, 0),
        )
        held, unknown = self._some(held), self._some(unknown)
        self._rounds += 1
        told = await self._testimonies(asked, held, unknown)
        await self._tell_who_is_ahead()
        if not self._open(lost):
            return False
        without = frozenset(lost.without)
        self._waits = {}
        judged: list[tuple[str, Judgement]] = []
        for txn in held:
            judge = judge_active if txn.active else judge_copied
            judged.append((txn.gid, judge(txn, {name: told.get((name, txn.gid)) for name in asked}, without)))
        judged += [
            (gid, judge_unknown(gid, {name: told.get((name, gid)) for name in asked}, without)) for gid in unknown
        ]
        progress = await self._carry_out(judged)
        undecided = any(number in lost and txn.decision is None for number, txn in self._ledger.unfinished.items())
        quiet = not undecided and all(
            name in without or (view.exhaustive and not view.prepared) for name, view in self._views.items()
        )
        self._quiet = self._quiet + 1 if quiet else 0
        if self._quiet >= _QUIET_ROUNDS and self._fenced != lost.high and not lost.without:
            if self._patience and any(number <= lost.high for number in self._ledger.unfinished):
                self._patience -= 1  # what is decided is carried out meanwhile, as a rule
            elif await self._fence(asked, lost):
                # Looked at once more: what came before the fence is seen now, and nothing comes after it.
                self._fenced, self._quiet = lost.high, _QUIET_ROUNDS - 1
        elif self._quiet >= _QUIET_ROUNDS and self._open(lost):
            applied = await self._driver.log(LostRangeNoted(closed=True), 50)
            if applied.verdict is Verdict.APPLIED:
                _log.warning("all is found out that can be after the restore: %s", self._counts())
        return progress

    def _some(self, all_of_them: list[_T]) -> list[_T]:
        """As many as a round looks at, others each time: the first ones may wait for somebody who is away."""
        first = self._rounds * _PER_ROUND % max(1, len(all_of_them))
        return (all_of_them[first:] + all_of_them[:first])[:_PER_ROUND]

    def _open(self, lost: LostRange) -> bool:
        return self._driver.leading and self._ledger.lost is not None and self._ledger.lost.high == lost.high

    async def _carry_out(self, judged: list[tuple[str, Judgement]]) -> bool:
        entries: list[Reconciled | Enlisted] = []
        released = False
        for gid, judgement in judged:
            match judgement:
                case Wait():
                    if judgement.names:
                        self._waits[gid] = judgement.names
                case Release():
                    self._driver.release(gid)
                    released = True
                case Found():
                    entries += judgement.branches
                case Reconciled():
                    entries.append(judgement)
        results = await asyncio.gather(
            *(self._driver.log(entry, _size_of(entry)) for entry in entries),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, BaseException) or result.verdict is not Verdict.APPLIED:
                continue
            if isinstance(entry, Enlisted):
                _log.info("%s has a branch at %s, enlisted after the copy was made", entry.gid, entry.participant)
                continue
            what = {Decision.COMMIT: "committed", Decision.ABORT: "aborted", None: "forgotten"}[entry.decision]
            self._settled[what] += 1
            _log.info("%s is %s: %s", entry.gid, what, entry.reason or "all of its branches are prepared")
        if errors:
            raise errors[0]
        return bool(entries) or released

    # -------------------------------------------------------------------------------------------- questions

    async def _look(self, participant: Participant, lost: LostRange) -> _View:
        """What it holds prepared of the range."""
        bound = Gid.of_number(self._ledger.cluster, lost.high + 1)
        try:
            body = await self._get(participant, f"/branches?before={bound}")
            rows = self._rows(body)
        except _NoAnswer as error:
            return _View(trouble=str(error))
        view = _View(answered=True)
        for gid, branch, _state in rows:
            parsed = self._ledger.own_gid(gid)
            if parsed is not None and parsed.number in lost:
                view.prepared.setdefault(gid, []).append(branch)
        total = body.get("total", len(rows))
        # What is at work may be prepared a moment later.
        view.exhaustive = total == len(rows) and body.get("working", 0) == 0
        return view

    async def _fence(self, asked: dict[str, Participant], lost: LostRange) -> bool:
        """Tell all that the range is over; True once everybody has heard it.

        An application may have begun a transaction in the range, and prepare a branch of it only now. Nobody could say
        later what becomes of that, so no participant must take it any more: it is below the floor, which is as high as
        what is owed to the participant allows. The message is an abort, of a gid that was never given out: it is acked,
        and what is written is the epoch and the floor; and a tombstone, where something older is owed that keeps the
        floor from rising above that gid. Where somebody is left out nobody is told: should it come back meanwhile, what
        the others would drop is what it needs.
        """
        # The range ends with the base of the new epochs, which is nobody's epoch itself.
        nothing = str(Gid(self._ledger.cluster, Gid.of_number(self._ledger.cluster, lost.high).epoch, 0))

        def floor(name: str) -> str:
            owed = [
                number
                for number, txn in self._ledger.unfinished.items()
                if any(branch.participant == name for branch in txn.branches)
            ]
            return str(Gid.of_number(self._ledger.cluster, min([lost.high + 1, *owed])))

        async def tell(participant: Participant) -> bool:
            body = {"gid": nothing, "branch": "none", "epoch": self._ledger.epoch, "floor": floor(participant.name)}
            try:
                await self._call(participant, "/abort", body)
            except _NoAnswer as error:
                self._views[participant.name].trouble = str(error)
                return False
            return True

        return all(await asyncio.gather(*(tell(participant) for participant in asked.values())))

    async def _testimonies(
        self, asked: dict[str, Participant], held: Sequence[Transaction], unknown: Sequence[str]
    ) -> dict[tuple[str, str], Testimony]:
        """By participant and gid, what it says; nothing where it did not answer."""
        questions: dict[str, list[str]] = {name: list(unknown) for name in asked}
        for txn in held:
            for name in asked if txn.active else {branch.participant for branch in txn.branches}:
                if name in questions:
                    questions[name].append(txn.gid)
        told: dict[tuple[str, str], Testimony] = {}
        gate = asyncio.Semaphore(_ASKS_AT_ONCE)

        async def ask(name: str, gids: list[str]) -> None:
            async with gate:
                try:
                    answers = await self._ask(asked[name], gids)
                except _NoAnswer as error:
                    self._views[name].answered, self._views[name].trouble = False, str(error)
                    return
            for gid, testimony in answers.items():
                told[name, gid] = testimony
                self._views[name].can_tell = testimony.can_tell

        # Whoever did not even say what it holds prepared is not asked on.
        await asyncio.gather(
            *(
                ask(name, gids[at : at + _GIDS_AT_ONCE])
                for name, gids in questions.items()
                if self._views[name].answered
                for at in range(0, len(gids), _GIDS_AT_ONCE)
            )
        )
        return told

    async def _ask(self, participant: Participant, gids: list[str]) -> dict[str, Testimony]:
        body = await self._get(participant, "/branches?" + "&".join(f"gid={quote(gid)}" for gid in gids))
        rows = self._rows(body)
        can_tell = body.get("known") is True
        floor = body.get("floor")
        bound = Gid.parse(floor) if isinstance(floor, str) else None
        self._heard_epoch(participant.name, body.get("epoch"))
        answers = {}
        for gid in gids:
            parsed = Gid.parse(gid)
            answers[gid] = Testimony(
                branches=tuple((branch, state) for about, branch, state in rows if about == gid),
                can_tell=can_tell,
                ended=bound is not None and parsed is not None and parsed.number < bound.number,
            )
        return answers

    def _heard_epoch(self, name: str, epoch: object) -> None:
        if type(epoch) is int and epoch > self._ledger.epoch and name not in self._alarmed:
            self._ahead[name] = epoch

    async def _tell_who_is_ahead(self) -> None:
        """An alarm about each participant that has heard from an epoch beyond this cluster's. Raises `OutlastError`."""
        if not self._ahead:
            return
        ahead, self._ahead = self._ahead, {}
        # It may have been from this node's own successor: nobody tells a leader that it is deposed.
        await self._driver.barrier()
        for name, epoch in ahead.items():
            if epoch > self._ledger.epoch:
                self._alarmed.add(name)
                _log.error(
                    "ALARM: %s has heard from epoch %d of this cluster, which is at %d: either the cluster that was "
                    "lost still runs, or it had come further than was thought. %s refuses to prepare; restore again "
                    "with --above-epoch %d",
                    name,
                    epoch,
                    self._ledger.epoch,
                    name,
                    epoch,
                )

    def _rows(self, body: dict[str, Any]) -> list[tuple[str, str, str]]:
        """gid, branch and state of all that is listed, fit for the log. Raises `_NoAnswer`."""
        rows = _rows(body)
        ours = Counter(gid for gid, _branch, _state in rows if self._ledger.own_gid(gid) is not None)
        if any(gid in ours and not valid_name(branch) for gid, branch, _state in rows):
            raise _NoAnswer("GET /branches was answered with a branch that no transaction of this cluster can have")
        if max(ours.values(), default=0) > max(_BRANCHES_MAX, self._config.limits.max_branches):
            raise _NoAnswer("GET /branches was answered with more branches than a transaction of this cluster can have")
        return rows

    async def _get(self, participant: Participant, path: str) -> dict[str, Any]:
        return await self._call(participant, path, None)

    async def _call(self, participant: Participant, path: str, told: dict[str, Any] | None) -> dict[str, Any]:
        """The answer to a question, or to what it is `told`. Raises `_NoAnswer`."""
        url = participant.url.rstrip("/") + path
        method = "GET" if told is None else "POST"
        what = f"{method} {path.partition('?')[0]}"
        token = self._config.participant_token
        try:
            parts = urlsplit(url)
            if token is not None and parts.scheme != "https" and not is_loopback(parts.hostname or ""):
                raise _NoAnswer("a token goes beyond loopback only over TLS; register an https URL")
            async with self._connected().request(method, url, json=told, allow_redirects=False) as response:
                raw = await response.content.read(_ANSWER_BYTES_MAX)
                while not response.content.at_eof() and len(raw) < _ANSWER_BYTES_MAX:
                    raw += await response.content.read(_ANSWER_BYTES_MAX - len(raw))
                if response.status != 200 and (told is None or response.status != 409):  # which is an answer, too
                    raise _NoAnswer(f"status {response.status} to {what}")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise _NoAnswer(f"no answer: {error or type(error).__name__}") from error
        return _object(raw, what)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            token, timing = self._config.participant_token, self._config.timing
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_ASKS_AT_ONCE, ssl=self._tls or True),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={} if token is None else {"Authorization": f"Bearer {token}"},
                timeout=aiohttp.ClientTimeout(
                    total=timing.participant_timeout_s, sock_connect=timing.connect_timeout_s
                ),
            )
        return self._session


def _object(raw: bytes, what: str) -> dict[str, Any]:
    """What the answer to `what` spells. Raises `_NoAnswer`."""
    try:
        body = json_value(raw)
    except Malformed as error:
        raise _NoAnswer(f"{what} was answered with something else: {error}") from error
    if not isinstance(body, dict):
        raise _NoAnswer(f"{what} was answered with something else than an object")
    return body


def _size_of(entry: Reconciled | Enlisted) -> int:
    if isinstance(entry, Enlisted):
        return 300
    return 300 + sum(len(plan.name) + len(plan.participant) for plan in entry.branches)


def _rows(body: dict[str, Any]) -> list[tuple[str, str, str]]:
    """gid, branch and state of all that is listed. Raises `_NoAnswer`."""
    rows = body.get("branches")
    if not isinstance(rows, list):
        raise _NoAnswer("GET /branches was answered without branches")
    found = []
    for row in rows:
        match row:
            case {"gid": str(gid), "branch": str(branch), "state": str(state)}:
                found.append((gid, branch, state))
            case _:
                raise _NoAnswer("GET /branches was answered with something else among the branches")
    if len({(gid, branch) for gid, branch, _state in found}) != len(found):
        raise _NoAnswer("GET /branches was answered with one branch twice")
    return found


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("a defect: nobody finds out any more what was lost", exc_info=error)
