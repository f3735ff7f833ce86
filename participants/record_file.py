"""Records of branches in an SQLite file of their own, for resource managers whose data lives somewhere else.

All requests that wait share one transaction, and so one sync; while it runs, the next ones collect.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import apsw

from participants.manager import Unavailable
from participants.records import Records

_T = TypeVar("_T")


class AlreadyOpen(Exception):
    """Another resource manager has this file open."""


def lock_exclusively(path: Path) -> int:
    """Takes the lock beside `path` and returns the descriptor that holds it. Raises `AlreadyOpen`, and `OSError`."""
    descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyOpen(f"{path} is in use by another resource manager") from None
    return descriptor


class RecordFile:
    """The records in `path`. Used from one event loop; the file is touched in a thread only."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).resolve()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"records-{self._path.name}")
        self._waiting: list[tuple[Callable[[Records], Any], asyncio.Future[Any]]] = []
        self._flush: asyncio.Task[None] | None = None
        self._db: apsw.Connection | None = None
        self._records: Records | None = None
        self._lock_file: int | None = None

    async def open(self) -> None:
        """Raises `AlreadyOpen`, and `apsw.Error` for what is no database."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    def _open(self) -> None:
        self._lock_file = lock_exclusively(self._path)
        self._connect()

    def _connect(self) -> Records:
        self._db = apsw.Connection(str(self._path))
        self._db.pragma("journal_mode", "wal")
        self._db.pragma("synchronous", "full")
        self._records = Records(self._db)
        with self._db:
            self._records.create()
        return self._records

    async def transact(self, function: Callable[[Records], _T]) -> _T:
        """What `function` returns, once it is durable. It runs in a thread, and must not wait for anything.

        Raises `Unavailable` when nothing is known of it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        self._waiting.append((function, future))
        if self._flush is None:
            self._flush = loop.create_task(self._flush_all())
        return await future

    async def _flush_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            together, self._waiting = self._waiting, []
            results, error = await loop.run_in_executor(self._thread, self._run, [each for each, _ in together])
            for (_, future), result in zip(together, results, strict=True):
                if future.done():
                    continue
                if error is not None:
                    future.set_exception(Unavailable(f"{self._path}: {error}"))
                else:
                    future.set_result(result)
        self._flush = None

    def _run(self, functions: list[Callable[[Records], Any]]) -> tuple[list[Any], Exception | None]:
        try:
            records = self._records or self._connect()
            assert self._db is not None
            with self._db:
                results = [function(records) for function in functions]
            return results, None
        except apsw.Error as error:
            self._disconnect()
            return [None] * len(functions), error

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close(True)
        self._db = self._records = None

    async def close(self) -> None:
        """Waits for what is under way."""
        if self._flush is not None:
            await self._flush
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None
