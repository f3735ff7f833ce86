"""Databases that know prepared transactions, as resource managers: what PostgreSQL and MariaDB have in common.

A branch is one transaction of the database, under a name that is computed from its gid and its own name. The database
keeps it when it is prepared, through kill -9, with all of its locks. What it does *not* keep is an answer to "what
became of it": a name that it no longer lists may have been committed, rolled back, or never have been prepared; worse,
it may be prepared a moment later, by a connection whose client died. Two small tables in the same database settle that:

    outlast_branches   primary key (cluster, number, branch): at most one row per branch
      a marker         state committed; inserted by the branch's own transaction as its last change, so it can be seen
                       exactly when the branch is committed
      a tombstone      state aborted; inserted in a transaction of its own. A late prepare hits the key and fails; and
                       while a zombie (a transaction that nobody waits for) holds the key, no tombstone can be inserted,
                       and no abort is acknowledged
      a read-only row  state read_only; saves running the work again
    outlast_horizons   per cluster, what its messages have taught (see `resource`)

So whoever looks (the list of prepared transactions first, the row next) knows for sure: a row says what it says; a
listed name is prepared; neither means unknown, and becomes aborted by the tombstone that fences it.

What must be durable before what (`resource` says why):
- a vote prepared: the database's own prepare, which covers the marker: nothing else is written for it
- an ack of a commit: the database's own commit; the marker becomes visible with it
- a vote no, an ack of an abort: the tombstone
- an answer to a message of a new epoch: the epoch
- a pruned row: the floor that allowed it, saved at least one round (`prune_every_s`) earlier. The round's length is
  above every statement's, so that no marker's insert that began under the older floor is still on its way

What was seen is remembered, so that nothing is looked up on the way of a branch that goes well: the rounds that it
takes are begin, its own statements, marker and prepare in one, and the commit.

The reserved operation `outlast.enlisted` runs no work: an application has prepared the branch on a connection of its
own, under the branch's name and with the marker in it. The branch is prepared if it is listed, and refused otherwise.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

from coordinator.codec import Malformed, json_value
from coordinator.protocol.messages import (
    Abort,
    Acked,
    Answer,
    Commit,
    Contradicted,
    Gid,
    Prepare,
    Refused,
    Request,
    Stamp,
    Vote,
)
from participants.manager import BranchId, Envelope, InDoubt, Known, KnownBranch, Unavailable
from participants.resource import Branch, Horizon, State, Step, Work, finish, observe, receive

_log = logging.getLogger(__name__)

ENLISTED_OP: Final = "outlast.enlisted"
"""The operation of a branch that its application has prepared by itself."""

NOT_ENLISTED: Final = "not_enlisted"
"""Why such a branch is refused when it is not prepared."""

OWN_PREFIX: Final = "outlast_"
"""Of the tables that are not for operations."""

NUMBER_LIMIT: Final = 2**63
"""Above every number of a gid that fits into a signed column of 64 bits."""

_LOOKS: Final = 4
"""How often a branch is looked at, for one message, when it changes under the hands of whoever looks."""

_PRUNE_STEPS: Final = 16
"""Deletes per cluster and round."""

_UNHEARD: Final = Branch()


class Unfit(Exception):
    """The database cannot be used as it is set up. The text names the setting or the statement that helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSettings:
    """Limits of one database with prepared transactions. Times in seconds.

    work_connections: branches that work at the same time; the next ones wait.
    finish_connections: kept for commits, aborts and records, so that a commit never waits for a branch whose lock it
        would release.
    acquire_within_s: how long a branch waits for a connection; then it is refused as `busy`, retryable.
    connect_within_s: of one attempt to connect; then nothing is known.
    work_within_s: of one operation; then it is refused as `too_slow`, retryable.
    lock_within_s: for one lock; then it is refused as `locked`, retryable. Below the coordinator's deadline: no
        database sees a deadlock that spans two of them.
    statement_within_s: of one statement.
    prune_every_s: between two rounds of saving the floor and forgetting what is below it.
    pruned_at_once: rows forgotten in one transaction.
    remembered_limit: branches remembered, to spare looking them up.
    result_limit_bytes: of one branch; above it is refused.
    """

    work_connections: int = 32
    finish_connections: int = 16
    acquire_within_s: float = 2.0
    connect_within_s: float = 5.0
    work_within_s: float = 5.0
    lock_within_s: float = 2.0
    statement_within_s: float = 4.0
    prune_every_s: float = 5.0
    pruned_at_once: int = 1000
    remembered_limit: int = 100_000
    result_limit_bytes: int = 32 * 1024

    def __post_init__(self) -> None:
        for each in fields(self):
            assert getattr(self, each.name) > 0, f"{each.name} must be positive"
        assert self.lock_within_s < self.statement_within_s, "a statement may wait for a lock, and still has to end"
        assert self.statement_within_s < self.work_within_s, "an operation is some statements"
        assert self.statement_within_s < self.prune_every_s, "a marker's insert must not outlast a round"


