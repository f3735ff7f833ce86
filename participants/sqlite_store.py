"""One open SQLite database, and how a batch of messages becomes one transaction in it.

Decisions go first: they release locks that the prepares of the same batch may need, and all changes that they make
visible are applied together. The order does not matter otherwise: a batch never holds two messages about one branch.

What is kept in memory (horizons, how many are prepared) follows the database only after a commit. After any other error
than a busy database the whole object is thrown away.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import apsw

from coordinator.protocol.messages import Answer, Contradicted, Gid, Prepare, Refused, Vote
from participants.manager import BranchId, Envelope
from participants.operations import Operations, Refuse
from participants.records import Record, Records
from participants.resource import Branch, Horizon, State, Step, Work, finish, observe, receive
from participants.sqlite_locks import Locks
from participants.sqlite_tables import OWN_PREFIX, quoted, read_tables, require_fit
from participants.sqlite_work import Effects, SqliteSettings, Worker

_log = logging.getLogger(__name__)

_UNHEARD: Final = Branch()


@dataclass(slots=True, kw_only=True)
class _Batch:
    """What one transaction changes of what is kept in memory."""

    horizons: dict[str, Horizon] = field(default_factory=dict)
    pruned_below: dict[str, int] = field(default_factory=dict)
    prepared: int


class _Turn(NamedTuple):
    """A message that was received: what is stored of its branch, and what is to become of it."""

    key: BranchId
    gid: Gid
    epoch: int
    record: Record | None
    step: Step


class Store:
    """An open database. Lives in one thread.

    Raises `SchemaUnfit` if a table cannot be changed safely, and `apsw.Error`.
    """

    def __init__(
        self,
        path: Path,
        operations: Operations,
        schema: str,
        settings: SqliteSettings,
        *,
        now: Callable[[], float] = time.time,
        vfs: str | None = None,
    ) -> None:
        self._path, self._settings, self._now = path, settings, now
        self._db = apsw.Connection(str(path), vfs=vfs)
        try:
            self._configure()
            self.records, self._locks = Records(self._db), Locks(self._db)
            self._worker = Worker(self._db, operations, self._locks, settings)
            with self._db:
                self.records.create()
                self._locks.create()
                self._db.execute(schema)
                self._read_schema()
                require_fit(self._worker.unfit, settings.left_alone)
            self._schema_version: int | None = self._db.pragma("schema_version")
            self._horizons = self.records.horizons()
            self._prepared = self.records.prepared()
        except BaseException:
            self.close()
            raise
        self._pruned_below: dict[str, int] = {}

    def _configure(self) -> None:
        self._db.set_busy_timeout(int(self._settings.busy_within_s * 1000))
        if self._db.pragma("journal_mode", "wal") != "wal":
            raise apsw.CantOpenError(f"{self._path} cannot have a write-ahead log")
        # Every commit is synced; that is what makes a vote durable.
        self._db.pragma("synchronous", "full")
        self._db.pragma("foreign_keys", True)
        # So that REPLACE fires the guard of the row that it removes.
        self._db.pragma("recursive_triggers", True)

    def close(self) -> None:
        """Gives the connection up, whatever state it is in."""
        try:
            self._db.close(True)
        except apsw.Error:
            # Checkpointing is part of closing, and fails where the disk does; the log stays for the next to open it.
            _log.warning("closing %s failed", self._path, exc_info=True)

    def _read_schema(self) -> None:
        """Learns the tables, and makes sure that each has its guards."""
        tables, unfit = read_tables(self._db)
        wanted = {name: sql for table in tables.values() for name, sql in table.guards().items()}
        rows = self._db.execute(
            "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND name GLOB ?", (f"{OWN_PREFIX}guard_*",)
        ).fetchall()
        there = {str(name): str(sql) for name, sql in rows}
        for name, sql in there.items():
            if wanted.get(name) != sql:
                self._db.execute(f"DROP TRIGGER {quoted(name)}")
        for name, sql in wanted.items():
            if there.get(name) != sql:
                self._db.execute(sql)
        self._worker.tables, self._worker.unfit = tables, unfit

    # --------------------------------------------------------------------------------------------- one batch

    def run(self, messages: Sequence[Envelope], refused: dict[BranchId, Refuse]) -> Sequence[Answer]:
        """Answers `messages` in one transaction; branches in `refused` do not work, and are.

        Raises `apsw.Error`, and `TransactionLost` for a branch that must be in `refused` next time.
        """
        batch = _Batch(prepared=self._prepared)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            version = self._db.pragma("schema_version")
            if version != self._schema_version:
                self._schema_version = None
                self._read_schema()
                version = self._db.pragma("schema_version")
            answers = self._answers(batch, messages, refused)
            self._prune(batch, 2 * len(messages) + self._settings.pruned_per_batch)
            for cluster, horizon in batch.horizons.items():
                if horizon != self._horizons.get(cluster):
                    self.records.save_horizon(cluster, horizon)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._schema_version = version
        self._prepared = batch.prepared
        self._horizons.update(batch.horizons)
        self._pruned_below.update(batch.pruned_below)
        return answers

    def _answers(
        self, batch: _Batch, messages: Sequence[Envelope], refused: dict[BranchId, Refuse]
    ) -> Sequence[Answer]:
        answers: dict[BranchId, Answer] = {}
        decided = [self._receive(batch, each) for each in messages if not isinstance(each.message, Prepare)]
        contradicted = self._apply([turn for turn in decided if turn.step.work is Work.APPLY])
        for turn in decided:
            if turn.key in contradicted:
                gid, branch = turn.key
                answers[turn.key] = Contradicted(gid=gid, branch=branch, state=State.PREPARED.value)
            else:
                answers[turn.key] = self._keep(batch, turn, turn.step)
        for each in messages:
            if isinstance(each.message, Prepare):
                turn = self._receive(batch, each)
                step, effects = turn.step, None
                if step.work is Work.RUN:
                    vote, effects = self._work(batch, each.message, refused.get(turn.key))
                    step = finish(step.branch, vote)
                answers[turn.key] = self._keep(batch, turn, step, effects)
        return [answers[each.id] for each in messages]

    def _receive(self, batch: _Batch, envelope: Envelope) -> _Turn:
        message, stamp = envelope
        gid = Gid.parse(message.gid)
        assert gid is not None, "the server checks what it takes"
        seen = batch.horizons.get(gid.cluster) or self._horizons.get(gid.cluster) or Horizon()
        horizon = batch.horizons[gid.cluster] = observe(seen, message.gid, stamp)
        record = self.records.load(gid, message.branch)
        before = record.branch if record is not None else _UNHEARD
        step = receive(before, horizon, message, stamp)
        return _Turn(key=envelope.id, gid=gid, epoch=stamp.epoch, record=record, step=step)

    def _keep(self, batch: _Batch, turn: _Turn, step: Step, effects: Effects | None = None) -> Answer:
        """Stores what became of a branch, and returns what to say."""
        record, after = turn.record, step.branch
        if record is None:
            if after.state is not State.UNKNOWN:
                at, redo = (None, None) if effects is None else (self._now(), effects.redo)
                holder = self.records.insert(turn.gid, turn.key.branch, after, epoch=turn.epoch, at=at, redo=redo)
                if effects is not None:
                    batch.prepared += 1
                    self._locks.take(effects.locks, holder)
        elif after != record.branch:
            if record.branch.state is State.PREPARED:
                batch.prepared -= 1
                self._locks.release(record.id)
            self.records.update(record.id, after)
        assert step.answer is not None, "within a transaction nothing is ever at work"
        return step.answer

    def _work(self, batch: _Batch, message: Prepare, refusal: Refuse | None) -> tuple[Vote, Effects | None]:
        if refusal is None and batch.prepared >= self._settings.prepared_limit:
            refusal = Refuse("too_many_prepared", retryable=True)
        if refusal is None:
            return self._worker.work(message)
        reason, retryable = refusal.reason, refusal.retryable
        return Refused(gid=message.gid, branch=message.branch, reason=reason, retryable=retryable), None

    def _apply(self, turns: Sequence[_Turn]) -> set[BranchId]:
        """Makes prepared changes visible; returns the branches that could not, with an alarm for each.

        All at once, because most of the cost is to compile the statements; one by one only to find out who is to blame.
        """
        redos = {turn.key: turn.record.redo for turn in turns if turn.record is not None and turn.record.redo}
        if not redos:
            return set()
        # What triggers did is part of the redo; and the guards would stop the holder of the locks too.
        self._db.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
        try:
            if self._applied(list(redos.values())):
                return set()
            failed = {key for key, redo in redos.items() if not self._applied([redo])}
        finally:
            self._db.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 1)
        for key in failed:
            _log.error(
                "ALARM: branch %s of %s is to be committed, but the rows that it had locked were changed by another"
                " connection, around the locks; it stays prepared",
                key.branch,
                key.gid,
            )
        return failed

    def _applied(self, redos: Sequence[bytes]) -> bool:
        """Applies all or nothing: False when the database is no longer as it was locked."""
        self._db.execute("SAVEPOINT outlast_apply")
        before = self._db.total_changes()
        try:
            changes = redos[0] if len(redos) == 1 else _joined(redos)
            # Actions of foreign keys are part of the redo, like triggers.
            apsw.Changeset.apply(changes, self._db, flags=apsw.SQLITE_CHANGESETAPPLY_FKNOACTION)
            # Changes to a table that is gone or altered are skipped without an error.
            complete = self._db.total_changes() - before >= sum(1 for _ in apsw.Changeset.iter(changes))
        except (apsw.AbortError, apsw.SchemaChangeError):
            complete = False
        if not complete:
            self._db.execute("ROLLBACK TO outlast_apply")
        self._db.execute("RELEASE outlast_apply")
        return complete

    def _prune(self, batch: _Batch, at_most: int) -> None:
        for cluster, horizon in batch.horizons.items():
            if horizon.floor <= self._pruned_below.get(cluster, 0):
                continue
            pruned = self.records.prune(cluster, horizon.floor, at_most)
            # Fewer than asked for: there are no more, until the floor moves again.
            if pruned < at_most:
                batch.pruned_below[cluster] = horizon.floor


def _joined(redos: Sequence[bytes]) -> bytes:
    builder = apsw.ChangesetBuilder()  # type: ignore[no-untyped-call]  # its stub forgot
    try:
        for redo in redos:
            builder.add(redo)
        return builder.output()
    finally:
        builder.close()
