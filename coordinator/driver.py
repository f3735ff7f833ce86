"""The leader's loop: applied entry -> owed -> perform -> tally -> decide -> propose.

One driver runs on every node. It hears of every applied entry (`applied`), on leaders and followers alike, and answers
whoever waits for one. Only while its node leads, *past its barrier*, does it act:

    becomes leader of term t --> proposes TookOver(epoch = t)
    TookOver(t) is applied here, and the node still leads t --> for every unfinished transaction: adopt
    loses leadership --> forgets all soft state; says nothing more to anybody

`adopt` is the only way in, for a transaction that has just begun and for one that a dead leader left behind: perform
what `owed` says, note what is heard in the tally, propose what `decide` wishes. There is no recovery besides it.

Nothing here decides. What is proposed is a wish; what is performed comes from applied state; and the rules for both are
in `coordinator.protocol`.

Group commit: entries that wait are proposed together as one command, a few turns of the loop after the first of them if
each turn brings more. While `COMMANDS_UNDER_WAY` of them are on their way through the log, what arrives waits and
becomes the next one.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from cluster.replication.clock import Clock
from cluster.replication.log import Leadership, NotProposed, ProposalUnknown, ReplicatedLog
from coordinator.commands import encode_command
from coordinator.config import Limits, NodeConfig
from coordinator.courier import Courier, LaneStatus
from coordinator.deadlines import Deadlines
from coordinator.errors import (
    AwaitingCopy,
    Conflict,
    Gone,
    NotBeforeUpgrade,
    NotEmpty,
    NotFound,
    NotKnownYet,
    NotLeader,
    OutcomeUnknown,
    ShuttingDown,
    TooMany,
    Unprocessable,
)
from coordinator.facts import Applied, Knowledge, Participant, Verdict
from coordinator.floors import Floors
from coordinator.housekeeping import Housekeeper
from coordinator.ledger import Ledger
from coordinator.levels import ENTRY_LEVELS, OLDEST
from coordinator.metrics import Metrics
from coordinator.protocol.effects import Reply, Send, SetDeadline
from coordinator.protocol.entries import (
    Acknowledged,
    Beginning,
    Begun,
    BranchPlan,
    CopyInstalled,
    Decided,
    Ended,
    Enlisted,
    Entry,
    Header,
    Opened,
    Raised,
    Reconciled,
    Registered,
    Resolved,
    RestoreEntry,
    Sealed,
    TookOver,
    Unregistered,
)
from coordinator.protocol.messages import Answer, Gid, Prepare, Stamp
from coordinator.protocol.record import Record
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import NOTHING_HEARD, Decision, Tally, Transaction
from coordinator.refusals import being_found_out, is_enlisted, is_resolved, other_branches, unknown_participant
from coordinator.survey import Survey
from coordinator.waiting import Waiting, waiting_for

_log = logging.getLogger(__name__)

_APPLIED: Final = Verdict.APPLIED  # see `coordinator.ledger`

COMMANDS_UNDER_WAY: Final = 1
"""Commands in the log at once. The log sends a follower what is new when it has answered what it was sent before. So a
second command would hardly arrive sooner than as a part of the next one, and costs every node as much as the first."""

TURNS_FOR_COMPANY: Final = 5
"""How many turns of the loop a command waits at most, as long as each of them brings more for it. What has arrived at
the node meanwhile comes along; where nothing has, the command leaves after one turn, which takes no time then. What
nobody waits for (`Ended`) is no company to wait for."""

ENDED_WAITS_S: Final = 0.05
"""How long an `Ended` may wait for company. Nobody waits for it, so it travels with the next entry that somebody does
wait for, or alone after this time."""

RETRY_PROPOSAL_S: Final = 0.05
"""Before a wish that the log would not take is expressed again."""

LOOK_AT_LEVELS_S: Final = 0.1
"""Between a leader's looks at what the nodes understand, while that may rise."""

LEADERLESS_S: Final = 1.5
"""When nobody has led for so long, whoever waits is told how far it is; a leader that is cut off knows after 1 s."""

SURVEYED_AT_ONCE: Final = 500
"""Transactions that are counted for the metrics before others get their turn."""


class NewTransaction(Record, frozen=True):
    """What a client asks for, validated. `active`: it will enlist the branches itself, one by one.

    body_hash: of what was asked for, where there is a key.
    """

    protocol: str
    branches: tuple[BranchPlan, ...]
    timeout_ms: int
    key: str | None
    body_hash: bytes | None
    active: bool = False

    def __post_init__(self) -> None:
        assert (self.key is None) == (self.body_hash is None), "whoever has a key is told that its body differs"


@dataclass(slots=True, eq=False)
class _Running:
    """A transaction that this leader drives, and its soft state. `wish`: what was proposed and is not applied yet."""

    txn: Transaction
    tally: Tally = NOTHING_HEARD
    expired: bool = False
    wish: Entry | None = None


@dataclass(slots=True, eq=False)
class _Waiting:
    """An entry on its way into the log, and who wants to know what came of it."""

    entry: Entry
    size: int
    future: asyncio.Future[Applied] | None = None


