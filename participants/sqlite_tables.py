"""What must be known of an SQLite schema before rows in it can be locked and changes to them replayed.

A changeset names a row by its primary key, so a table needs one that is declared and never NULL. Two branches must not
both claim a value of a UNIQUE column, and a parent row must not go away under a child that is prepared but not visible
yet, so the unique keys and the foreign keys of each table are read too.

A lock is on a *key*: a table, one of its unique indexes (or the primary key), and the values as text. Two values that
the index takes for equal must become the same text, whatever their storage class or collation. The text is written
twice, by `Key.text` here and by `Key.expression` in the guard triggers, and the two must agree.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import apsw

OWN_PREFIX: Final = "outlast_"
"""Of the tables and triggers that belong to the resource manager itself."""

Value = int | float | bytes | str | None
"""What a column of a row may hold."""

PRIMARY: Final = ""
"""The name of a table's primary key; the others are called after their index."""

_LOWER: Final = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
_COLLATIONS: Final = ("BINARY", "NOCASE", "RTRIM")


class SchemaUnfit(Exception):
    """Tables that branches cannot change safely. The text names each, and says what it lacks."""


def quoted(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A primary key or unique index. `columns` are positions in the table, in the order of the index."""

    table: str
    name: str
    columns: tuple[int, ...]
    column_names: tuple[str, ...]
    collations: tuple[str, ...]

    def text(self, values: Sequence[Value]) -> str | None:
        """The key that `values` (in the order of `columns`) make, or None: a NULL collides with nothing."""
        parts = []
        for value, collation in zip(values, self.collations, strict=True):
            if value is None:
                return None
            parts.append(_part(value, collation))
        return ",".join(parts)

    def expression(self, row: str) -> str:
        """SQL for `text` of the row called `row` (NEW or OLD); a NULL makes a text that is never locked."""
        return " || ',' || ".join(
            f"quote({_canonical(f'{row}.{quoted(name)}', collation)})"
            for name, collation in zip(self.column_names, self.collations, strict=True)
        )


def _part(value: Value, collation: str) -> str:
    if isinstance(value, str):
        if collation == "NOCASE":
            value = value.translate(_LOWER)
        elif collation == "RTRIM":
            value = value.rstrip(" ")
        # quote() ends a text at its first NUL; so both sides lock a little too much there, and never too little.
        return literal(value.partition("\0")[0])
    if isinstance(value, bytes):
        return f"X'{value.hex().upper()}'"
    if isinstance(value, float):
        # Its integer part, because all sides agree on that one: an integral real equals the integer, in an index too,
        # and others that share it are locked together, which is too much and harmless.
        return str(2**63 - 1) if value >= 2.0**63 else str(int(max(value, -(2.0**63))))
    return str(value)


def _canonical(column: str, collation: str) -> str:
    text = {"NOCASE": f"lower({column})", "RTRIM": f"rtrim({column}, ' ')"}.get(collation, column)
    return f"CASE typeof({column}) WHEN 'text' THEN {text} WHEN 'real' THEN CAST({column} AS INTEGER) ELSE {column} END"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A foreign key: the child's column positions, in the order of the parent key's columns."""

    columns: tuple[int, ...]
    parent: Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that branches may change. `keys[0]` is the primary key."""

    name: str
    columns: tuple[str, ...]
    keys: tuple[Key, ...]
    references: tuple[Reference, ...] = ()

    def guards(self) -> Mapping[str, str]:
        """Triggers that keep other connections from changing locked rows: name to SQL."""
        old, new = ([self._locked(key, row) for key in self.keys] for row in ("OLD", "NEW"))
        moved = []
        for key, was, will_be in zip(self.keys, old, new, strict=True):
            changed = " OR ".join(f"OLD.{quoted(name)} IS NOT NEW.{quoted(name)}" for name in key.column_names)
            moved.append(f"(({changed}) AND ({was} OR {will_be}))")
        # Whoever holds only a key share does not mind a change of the other columns.
        held = self._locked(self.keys[0], "OLD", " AND mode <> 'key_share'")
        return {
            name: f"CREATE TRIGGER {quoted(name)} AFTER {event} ON {quoted(self.name)} WHEN {' OR '.join(conditions)}"
            f" BEGIN SELECT RAISE(ABORT, {literal(GUARD_MESSAGE + self.name)}); END"
            for name, event, conditions in (
                (f"{OWN_PREFIX}guard_insert_{self.name}", "INSERT", new),
                (f"{OWN_PREFIX}guard_update_{self.name}", "UPDATE", [held, *moved]),
                (f"{OWN_PREFIX}guard_delete_{self.name}", "DELETE", old),
            )
        }

    def _locked(self, key: Key, row: str, mode: str = "") -> str:
        wanted = f"tbl = {literal(self.name)} AND idx = {literal(key.name)} AND key = {key.expression(row)}{mode}"
        return f"EXISTS(SELECT 1 FROM outlast_lock WHERE {wanted})"  # noqa: S608  # names of the schema, quoted


GUARD_MESSAGE: Final = "locked by a prepared transaction: "
"""How the guards' errors begin; the table's name follows."""


def read_tables(db: apsw.Connection) -> tuple[dict[str, Table], dict[str, str]]:
    """The tables of the main database that branches can change, by lower-case name; and why not, of the others."""
    listed = [
        (str(name), kind, bool(without_rowid))
        for schema, name, kind, _columns, without_rowid, _strict in db.execute("PRAGMA main.table_list")
        if schema == "main" and not str(name).startswith(("sqlite_", OWN_PREFIX))
    ]
    tables: dict[str, Table] = {}
    unfit: dict[str, str] = {}
    for name, kind, without_rowid in listed:
        if kind == "virtual":
            unfit[name.lower()] = "is a virtual table, whose changes cannot be recorded"
        elif kind == "shadow":
            unfit[name.lower()] = "belongs to a virtual table"
        elif kind == "table":
            read = _read_table(db, name, without_rowid)
            if isinstance(read, str):
                unfit[name.lower()] = read
            else:
                tables[name.lower()] = read
    fit: dict[str, Table] = {}
    for key, table in tables.items():
        references = _read_references(db, table, tables)
        if isinstance(references, str):
            unfit[key] = references
        else:
            fit[key] = Table(name=table.name, columns=table.columns, keys=table.keys, references=references)
    return fit, unfit


def _read_table(db: apsw.Connection, name: str, without_rowid: bool) -> Table | str:
    """The table without its foreign keys, or why it is unfit."""
    columns: list[str] = []
    primary: dict[int, int] = {}
    nullable: set[int] = set()
    for position, column, _type, not_null, _default, in_key, hidden in db.execute(
        f"PRAGMA main.table_xinfo({quoted(name)})"
    ):
        if hidden:
            return "has a generated column, which a replay would have to compute again"
        columns.append(column)
        if in_key:
            primary[in_key] = position
            if not not_null:
                nullable.add(position)
    if not primary:
        return "has no explicit primary key, so its changes cannot be recorded"
    own = tuple(primary[place] for place in sorted(primary))
    keys: list[Key] = []
    aliases_rowid = not without_rowid
    for _, index_name, unique, origin, _partial in db.execute(f"PRAGMA main.index_list({quoted(name)})"):
        if not unique:
            continue
        index = str(index_name)
        parts = [
            (position, collation.upper())
            for _, position, _, _, collation, is_key in db.execute(f"PRAGMA main.index_xinfo({quoted(index)})")
            if is_key
        ]
        if any(position < 0 for position, _ in parts):
            return f"has the unique index {index} on an expression, which cannot be locked"
        if any(collation not in _COLLATIONS for _, collation in parts):
            return f"has the unique index {index} with a collation of its own, which cannot be locked"
        if origin == "pk":
            aliases_rowid = False
        positions = tuple(position for position, _ in parts)
        keys.append(
            Key(
                table=name,
                name=PRIMARY if origin == "pk" else index,
                columns=positions,
                column_names=tuple(columns[position] for position in positions),
                collations=tuple(collation for _, collation in parts),
            )
        )
    if aliases_rowid:
        keys.append(Key(table=name, name=PRIMARY, columns=own, column_names=(columns[own[0]],), collations=("BINARY",)))
    elif nullable and not without_rowid:
        names = ", ".join(columns[position] for position in sorted(nullable))
        return f"allows NULL in its primary key ({names}): declare NOT NULL, INTEGER PRIMARY KEY or WITHOUT ROWID"
    keys.sort(key=lambda key: key.name != PRIMARY)
    return Table(name=name, columns=tuple(columns), keys=tuple(keys))


def _read_references(db: apsw.Connection, table: Table, tables: Mapping[str, Table]) -> tuple[Reference, ...] | str:
    """The foreign keys of `table`, or why it is unfit."""
    found: dict[int, list[tuple[str, str, str | None]]] = {}
    for number, _, parent, child_column, parent_column, *_ in db.execute(
        f"PRAGMA main.foreign_key_list({quoted(table.name)})"
    ):
        found.setdefault(number, []).append((parent, child_column, parent_column))
    positions = {column.lower(): position for position, column in enumerate(table.columns)}
    references = []
    for parts in found.values():
        parent = tables.get(parts[0][0].lower())
        if parent is None:
            return f"references {parts[0][0]}, which is missing or unfit"
        children = [positions[child.lower()] for _, child, _ in parts]
        if parts[0][2] is None:
            named = [name.lower() for name in parent.keys[0].column_names]
        else:
            named = [str(column).lower() for _, _, column in parts]
        key = next(
            (key for key in parent.keys if sorted(name.lower() for name in key.column_names) == sorted(named)), None
        )
        if key is None:
            return f"references columns of {parent.name} that are no unique key"
        child_of = dict(zip(named, children, strict=True))
        ordered = tuple(child_of[name.lower()] for name in key.column_names)
        for position, name in zip(ordered, key.column_names, strict=True):
            if _affinity(db, table.name, table.columns[position]) != _affinity(db, parent.name, name):
                return f"references {parent.name}.{name} from {table.columns[position]}, which has another type"
        references.append(Reference(columns=ordered, parent=key))
    return tuple(references)


def _affinity(db: apsw.Connection, table: str, column: str) -> str:
    """How SQLite converts what is stored in the column: the rules of its manual, in their order."""
    declared = (db.column_metadata("main", table, column)[0] or "").upper()
    if "INT" in declared:
        return "number"
    if any(word in declared for word in ("CHAR", "CLOB", "TEXT")):
        return "text"
    if "BLOB" in declared or not declared:
        return "none"
    # A real column stores 1 as 1.0, but both make the same key.
    return "number"


def require_fit(unfit: Mapping[str, str], left_alone: Iterable[str]) -> None:
    """Raises `SchemaUnfit` for tables that are neither fit nor said to be left alone."""
    allowed = {name.lower() for name in left_alone}
    bad = [f"table {name} {why}" for name, why in sorted(unfit.items()) if name not in allowed]
    if bad:
        raise SchemaUnfit("; ".join(bad))
