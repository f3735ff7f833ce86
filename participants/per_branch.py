'''A resource manager of your own, from three coroutines: prepare, commit and abort one branch.

    class Uploads(PerBranchManager):
        """Puts a file in its place when the transaction commits."""

        def __init__(self, folder: Path) -> None:
            super().__init__(folder / "branches.db")
            self._folder = folder

        async def prepare(self, branch: BranchId, payload: Any) -> Held:
            if (self._folder / payload["name"]).exists():
                raise Refuse("exists")
            write_and_sync(self._folder / f"{branch.gid}.{branch.branch}.part", payload["text"])
            write_and_sync(self._folder / f"{branch.gid}.{branch.branch}.name", payload["name"])
            return Held()

        async def commit(self, branch: BranchId) -> None: ...    # rename, if it is not done yet
        async def abort(self, branch: BranchId) -> None: ...     # unlink, if anything is there

The records (who voted what, tombstones, done rows, horizons) are kept here, in an SQLite file. Three duties are left:

- `prepare` returns only when its work is durable, and can no longer fail to commit. It may find traces of an earlier
  prepare of the same branch, which a crash cut short.
- `commit` and `abort` may be called again after they succeeded, because a crash came before the record.
- `abort` may be called for a branch that left nothing behind.

An exception of `commit` or `abort` means "unknown": the call is repeated. One of `prepare` is a vote no, and `abort` is
called to tidy up. Different branches run concurrently, one branch never does.
'''

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from coordinator.codec import json_bytes, json_value
from coordinator.protocol.messages import Abort, Answer, Gid, Prepare, Prepared, ReadOnly, Refused, Vote
from participants.manager import BranchId, Envelope, InDoubt, Known, Unavailable
from participants.operations import refusal_of
from participants.record_file import RecordFile
from participants.records import Record, Records
from participants.resource import Branch, Horizon, State, Work, finish, observe, receive

_PRUNED_PER_MESSAGE: Final = 4
"""Records forgotten at most whenever one is stored, so that a backlog shrinks and no single message pays for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The work is done, durable, and waits for the decision. `result`, any JSON value, travels with the vote."""

    result: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchanged:
    """There was nothing to change: no commit or abort will follow."""

    result: Any = None


class PerBranchManager(ABC):
    """See the top of the module. `work_within_s` limits one prepare, which is cancelled and refused after it."""

    batches_at_once: int = 32
    batch_limit: int = 1

    def __init__(
        self,
        records: str | os.PathLike[str],
        *,
        work_within_s: float = 30.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._file = RecordFile(records)
        self._work_within_s = work_within_s
        self._now = now
        self._horizons: dict[str, Horizon] = {}
        self._saved: dict[str, Horizon] = {}

    @abstractmethod
    async def prepare(self, branch: BranchId, payload: Any) -> Held | Unchanged:
        """Does the work of a branch and makes it durable but not visible. Raises `Refuse` to vote no."""

    @abstractmethod
    async def commit(self, branch: BranchId) -> None:
        """Makes the prepared work visible."""

    @abstractmethod
    async def abort(self, branch: BranchId) -> None:
        """Undoes whatever work there is."""

    # --------------------------------------------------------------------------------------------- ResourceManager

    async def open(self) -> Sequence[InDoubt]:
        """Opens the records, and tells what is prepared."""
        await self._file.open()
        self._saved = await self._file.transact(Records.horizons)
        self._horizons = dict(self._saved)
        return await self.in_doubt()

    async def in_doubt(self) -> Sequence[InDoubt]:
        """The prepared branches, oldest first."""
        return await self._file.transact(Records.in_doubt)

    async def known(self, gids: Sequence[str]) -> Known:
        """What is on record of these transactions."""
        return await self._file.transact(lambda records: records.known(gids))

    async def close(self) -> None:
        """Closes the records."""
        await self._file.close()

    async def handle(self, batch: Sequence[Envelope]) -> Sequence[Answer]:
        """The answers, one after the other."""
        return [await self._answer(envelope) for envelope in batch]

    async def _answer(self, envelope: Envelope) -> Answer:
        message, stamp = envelope
        key, gid = envelope.id, Gid.parse(message.gid)
        assert gid is not None, "the server checks what it takes"
        horizon = observe(self._horizons.get(gid.cluster, Horizon()), message.gid, stamp)
        self._horizons[gid.cluster] = horizon
        record = await self._file.transact(lambda records: records.load(gid, key.branch))
        before = record.branch if record is not None else Branch()
        step = receive(before, horizon, message, stamp)
        match step.work:
            case Work.RUN:
                assert isinstance(message, Prepare)
                step = finish(step.branch, await self._vote(message, stamp.deadline_ms))
            case Work.APPLY:
                await self.commit(key)
            case Work.UNDO:
                await self.abort(key)
            case _ if isinstance(message, Abort) and step.branch != before:
                # No record, but a crash may have come between the work and its record.
                await self.abort(key)
        if step.branch != before or self._saved.get(gid.cluster) != horizon:
            await self._file.transact(lambda records: self._store(records, gid, key, record, step.branch, horizon))
            self._saved[gid.cluster] = horizon
        if step.answer is None:
            raise Unavailable(f"{key} is at work although one branch is never handled twice at once")
        return step.answer

    async def _vote(self, message: Prepare, deadline_ms: int | None) -> Vote:
        key = BranchId(message.gid, message.branch)
        within_s = self._work_within_s if deadline_ms is None else min(self._work_within_s, deadline_ms / 1000)
        try:
            async with asyncio.timeout(within_s):
                done = await self.prepare(key, json_value(message.payload))
            result = None if done.result is None else json_bytes(done.result)
        except Exception as error:  # noqa: BLE001  # whatever the work raises, it only loses its vote
            if isinstance(error, TimeoutError):
                reason, retryable = "too_slow", True
            else:
                reason, retryable = refusal_of(error, f"branch {key.branch} of {key.gid}")
            await self.abort(key)
            return Refused(gid=key.gid, branch=key.branch, reason=reason, retryable=retryable)
        vote = Prepared if isinstance(done, Held) else ReadOnly
        return vote(gid=key.gid, branch=key.branch, result=result)

    def _store(
        self, records: Records, gid: Gid, key: BranchId, record: Record | None, after: Branch, horizon: Horizon
    ) -> None:
        """In the records' thread."""
        if record is not None:
            records.update(record.id, after)
        elif after.state is not State.UNKNOWN:
            at = self._now() if after.state is State.PREPARED else None
            records.insert(gid, key.branch, after, epoch=horizon.epoch, at=at)
        records.save_horizon(gid.cluster, horizon)
        records.prune(gid.cluster, horizon.floor, _PRUNED_PER_MESSAGE)
