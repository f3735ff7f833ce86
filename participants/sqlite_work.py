"""Runs one branch's operation against SQLite, records what it changed, and leaves no trace of it.

The operation runs inside a savepoint that is always rolled back; a session records its changes. What it may do is
checked by SQLite's authorizer while its statements are compiled: read everything, write to tables whose rows can be
locked and replayed, and nothing else.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import apsw

from coordinator.codec import json_bytes
from coordinator.protocol.messages import Prepare, Prepared, ReadOnly, Refused, Vote
from participants.manager import BranchId
from participants.operations import Operations, Refuse, refusal_of
from participants.sqlite_locks import Lock, Locked, Locks, Mode, Wanted
from participants.sqlite_tables import GUARD_MESSAGE, OWN_PREFIX, Table, Value, quoted

_PROGRESS_STEPS: Final = 4000
"""Steps of SQLite's virtual machine between two looks at the clock: well below a millisecond."""

_READS: Final = frozenset((apsw.SQLITE_SELECT, apsw.SQLITE_READ, apsw.SQLITE_FUNCTION, apsw.SQLITE_RECURSIVE))
_WRITES: Final = frozenset((apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE))

_OPERATIONS_OWN: Final = apsw.SQLITE_PREPARE_PERSISTENT
"""Compiled statements are cached by text and flags. Nobody else uses this flag, so an operation never gets a statement
that was compiled, and authorized, for the manager itself."""

_READING_PRAGMAS: Final = frozenset(
    ("foreign_key_list", "index_info", "index_list", "index_xinfo", "table_info", "table_list", "table_xinfo")
)
"""The session asks for these itself while it records."""

_STORAGE_ERRORS: Final = (
    apsw.BusyError,
    apsw.CantOpenError,
    apsw.CorruptError,
    apsw.FullError,
    apsw.IOError,
    apsw.LockedError,
    apsw.NoMemError,
    apsw.NotADBError,
    apsw.ProtocolError,
    apsw.ReadOnlyError,
)
"""Not the operation's fault, and no vote: the whole batch is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteSettings:
    """Limits of one database.

    batch_limit: messages in one transaction.
    busy_within_s: how long a batch waits for another connection that writes; then it is unknown.
    operation_within_s: of SQL in one operation; then it is refused as `too_slow`, retryable.
    redo_limit_bytes, result_limit_bytes: of one branch; above it is refused.
    prepared_limit: branches prepared at the same time; above it prepares are refused as `too_many_prepared`, retryable.
    pruned_per_batch: records forgotten in one transaction, beyond two per message.
    left_alone: tables that no operation changes, and that may therefore lack what a branch needs.
    """

    batch_limit: int = 256
    busy_within_s: float = 1.0
    operation_within_s: float = 1.0
    redo_limit_bytes: int = 16 * 1024 * 1024
    result_limit_bytes: int = 32 * 1024
    prepared_limit: int = 100_000
    pruned_per_batch: int = 64
    left_alone: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            assert not isinstance(value, (int, float)) or value > 0, f"{name} must be positive"
        assert self.batch_limit <= self.prepared_limit, "one batch must fit below prepared_limit"


class SqliteBranch:
    """What an operation is given: the names of its branch, and the database as committed."""

    __slots__ = ("_cursors", "_db", "_locks", "_over", "_tables", "_wanted", "branch", "gid")

    def __init__(
        self, key: BranchId, db: apsw.Connection, tables: Mapping[str, Table], locks: Locks, wanted: Wanted
    ) -> None:
        self.gid, self.branch = key
        self._db, self._tables, self._locks, self._wanted = db, tables, locks, wanted
        self._cursors: list[apsw.Cursor] = []
        self._over = False

    def execute(self, sql: str, parameters: Sequence[Value] | Mapping[str, Value] = ()) -> Any:
        """Runs SQL, and returns an iterator over its rows (tuples). Valid until the operation returns."""
        if self._over:
            raise RuntimeError("the operation is over")
        cursor = self._db.cursor()
        self._cursors.append(cursor)
        return cursor.execute(sql, parameters, prepare_flags=_OPERATIONS_OWN)

    def one(self, sql: str, parameters: Sequence[Value] = ()) -> tuple[Any, ...] | None:
        """The first row, or None."""
        for row in self.execute(sql, parameters):
            return tuple(row)
        return None

    def lock_shared(self, table: str, *key: Value) -> None:
        """Keeps the row with primary key `key` as it is, or absent, until this transaction's decision.

        For rows that the operation decides by and does not change. The branch then votes prepared even if it changes
        nothing. Raises `Refuse`, retryable, when another prepared branch has changed the row.
        """
        known = self._tables[table.lower()]
        primary = known.keys[0]
        if len(key) != len(primary.columns):
            raise ValueError(f"the primary key of {known.name} has {len(primary.columns)} columns")
        where = " AND ".join(f"{quoted(name)} = ?" for name in primary.column_names)
        columns = ", ".join(map(quoted, primary.column_names))
        # As stored: '1' and 1 may name the same row.
        stored = self.one(f"SELECT {columns} FROM main.{quoted(known.name)} WHERE {where}", key)  # noqa: S608  # quoted
        text = primary.text(stored if stored is not None else key)
        if text is None:
            raise ValueError(f"the primary key of {known.name} is never NULL")
        lock = Lock(known.name, primary.name, text)
        try:
            self._locks.refuse_held(lock, Mode.SHARE)
        except Locked as error:
            raise Refuse(f"locked: {error}", retryable=True) from error
        self._wanted.modes.setdefault(lock, Mode.SHARE)

    def end(self) -> None:
        """No more SQL: an open cursor would keep the database from being checkpointed."""
        self._over = True
        for cursor in self._cursors:
            cursor.close(True)


class Effects(NamedTuple):
    """What a prepared branch has to store: its changes, and the locks that keep them possible."""

    redo: bytes
    locks: Wanted


class TransactionLost(Exception):
    """A branch's work ended the whole transaction. It is to be refused, and the rest of its batch done again."""

    def __init__(self, key: BranchId, refusal: Refuse) -> None:
        super().__init__(str(refusal))
        self.key, self.refusal = key, refusal


