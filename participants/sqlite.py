"""An SQLite database as a resource manager: named operations, prepared as changesets, synced in batches.

SQLite has one writer and no prepared transactions, so a branch cannot simply stay open until the decision. Instead:

    prepare   run the operation inside a savepoint, record what it changed (a changeset of SQLite's session extension),
              roll it back; store the changeset as redo, and a lock row for each key it touched
    commit    apply the redo with triggers off (what they did is part of the changeset), delete the locks
    abort     delete the locks

A whole batch of messages is one transaction of the database, and so one sync to disk: that is where the throughput
comes from. If that transaction fails (the disk is full, the device reports an error), nothing is known of any of the
batch, which is what `Unavailable` says; the next batch begins by opening the database anew.

What an operation may count on, and what not:
- It sees committed data only: never what another branch has prepared. Whoever writes a row that another prepared branch
  wrote is refused (`locked: <table>`, retryable), so an operation that checks a row and then changes it is safe.
- To decide by a row that it does *not* change, it must say so with `branch.lock_shared`; else another branch may change
  that row between this prepare and this commit (write skew). Conditions over many rows, such as sums, are not guarded:
  keep the sum in a row.
- It may run more than once, and be rolled back each time: it should touch nothing but the database.
- Keys that SQLite assigns (an INTEGER PRIMARY KEY left out) are the same for all branches that are prepared at the same
  time, so all but the first are refused as locked: take keys from the payload. The same goes for triggers that write
  such rows.
- It cannot change the schema, nor begin or end transactions: changesets do not record that.

Other connections may read at any time, and write, except to locked rows: guard triggers stop them. They bypass the
guard when they turn triggers off, or use `REPLACE` without `PRAGMA recursive_triggers`; then a commit may find that its
row is gone, which is an alarm and needs a person. The guards cost about a tenth of the throughput.

Use one process per database; a second one is refused (`AlreadyOpen`).
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import apsw

from coordinator.protocol.messages import Answer
from participants.manager import BranchId, Envelope, InDoubt, Known, Unavailable
from participants.operations import Operations, Refuse
from participants.record_file import AlreadyOpen, lock_exclusively
from participants.sqlite_store import Store
from participants.sqlite_tables import SchemaUnfit
from participants.sqlite_work import SqliteBranch, SqliteSettings, TransactionLost

__all__ = ["AlreadyOpen", "SchemaUnfit", "SqliteBranch", "SqliteManager", "SqliteSettings"]

_T = TypeVar("_T")


class SqliteManager:
    """The resource manager. `schema` is SQL that runs at every start: `CREATE TABLE IF NOT EXISTS ...`.

    `open` raises `AlreadyOpen`, `SchemaUnfit`, and `apsw.Error` for what is no database. `vfs` names SQLite's access to
    the file system, for fault injection.
    """

    batches_at_once: int = 1

    def __init__(
        self,
        path: str | os.PathLike[str],
        operations: Operations,
        *,
        schema: str = "",
        settings: SqliteSettings | None = None,
        now: Callable[[], float] = time.time,
        vfs: str | None = None,
    ) -> None:
        self._path = Path(path).resolve()
        self._operations = operations
        self._schema = schema
        self._settings = settings or SqliteSettings()
        self._now = now
        self._vfs = vfs
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sqlite-{self._path.name}")
        self._lock_file: int | None = None
        self._store: Store | None = None

    @property
    def batch_limit(self) -> int:
        """Messages in one transaction."""
        return self._settings.batch_limit

    async def open(self) -> Sequence[InDoubt]:
        """Opens the database, creates what is missing, and finds the prepared branches."""
        return await self._call(self._open)

    async def handle(self, batch: Sequence[Envelope]) -> Sequence[Answer]:
        """The answers, after one sync. Raises `Unavailable`."""
        return await self._call(self._handle, batch)

    async def in_doubt(self) -> Sequence[InDoubt]:
        """The prepared branches, oldest first. Raises `Unavailable`."""
        return await self._call(self._in_doubt)

    async def known(self, gids: Sequence[str]) -> Known:
        """What is on record of these transactions. Raises `Unavailable`."""
        return await self._call(self._known, gids)

    async def close(self) -> None:
        """Closes the database; waits for a batch that runs."""
        await self._call(self._close)
        self._thread.shutdown()

    async def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # --------------------------------------------------------------------------------------------- in the thread

    def _open(self) -> Sequence[InDoubt]:
        self._lock_file = lock_exclusively(self._path)
        self._store = self._new_store()
        return self._store.records.in_doubt()

    def _new_store(self) -> Store:
        return Store(self._path, self._operations, self._schema, self._settings, now=self._now, vfs=self._vfs)

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _usable(self) -> Store:
        """The open database, opened anew after a failure."""
        if self._store is None:
            assert self._lock_file is not None, "open() comes first, close() last"
            self._store = self._new_store()
        return self._store

    def _in_doubt(self) -> Sequence[InDoubt]:
        try:
            return self._usable().records.in_doubt()
        except apsw.Error as error:
            raise Unavailable(f"{self._path}: {error}") from error

    def _known(self, gids: Sequence[str]) -> Known:
        try:
            return self._usable().records.known(gids)
        except apsw.Error as error:
            raise Unavailable(f"{self._path}: {error}") from error

    def _handle(self, batch: Sequence[Envelope]) -> Sequence[Answer]:
        refused: dict[BranchId, Refuse] = {}
        while True:
            try:
                return self._usable().run(batch, refused)
            except TransactionLost as lost:
                if lost.key in refused:
                    raise  # it did not even work again: no progress is to be expected
                refused[lost.key] = lost.refusal
            except apsw.BusyError as error:
                raise Unavailable(f"{self._path}: another connection writes for too long: {error}") from error
            except apsw.Error as error:
                # What the connection still knows is not to be trusted: it may believe in pages that never got to disk.
                store, self._store = self._store, None
                if store is not None:
                    store.close()
                raise Unavailable(f"{self._path}: {type(error).__name__}: {error}") from error