class PreparedDatabase(ABC):
    """One database. Every method raises `Unavailable` when it cannot say what happened; none of them is a vote then."""

    @abstractmethod
    async def open(self) -> None:
        """Connects, checks the settings, creates what is missing. Raises `Unfit`."""

    @abstractmethod
    async def close(self) -> None:
        """Gives all connections up; also when `open` failed."""

    @abstractmethod
    def unfit(self, gid: Gid, branch: str) -> str | None:
        """Why no branch of this name can ever be prepared here; None if it can. Pure: always the same answer."""

    @abstractmethod
    async def look(self, gid: Gid, branch: str) -> Branch:
        """What is certainly true now: the list of prepared transactions is read first, the row next.

        A prepared branch hides its marker, so its result may be missing. One that is prepared although its tombstone is
        there has left out its marker: no vote stands for it, so it is rolled back.
        """

    @abstractmethod
    async def work(self, message: Prepare, gid: Gid, within_s: float) -> Vote | None:
        """Runs the operation, and leaves the branch prepared with its marker, or done with a read-only row, or undone.

        None: the key is taken, so there is something to look at. `Refused` leaves no row yet: `bury` is the next.
        """

    @abstractmethod
    async def commit(self, gid: Gid, branch: str) -> bool:
        """Commits a prepared branch. False: there is none of this name any more."""

    @abstractmethod
    async def roll_back(self, gid: Gid, branch: str) -> bool:
        """Rolls a prepared branch back. False: there is none of this name any more."""

    @abstractmethod
    async def bury(self, gid: Gid, branch: str, record: Branch) -> bool:
        """Stores a tombstone, durably, over nothing or over a read-only row.

        False: another row is there, or a transaction that has not ended holds the key.
        """

    @abstractmethod
    async def fence(self, gid: Gid, branch: str) -> None:
        """Ends every connection that may still work on the branch, and was not told to stop by `work`."""

    @abstractmethod
    async def prepared(self) -> Sequence[InDoubt]:
        """All prepared branches that are certainly ours, oldest first."""

    @abstractmethod
    async def known(self, gids: Sequence[Gid]) -> Sequence[KnownBranch]:
        """Every branch of these transactions that is prepared or has a row; the list is read first, the rows next."""

    @abstractmethod
    async def load(self) -> tuple[Mapping[str, Horizon], Mapping[str, int]]:
        """Per cluster: the horizon that was saved, and the highest number among rows and prepared branches."""

    @abstractmethod
    async def save(self, horizons: Mapping[str, Horizon]) -> None:
        """Stores horizons, durably; what is stored only ever rises."""

    @abstractmethod
    async def prune(self, cluster: str, above: int, below: int, at_most: int) -> int:
        """Deletes rows with `above <= number < below`, oldest first; how many. Need not be durable by itself."""


