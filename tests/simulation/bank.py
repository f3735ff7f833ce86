"""A bank as a resource manager: accounts, locks and a mark per branch, on a store that is durable only when synced.

It decides with the real automaton (`participants.resource`) and is served by the real server. A transfer takes or gives
an amount on one account; the account stays locked while its branch is prepared, and the mark of the branch appears with
its commit. All changes of a batch become durable together or not at all. One kind of bank refuses what is locked, the
other waits for the lock for a while.

Applications work in its database by themselves (`database.py`). What they have prepared is a branch like any other.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.codec import json_value
from coordinator.protocol.messages import Answer, Commit, Gid, Prepare, Prepared, ReadOnly, Refused, Vote
from participants import resource
from participants.manager import BranchId, Envelope, InDoubt, Known, KnownBranch, Unavailable
from participants.prepared import NOT_ENLISTED, is_enlisted
from participants.resource import Branch, Horizon, State, Work
from tests.simulation.machines import Machine

OPENING_BALANCE = 100
USUAL_SYNC_S = (0.0002, 0.005)
_PRUNED_AT_ONCE = 8
_LOCK_PATIENCE_S = 1.0
_STATEMENT_STALLS = 0.1
"""How often the statement that prepares takes long."""

Change = tuple[str, Any, Any]
"""Table, key, and the new value; None removes it."""


class SyncBroken(Exception):
    """What the store holds now is what it held before, or all of the batch."""


class Denied(Exception):
    """What an application asked for was not done, and its work is undone. The text says why."""


class Store:
    """Tables in memory and on disk. It outlives the processes that use it."""

    def __init__(self, rng: random.Random, accounts: Sequence[str]) -> None:
        self.rng = rng
        self.disk: dict[str, dict[Any, Any]] = {
            "balances": dict.fromkeys(accounts, OPENING_BALANCE),
            "branches": {},
            "redo": {},
            "since": {},
            "locks": {},
            "marks": {},
            "horizons": {},
        }
        self.sync_s = USUAL_SYNC_S
        self.fail_next = 0
        self.strikes: list[Callable[[], None]] = []
        """Told of the next syncs that fail."""
        self._writing: list[list[Change]] = []
        self.lost = 0
        self.failed = 0

    def load(self) -> dict[str, dict[Any, Any]]:
        """What a process that starts finds."""
        return {name: dict(table) for name, table in self.disk.items()}

    async def write(self, changes: list[Change]) -> None:
        """Durable when this returns. Raises `SyncBroken`."""
        self._writing.append(changes)
        await asyncio.sleep(self.rng.uniform(*self.sync_s))
        self._writing.remove(changes)
        if self.fail_next:
            self.fail_next -= 1
            self.failed += 1
            self.strikes.pop(0)()
            if self.rng.random() < 0.5:
                self._put(changes)
            raise SyncBroken
        self._put(changes)

    def crash(self) -> None:
        """Whatever was on its way is there as a whole, or not."""
        for changes in self._writing:
            if self.rng.random() < 0.5:
                self._put(changes)
            else:
                self.lost += 1
                break  # what came after it built on it
        self._writing = []

    def _put(self, changes: list[Change]) -> None:
        for table, key, value in changes:
            if value is None:
                self.disk[table].pop(key, None)
            else:
                self.disk[table][key] = value


@dataclass(slots=True)
class Mood:
    """How a bank behaves within what it may do: each is a chance."""

    refuses: float = 0.0
    """It votes no although it could."""
    mute: float = 0.0
    """It does what it is told, and says that it does not know."""
    forgets_work: float = 0.0
    """It drops work that it has not voted on, and says nothing of it."""


@dataclass(slots=True)
class Heard:
    """Whom a bank tells what happens in it."""

    decided: Callable[[str, str, str], None]
    changed: Callable[["Bank"], None]
    counted: Callable[[str], None]


class Bank:
    """A `ResourceManager`, in one life."""

    receive = staticmethod(resource.receive)
    prunable = staticmethod(resource.prunable)
    syncs_votes = True

    def __init__(
        self, name: str, store: Store, machine: Machine, rng: random.Random, mood: Mood, heard: Heard, *, waits: bool
    ) -> None:
        self.name = name
        self.store = store
        self.batches_at_once = 8 if waits else 1
        self.batch_limit = 1 if waits else 64
        self._machine = machine
        self._rng = rng
        self._mood = mood
        self._heard = heard
        self._waits = waits
        self.tables = store.load()
        self._changes: list[Change] = []
        self._syncing: asyncio.Task[None] | None = None
        self._unlocked = asyncio.Event()
        self._sessions: dict[str, object] = {}
        """Accounts that applications are at work on, and in which session of the database."""

    async def open(self) -> Sequence[InDoubt]:
        return await self.in_doubt()

    async def in_doubt(self) -> Sequence[InDoubt]:
        since = self.tables["since"]
        return [InDoubt(gid=key.gid, branch=key.branch, prepared_at=at) for key, at in since.items()]

    async def known(self, gids: Sequence[str]) -> Known:
        """What is on record of some transactions of one cluster."""
        await self._sync()
        parsed = Gid.parse(gids[0])
        assert parsed is not None
        horizon = self.tables["horizons"].get(parsed.cluster, Horizon())
        wanted = set(gids)
        branches = [
            KnownBranch(gid=key.gid, branch=key.branch, state=branch.state.value)
            for key, branch in self.tables["branches"].items()
            if key.gid in wanted
        ]
        return Known(branches=tuple(branches), epoch=horizon.epoch, floor=horizon.floor)

    async def close(self) -> None:
        pass

    async def handle(self, batch: Sequence[Envelope]) -> Sequence[Answer]:
        answers = [await self._answer(envelope) for envelope in batch]
        self._prune()
        unsynced = not self.syncs_votes and all(isinstance(each.message, Prepare) for each in batch)
        if unsynced:
            asyncio.get_running_loop().create_task(self._sync())
        else:
            await self._sync()
        self._heard.changed(self)
        if self._mood.mute and self._rng.random() < self._mood.mute:
            raise Unavailable("in a mood")
        return answers

    # What becomes of a message.

    async def _answer(self, envelope: Envelope) -> Answer:
        message, stamp = envelope
        key, gid = envelope.id, Gid.parse(message.gid)
        assert gid is not None
        if not isinstance(message, Prepare):
            self._heard.decided(message.gid, "committed" if isinstance(message, Commit) else "aborted", self.name)
        horizons = self.tables["horizons"]
        before_horizon = horizons.get(gid.cluster, Horizon())
        horizon = resource.observe(before_horizon, message.gid, stamp)
        if horizon != before_horizon:
            self._put("horizons", gid.cluster, horizon)
        before = self.tables["branches"].get(key, Branch())
        step = self.receive(before, horizon, message, stamp)
        match step.work:
            case Work.RUN:
                assert isinstance(message, Prepare)
                vote = await self._work(key, message.payload)
                if self._mood.forgets_work and self._rng.random() < self._mood.forgets_work:
                    raise Unavailable("it was dropped")
                step = resource.finish(step.branch, vote)
                if horizons.get(gid.cluster) != horizon:  # a failed sync came between
                    horizons = self.tables["horizons"]
                    known = horizons.get(gid.cluster, Horizon())
                    risen = Horizon(epoch=max(known.epoch, horizon.epoch), floor=max(known.floor, horizon.floor))
                    self._put("horizons", gid.cluster, risen)
                if step.branch.state is State.PREPARED:
                    account, amount = self._wish(message.payload)
                    self._put("locks", account, key)
                    self._put("redo", key, (account, amount))
                    self._put("since", key, self._machine.loop.now_s)
            case Work.APPLY:
                account, amount = self.tables["redo"][key]
                self._put("balances", account, self.tables["balances"][account] + amount)
                self._put("marks", key, amount)
                self._end(key)
            case Work.UNDO:
                self._end(key)
            case _:
                pass
        if step.branch != before:
            self._put("branches", key, step.branch)
        assert step.answer is not None, f"{key} is at work although one branch is never handled twice at once"
        return step.answer

    async def _work(self, key: BranchId, payload: bytes) -> Vote:
        gid, branch = key
        if is_enlisted(payload):
            return Refused(gid=gid, branch=branch, reason=NOT_ENLISTED)
        account, amount = self._wish(payload)
        if amount == 0:
            return ReadOnly(gid=gid, branch=branch, result=b"%d" % self.tables["balances"][account])
        if not await self._free(account):
            return Refused(gid=gid, branch=branch, reason="locked", retryable=True)
        if self._mood.refuses and self._rng.random() < self._mood.refuses:
            return Refused(gid=gid, branch=branch, reason="in a mood", retryable=self._rng.random() < 0.5)
        if self.tables["balances"][account] + amount < 0:
            return Refused(gid=gid, branch=branch, reason="no money", retryable=False)
        return Prepared(gid=gid, branch=branch, result=b'"held"' if amount % 2 else None)

    async def _free(self, account: str) -> bool:
        """Whether nobody holds its lock, after a while at the latest."""
        until_s = self._machine.monotonic_s() + _LOCK_PATIENCE_S
        while account in self.tables["locks"] or account in self._sessions:
            left_s = until_s - self._machine.monotonic_s()
            if not self._waits or left_s <= 0:
                return False
            self._unlocked.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._unlocked.wait()
            except TimeoutError:
                continue
        return True

    @staticmethod
    def _wish(payload: bytes) -> tuple[str, int]:
        wish = json_value(payload)
        return wish["account"], wish["amount"]

    def _end(self, key: BranchId) -> None:
        account, _amount = self.tables["redo"][key]
        if self.tables["locks"].get(account) == key:
            self._put("locks", account, None)
        self._put("redo", key, None)
        self._put("since", key, None)
        self._unlocked.set()

    def _prune(self) -> None:
        branches, horizons = self.tables["branches"], self.tables["horizons"]
        doomed = []
        for key, branch in branches.items():
            parsed = Gid.parse(key.gid)
            assert parsed is not None
            if self.prunable(branch, key.gid, horizons.get(parsed.cluster, Horizon())):
                doomed.append(key)
                if len(doomed) == _PRUNED_AT_ONCE:
                    break
        for key in doomed:
            self._put("branches", key, None)

    # What applications do in the database, each in a session of its own.

    may_prepare = staticmethod(resource.may_prepare)

    async def work_for(self, session: object, account: str, amount: int) -> None:
        """The account is this session's until it is prepared, or rolled back. Raises `Denied`."""
        if not await self._free(account):
            raise Denied("locked")
        self._sessions[account] = session
        if self.tables["balances"][account] + amount < 0:
            raise Denied("no money")

    async def prepare_for(self, session: object, key: BranchId, account: str, amount: int) -> None:
        """The branch is prepared, durably. Raises `Denied`, also where an abort was here before, and `Unavailable`."""
        if self._rng.random() < _STATEMENT_STALLS:
            await asyncio.sleep(self._rng.uniform(0.2, 5.0))
        gid = Gid.parse(key.gid)
        assert gid is not None
        horizon = self.tables["horizons"].get(gid.cluster, Horizon())
        before = self.tables["branches"].get(key, Branch())
        if not self.may_prepare(before, key.gid, horizon):
            self._heard.counted("applications that prepare too late")
            raise Denied(f"{key.gid} is {before.state.value} here")
        self._put("branches", key, Branch(state=State.PREPARED))
        self._put("locks", account, key)
        self._put("redo", key, (account, amount))
        self._put("since", key, self._machine.loop.now_s)
        self._sessions.pop(account)
        await self._sync()
        self._heard.changed(self)

    def roll_back(self, session: object) -> None:
        """What is not prepared is undone."""
        for account in [account for account, holder in self._sessions.items() if holder is session]:
            del self._sessions[account]
            self._unlocked.set()

    # What becomes durable.

    def _put(self, table: str, key: Any, value: Any) -> None:
        if value is None:
            self.tables[table].pop(key, None)
        else:
            self.tables[table][key] = value
        self._changes.append((table, key, value))

    async def _sync(self) -> None:
        """All changes so far are durable when this returns."""
        while self._syncing is not None:
            await asyncio.shield(self._syncing)
        if self._changes:
            changes, self._changes = self._changes, []
            self._syncing = asyncio.get_running_loop().create_task(self._write(changes))
            await asyncio.shield(self._syncing)

    async def _write(self, changes: list[Change]) -> None:
        try:
            await self.store.write(changes)
        except SyncBroken as error:
            # What else is in memory builds on it.
            self.tables = self.store.load()
            self._changes = []
            self._unlocked.set()
            raise Unavailable("the disk has failed a sync") from error
        finally:
            self._syncing = None
