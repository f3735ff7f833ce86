"""Connections to a database that is away are tried one at a time, and not all the time."""

import asyncio

import pytest

from participants.attempts import REST_S, Attempts
from participants.manager import Unavailable
from tests.support.waiting import eventually


class Database:
    """Counts who knocks. While `away` nobody gets in; while `slow` is set, nobody hears anything before it is."""

    def __init__(self) -> None:
        self.away = True
        self.slow: asyncio.Event | None = None
        self.knocks = 0

    async def connect(self) -> int:
        self.knocks += 1
        if self.slow is not None:
            await self.slow.wait()
        if self.away:
            raise Unavailable(f"attempt {self.knocks} found nobody")
        return self.knocks


async def knock(attempts: Attempts[int]) -> str | int:
    try:
        return await attempts.connect()
    except Unavailable as error:
        return str(error)


async def test_while_it_is_away_hardly_anybody_tries() -> None:
    database = Database()
    attempts = Attempts(database.connect)
    loop = asyncio.get_running_loop()
    assert await knock(attempts) == "attempt 1 found nobody"
    failed_at = loop.time()

    async def tries_again() -> str | None:
        said = await knock(attempts)
        return str(said) if database.knocks == 2 else None

    said = await eventually(tries_again)
    assert loop.time() >= failed_at + REST_S
    assert said == "attempt 2 found nobody"
    assert await knock(attempts) == said, "and the next one has to rest as well"
    assert database.knocks == 2


async def trying_slowly(database: Database, attempts: Attempts[int]) -> asyncio.Task[str | int]:
    """The attempt after one that has failed, under way, and nobody hears anything of it yet."""
    await knock(attempts)
    attempts._again_at = 0.0
    database.slow = asyncio.Event()
    trying = asyncio.create_task(knock(attempts))
    await eventually(lambda: database.knocks == 2)
    return trying


async def test_one_tries_for_all_and_the_others_hear_how_the_last_attempt_ended() -> None:
    database = Database()
    attempts = Attempts(database.connect)
    trying = await trying_slowly(database, attempts)
    assert [await knock(attempts) for _ in range(20)] == ["attempt 1 found nobody"] * 20
    assert database.knocks == 2
    database.away = False
    assert database.slow is not None
    database.slow.set()
    assert await trying == 2
    assert await asyncio.gather(*(knock(attempts) for _ in range(5))) == [3, 4, 5, 6, 7], "it is back, for all"


async def test_an_attempt_that_is_cut_short_lets_others_try() -> None:
    database = Database()
    attempts = Attempts(database.connect)
    trying = await trying_slowly(database, attempts)
    trying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trying
    database.away, database.slow = False, None
    assert await knock(attempts) == 3


async def test_while_it_is_there_everybody_connects_at_once() -> None:
    database = Database()
    database.away, database.slow = False, asyncio.Event()
    attempts = Attempts(database.connect)
    knocking = [asyncio.ensure_future(knock(attempts)) for _ in range(3)]
    await eventually(lambda: database.knocks == 3)
    database.slow.set()
    assert await asyncio.gather(*knocking) == [3, 3, 3]
