"""The money: a balance per account, in integer cents, and what was charged to it."""

import os
from collections.abc import Mapping
from typing import Final

from participants.manager import ResourceManager
from participants.operations import Operations, Refuse
from participants.shop.on_server import fill_at, kind_of
from participants.shop.places import dsn_of
from participants.shop.storage import database, fill, order_of, refuse_unless_positive
from participants.sqlite import SqliteBranch, SqliteManager

DATABASE: Final = "payments.db"

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS account(
  account TEXT PRIMARY KEY NOT NULL, initial_cents INTEGER NOT NULL, balance_cents INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS charge(
  order_id TEXT PRIMARY KEY NOT NULL, gid TEXT NOT NULL UNIQUE,
  account TEXT NOT NULL REFERENCES account(account), amount_cents INTEGER NOT NULL
) WITHOUT ROWID;
"""

operations = Operations()


@operations.operation("charge")
def charge(branch: SqliteBranch, account: str, amount_cents: int, order_id: str | None = None) -> dict[str, int]:
    """Takes money off an account; says what is left. Refuses as unknown_account, insufficient_funds."""
    refuse_unless_positive(amount_cents=amount_cents)
    order = order_of(branch, "charge", order_id)
    found = branch.one("SELECT balance_cents FROM account WHERE account = ?", (account,))
    if found is None:
        raise Refuse("unknown_account")
    balance_cents = int(found[0])
    if balance_cents < amount_cents:
        raise Refuse("insufficient_funds")
    left_cents = balance_cents - amount_cents
    branch.execute("UPDATE account SET balance_cents = ? WHERE account = ?", (left_cents, account))
    branch.execute("INSERT INTO charge VALUES (?, ?, ?, ?)", (order, branch.gid, account, amount_cents))
    return {"balance_cents": left_cents}


def manager(data_dir: str | os.PathLike[str]) -> ResourceManager:
    """The resource manager of the accounts in `data_dir`."""
    if (dsn := dsn_of(data_dir, "payments")) is not None:
        return kind_of(dsn).manager("payments", dsn)
    return SqliteManager(database(data_dir, DATABASE), operations, schema=SCHEMA)


def seed(data_dir: str | os.PathLike[str], balances_cents: Mapping[str, int]) -> None:
    """Opens new accounts; those that are there already stay as they are."""
    rows = [(account, cents, cents) for account, cents in balances_cents.items()]
    if (dsn := dsn_of(data_dir, "payments")) is not None:
        fill_at(dsn, "payments", "account", rows)
    else:
        fill(database(data_dir, DATABASE), SCHEMA, "INSERT INTO account VALUES (?, ?, ?) ON CONFLICT DO NOTHING", rows)
