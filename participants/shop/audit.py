"""Do the shop's three databases agree? Reads them as they are on disk, and compares every movement.

Within one database, sums must hold at any moment: what is there plus what moved is what there was. Between databases,
a transaction's movements must all be there or all be absent. Branches that are prepared are not wrong, only unfinished,
so their transactions are counted and left out of the comparison. The databases cannot be read at one instant, so what
looks wrong is looked at again, and reported if it still does.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import apsw

from participants.records import Records
from participants.shop import inventory, orders, payments
from participants.shop.on_server import kind_of, wait_for
from participants.shop.places import dsn_of

_BUSY_MS: Final = 5000
_FILES: Final = {"inventory": inventory.DATABASE, "payments": payments.DATABASE, "orders": orders.DATABASE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an audit found. Amounts are sums over all rows.

    in_doubt: prepared branches in the three databases; 0 once every transaction has ended.
    discrepancies: one sentence per thing that is wrong, with the gid where there is one.
    """

    orders: int
    reservations: int
    charges: int
    stock_initial: int
    stock_available: int
    sold: int
    balance_initial_cents: int
    balance_cents: int
    charged_cents: int
    in_doubt: int
    discrepancies: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong; branches may still be in doubt."""
        return not self.discrepancies

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """All three databases, read one after the other. Movements are keyed by gid, as the rows that they are."""

    stock: list[tuple[str, int, int]]
    accounts: list[tuple[str, int, int]]
    reservations: list[tuple[str, str, str, int]]
    charges: list[tuple[str, str, str, int]]
    purchases: list[tuple[str, str, str, str, int, int]]
    in_doubt: list[str]


def audit(data_dir: str | os.PathLike[str]) -> Report:
    """Compares the databases in `data_dir`; those of a stopped or a running shop.

    Raises `FileNotFoundError` when one of them is missing, and `apsw.Error`, or what a server's driver raises, when one
    cannot be read.
    """
    folder = Path(data_dir)
    first = _look(folder)
    unequal = _unequal(first)
    if unequal:
        # Something that was on its way during the first look has arrived by now; a real difference stays.
        second = _look(folder)
        still = _unequal(second)
        unequal = {gid: still[gid] for gid in unequal.keys() & still.keys()}
    return Report(
        orders=len(first.purchases),
        reservations=len(first.reservations),
        charges=len(first.charges),
        stock_initial=sum(row[1] for row in first.stock),
        stock_available=sum(row[2] for row in first.stock),
        sold=sum(row[3] for row in first.reservations),
        balance_initial_cents=sum(row[1] for row in first.accounts),
        balance_cents=sum(row[2] for row in first.accounts),
        charged_cents=sum(row[3] for row in first.charges),
        in_doubt=len(first.in_doubt),
        discrepancies=(
            *_sums("SKU", first.stock, first.reservations),
            *_sums("account", first.accounts, first.charges),
            *(sentence for gid in sorted(unequal) for sentence in unequal[gid]),
        ),
    )


def order_ids(data_dir: str | os.PathLike[str]) -> dict[str, str]:
    """The gid of every order that was placed, by order id. Raises what `audit` raises."""
    _, (rows,) = _read(Path(data_dir), "orders", "SELECT order_id, gid FROM purchase")
    return dict(rows)


def marks(data_dir: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """What transactions have left: by service, the gid of every order id. Raises what `audit` raises."""
    folder = Path(data_dir)
    tables = {"inventory": "reservation", "payments": "charge", "orders": "purchase"}
    found = {}
    for service, table in tables.items():
        _, (rows,) = _read(folder, service, f"SELECT order_id, gid FROM {table}")  # noqa: S608  # our own words
        found[service] = dict(rows)
    return found


def locks(data_dir: str | os.PathLike[str]) -> dict[str, int]:
    """How much each database holds locked for branches: rows of locks, or branches. Raises what `audit` raises."""
    folder = Path(data_dir)
    found = {}
    for service in _FILES:
        if dsn_of(folder, service) is not None:
            doubt, _ = _read(folder, service)
            found[service] = len(doubt)
        else:
            doubt, (rows,) = _read(folder, service, "SELECT 1 FROM outlast_lock")
            found[service] = len(doubt) + len(rows)
    return found


def _look(folder: Path) -> _Look:
    doubt, (stock, reservations) = _read(
        folder,
        "inventory",
        "SELECT sku, initial, available FROM stock",
        "SELECT order_id, gid, sku, quantity FROM reservation",
    )
    doubt2, (accounts, charges) = _read(
        folder,
        "payments",
        "SELECT account, initial_cents, balance_cents FROM account",
        "SELECT order_id, gid, account, amount_cents FROM charge",
    )
    doubt3, (purchases,) = _read(
        folder, "orders", "SELECT order_id, gid, account, sku, quantity, amount_cents FROM purchase"
    )
    return _Look(
        stock=stock,
        accounts=accounts,
        reservations=reservations,
        charges=charges,
        purchases=purchases,
        in_doubt=[*doubt, *doubt2, *doubt3],
    )


def _read(folder: Path, service: str, *queries: str) -> tuple[list[str], list[list[Any]]]:
    """The gids in doubt, and the rows of each query, all of one instant of one database."""
    dsn = dsn_of(folder, service)
    if dsn is not None:
        doubt, rows = wait_for(kind_of(dsn).read(dsn, queries))
        return doubt, list(rows)
    return _read_file(folder / _FILES[service], *queries)


def _read_file(path: Path, *queries: str) -> tuple[list[str], list[list[Any]]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: there is no shop, or it was never started")
    # Not read-only: after a crash, whoever opens the database first recovers its write-ahead log.
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(_BUSY_MS)
        connection.execute("BEGIN")
        # A shop that was seeded and never started has no branches yet.
        served = connection.table_exists("main", "outlast_branch")
        doubt = [each.gid for each in Records(connection).in_doubt()] if served else []
        rows = [connection.execute(query).fetchall() for query in queries]
        connection.execute("ROLLBACK")
        return doubt, rows
    finally:
        connection.close()


def _sums(what: str, states: Iterable[tuple[str, int, int]], moves: Iterable[tuple[str, str, str, int]]) -> list[str]:
    moved: dict[str, int] = {}
    for _, _, name, amount in moves:
        moved[name] = moved.get(name, 0) + amount
    wrong = []
    for name, initial, left in states:
        gone = moved.pop(name, 0)
        if left + gone != initial:
            wrong.append(f"{what} {name}: {left} left and {gone} moved do not make the initial {initial}")
        if left < 0:
            wrong.append(f"{what} {name}: {left} left, below zero")
    wrong += [f"{what} {name}: {amount} moved, but there is no such {what}" for name, amount in moved.items()]
    return wrong


def _unequal(look: _Look) -> Mapping[str, list[str]]:
    """What is wrong with each transaction that all three databases should agree on."""
    wrong: dict[str, list[str]] = {}
    reservations = _by_gid(look.reservations, lambda row: row[1], "reservation", wrong)
    charges = _by_gid(look.charges, lambda row: row[1], "charge", wrong)
    purchases = _by_gid(look.purchases, lambda row: row[1], "order", wrong)
    for gid in reservations.keys() | charges.keys() | purchases.keys():
        reservation, charge, purchase = reservations.get(gid), charges.get(gid), purchases.get(gid)
        complaints = [
            f"{gid}: no {name}"
            for name, row in (("reservation", reservation), ("charge", charge), ("order", purchase))
            if row is None
        ]
        if reservation is not None and charge is not None and purchase is not None:
            order, _, account, sku, quantity, amount_cents = purchase
            if {reservation[0], charge[0]} - {order, gid}:
                complaints.append(f"{gid}: order {order} was reserved as {reservation[0]} and charged as {charge[0]}")
            if reservation[2:] != (sku, quantity):
                complaints.append(f"{gid}: {quantity} {sku} ordered, {reservation[3]} {reservation[2]} reserved")
            if charge[2:] != (account, amount_cents):
                complaints.append(f"{gid}: {amount_cents} due from {account}, {charge[3]} charged to {charge[2]}")
        if complaints:
            wrong.setdefault(gid, []).extend(complaints)
    for gid in look.in_doubt:
        wrong.pop(gid, None)
    return wrong


def _by_gid(
    rows: Iterable[Any], gid_of: Callable[[Any], str], what: str, wrong: dict[str, list[str]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        gid = gid_of(row)
        if gid in found:
            wrong.setdefault(gid, []).append(f"{gid}: more than one {what}")
        found[gid] = row
    return found