class Worker:
    """Runs operations on one open connection, inside whatever transaction is open. `tables` may be replaced."""

    def __init__(self, db: apsw.Connection, operations: Operations, locks: Locks, settings: SqliteSettings) -> None:
        self._db, self._operations, self._locks, self._settings = db, operations, locks, settings
        self.tables: Mapping[str, Table] = {}
        self.unfit: Mapping[str, str] = {}
        self._working = False
        self._ends = 0.0
        self._denied: str | None = None
        db.authorizer = self._authorize
        db.set_progress_handler(self._is_too_slow, _PROGRESS_STEPS)

    def work(self, message: Prepare) -> tuple[Vote, Effects | None]:
        """Does a branch's work, undoes it, and says how it votes; effects only if it votes prepared.

        Raises `TransactionLost`, and `apsw.Error` when it is the storage that failed.
        """
        try:
            result, changes, wanted = self._run(BranchId(message.gid, message.branch), message.payload)
            if not changes and not wanted.modes:
                return ReadOnly(gid=message.gid, branch=message.branch, result=result), None
            self._lock(changes, wanted)
        except Refuse as refusal:
            reason, retryable = refusal.reason, refusal.retryable
            return Refused(gid=message.gid, branch=message.branch, reason=reason, retryable=retryable), None
        return Prepared(gid=message.gid, branch=message.branch, result=result), Effects(changes, wanted)

    def _run(self, key: BranchId, payload: bytes) -> tuple[bytes | None, bytes, Wanted]:
        """Result, changeset, and the locks that were asked for; the savepoint is rolled back whatever happens."""
        wanted = Wanted()
        branch = SqliteBranch(key, self._db, self.tables, self._locks, wanted)
        self._db.execute("SAVEPOINT outlast_work")
        session = apsw.Session(self._db, "main")
        try:
            session.attach()
            refusal: Refuse | None = None
            result: bytes | None = None
            try:
                result = self._result(branch, payload)
            except _STORAGE_ERRORS:
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever an operation does, it only loses its vote
                refusal = self._refusal(error, key)
            finally:
                branch.end()
            if not self._db.in_transaction:
                # An interrupt, or a conflict clause that rolls back, took the whole transaction with it.
                raise TransactionLost(key, refusal or Refuse("operation_failed"))
            if refusal is None and self._db.status(apsw.SQLITE_DBSTATUS_DEFERRED_FKS)[0]:
                refusal = Refuse("constraint: a foreign key has no parent")
            changes = session.changeset() if refusal is None else b""
        finally:
            session.close()
            if self._db.in_transaction:
                self._db.execute("ROLLBACK TO outlast_work; RELEASE outlast_work")
        if refusal is not None:
            raise refusal
        return result, changes, wanted

    def _result(self, branch: SqliteBranch, payload: bytes) -> bytes | None:
        self._working, self._denied = True, None
        self._ends = time.monotonic() + self._settings.operation_within_s
        try:
            value = self._operations.run(branch, payload)
        finally:
            self._working = False
        if value is None:
            return None
        result = json_bytes(value)
        if len(result) > self._settings.result_limit_bytes:
            raise Refuse(f"result_too_large: {len(result)} bytes, at most {self._settings.result_limit_bytes}")
        return result

    def _refusal(self, error: Exception | SystemExit, key: BranchId) -> Refuse:
        if self._denied is not None:
            # The operation wanted what no operation may; whatever it made of the error is secondary.
            return Refuse(f"not_allowed: {self._denied}")
        match error:
            case Refuse():
                return error
            case apsw.InterruptError():
                return Refuse("too_slow", retryable=True)
            case apsw.ConstraintError():
                before, found, table = str(error).partition(GUARD_MESSAGE)
                if found:
                    return Refuse(f"locked: {table}", retryable=True)
                return Refuse(f"constraint: {before}")
        reason, retryable = refusal_of(error, f"branch {key.branch} of {key.gid}")
        return Refuse(reason, retryable=retryable)

    def _lock(self, changes: bytes, wanted: Wanted) -> None:
        """Adds what `changes` need to `wanted`. Raises `Refuse` when another branch holds one of the locks."""
        if len(changes) > self._settings.redo_limit_bytes:
            raise Refuse(f"changes_too_large: {len(changes)} bytes, at most {self._settings.redo_limit_bytes}")
        wanted.add_changes(self._db, self.tables, changes)
        try:
            for lock, mode in wanted.modes.items():
                self._locks.refuse_held(lock, mode)
        except Locked as error:
            raise Refuse(f"locked: {error}", retryable=True) from error

    # --------------------------------------------------------------------------------------------- SQLite calls these

    def _authorize(
        self, action: int, first: str | None, _second: str | None, database: str | None, _trigger: str | None
    ) -> int:
        if not self._working or action in _READS:
            return apsw.SQLITE_OK
        if action == apsw.SQLITE_PRAGMA and first in _READING_PRAGMAS:
            return apsw.SQLITE_OK
        if action in _WRITES and first is not None:
            why = self._why_not(first, database)
            if why is None:
                return apsw.SQLITE_OK
        else:
            name = str(apsw.mapping_authorizer_function[action]).removeprefix("SQLITE_").lower().replace("_", " ")
            why = f"{name}: an operation only reads and changes rows"
        self._denied = self._denied or why
        return apsw.SQLITE_DENY

    def _why_not(self, table: str, database: str | None) -> str | None:
        """Why an operation may not write to `table`; None if it may."""
        if database != "main" or table.startswith(OWN_PREFIX):
            return f"table {table} is not for operations"
        if table.lower() in self.tables or table == "sqlite_sequence":
            return None
        if table.startswith("sqlite_"):
            return "an operation cannot change the schema"
        return f"table {table} {self.unfit.get(table.lower(), 'is not for operations')}"

    def _is_too_slow(self) -> bool:
        return self._working and time.monotonic() > self._ends
