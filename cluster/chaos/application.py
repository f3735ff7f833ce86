"""`python -m cluster.chaos.application SEED NODES DSN DSN LIFE`: an application that moves money between two databases,
in transactions of its own, with the client that users have.

It says what it asks for and what it was told, one JSON object a line. Now and then it changes its mind, takes longer
than it has, or kills itself at a bad moment: at work, before it prepares a branch, or with one prepared and the commit
not asked for. LIFE: how often it has been started; it is part of its keys, which nobody may use again.
"""

import asyncio
import json
import logging
import os
import random
import signal
import sys
from typing import Any, Final

import asyncpg

from cluster.chaos.books import BOOKS, ENTER, TAKE
from cluster.chaos.load import MOVE_TIMEOUT_S
from coordinator.client import Client, ClientError
from participants.postgres_application import Postgres, PostgresWork

FROM, TO = "payments", "ledger"
"""The participants that look after the two databases."""

_WORKERS: Final = 3
_PAUSE_S: Final = (0.2, 1.2)
_CONNECT_S: Final = 1.0
_COMMAND_S: Final = 3.0
_MOMENTS: Final = ("working", "unprepared", "prepared")
_DIES, _CHANGES_MIND, _TAKES_TOO_LONG = 0.02, 0.06, 0.03


class _ChangedMind(Exception):
    """It does not want the transaction any more."""


class _Dies:
    """A database in whose branch the application dies at `moment`."""

    def __init__(self, source: Postgres, moment: str) -> None:
        self._source, self._moment = source, moment

    async def outlast_begin(self, gid: str, branch: str) -> "_DyingWork":
        return _DyingWork(await self._source.outlast_begin(gid, branch), self._moment)


class _DyingWork:
    def __init__(self, work: PostgresWork, moment: str) -> None:
        self._work, self._moment = work, moment

    @property
    def connection(self) -> Any:
        return self._work.connection

    async def prepare(self) -> None:
        if self._moment == "unprepared":
            _die()
        await self._work.prepare()
        _die()

    async def close(self) -> None:
        await self._work.close()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def say(**fields: Any) -> None:
    """One line; the line before may have been cut off by a death."""
    sys.stdout.write(f"\n{json.dumps(fields)}\n")
    sys.stdout.flush()


class Application:
    """What its workers share. source, target: pools of connections."""

    def __init__(self, client: Client, source: Any, target: Any) -> None:
        self._client, self._source, self._target = client, source, target

    async def work(self, rng: random.Random, name: str) -> None:
        """Moves money, without end."""
        turn = 0
        while True:
            turn += 1
            key = f"{name}-{turn}"
            say(asked=key)
            outcome, gid, detail = await self._one(rng, key)
            say(answered=key, outcome=outcome, gid=gid, detail=detail)
            await asyncio.sleep(rng.uniform(*_PAUSE_S))

    async def _one(self, rng: random.Random, key: str) -> tuple[str, str | None, str | None]:
        """One move: how it ended, as far as this application can know."""
        one, other = (f"book-{rng.randrange(BOOKS)}" for _ in range(2))
        cents = rng.randint(1, 500)
        moment = rng.choice(_MOMENTS) if rng.random() < _DIES else None
        source: Any = Postgres(self._source)
        transaction = self._client.transaction(timeout_s=MOVE_TIMEOUT_S, key=key)
        try:
            async with transaction as tx:
                place = source if moment in (None, "working") else _Dies(source, str(moment))
                async with tx.enlist(FROM, place) as connection:
                    await connection.execute(TAKE, cents, one)
                    await connection.execute(ENTER, key, tx.gid, one, cents)
                if moment == "working":
                    _die()
                if rng.random() < _TAKES_TOO_LONG:
                    await asyncio.sleep(2 * MOVE_TIMEOUT_S)
                async with tx.enlist(TO, self._target) as connection:
                    await connection.execute(TAKE, -cents, other)
                    await connection.execute(ENTER, key, tx.gid, other, -cents)
                if rng.random() < _CHANGES_MIND:
                    raise _ChangedMind
        except (
            ClientError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            OSError,
            TimeoutError,
            _ChangedMind,
        ) as error:
            detail: str | None = f"{type(error).__name__}: {error}"[:200]
        else:
            detail = None
        try:
            result = transaction.result
        except RuntimeError:
            return "unknown", None, detail  # it did not begin, as far as we know
        outcome = "committed" if result.committed else "aborted" if result.aborted else "unknown"
        return outcome, result.gid, detail


async def _pool(dsn: str) -> Any:
    """Connections to one database, once it is up."""
    while True:
        try:
            return await asyncpg.create_pool(
                dsn,
                min_size=1,
                max_size=_WORKERS,
                timeout=_CONNECT_S,
                command_timeout=_COMMAND_S,
                server_settings={"lock_timeout": "2000"},
            )
        except (asyncpg.PostgresError, OSError, TimeoutError):
            await asyncio.sleep(0.2)


async def main(seed: str, nodes: str, source: str, target: str, life: str) -> None:
    """Run until somebody ends it."""
    logging.basicConfig(level=logging.ERROR)
    async with Client(nodes.split(","), patience_s=MOVE_TIMEOUT_S) as client:
        application = Application(client, await _pool(source), await _pool(target))
        async with asyncio.TaskGroup() as group:
            for number in range(_WORKERS):
                rng = random.Random(f"application {seed} {life} {number}")
                group.create_task(application.work(rng, f"move-{life}-{number}"))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