class PreparedManager:
    """The resource manager of one such database. `open` raises `Unfit` and `Unavailable`.

    Two managers on one database do each other no harm, but double the work: use one.
    """

    batch_limit: int = 1
    batches_at_once: int = 8192
    """Above the server's limit of what waits: a commit must never queue behind branches that wait for its locks."""

    def __init__(self, database: PreparedDatabase, settings: PreparedSettings) -> None:
        self._database = database
        self._settings = settings
        self._memory = _Memory(settings.remembered_limit)
        self._horizons: dict[str, Horizon] = {}
        self._saved: dict[str, Horizon] = {}
        self._pruned_below: dict[str, int] = {}
        self._saving = asyncio.Lock()
        self._rounds: asyncio.Task[None] | None = None

    # --------------------------------------------------------------------------------------------- ResourceManager

    async def open(self) -> Sequence[InDoubt]:
        """Connects, and finds the prepared branches."""
        await self._database.open()
        horizons, highest = await self._database.load()
        self._saved, self._horizons = dict(horizons), dict(horizons)
        self._memory.distrust(highest)
        found = await self._database.prepared()
        self._rounds = asyncio.get_running_loop().create_task(self._go_round())
        return found

    async def handle(self, batch: Sequence[Envelope]) -> Sequence[Answer]:
        """The answers. Raises `Unavailable`; the branch is then looked up when it is asked about again."""
        return [await self._answer(envelope) for envelope in batch]

    async def in_doubt(self) -> Sequence[InDoubt]:
        """The prepared branches, oldest first; those that this process knows nothing of included."""
        found = await self._database.prepared()
        self._memory.listed(found)
        return found

    async def known(self, gids: Sequence[str]) -> Known:
        """What there is on record of some transactions of one cluster."""
        parsed = [gid for gid in map(Gid.parse, gids) if gid is not None]
        found = await self._database.known([gid for gid in parsed if gid.number < NUMBER_LIMIT])
        horizon = self._horizons.get(parsed[0].cluster, Horizon()) if parsed else Horizon()
        return Known(branches=tuple(found), epoch=horizon.epoch, floor=horizon.floor)

    async def close(self) -> None:
        """Saves what was learned, and gives the connections up."""
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.wait([self._rounds])
            try:
                await self._save_horizons()
            except Unavailable as error:
                _log.warning("the floor is not saved, so some records are kept for longer: %s", error)
        await self._database.close()

    # --------------------------------------------------------------------------------------------- one message

    async def _answer(self, envelope: Envelope) -> Answer:
        message, stamp = envelope
        gid = Gid.parse(message.gid)
        assert gid is not None, "the server checks what it takes"
        why = self._database.unfit(gid, message.branch)
        if why is not None:
            return _unfit(message, why)
        horizon = observe(self._horizons.get(gid.cluster, Horizon()), message.gid, stamp)
        self._horizons[gid.cluster] = horizon
        try:
            if horizon.epoch > self._saved.get(gid.cluster, Horizon()).epoch:
                await self._save_horizons(epoch_of=gid.cluster)
            return await self._settle(gid, envelope, horizon)
        except BaseException:
            self._memory.doubt(gid, envelope.id)
            raise

    async def _settle(self, gid: Gid, envelope: Envelope, horizon: Horizon) -> Answer:
        message, stamp = envelope
        known, looked = self._memory.recall(envelope.id), False
        if known is None and type(message) is Prepare and not _enlisted(message):
            known = _UNHEARD if self._memory.is_new(gid) else None
        for _ in range(_LOOKS):
            if known is None:
                known, looked = await self._database.look(gid, message.branch), True
            told = receive(known, horizon, message, stamp)
            if looked and known.state is State.UNKNOWN and told.branch != known and not _enlisted(message):
                # Nobody here works on it. A connection that still does is one whose client is gone.
                await self._database.fence(gid, message.branch)
            step = await self._perform(gid, envelope, known, told)
            if step is not None:
                assert step.answer is not None, "whatever had to be waited for is over"
                self._memory.remember(gid, envelope.id, step.branch)
                if isinstance(message, Commit) and isinstance(step.answer, Contradicted):
                    _log.error(
                        "ALARM: branch %s of %s is to be committed, but it is %s; has somebody ended it by hand?",
                        message.branch,
                        message.gid,
                        step.answer.state,
                    )
                return step.answer
            known = None
        raise Unavailable(f"branch {message.branch} of {message.gid} is held by a transaction that could not be ended")

    async def _perform(self, gid: Gid, envelope: Envelope, known: Branch, step: Step) -> Step | None:
        """Does what `step` asks for. None: `known` was wrong, look again."""
        database, message = self._database, envelope.message
        match step.work:
            case Work.RUN:
                assert isinstance(message, Prepare)
                vote = await self._vote(gid, message, envelope.stamp)
                if vote is None:
                    return None
                step = finish(step.branch, vote)
            case Work.APPLY:
                return step if await database.commit(gid, message.branch) else None
            case Work.UNDO:
                if not await database.roll_back(gid, message.branch):
                    return None
        fresh = step.branch.state is State.ABORTED and step.branch != known
        if fresh and not await database.bury(gid, message.branch, step.branch):
            await database.fence(gid, message.branch)
            return None
        return step

    async def _vote(self, gid: Gid, message: Prepare, stamp: Stamp) -> Vote | None:
        if is_enlisted(message.payload):
            # It was looked for, and is not prepared.
            return Refused(gid=message.gid, branch=message.branch, reason=NOT_ENLISTED)
        within_s = self._settings.work_within_s
        if stamp.deadline_ms is not None:
            within_s = min(within_s, stamp.deadline_ms / 1000)
        return await self._database.work(message, gid, within_s)

    # --------------------------------------------------------------------------------------------- horizons

    async def _save_horizons(self, *, epoch_of: str | None = None) -> None:
        """Saves what has risen. All that wait for the same epoch wait for one transaction."""
        async with self._saving:
            if epoch_of is not None and self._saved.get(epoch_of, Horizon()).epoch >= self._horizons[epoch_of].epoch:
                return
            risen = {name: it for name, it in self._horizons.items() if self._saved.get(name) != it}
            if risen:
                await self._database.save(risen)
                self._saved.update(risen)

    async def _go_round(self) -> None:
        """Tidies up, round after round, until it is cancelled."""
        failed = False
        while True:
            await asyncio.sleep(self._settings.prune_every_s)
            try:
                await self.tidy()
            except Unavailable as error:
                if not failed:
                    _log.warning("records cannot be pruned for now: %s", error)
                failed = True
            except Exception:  # noqa: BLE001  # never the end of all pruning; it is told of, and tried again
                _log.exception("a defect: records were not pruned")
                failed = True
            else:
                failed = False

    async def tidy(self) -> None:
        """One round: prune below the floors that the last one saved, and save those of now. Raises `Unavailable`."""
        floors = {name: horizon.floor for name, horizon in self._saved.items()}
        self._memory.forget_below(floors)
        # In this order: a floor that is saved now allows nothing before the next round.
        for cluster, floor in floors.items():
            await self._prune(cluster, floor)
        await self._save_horizons()

    async def _prune(self, cluster: str, floor: int) -> None:
        above = self._pruned_below.get(cluster, 0)
        if floor <= above:
            return
        at_most = self._settings.pruned_at_once
        for _ in range(_PRUNE_STEPS):
            if await self._database.prune(cluster, above, floor, at_most) < at_most:
                # Whatever is below now can be skipped: the index is full of what is deleted and not yet swept up.
                self._pruned_below[cluster] = floor
                return


