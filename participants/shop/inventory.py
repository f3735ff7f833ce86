"""The stock: how many pieces of each SKU are there, and who has reserved which."""

import os
from collections.abc import Mapping
from typing import Final

from participants.manager import ResourceManager
from participants.operations import Operations, Refuse
from participants.shop.on_server import fill_at, kind_of
from participants.shop.places import dsn_of
from participants.shop.storage import database, fill, order_of, refuse_unless_positive
from participants.sqlite import SqliteBranch, SqliteManager

DATABASE: Final = "inventory.db"

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS stock(
  sku TEXT PRIMARY KEY NOT NULL, initial INTEGER NOT NULL, available INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reservation(
  order_id TEXT PRIMARY KEY NOT NULL, gid TEXT NOT NULL UNIQUE,
  sku TEXT NOT NULL REFERENCES stock(sku), quantity INTEGER NOT NULL
) WITHOUT ROWID;
"""

operations = Operations()


@operations.operation("reserve")
def reserve(branch: SqliteBranch, sku: str, quantity: int, order_id: str | None = None) -> dict[str, int]:
    """Takes `quantity` pieces out of stock; says how many are left. Refuses as unknown_sku, out_of_stock."""
    refuse_unless_positive(quantity=quantity)
    order = order_of(branch, "reservation", order_id)
    found = branch.one("SELECT available FROM stock WHERE sku = ?", (sku,))
    if found is None:
        raise Refuse("unknown_sku")
    available = int(found[0])
    if available < quantity:
        raise Refuse("out_of_stock")
    branch.execute("UPDATE stock SET available = ? WHERE sku = ?", (available - quantity, sku))
    branch.execute("INSERT INTO reservation VALUES (?, ?, ?, ?)", (order, branch.gid, sku, quantity))
    return {"available": available - quantity}


def manager(data_dir: str | os.PathLike[str]) -> ResourceManager:
    """The resource manager of the stock in `data_dir`."""
    if (dsn := dsn_of(data_dir, "inventory")) is not None:
        return kind_of(dsn).manager("inventory", dsn)
    return SqliteManager(database(data_dir, DATABASE), operations, schema=SCHEMA)


def seed(data_dir: str | os.PathLike[str], stock: Mapping[str, int]) -> None:
    """Puts pieces of new SKUs into stock; those that are there already stay as they are."""
    rows = [(sku, quantity, quantity) for sku, quantity in stock.items()]
    if (dsn := dsn_of(data_dir, "inventory")) is not None:
        fill_at(dsn, "inventory", "stock", rows)
    else:
        fill(database(data_dir, DATABASE), SCHEMA, "INSERT INTO stock VALUES (?, ?, ?) ON CONFLICT DO NOTHING", rows)
