"""The application's own tables, in two databases of the PostgreSQL server: money that it moves from one to the other.

A move leaves an entry with its order id in both, so that a transaction that was done by half is seen.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import asyncpg

from participants.postgres_names import PREFIX

BOOKS: Final = 12
"""In either database, so few that moves meet each other's locks."""

INITIAL_CENTS: Final = 1_000_000_00

TAKE: Final = "UPDATE book SET cents = cents - $1 WHERE name = $2"
ENTER: Final = "INSERT INTO entry VALUES ($1, $2, $3, $4)"
"""Order id, gid, book, cents that left it."""

_SCHEMA: Final = """
CREATE TABLE book(name TEXT PRIMARY KEY, initial_cents BIGINT NOT NULL, cents BIGINT NOT NULL);
CREATE TABLE entry(
  order_id TEXT PRIMARY KEY, gid TEXT NOT NULL UNIQUE, name TEXT NOT NULL REFERENCES book(name), cents BIGINT NOT NULL
);
"""
_LOOK_S: Final = 20.0


class Found(NamedTuple):
    """What one database holds, at rest.

    entries: order id to gid. prepared: branches. locked: why its rows cannot be had; None: they can.
    wrong: books whose entries do not make up for what they lack.
    """

    entries: Mapping[str, str]
    initial_cents: int
    left_cents: int
    prepared: int
    locked: str | None
    wrong: tuple[str, ...]


async def lay_out(dsn: str) -> None:
    """Make and fill the tables of one database."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(_SCHEMA)
        rows = [(f"book-{number}", INITIAL_CENTS, INITIAL_CENTS) for number in range(BOOKS)]
        await connection.executemany("INSERT INTO book VALUES ($1, $2, $3)", rows)
    finally:
        await connection.close()


async def read(dsn: str) -> Found:
    """Look at one database. Raises what asyncpg raises."""
    connection = await asyncpg.connect(dsn, command_timeout=_LOOK_S)
    try:
        prepared = await connection.fetchval(
            "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database() AND starts_with(gid, $1)",
            PREFIX,
        )
        entries = await connection.fetch("SELECT order_id, gid, name, cents FROM entry")
        books = await connection.fetch("SELECT name, initial_cents, cents FROM book ORDER BY name")
        locked = await _locked(connection)
    finally:
        await connection.close()
    gone: dict[str, int] = {}
    for entry in entries:
        gone[entry["name"]] = gone.get(entry["name"], 0) + entry["cents"]
    return Found(
        entries={entry["order_id"]: entry["gid"] for entry in entries},
        initial_cents=sum(book["initial_cents"] for book in books),
        left_cents=sum(book["cents"] for book in books),
        prepared=prepared,
        locked=locked,
        wrong=tuple(
            f"{book['name']}: {book['cents']} left and {gone.get(book['name'], 0)} moved do not make the initial "
            f"{book['initial_cents']}"
            for book in books
            if book["cents"] + gone.get(book["name"], 0) != book["initial_cents"]
        ),
    )


async def _locked(connection: Any) -> str | None:
    try:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM book FOR UPDATE NOWAIT")
    except asyncpg.LockNotAvailableError as error:
        return str(error)
    return None