class _Memory:
    """What was seen of branches. It may be incomplete, and knows how far it can be trusted."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[BranchId, tuple[Branch, Gid]] = {}
        self._complete_above: dict[str, int] = {}
        """Per cluster: whatever exists above this number is in `_known`."""

    def recall(self, key: BranchId) -> Branch | None:
        """What was last seen of it; None: nothing."""
        found = self._known.get(key)
        return None if found is None else found[0]

    def is_new(self, gid: Gid) -> bool:
        """Can a branch of `gid` that is not remembered be taken for one that nobody has heard of?"""
        return gid.number > self._complete_above.get(gid.cluster, 0)

    def distrust(self, highest: Mapping[str, int]) -> None:
        """Others may have made branches up to these numbers."""
        for cluster, number in highest.items():
            self._complete_above[cluster] = max(number, self._complete_above.get(cluster, 0))

    def remember(self, gid: Gid, key: BranchId, branch: Branch) -> None:
        """It is `branch` now, for sure."""
        if branch.state is State.UNKNOWN:
            return
        self._known[key] = branch, gid
        if len(self._known) > self._limit:
            self._drop(next(iter(self._known)))

    def doubt(self, gid: Gid, key: BranchId) -> None:
        """Something happened to it, and nobody knows what."""
        self._known.pop(key, None)
        self.distrust({gid.cluster: gid.number})

    def listed(self, prepared: Sequence[InDoubt]) -> None:
        """These are prepared, whatever is remembered of them: look, before anything else is believed."""
        for each in prepared:
            found = self._known.get(BranchId(each.gid, each.branch))
            if found is not None and found[0].state is not State.PREPARED:
                self._drop(BranchId(each.gid, each.branch))

    def forget_below(self, floors: Mapping[str, int]) -> None:
        """What is below the floor is answered without a record; prepared branches stay."""
        ended = [
            key
            for key, (branch, gid) in self._known.items()
            if gid.number < floors.get(gid.cluster, 0) and branch.state is not State.PREPARED
        ]
        for key in ended:
            self._drop(key)

    def _drop(self, key: BranchId) -> None:
        _, gid = self._known.pop(key)
        self.distrust({gid.cluster: gid.number})


def is_enlisted(payload: bytes) -> bool:
    """Was the branch prepared by its application?"""
    if ENLISTED_OP.encode() not in payload:
        return False
    try:
        value = json_value(payload)
    except Malformed:
        return False
    return isinstance(value, dict) and value.get("op") == ENLISTED_OP


def _enlisted(message: Request) -> bool:
    return isinstance(message, Prepare) and is_enlisted(message.payload)


def _unfit(message: Request, why: str) -> Answer:
    """Nothing of this name was ever prepared, nor can be; so nothing has to be stored."""
    gid, branch = message.gid, message.branch
    match message:
        case Prepare():
            return Refused(gid=gid, branch=branch, reason=why)
        case Commit():
            return Contradicted(gid=gid, branch=branch, state=State.UNKNOWN.value)
        case Abort():
            return Acked(gid=gid, branch=branch)
