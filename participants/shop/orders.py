"""The orders themselves: who ordered how much of what, for how much."""

import os
from typing import Final

from participants.manager import ResourceManager
from participants.operations import Operations
from participants.shop.on_server import fill_at, kind_of
from participants.shop.places import dsn_of
from participants.shop.storage import database, fill, order_of, refuse_unless_positive
from participants.sqlite import SqliteBranch, SqliteManager

DATABASE: Final = "orders.db"

# An order is called "purchase" here because ORDER is a word of SQL.
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS purchase(
  order_id TEXT PRIMARY KEY NOT NULL, gid TEXT NOT NULL UNIQUE, account TEXT NOT NULL,
  sku TEXT NOT NULL, quantity INTEGER NOT NULL, amount_cents INTEGER NOT NULL
) WITHOUT ROWID;
"""

operations = Operations()


@operations.operation("place")
def place(
    branch: SqliteBranch, account: str, sku: str, quantity: int, amount_cents: int, order_id: str | None = None
) -> dict[str, str]:
    """Writes the order down. Refuses as duplicate_order."""
    refuse_unless_positive(quantity=quantity, amount_cents=amount_cents)
    order = order_of(branch, "purchase", order_id)
    row = (order, branch.gid, account, sku, quantity, amount_cents)
    branch.execute("INSERT INTO purchase VALUES (?, ?, ?, ?, ?, ?)", row)
    return {"order_id": order}


def manager(data_dir: str | os.PathLike[str]) -> ResourceManager:
    """The resource manager of the orders in `data_dir`."""
    if (dsn := dsn_of(data_dir, "orders")) is not None:
        return kind_of(dsn).manager("orders", dsn)
    return SqliteManager(database(data_dir, DATABASE), operations, schema=SCHEMA)


def seed(data_dir: str | os.PathLike[str]) -> None:
    """Creates the table: a shop begins without orders."""
    if (dsn := dsn_of(data_dir, "orders")) is not None:
        fill_at(dsn, "orders", "purchase", ())
    else:
        fill(database(data_dir, DATABASE), SCHEMA, "SELECT 1", ())
