"""Waiting for a condition, never for a time."""

import asyncio
from collections.abc import Awaitable, Callable


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
