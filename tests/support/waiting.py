"""Waiting for a condition, never for a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

_T = TypeVar("_T")


def wait_until(holds: Callable[[], _T], what: str, *, within_s: float = 30.0) -> _T:
    """What `holds()` says once that is true; for tests without a loop. Fails, naming `what`, when it stays false."""
    deadline_s = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)
    return value


async def eventually(
    look: Callable[[], Awaitable[_T]] | Callable[[], _T],
    what: str = "",
    *,
    within_s: float = 15.0,
    pause_s: float = 0.002,
) -> _T:
    """The first true value of `look`. Raises `TimeoutError`, naming `what`, when there is none in time."""
    try:
        async with asyncio.timeout(within_s):
            while True:
                found = look()
                value: Any = await found if isinstance(found, Awaitable) else found
                if value:
                    return cast("_T", value)
                await asyncio.sleep(pause_s)
    except TimeoutError as error:
        raise TimeoutError(f"not within {within_s:g} s: {what or look}") from error


async def turns(count: int = 5) -> None:
    """Let everything that is ready to run do so, `count` times; for tests that nothing happens."""
    for _ in range(count):
        await asyncio.sleep(0)
