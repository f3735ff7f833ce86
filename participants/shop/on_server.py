"""The shop's operations on database servers: the same rules as on SQLite, in SQL that all of them understand.

Where SQLite refuses an order for goods that another order has locked, a server lets it wait for a while.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from participants.operations import Operations, Refuse
from participants.prepared import PreparedManager
from participants.settings import SettingsError
from participants.shop.storage import refuse_unless_an_id, refuse_unless_positive

_T = TypeVar("_T")

SCHEMAS: Final[Mapping[str, str]] = {
    "inventory": """
CREATE TABLE IF NOT EXISTS stock(sku VARCHAR(128) PRIMARY KEY, initial BIGINT NOT NULL, available BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS reservation(
  order_id VARCHAR(128) PRIMARY KEY, gid VARCHAR(64) NOT NULL UNIQUE,
  sku VARCHAR(128) NOT NULL, quantity BIGINT NOT NULL, FOREIGN KEY (sku) REFERENCES stock(sku)
);
""",
    "payments": """
CREATE TABLE IF NOT EXISTS account(
  account VARCHAR(128) PRIMARY KEY, initial_cents BIGINT NOT NULL, balance_cents BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS charge(
  order_id VARCHAR(128) PRIMARY KEY, gid VARCHAR(64) NOT NULL UNIQUE,
  account VARCHAR(128) NOT NULL, amount_cents BIGINT NOT NULL, FOREIGN KEY (account) REFERENCES account(account)
);
""",
    "orders": """
CREATE TABLE IF NOT EXISTS purchase(
  order_id VARCHAR(128) PRIMARY KEY, gid VARCHAR(64) NOT NULL UNIQUE, account VARCHAR(128) NOT NULL,
  sku VARCHAR(128) NOT NULL, quantity BIGINT NOT NULL, amount_cents BIGINT NOT NULL
);
""",
}
"""Statements that end with `;` at the end of a line, so that they can be run one by one."""


class Books(Protocol):
    """One branch's view of its database. Parameters stand as $1, $2, ... in their order, each once."""

    @property
    def gid(self) -> str:
        """Of the transaction."""
        ...

    async def one(self, sql: str, *arguments: Any) -> Sequence[Any] | None:
        """The first row."""
        ...

    async def change(self, sql: str, *arguments: Any) -> int:
        """How many rows were changed."""
        ...


def operations_on(books_of: Callable[[Any], Books]) -> Mapping[str, Operations]:
    """The operations of each service. `books_of`: makes `Books` of what a manager hands to its operations."""
    stock, money, orders = Operations(), Operations(), Operations()

    @stock.operation("reserve")
    async def reserve(branch: Any, sku: str, quantity: int, order_id: str | None = None) -> dict[str, int]:
        refuse_unless_positive(quantity=quantity)
        books = books_of(branch)
        order = await _order_of(books, "SELECT 1 FROM reservation WHERE order_id = $1", order_id)
        found = await books.one("SELECT available FROM stock WHERE sku = $1 FOR UPDATE", sku)
        if found is None:
            raise Refuse("unknown_sku")
        if found[0] < quantity:
            raise Refuse("out_of_stock")
        await books.change("UPDATE stock SET available = available - $1 WHERE sku = $2", quantity, sku)
        await books.change("INSERT INTO reservation VALUES ($1, $2, $3, $4)", order, books.gid, sku, quantity)
        return {"available": int(found[0]) - quantity}

    @money.operation("charge")
    async def charge(branch: Any, account: str, amount_cents: int, order_id: str | None = None) -> dict[str, int]:
        refuse_unless_positive(amount_cents=amount_cents)
        books = books_of(branch)
        order = await _order_of(books, "SELECT 1 FROM charge WHERE order_id = $1", order_id)
        found = await books.one("SELECT balance_cents FROM account WHERE account = $1 FOR UPDATE", account)
        if found is None:
            raise Refuse("unknown_account")
        if found[0] < amount_cents:
            raise Refuse("insufficient_funds")
        update = "UPDATE account SET balance_cents = balance_cents - $1 WHERE account = $2"
        await books.change(update, amount_cents, account)
        await books.change("INSERT INTO charge VALUES ($1, $2, $3, $4)", order, books.gid, account, amount_cents)
        return {"balance_cents": int(found[0]) - amount_cents}

    @orders.operation("place")
    async def place(
        branch: Any, account: str, sku: str, quantity: int, amount_cents: int, order_id: str | None = None
    ) -> dict[str, str]:
        refuse_unless_positive(quantity=quantity, amount_cents=amount_cents)
        books = books_of(branch)
        order = await _order_of(books, "SELECT 1 FROM purchase WHERE order_id = $1", order_id)
        insert = "INSERT INTO purchase VALUES ($1, $2, $3, $4, $5, $6)"
        await books.change(insert, order, books.gid, account, sku, quantity, amount_cents)
        return {"order_id": order}

    return {"inventory": stock, "payments": money, "orders": orders}


async def _order_of(books: Books, query: str, order_id: str | None) -> str:
    order = order_id if order_id is not None else books.gid
    refuse_unless_an_id(order)
    if await books.one(query, order) is not None:
        raise Refuse("duplicate_order")
    return order


# ------------------------------------------------------------------------------------------------ kinds of servers


class Kind(NamedTuple):
    """What a kind of server can do for a shop.

    manager: of a service, at a DSN. fill: creates the service's tables, and inserts rows into one of them unless their
    keys are there. read: the gids in doubt, and the rows of each query, of one instant.
    """

    manager: Callable[[str, str], PreparedManager]
    fill: Callable[[str, str, str, Sequence[Sequence[Any]]], Coroutine[Any, Any, None]]
    read: Callable[[str, Sequence[str]], Coroutine[Any, Any, tuple[list[str], list[list[tuple[Any, ...]]]]]]


def kind_of(dsn: str) -> Kind:
    """By the scheme of the DSN. Raises `SettingsError`."""
    scheme = dsn.partition(":")[0].lower()
    if scheme in ("postgresql", "postgres"):
        from participants.shop.on_postgres import POSTGRES

        return POSTGRES
    if scheme in ("mariadb", "mysql"):
        from participants.shop.on_mariadb import MARIADB

        return MARIADB
    raise SettingsError(f"a shop is on PostgreSQL, on MariaDB or in files, not on {scheme:.20}")


def fill_at(dsn: str, service: str, table: str, rows: Iterable[Sequence[Any]]) -> None:
    """Creates a service's tables, and inserts what `table` lacks of `rows`. Blocks."""
    wait_for(kind_of(dsn).fill(dsn, service, table, list(rows)))


def wait_for(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns, also where an event loop runs already, which it blocks: for seeds and audits only."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()
