"""Locks that outlive a transaction of the database: rows in a table, held by prepared branches.

A branch is prepared by doing its work, recording the changes, and rolling back; so the database itself holds no lock
for it. These do. Nobody waits for one: a branch that meets a lock is refused at once, retryable, and so no deadlock can
span two participants.

Four modes, as PostgreSQL's row locks have them, so that an order may refer to a customer whose balance changes:

    key_share   the row's key is to stay: taken on the parents of new rows
    share       the row is to stay as it is: taken on request, by a branch that decides by what it reads
    update      columns outside the key change
    exclusive   the row comes, goes, or changes its key

A lock is on a key (see `sqlite_tables`), and may be on one that no row has: that is how two branches are kept from
inserting the same row.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Final, NamedTuple, cast

import apsw

from participants.sqlite_tables import Key, Table, Value, quoted

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS outlast_lock(
  tbl TEXT NOT NULL, idx TEXT NOT NULL, key TEXT NOT NULL, holder INTEGER NOT NULL, mode TEXT NOT NULL,
  PRIMARY KEY(tbl, idx, key, holder)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS outlast_lock_holder ON outlast_lock(holder);
"""


_Row = Sequence[object]
"""Values, and `apsw.no_change` where a changeset leaves one out."""


class Mode(IntEnum):
    """Each mode excludes all that the ones before it exclude."""

    KEY_SHARE = 1
    SHARE = 2
    UPDATE = 3
    EXCLUSIVE = 4


_EXCLUDES: Final[Mapping[Mode, frozenset[Mode]]] = {
    Mode.KEY_SHARE: frozenset((Mode.EXCLUSIVE,)),
    Mode.SHARE: frozenset((Mode.UPDATE, Mode.EXCLUSIVE)),
    Mode.UPDATE: frozenset((Mode.SHARE, Mode.UPDATE, Mode.EXCLUSIVE)),
    Mode.EXCLUSIVE: frozenset(Mode),
}
_MODES: Final = {mode.name.lower(): mode for mode in Mode}


class Lock(NamedTuple):
    """What is locked: the values of one unique key."""

    table: str
    key: str
    text: str


class Locked(Exception):
    """Another prepared branch holds a lock that excludes this one. The text is the table's name."""


class Wanted:
    """The locks that one branch needs, the strongest mode of each."""

    __slots__ = ("modes",)

    def __init__(self) -> None:
        self.modes: dict[Lock, Mode] = {}

    def add(self, key: Key, values: Sequence[Value], mode: Mode) -> None:
        """Wants `mode` on the key that `values` make, unless one of them is NULL: that collides with nothing."""
        text = key.text(values)
        if text is not None:
            lock = Lock(key.table, key.name, text)
            self.modes[lock] = max(mode, self.modes.get(lock, mode))

    def add_changes(self, db: apsw.Connection, tables: Mapping[str, Table], changeset: bytes) -> None:
        """Wants what a changeset needs, whose changes are rolled back again in `db`."""
        for change in apsw.Changeset.iter(changeset):
            table = tables[change.name.lower()]
            old, new = change.old, change.new
            if old is not None and new is not None:
                self._add_update(db, table, old, new)
            elif new is not None:
                for key in table.keys:
                    self.add(key, _told(new, key.columns), Mode.EXCLUSIVE)
                for reference in table.references:
                    self.add(reference.parent, _told(new, reference.columns), Mode.KEY_SHARE)
            elif old is not None:
                for key in table.keys:
                    self.add(key, _told(old, key.columns), Mode.EXCLUSIVE)

    def _add_update(self, db: apsw.Connection, table: Table, old: _Row, new: _Row) -> None:
        primary = table.keys[0]
        own = _told(old, primary.columns)
        self.add(primary, own, Mode.UPDATE)
        moved = [key for key in table.keys if _changed(new, key.columns)]
        referring = [reference for reference in table.references if _changed(new, reference.columns)]
        if not moved and not referring:
            return
        # A changeset leaves out what did not change, but a key of several columns needs all of them.
        before = _row(db, table, own)
        after = [was if is_now is apsw.no_change else is_now for was, is_now in zip(before, new, strict=True)]
        for key in moved:
            self.add(key, _told(before, key.columns), Mode.EXCLUSIVE)
            self.add(key, _told(after, key.columns), Mode.EXCLUSIVE)
        for reference in referring:
            self.add(reference.parent, _told(after, reference.columns), Mode.KEY_SHARE)


def _changed(new: _Row, columns: Sequence[int]) -> bool:
    return any(new[at] is not apsw.no_change for at in columns)


def _told(row: _Row, columns: Sequence[int]) -> list[Value]:
    values: list[Value] = []
    for at in columns:
        value = row[at]
        assert value is not apsw.no_change, "a changeset always tells the primary key, and all of a whole row"
        values.append(cast("Value", value))
    return values


def _row(db: apsw.Connection, table: Table, primary: Sequence[Value]) -> Sequence[Value]:
    """The row as it is committed."""
    columns = ", ".join(map(quoted, table.columns))
    where = " AND ".join(f"{quoted(name)} = ?" for name in table.keys[0].column_names)
    rows = db.execute(f"SELECT {columns} FROM main.{quoted(table.name)} WHERE {where}", primary)  # noqa: S608  # quoted
    return next(iter(rows))


class Locks:
    """The table of locks in one open database. Every method raises what apsw raises."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._db = connection

    def create(self) -> None:
        """Creates what is missing."""
        self._db.execute(_SCHEMA)

    def refuse_held(self, lock: Lock, mode: Mode) -> None:
        """Raises `Locked` if a prepared branch holds `lock` in a mode that excludes `mode`."""
        for (held,) in self._db.execute("SELECT mode FROM outlast_lock WHERE tbl = ? AND idx = ? AND key = ?", lock):
            if mode in _EXCLUDES[_MODES[str(held)]]:
                raise Locked(lock.table)

    def take(self, wanted: Wanted, holder: int) -> None:
        """Stores locks that nobody's lock excludes."""
        self._db.executemany(
            "INSERT INTO outlast_lock VALUES (?, ?, ?, ?, ?)",
            [(*lock, holder, mode.name.lower()) for lock, mode in wanted.modes.items()],
        )

    def release(self, holder: int) -> None:
        """Drops all locks of a branch that ended."""
        self._db.execute("DELETE FROM outlast_lock WHERE holder = ?", (holder,))
