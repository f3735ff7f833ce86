"""What the three services share: where their databases are, and how they are filled before anything runs."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import apsw

from participants.operations import Refuse
from participants.sqlite import SqliteBranch

_BUSY_MS: Final = 5000


def database(data_dir: str | os.PathLike[str], name: str) -> Path:
    """The path of a service's database; its folder is created."""
    folder = Path(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def fill(path: Path, schema: str, statement: str, rows: Iterable[tuple[str | int, ...]]) -> None:
    """Creates the tables and runs `statement` for each row, durably, in one transaction. Raises `apsw.Error`."""
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(_BUSY_MS)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        with connection:
            connection.execute(schema)
            connection.executemany(statement, rows)
    finally:
        connection.close()


def refuse_unless_positive(**amounts: int) -> None:
    """Raises `Refuse` for an amount that is zero or negative, or too large to be added to anything."""
    for name, amount in amounts.items():
        if not 0 < amount < 2**53:
            raise Refuse(f"bad_arguments: {name} must be positive and below 2**53")


def refuse_unless_an_id(order: str) -> None:
    """Raises `Refuse` for what is too short or too long to be an order's id, or that no database would store."""
    if not 0 < len(order) <= 128 or "\0" in order:
        raise Refuse("bad_arguments: order_id must have 1 to 128 characters")


def order_of(branch: SqliteBranch, table: str, order_id: str | None) -> str:
    """The order's id, its transaction's gid if it has none. Raises `Refuse` if `table` has it already."""
    order = order_id if order_id is not None else branch.gid
    refuse_unless_an_id(order)
    if branch.one(f"SELECT 1 FROM {table} WHERE order_id = ?", (order,)) is not None:  # noqa: S608  # a constant word
        raise Refuse("duplicate_order")
    return order
