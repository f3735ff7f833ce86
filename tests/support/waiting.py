"""Waiting for a condition, never for a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_until(holds: Callable[[], _T], what: str, *, within_s: float = 30.0) -> _T:
    """What `holds()` says once that is true; for tests without a loop. Fails, naming `what`, when it stays false."""
    deadline_s = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)
    return value


async def eventually(condition: Callable[[], object], *, within_s: float = 15.0) -> None:
    """Return once `condition()` is true. Raises `TimeoutError` naming it when it does not come true."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110  # any condition, of anything
                await asyncio.sleep(0.002)
    except TimeoutError as error:
        raise TimeoutError(f"not within {within_s:g} s: {condition}") from error


async def eventually_so(condition: Callable[[], Awaitable[object]], *, within_s: float = 15.0) -> None:
    """The same for a condition that has to be asked for. Raises `TimeoutError`."""
    try:
        async with asyncio.timeout(within_s):
            while not await condition():  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise TimeoutError(f"not within {within_s:g} s: {condition}") from error


async def turns(count: int = 5) -> None:
    """Let everything that is ready to run do so, `count` times; for tests that nothing happens."""
    for _ in range(count):
        await asyncio.sleep(0)
