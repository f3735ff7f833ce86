"""What an operation on a MariaDB database is given, and what it is kept from."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

Parameters = Sequence[Any] | Mapping[str, Any]

_WORDS: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE", "WITH", "VALUES", "CALL", "SHOW"})
"""What a statement of an operation may begin with: everything else is about sessions, transactions or the schema."""

_BEFORE: Final = re.compile(r"(?:\s|\(|/\*(?!!|M!).*?\*/|--\s[^\n]*\n|#[^\n]*\n)*", re.DOTALL)
_WORD: Final = re.compile(r"[A-Za-z]+")
_LOCKING: Final = re.compile(r"\bFOR\s+UPDATE\b|\bSHARE\s+MODE\b", re.IGNORECASE)


class Runs(Protocol):
    """Runs one statement: how many rows it changed, the last id it gave out, and its rows if it has any."""

    async def run(self, sql: str, parameters: Parameters = ()) -> tuple[int, int, Sequence[tuple[Any, ...]] | None]:
        """Raises what the driver raises."""
        ...


class MariaDbBranch:
    """The names of its branch, and statements within it. Parameters stand as %s, or as %(name)s.

    Every error of a statement is final, caught or not: the branch votes no. After most errors MariaDB would go on, and
    prepare the part of the work that was done.
    """

    __slots__ = ("_runs", "branch", "failure", "gid", "last_id", "only_reads")

    def __init__(self, gid: str, branch: str, runs: Runs) -> None:
        self.gid, self.branch = gid, branch
        self.last_id = 0
        """What AUTO_INCREMENT gave the last row that was inserted."""
        self.failure: BaseException | None = None
        self.only_reads = True
        """Nothing but plain SELECT so far; a function that it calls may have written all the same."""
        self._runs: Runs | None = runs

    async def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """Runs one statement; how many rows it changed. Raises what the driver raises.

        An UPDATE to values that are there already changes nothing, and is not counted.
        """
        return (await self._run(sql, parameters))[0]

    async def fetch(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        return list((await self._run(sql, parameters))[1] or ())

    async def one(self, sql: str, parameters: Parameters = ()) -> tuple[Any, ...] | None:
        """The first row of a query, or None."""
        rows = (await self._run(sql, parameters))[1]
        return rows[0] if rows else None

    async def _run(self, sql: str, parameters: Parameters) -> tuple[int, Sequence[tuple[Any, ...]] | None]:
        if self._runs is None:
            raise RuntimeError("the operation is over")
        if self.failure is not None:
            raise RuntimeError("an earlier statement of this branch failed: it can only be refused") from self.failure
        try:
            word = _first_word(sql)
            if word != "SELECT" or _LOCKING.search(sql):
                self.only_reads = False
            changed, last_id, rows = await self._runs.run(sql, parameters)
        except BaseException as error:
            self.failure = error
            raise
        self.last_id = last_id or self.last_id
        return changed, rows

    def end(self) -> None:
        """No more statements."""
        self._runs = None


def _first_word(sql: str) -> str:
    """Raises `ValueError` for what is not one statement on rows."""
    if ";" in sql.rstrip().removesuffix(";"):
        raise ValueError("one statement at a time, and values as parameters: there is a ; in it")
    start = _BEFORE.match(sql)
    found = _WORD.match(sql, start.end() if start else 0)
    word = found[0].upper() if found else ""
    if word not in _WORDS:
        raise ValueError(f"an operation only reads and changes rows: {word or sql[:20]!r} is not for it")
    return word