class Driver:
    """See the module's text. All methods belong to the event loop's thread."""

    def __init__(
        self,
        *,
        config: NodeConfig,
        ledger: Ledger,
        log: ReplicatedLog,
        clock: Clock,
        metrics: Metrics,
        courier: Callable[[Callable[[str], Stamp], Callable[[list[Answer]], None]], Courier],
    ) -> None:
        self._config = config
        self._limits: Limits = config.limits
        self._ledger = ledger
        self._log = log
        self._clock = clock
        self._metrics = metrics
        metrics.in_flight.set_function(lambda: len(self._running))
        metrics.active.set_function(lambda: self._floors.active)
        self._courier = courier(self._stamp, self._heard)
        self._deadlines = Deadlines(clock, self._expired)
        self._coordinators = tuple(peer.url for peer in config.nodes)

        self._epoch: int | None = None
        """The epoch that this node drives; None while it does not lead, or is not past its barrier."""
        self._claimed: int | None = None
        """The term for which a TookOver was proposed."""
        self._numbered = 0
        """The epoch that `_next_sequence` belongs to: one that is regained goes on counting."""
        self._next_sequence = 0
        self._running: dict[str, _Running] = {}
        self._undecided = 0
        self._beginning: set[int] = set()
        """Sequences whose Begun is on its way."""
        self._perhaps_begun: set[int] = set()
        """Sequences whose Begun had an unknown fate, and may come to be until a later one has begun."""
        self._last_begun = -1
        self._floors = Floors(ledger)
        self._enlisting: dict[str, list[str]] = {}
        """Branches whose Enlisted is on its way, or has been applied and whoever asked does not know it yet, by gid."""

        self._outbox: deque[_Waiting] = deque()
        self._lazy: list[_Waiting] = []
        self._lazy_timer: asyncio.TimerHandle | None = None
        self._under_way = 0
        self._flush_scheduled = False
        self._raising = False
        self._released: set[str] = set()
        """Of what was undecided in a copy, what goes the normal way."""
        self._reigns = 0
        """How often this node has led: what it proposed in an earlier reign is no business of the present one."""
        self._timers: set[asyncio.TimerHandle] = set()
        self._housekeeper: asyncio.TimerHandle | None = None
        self._house = Housekeeper(
            config=config,
            ledger=ledger,
            log=log,
            clock=clock,
            metrics=metrics,
            propose=self._proposed,
            leads=lambda: self.leading,
            may_forget=lambda: self.leading and not self._draining,
        )

        self._decided_waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._ended_waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._leadership_waiters: set[asyncio.Future[None]] = set()
        self._leaderless: asyncio.TimerHandle | None = None
        self._draining = False
        self._stopped = False

    # -------------------------------------------------------------------------------------------- what others ask

    @property
    def leading(self) -> bool:
        """Whether this node leads and is past its barrier: what it has applied holds all that was ever committed."""
        return self._epoch is not None

    @property
    def in_flight(self) -> int:
        """Transactions that this leader drives and that have not ended; on a follower, as far as it has applied."""
        return len(self._running) if self.leading else len(self._ledger.unfinished)

    def lanes(self) -> dict[str, LaneStatus]:
        """How each participant is, as the courier sees it."""
        return self._courier.status()

    def tally(self, gid: str) -> Tally:
        """What this leader has heard of a transaction; nothing, on a follower."""
        running = self._running.get(gid)
        return NOTHING_HEARD if running is None else running.tally

    def waiting_for(self, txn: Transaction) -> tuple[Waiting, ...] | None:
        """What an unfinished transaction waits for; None where it has ended, and on a follower, which cannot know."""
        if not self.leading or txn.ended_at is not None:
            return None
        return waiting_for(txn, self.tally(txn.gid), self._courier.status_of)

    async def survey(self) -> Survey | None:
        """What there is to measure of what this leader drives, looked at in bounded pieces; None on a follower."""
        if not self.leading:
            return None
        survey = Survey(lanes=self.lanes())
        for count, running in enumerate(list(self._running.values()), 1):
            survey.add(running.txn, running.tally)
            if count % SURVEYED_AT_ONCE == 0:
                await asyncio.sleep(0)
        for count, number in enumerate(self._ledger.heuristic(), 1):
            txn = self._ledger.at(number)
            if txn is not None and txn.heuristic is not None:
                survey.heuristics[txn.heuristic] += 1
            if count % SURVEYED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return survey if self.leading else None

    async def submit(self, new: NewTransaction) -> Transaction:
        """Begin `new`, or find the transaction that its key names. Returns once it is applied.

        Raises `NotLeader` (not begun); `OutcomeUnknown` (perhaps begun); `TooMany`, `Unprocessable`.
        """
        self._require_leading()
        self.require_copy()
        if new.key is not None:
            holder = self._ledger.holder(new.key)
            if holder is not None:
                return self._same_body(holder, new)
        if new.active:
            self._require_level(ENTRY_LEVELS[Opened], "transactions that an application does itself")
        self._check_room(new)
        sequence = self._next_sequence
        self._next_sequence += 1
        self._beginning.add(sequence)
        gid = str(Gid(self._config.cluster, self._ledger.epoch, sequence))
        entry = _beginning(gid, new)
        size = sum(len(plan.payload) + 100 for plan in new.branches) + 200
        applied = await self._proposed(entry, size)
        match applied.verdict:
            case Verdict.APPLIED if applied.txn is not None:
                return applied.txn
            case Verdict.KEY_TAKEN | Verdict.KEY_REUSED if applied.txn is not None:
                return self._same_body(applied.txn, new)
            case Verdict.UNKNOWN_PARTICIPANT:
                raise unknown_participant(str(applied.detail))
            case _:
                # Fenced: another leader's epoch began before this entry was applied.
                raise NotLeader(f"the transaction was not begun: {applied.verdict.value}")

    @staticmethod
    def _same_body(holder: Transaction, new: NewTransaction) -> Transaction:
        if holder.body_hash != new.body_hash:
            raise Unprocessable(
                f"this Idempotency-Key names {holder.gid}, which was asked for with another body; nothing was begun",
                code="idempotency_key_reused",
            )
        return holder

    def _check_room(self, new: NewTransaction) -> None:
        limits = self._limits
        if self._undecided + len(self._beginning) >= limits.max_in_flight:
            raise TooMany(
                f"{limits.max_in_flight} transactions are undecided (max_in_flight); nothing was begun, try later",
                code="too_many_in_flight",
            )
        if len(self._ledger) + len(self._beginning) >= limits.max_retained:
            raise TooMany(
                f"{limits.max_retained} transactions are remembered (max_retained); nothing was begun. Room comes as "
                f"they are forgotten, {limits.retention_s:g} s after their end",
                code="too_many_retained",
                retry_after_s=self._config.timing.housekeeping_s,
            )
        for plan in new.branches:
            self._check_participant(plan.participant)

    def _check_participant(self, name: str) -> None:
        if name not in self._ledger.participants:
            raise unknown_participant(name)
        limit = self._limits.max_owed_per_participant
        if self._courier.owed(name) >= limit:
            raise TooMany(
                f"participant {name} has {limit} messages to answer (max_owed_per_participant); nothing was begun, "
                "try again later",
                code="participant_backlog",
            )

    def _to_advance(self, gid: str) -> Transaction:
        """The transaction as applied, for a leader to go on with.

        Raises `NotLeader`, `NotFound`, `Gone`; `NotKnownYet` while it is found out after a restore what became of it.
        """
        self._require_leading()
        txn = self._ledger.get(gid)
        if txn is None:
            raise self.absent(gid)
        if txn.decision is None and self._is_restored(gid):
            raise being_found_out(gid)
        return txn

    async def enlist(self, gid: str, branch: str, participant: str) -> Transaction:
        """Note that the application works at `participant` as `branch` of its transaction; again is the same.

        Returns once it is applied. Raises what `_to_advance` raises; `Conflict` when the transaction is active no more,
        or the branch is another participant's; `Unprocessable`, `TooMany`; `NotLeader`, `OutcomeUnknown`.
        """
        txn = self._to_advance(gid)
        if is_enlisted(txn, branch, participant):
            return txn
        others = {each.name for each in txn.branches}.union(self._enlisting.get(gid, ())) - {branch}
        if len(others) >= self._limits.max_branches:
            raise Unprocessable(
                f"{gid} has {self._limits.max_branches} branches (max_branches); {branch} was not enlisted",
                code="too_many_branches",
            )
        self._check_participant(participant)
        self._enlisting.setdefault(gid, []).append(branch)
        try:
            applied = await self._proposed(Enlisted(gid=gid, branch=branch, participant=participant), 300)
        finally:
            self._enlisting[gid].remove(branch)
            if not self._enlisting[gid]:
                del self._enlisting[gid]
        match applied.verdict:
            case Verdict.APPLIED | Verdict.UNCHANGED if applied.txn is not None:
                if not is_enlisted(applied.txn, branch, participant):
                    raise NotLeader(f"{branch} was not enlisted: {applied.verdict.value}")
                return applied.txn
            case Verdict.UNKNOWN_PARTICIPANT:
                raise unknown_participant(participant)
            case _:
                raise NotLeader(f"{branch} was not enlisted: {applied.verdict.value}")

    async def seal(self, gid: str, branches: tuple[str, ...]) -> Transaction:
        """The application asks for the commit of its transaction, with the names of its branches; again is the same.

        Returns once it is applied: the transaction is preparing then, or decided, whatever the decision is. Raises what
        `_to_advance` raises; `Conflict` when other branches are enlisted; `NotLeader`, `OutcomeUnknown`.
        """
        txn = self._to_advance(gid)
        if txn.active and not txn.has_branches(branches):
            # Before that is said: a leader that was deposed without knowing it lacks what was enlisted since.
            await self.barrier()
            txn = self._ledger.get(gid) or txn
        if txn.active and txn.has_branches(branches):
            applied = await self._proposed(Sealed(gid=gid, branches=branches), 200 + 70 * len(branches))
            if applied.txn is None:
                raise NotLeader(f"{gid} was not sealed: {applied.verdict.value}")
            txn = applied.txn
        if not txn.has_branches(branches) and txn.decision is not Decision.ABORT:
            raise other_branches(txn)
        return txn

    async def wait_decided(self, gid: str, timeout_s: float) -> None:
        """Return once `gid` is decided in applied state, or after `timeout_s`, or when there is no leader to decide."""
        txn = self._ledger.get(gid)
        if txn is not None and txn.decision is None:
            await self._wait(self._decided_waiters, gid, timeout_s)

    async def wait_ended(self, gid: str, timeout_s: float) -> None:
        """Return once `gid` has ended in applied state, or after `timeout_s`, or when there is no leader to end it."""
        txn = self._ledger.get(gid)
        if txn is not None and txn.ended_at is None:
            running = self._running.get(gid)
            waiting = self._wait(self._ended_waiters, gid, timeout_s)
            if running is not None and isinstance(running.wish, Ended):
                self._send_lazy()
            await waiting

    async def _wait(self, waiters: dict[str, list[asyncio.Future[None]]], gid: str, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        # When it is over, the caller looks at the transaction, whatever it has come to.
        timer = loop.call_later(timeout_s, _done, future)
        waiters.setdefault(gid, []).append(future)
        try:
            await future
        finally:
            timer.cancel()
            rest = waiters.get(gid)
            if rest is not None and future in rest:
                rest.remove(future)
                if not rest:
                    del waiters[gid]

    async def abort(self, gid: str, reason: str, timeout_s: float) -> Transaction:
        """Ask for an abort, and return the transaction with the stored decision, whatever it is.

        Raises what `_to_advance` raises, and `NotKnownYet` when it is not decided in time.
        """
        txn = self._to_advance(gid)
        running = self._running.get(gid)
        if txn.decision is None and running is not None:
            self._note(running, running.tally.asked_to_abort(reason))
            await self.wait_decided(gid, timeout_s)
            txn = self._ledger.get(gid) or txn
        if txn.decision is None:
            raise NotKnownYet(f"the abort of {gid} was asked for and is not decided yet; look again")
        return txn

    async def resolve(self, gid: str, name: str, outcome: Decision, note: str | None) -> Transaction:
        """Note that an operator ends a branch by hand; from then on nothing is owed to it. Again is the same.

        Returns once it is applied. Raises what `_to_advance` raises; `Conflict` when there is nothing to resolve, or it
        was resolved otherwise; `NotBeforeUpgrade`, `NotLeader`, `OutcomeUnknown`.
        """
        txn = self._to_advance(gid)
        if is_resolved(txn, name, outcome, self.tally(gid)):
            return txn
        self._require_level(ENTRY_LEVELS[Resolved], "resolutions by an operator")
        entry = Resolved(gid=gid, branch=name, outcome=outcome, note=note)
        applied = await self._proposed(entry, 200 + len((note or "").encode()))
        if applied.txn is None or not is_resolved(applied.txn, name, outcome, NOTHING_HEARD):
            raise NotLeader(f"{name} was not resolved: {applied.verdict.value}")
        return applied.txn

    async def acknowledge(self, gid: str) -> Transaction:
        """Note that an operator has seen to what was resolved in a transaction. Again is the same.

        Raises what `_to_advance` raises; `Conflict` when nothing was resolved; `NotLeader`, `OutcomeUnknown`.
        """
        txn = self._to_advance(gid)
        if txn.kept:
            applied = await self._proposed(Acknowledged(gid=gid), 60)
            if applied.txn is None or applied.txn.kept:
                raise NotLeader(f"{gid} was not acknowledged: {applied.verdict.value}")
            return applied.txn
        if txn.acknowledged_at is None:
            raise Conflict(
                f"no branch of {gid} was resolved by an operator, so there is nothing to acknowledge",
                code="not_resolved",
            )
        return txn

    async def outcome(self, gid: str) -> Decision:
        """The outcome of `gid`, for a participant in doubt; a leader settles what only it can.

        Raises `NotKnownYet`, `Gone`, `NotFound`, `NotLeader` (another node may know).
        """
        self.require_copy()
        knowledge = self._ledger.knowledge(gid)
        self._revive_participants(gid)
        match knowledge:
            case Knowledge.COMMITTED:
                return Decision.COMMIT
            case Knowledge.ABORTED:
                return Decision.ABORT
            case Knowledge.UNDECIDED:
                raise NotKnownYet(f"{gid} is not decided yet")
            case Knowledge.FORGOTTEN | Knowledge.FOREIGN:
                raise self.absent(gid)
            case Knowledge.ASK_LEADER:
                return await self._settle(gid)
            case Knowledge.LOST:
                raise being_found_out(gid)

    async def _settle(self, gid: str) -> Decision:
        self._require_leading()
        uncertain = self._uncertain(gid)
        if uncertain is not None:
            raise uncertain
        parsed = self._ledger.own_gid(gid)
        if parsed is None or parsed.sequence >= self._next_sequence:
            raise NotFound(f"{gid} has not been given to any transaction")
        entry = Decided(gid=gid, decision=Decision.ABORT, reason="never begun, and asked for by a participant in doubt")
        applied = await self._proposed(entry, 200)
        if applied.txn is None or applied.txn.decision is None:
            raise NotKnownYet(f"{gid} could not be settled: {applied.verdict.value}")
        return applied.txn.decision

    def _revive_participants(self, gid: str) -> None:
        """Who asks for an outcome is alive."""
        running = self._running.get(gid)
        if running is not None:
            for branch in running.txn.branches:
                self._courier.wake(branch.participant)

    def _uncertain(self, gid: str) -> NotKnownYet | None:
        """Why a leader cannot tell whether `gid`, which it does not have, exists: it may have been deposed unawares."""
        parsed = self._ledger.own_gid(gid)
        if parsed is None:
            return None
        if parsed.epoch > self._ledger.epoch:
            return NotKnownYet(f"{gid} is of a later leader than this node has heard of")
        on_its_way = parsed.sequence in self._beginning or parsed.sequence in self._perhaps_begun
        if parsed.epoch == self._numbered and on_its_way:
            return NotKnownYet(f"{gid} is on its way into the log")
        return None

    def absent(self, gid: str) -> Exception:
        """What to say of a gid that is not in the ledger."""
        if self.awaits_copy:
            return self._awaiting_copy()
        uncertain = self._uncertain(gid)
        if uncertain is not None:
            return uncertain
        knowledge = self._ledger.knowledge(gid)
        if knowledge is Knowledge.FORGOTTEN:
            return Gone(f"{gid} has been forgotten, or never was; its retention time is over")
        if knowledge is Knowledge.LOST:
            return being_found_out(gid)
        if knowledge is Knowledge.FOREIGN:
            return NotFound(f"{gid[:100]!r} is not a gid of cluster {self._config.cluster}")
        return NotFound(f"there is no transaction {gid}")

    def read(self, gid: str) -> Transaction:
        """The transaction as applied. Raises `NotFound`, `Gone`; `NotLeader` where this node cannot be sure."""
        txn = self._ledger.get(gid)
        if txn is not None and (txn.decision is not None or self.leading):
            return txn
        self.require_copy()
        knowledge = self._ledger.knowledge(gid)
        if knowledge is not Knowledge.FOREIGN:
            # A follower may be behind: what it does not know yet the leader may.
            self._require_leading()
        raise self.absent(gid)

    async def register(self, name: str, url: str, *, batch: bool) -> Participant:
        """Register a participant, or say that it has moved or come back. Raises `NotLeader`, `TooMany`."""
        self._require_leading()
        if name not in self._ledger.participants and len(self._ledger.participants) >= self._limits.max_participants:
            raise TooMany(
                f"{self._limits.max_participants} participants are registered (max_participants)",
                code="too_many_participants",
            )
        applied = await self._proposed(Registered(name=name, url=url, batch=batch), 1300)
        if applied.verdict is not Verdict.APPLIED:
            raise NotLeader(f"{name} was not registered: {applied.verdict.value}")
        return self._ledger.participants[name]

    async def unregister(self, name: str) -> None:
        """Give up a participant's name. Raises `NotFound`, `Conflict` while it is in use, `NotLeader`."""
        self._require_leading()
        if name not in self._ledger.participants:
            raise NotFound(f"no participant {name} is registered")
        lost = self._ledger.lost
        if lost is not None and name not in lost.without:
            raise Conflict(
                f"{name} may be the only one that knows what became of a transaction, and is asked after the restore; "
                f"it stays registered until all is found out. If it is gone: `outlast restore --without {name}`",
                code="being_found_out",
            )
        applied = await self._proposed(Unregistered(name=name), 200)
        match applied.verdict:
            case Verdict.APPLIED | Verdict.UNCHANGED:
                return
            case Verdict.IN_USE:
                raise Conflict(f"{name} takes part in {applied.detail}, which has not ended; it stays registered")
            case _:
                raise NotLeader(f"{name} was not unregistered: {applied.verdict.value}")

    async def barrier(self) -> None:
        """Return once this node has certainly led at a moment after the call: all that was told before it is applied.

        Raises `NotLeader`, also when the log does not answer in time; nothing was done either way.
        """
        self._require_leading()
        try:
            applied = await self._proposed(TookOver(node=self._config.node), 100)
        except OutcomeUnknown as error:
            # Of its own claim to an epoch that it has, nothing is left to do or to undo.
            raise NotLeader("the log did not say in time whether this node still leads; nothing was done") from error
        if applied.verdict is not Verdict.APPLIED:
            raise NotLeader(f"this node leads no more: {applied.verdict.value}")

    def leadership_change(self) -> asyncio.Future[None]:
        """Done once something about leadership has changed; whoever no longer waits for it cancels it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leadership_waiters.add(future)
        future.add_done_callback(self._leadership_waiters.discard)
        return future

    async def leadership_changed(self, timeout_s: float) -> None:
        """Return when something about leadership has changed, or after `timeout_s`."""
        with suppress(TimeoutError):  # asked for: the caller looks again either way
            await asyncio.wait_for(self.leadership_change(), timeout_s)

    def _require_leading(self) -> None:
        if self._draining:
            raise ShuttingDown("this node is stopping, and begins nothing new; nothing was done")
        if self._epoch is None:
            raise NotLeader("this node does not lead")

    def _require_level(self, level: int, what: str) -> None:
        """To be called before anything of that level is proposed. Raises `NotBeforeUpgrade`.

        what: names it, for people, in the plural: "application transactions".
        """
        if self._ledger.level >= level:
            return
        behind = [
            f"{node} is not connected" if known is None else f"{node} announces level {known}"
            for node, known in sorted(self._log.understands().items())
            if known is None or known < level
        ]
        raise NotBeforeUpgrade(
            f"{what} need level {level}, and this cluster works at level {self._ledger.level}: "
            + (", ".join(behind) or "it is about to rise")
            + "; nothing was done. Try again when every node runs the newer software, and none is held back by "
            "compatibility.highest_level"
        )

    # -------------------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Begin to take part."""
        self._ledger.on_applied = self.applied
        self._ledger.on_restored = self.restored
        await self._log.start(self._ledger, self._leadership)
        self._house.note_restore()  # its snapshot may tell of one
        self._housekeep()

    async def drain(self) -> None:
        """Begin nothing new, and hand leadership over if another node can take it."""
        self._draining = True
        if self._log.leadership().is_leader:
            handed_over = await self._log.transfer()
            _log.info("leadership %s", "handed over" if handed_over else "could not be handed over")

    async def stop(self) -> None:
        """Say nothing more, and let go of the log."""
        self._draining = self._stopped = True
        self._step_down()
        self._cancel_timers()
        for timer in (self._housekeeper, self._leaderless):
            if timer is not None:
                timer.cancel()
        await self._courier.close()
        await self._log.stop()

    # -------------------------------------------------------------------------------------------- leadership

    def _leadership(self, leadership: Leadership) -> None:
        if self._epoch is not None and not (leadership.is_leader and self._epoch_of(leadership.term) == self._epoch):
            self._step_down()
        if leadership.is_leader and self._claimed != leadership.term:
            self._claim(leadership.term)
        if not leadership.is_leader:
            self._claimed = None
        self._metrics.leader.set(1 if leadership.is_leader else 0)
        if leadership.leader is None:
            self._wait_for_leader()
        elif self._leaderless is not None:
            self._leaderless.cancel()
            self._leaderless = None
        self._wake_leadership_waiters()

    def _wait_for_leader(self) -> None:
        if self._leaderless is None and not self._stopped:
            self._leaderless = asyncio.get_running_loop().call_later(LEADERLESS_S, self._end_waits)

    def _end_waits(self) -> None:
        """This node is alone: what it waits for may come to pass elsewhere, and nobody would tell it."""
        for waiters in (self._decided_waiters, self._ended_waiters):
            for gid in list(waiters):
                _resolve(waiters, gid)
        self._leaderless = None
        self._wait_for_leader()

    def _wake_leadership_waiters(self) -> None:
        waiters, self._leadership_waiters = self._leadership_waiters, set()
        for future in waiters:
            if not future.done():
                future.set_result(None)

    def _epoch_of(self, term: int) -> int:
        """What the ledger calls the reign of that term's leader."""
        return self._ledger.epoch_base + term

    def _claim(self, term: int) -> None:
        """Propose the barrier. Its application, in `applied`, is where driving starts."""
        leadership = self._log.leadership()
        if not leadership.is_leader or leadership.term != term or self._stopped:
            return
        self._claimed = term
        entries: list[Entry] = [TookOver(node=self._config.node)]
        level = self._understood()
        if level > self._ledger.level:
            entries.append(Raised(level=level))  # it costs nobody a round of its own; if it was raised before, nothing
        future = self._log.propose(
            encode_command(Header(epoch=self._epoch_of(term), at=self._clock.wall_ms()), entries)
        )
        future.add_done_callback(lambda done: self._claim_done(term, done))

    def _claim_done(self, term: int, done: asyncio.Future[object]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is not None and self._epoch != self._epoch_of(term) and self._claimed == term:
            _log.warning("taking over as leader of term %d: %s; trying again", term, error)
            self._later(RETRY_PROPOSAL_S, self._claim_again, term)

    def _claim_again(self, term: int) -> None:
        if self._epoch != self._epoch_of(term) and self._claimed == term:
            self._claim(term)

    def _take_over(self, epoch: int) -> None:
        """Past the barrier: all that was committed before is applied. Finish what is unfinished."""
        leadership = self._log.leadership()
        if self._stopped or not leadership.is_leader or self._epoch_of(leadership.term) != epoch:
            return
        self._epoch = epoch
        if self._numbered != epoch:
            self._numbered, self._next_sequence, self._last_begun = epoch, 0, -1
            self._perhaps_begun.clear()
        self._reigns += 1
        unfinished = list(self._ledger.unfinished.items())
        _log.info("node %s leads epoch %d; %d transactions to finish", self._config.node, epoch, len(unfinished))
        for number, txn in unfinished:
            self._floors.name(number, txn.branches)
        for _, txn in unfinished:
            self._adopt(txn)
        self._look_at_levels()
        self._wake_leadership_waiters()

    def _understood(self) -> int:
        """The level that every node is known to understand now, as far as the operator lets the cluster rise."""
        return min(
            self._config.compatibility.announced, *(known or OLDEST for known in self._log.understands().values())
        )

    def _look_at_levels(self) -> None:
        """Raise the cluster's level once every node understands a higher one."""
        if self._epoch is None or self._ledger.level >= self._config.compatibility.announced:
            return
        level = self._understood()
        if level > self._ledger.level and not self._raising:
            self._raising = True
            self._proposed(Raised(level=level), 20).add_done_callback(self._raised)
        self._later(LOOK_AT_LEVELS_S, self._look_at_levels)

    def _raised(self, done: asyncio.Future[Applied]) -> None:
        self._raising = False
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.info("raising the cluster's level is tried again: %s", error)

    def _step_down(self) -> None:
        """Forget all soft state. What was decided will be said by the next leader."""
        self._empty_outbox()
        if self._epoch is None:
            return
        _log.info("node %s no longer leads epoch %d", self._config.node, self._epoch)
        self._epoch = None
        self._cancel_timers()
        self._courier.clear()
        self._deadlines.clear()
        self._running.clear()
        self._released.clear()
        self._undecided = 0
        self._under_way = 0
        self._house.step_down()
        self._perhaps_begun |= self._beginning
        self._beginning.clear()
        self._floors.clear()

    def _empty_outbox(self) -> None:
        """What has not been proposed by now never is: whoever waits for it is told so."""
        waiting, self._outbox, self._lazy = [*self._outbox, *self._lazy], deque(), []
        for item in waiting:
            if item.future is not None and not item.future.done():
                _fail(item.future, NotLeader("this node lost its leadership; nothing was logged"))

    # -------------------------------------------------------------------------------------------- applied entries

    def applied(self, results: list[Applied]) -> None:
        """Every entry that the ledger has applied comes through here, on every node, in log order."""
        for result in results:
            entry, txn = result.entry, result.txn
            if type(entry) is Begun or type(entry) is Opened:
                self._has_begun(entry, result)
            if result.verdict is not _APPLIED:
                self._settle_wish(result)
                continue
            match entry:
                case Begun() | Decided() | Ended() if txn is not None:  # nearly always
                    self._advanced(txn)
                case TookOver():
                    claimed = None if self._claimed is None else self._epoch_of(self._claimed)
                    if entry.node == self._config.node and self._ledger.epoch == claimed:
                        # A TookOver whose fate was unknown was proposed again: it starts the epoch only once.
                        if self._epoch != claimed:
                            self._take_over(self._ledger.epoch)
                    elif self._epoch is not None:
                        self._step_down()
                case CopyInstalled():
                    self._installed()
                case Reconciled() if txn is None:
                    self._dropped(entry.gid)
                case Registered():
                    if self._epoch is not None and entry.name in self._ledger.participants:
                        self._courier.moved(self._ledger.participants[entry.name])
                case Raised():
                    _log.info("this cluster works at level %d from here on", self._ledger.level)
                case Resolved() if txn is not None:
                    self._resolved(entry, txn)
                case Unregistered():
                    self._floors.forget(entry.name)
                    self._courier.forget(entry.name)
                case _:
                    if txn is not None:
                        self._advanced(txn)

    def _resolved(self, entry: Resolved, txn: Transaction) -> None:
        _log.warning(
            "an operator resolves branch %s of %s by hand: %s; the decision is %s",
            entry.branch,
            entry.gid,
            entry.outcome,
            txn.decision,
        )
        for branch in txn.branches:
            if branch.name == entry.branch:
                self._courier.withdraw(branch.participant, entry.gid, entry.branch)
        self._advanced(txn)

    def restored(self) -> None:
        """A snapshot has taken the place of the ledger's state: whoever waits may have been passed by."""
        self._step_down()  # a leader is never behind; should it be, what it drives is not what is
        self._house.note_restore()
        for waiters in (self._decided_waiters, self._ended_waiters):
            for gid in list(waiters):
                txn = self._ledger.get(gid)
                if txn is None or (txn.decision if waiters is self._decided_waiters else txn.ended_at) is not None:
                    _resolve(waiters, gid)
        self._wake_leadership_waiters()

    def _installed(self) -> None:
        """A copy has become the state, and epochs have a new base: whoever leads takes over anew."""
        self._step_down()
        self._house.note_restore()
        self._released.clear()
        leadership = self._log.leadership()
        if leadership.is_leader:
            self._claim(leadership.term)
        self._wake_leadership_waiters()

    def _dropped(self, gid: str) -> None:
        """Nobody knows how it ended, and it has left the ledger."""
        running = self._running.pop(gid, None)
        if running is not None:
            self._undecided -= 1
            self._floors.closed(self._number(running.txn))
            self._deadlines.cancel(gid)
            # It may have been released, and its participants asked to prepare it.
            self._released.discard(gid)
            for branch in running.txn.branches:
                self._courier.withdraw(branch.participant, gid, branch.name)
        _resolve(self._decided_waiters, gid)
        _resolve(self._ended_waiters, gid)

    def _advanced(self, txn: Transaction) -> None:
        if txn.decision is not None:
            _resolve(self._decided_waiters, txn.gid)
            if txn.ended_at is not None:
                _resolve(self._ended_waiters, txn.gid)
        if self._epoch is None:
            return
        running = self._running.get(txn.gid)
        if running is None:
            if txn.ended_at is None:
                self._floors.name(self._number(txn), txn.branches)
                self._adopt(txn)
            return
        if running.txn.active:
            self._active_advanced(running.txn, txn)
        just_sealed = running.txn.active and not txn.active and txn.decision is None
        just_decided = running.txn.decision is None and txn.decision is not None
        if just_decided:
            self._undecided -= 1
            self._metrics.decided(txn)
        running.txn, running.wish = txn, None
        if txn.ended_at is not None:
            del self._running[txn.gid]
            self._deadlines.cancel(txn.gid)
            return
        if just_decided or just_sealed:
            self._perform(running)
        self._consider(running)

    def _active_advanced(self, before: Transaction, txn: Transaction) -> None:
        number = self._number(txn)
        self._floors.name(number, txn.branches[len(before.branches) :])
        if not txn.active:
            self._floors.closed(number)

    def _number(self, txn: Transaction) -> int:
        number = Gid.number_in(self._config.cluster, txn.gid)
        assert number is not None, "it is applied"
        return number

    def _has_begun(self, entry: Beginning, result: Applied) -> None:
        """A Begun, or an Opened, is in the log, whatever it did there: it is not on its way any more."""
        gid = self._ledger.own_gid(entry.gid)
        if gid is not None and gid.epoch == self._numbered:
            self._beginning.discard(gid.sequence)
            self._perhaps_begun.discard(gid.sequence)
            if result.verdict is _APPLIED:
                self._last_begun = max(self._last_begun, gid.sequence)

    def _settle_wish(self, result: Applied) -> None:
        """An entry changed nothing. If it was our wish, look at the transaction as it is now."""
        gid = getattr(result.entry, "gid", None)
        running = None if gid is None else self._running.get(gid)
        if running is not None and running.wish == result.entry:
            running.wish = None
            self._consider(running)

    def _adopt(self, txn: Transaction) -> None:
        """Drive this transaction from here on."""
        running = self._running[txn.gid] = _Running(txn)
        if txn.decision is None:
            self._undecided += 1
            self._metrics.begun.inc()
        if txn.active:
            self._floors.opened(self._number(txn))
        if self._is_held(txn):
            return
        self._perform(running)
        self._consider(running)

    def _is_held(self, txn: Transaction) -> bool:
        """Whether it may have been decided after the copy was made that this cluster was restored from.

        Its participants are asked what they know before anybody is asked to prepare: see `reconcile.py`.
        """
        return txn.decision is None and self._is_restored(txn.gid) and txn.gid not in self._released

    def _is_restored(self, gid: str) -> bool:
        """Whether it is older than a restore that is not reconciled yet."""
        lost = self._ledger.lost
        parsed = None if lost is None else self._ledger.own_gid(gid)
        return parsed is not None and lost is not None and parsed.number in lost

    def release(self, gid: str) -> None:
        """A transaction that was held goes the normal way: but for its deadline, which may have been met."""
        running = self._running.get(gid)
        if running is None or not self._is_held(running.txn):
            return
        self._released.add(gid)
        self._perform(running)
        self._consider(running)

    @property
    def awaits_copy(self) -> bool:
        """Whether this cluster was made anew, and has not been given what it is to go on from.

        Of gids it has never heard of it would say that they are aborted, and they may be committed.
        """
        return self._config.generation > 1 and not self._ledger.epoch_base

    def require_copy(self) -> None:
        """Raises `AwaitingCopy` where nothing can be said about any transaction."""
        if self.awaits_copy:
            raise self._awaiting_copy()

    def _awaiting_copy(self) -> AwaitingCopy:
        return AwaitingCopy(
            f"this is generation {self._config.generation} of the cluster {self._config.cluster}, and it waits for "
            "the copy that it is to go on from: `outlast restore FILE` (docs/RECOVERY.md); nothing was done"
        )

    def require_restorable(self) -> None:
        """Raises `NotLeader`, `NotBeforeUpgrade`, and `NotEmpty` when there has been a transaction."""
        self._require_leading()
        self._require_level(2, "restores")
        if not self._ledger.is_fresh:
            raise NotEmpty(
                "this cluster has had transactions, and a copy never takes the place of any; nothing was done. Restore "
                "into a new cluster of the same name (docs/RECOVERY.md)"
            )

    async def log(self, entry: RestoreEntry | Enlisted, size: int) -> Applied:
        """What came of an entry of a restore, or of what follows one. Raises `NotLeader`, `OutcomeUnknown`, ..."""
        self._require_leading()
        self._require_level(2, "restores")
        return await self._proposed(entry, size)

    def _perform(self, running: _Running) -> None:
        txn = running.txn
        expires_s: float | None = None
        for effect in PROTOCOLS[txn.protocol].owed(txn):
            match effect:
                case Send(participant=name, message=message):
                    participant = self._ledger.participants.get(name)
                    if participant is None:
                        _log.critical("%s is owed to %s, which is not registered", txn.gid, name)
                        continue
                    expires = expires_s if type(message) is Prepare else None
                    self._courier.send(participant, message, expires_s=expires)
                case SetDeadline() if self._is_restored(txn.gid):
                    pass  # it may have been committed long ago: only its participants can tell
                case SetDeadline():
                    # A date of another node's clock becomes a duration here, and never a longer one than was asked for.
                    left_ms = min(max(0, effect.at - self._clock.wall_ms()), txn.timeout_ms)
                    expires_s = self._clock.monotonic_s() + left_ms / 1000
                    self._deadlines.set(txn.gid, expires_s)
                case Reply():
                    self._deadlines.cancel(txn.gid)

    # -------------------------------------------------------------------------------------------- soft state

    def _stamp(self, participant: str) -> Stamp:
        """What letters to `participant` say of this leader; the floor only rises, because unfinished numbers do."""
        number = self._floors.floor(participant)
        if number is None or self._ledger.lost is not None:
            floor = None  # after a restore, what it would drop may be the only trace of a commit
        else:
            floor = str(Gid.of_number(self._config.cluster, number))
        return Stamp(epoch=self._epoch or 0, floor=floor, coordinators=self._coordinators)

    def _heard(self, answers: list[Answer]) -> None:
        for answer in answers:
            running = self._running.get(answer.gid)
            if running is not None:
                self._note(running, running.tally.heard(answer))

    def _expired(self, gids: list[str]) -> None:
        for gid in gids:
            running = self._running.get(gid)
            if running is not None:
                running.expired = True
                self._consider(running)

    def _note(self, running: _Running, tally: Tally) -> None:
        if tally is not running.tally:
            running.tally = tally
            self._consider(running)

    def _consider(self, running: _Running) -> None:
        """Propose what `decide` wishes, unless it is on its way already."""
        if running.wish is not None:
            return
        txn = running.txn
        entry = PROTOCOLS[txn.protocol].decide(txn, running.tally, expired=running.expired)
        if entry is None:
            return
        running.wish = entry
        if isinstance(entry, Ended) and txn.gid not in self._ended_waiters:
            self._lazy.append(_Waiting(entry, 40))
            if self._lazy_timer is None:
                self._lazy_timer = self._later(ENDED_WAITS_S, self._send_lazy)
        else:
            results = sum(len(vote.result or b"") for vote in entry.votes) if isinstance(entry, Decided) else 0
            self._enqueue(_Waiting(entry, 200 + 60 * len(txn.branches) + results))

    # -------------------------------------------------------------------------------------------- proposing

    def _proposed(self, entry: Entry, size: int) -> asyncio.Future[Applied]:
        """What comes of `entry`. A `NotLeader` at once where leadership was lost, if only a moment ago.

        Else it would wait until this node leads again, and then be proposed under another epoch than it was meant for.
        """
        future: asyncio.Future[Applied] = asyncio.get_running_loop().create_future()
        if self._epoch is None:
            _fail(future, NotLeader("this node has lost its leadership; nothing was logged"))
        else:
            self._enqueue(_Waiting(entry, size, future))
        return future

    def _enqueue(self, item: _Waiting) -> None:
        self._outbox.append(item)
        self._schedule_flush()

    def _later(self, delay_s: float, work: Callable[..., None], *arguments: object) -> asyncio.TimerHandle:
        """Call `work` then, unless leadership is lost before."""

        def due() -> None:
            self._timers.discard(timer)
            work(*arguments)

        timer = asyncio.get_running_loop().call_later(delay_s, due)
        self._timers.add(timer)
        return timer

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._lazy_timer = None

    def _send_lazy(self) -> None:
        if self._lazy_timer is not None:
            self._lazy_timer.cancel()
            self._timers.discard(self._lazy_timer)
            self._lazy_timer = None
        if self._lazy:
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled and self._under_way < COMMANDS_UNDER_WAY:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_or_wait, 0, TURNS_FOR_COMPANY)

    def _flush_or_wait(self, before: int, turns: int) -> None:
        """Flush, unless there is more than `before`, and one of `turns` left to look for still more."""
        waiting = len(self._outbox)
        if turns and waiting > before:
            asyncio.get_running_loop().call_soon(self._flush_or_wait, waiting, turns - 1)
        else:
            self._flush()

    def _flush(self) -> None:
        """Everything that waits becomes one command, up to the bound on its size."""
        self._flush_scheduled = False
        if self._epoch is None or not (self._outbox or self._lazy):
            return
        items: list[_Waiting] = []
        size = 0
        for queue in (self._outbox, self._lazy):
            # One entry always goes, however large: the limits keep it well below what the log takes.
            while queue and (not items or size + queue[0].size <= self._limits.max_command_bytes):
                item = queue.popleft() if isinstance(queue, deque) else queue.pop()
                size += item.size
                items.append(item)
        header = Header(epoch=self._epoch, at=self._clock.wall_ms())
        self._under_way += 1
        self._metrics.command_entries.observe(len(items))
        reign = self._reigns
        future = self._log.propose(encode_command(header, [item.entry for item in items]))
        future.add_done_callback(lambda done: self._flushed(items, reign, done))
        if self._outbox:
            self._schedule_flush()

    def _flushed(self, items: list[_Waiting], reign: int, done: asyncio.Future[object]) -> None:
        present = reign == self._reigns and self._epoch is not None
        if present:
            self._under_way -= 1
        if self._outbox or (self._lazy and self._lazy_timer is None):
            self._schedule_flush()
        error = None if done.cancelled() else done.exception()
        results = done.result() if error is None and not done.cancelled() else None
        if isinstance(results, list) and len(results) == len(items):
            for item, result in zip(items, results, strict=True):
                if item.future is not None and not item.future.done():
                    item.future.set_result(result)
            return
        self._failed(items, error, present=present)

    def _failed(self, items: Iterable[_Waiting], error: BaseException | None, *, present: bool) -> None:
        definite = isinstance(error, NotProposed)
        if error is not None and not isinstance(error, NotProposed | ProposalUnknown):
            _log.error("the log failed a proposal in a way that it does not promise", exc_info=error)
        again: list[str] = []
        for item in items:
            if present and isinstance(item.entry, Begun | Opened):
                self._has_no_answer(item.entry, definite=definite)
            if item.future is not None:
                if not item.future.done():
                    _fail(
                        item.future,
                        NotLeader("the log did not take it; nothing was done")
                        if definite
                        else OutcomeUnknown(
                            "the log did not say in time whether it took this; it may have been done. Ask again with "
                            "the same Idempotency-Key"
                        ),
                    )
            else:
                again.append(getattr(item.entry, "gid", ""))
        if again and present:
            self._later(RETRY_PROPOSAL_S, self._wish_again, again)

    def _has_no_answer(self, entry: Beginning, *, definite: bool) -> None:
        gid = self._ledger.own_gid(entry.gid)
        if gid is not None and gid.sequence in self._beginning:
            self._beginning.discard(gid.sequence)
            if not definite:
                self._perhaps_begun.add(gid.sequence)

    def _wish_again(self, gids: list[str]) -> None:
        for gid in gids:
            running = self._running.get(gid)
            if running is not None:
                running.wish = None
                self._consider(running)

    def _housekeep(self) -> None:
        if self._perhaps_begun:
            # What has not begun before a later one never will: the ledger begins transactions in order.
            self._perhaps_begun = {one for one in self._perhaps_begun if one > self._last_begun}
        self._housekeeper = asyncio.get_running_loop().call_later(self._house.round(), self._housekeep)


def _fail(future: asyncio.Future[Applied], error: Exception) -> None:
    """Whoever asked may be gone in this same moment, as when the node stops: then nobody is left to be told."""
    future.set_exception(error)
    future.exception()  # else asyncio would report it with a traceback, as if it had been overlooked


def _beginning(gid: str, new: NewTransaction) -> Beginning:
    if new.active:
        return Opened(gid=gid, protocol=new.protocol, timeout_ms=new.timeout_ms, key=new.key, body_hash=new.body_hash)
    return Begun(
        gid=gid,
        protocol=new.protocol,
        branches=new.branches,
        timeout_ms=new.timeout_ms,
        key=new.key,
        body_hash=new.body_hash,
    )


def _resolve(waiters: dict[str, list[asyncio.Future[None]]], gid: str) -> None:
    for future in waiters.pop(gid, ()):
        _done(future)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
