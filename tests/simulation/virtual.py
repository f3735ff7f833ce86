"""An event loop whose time is a number, and what else must be replaced so that a run depends on its seed alone."""

import asyncio
import contextlib
import random
import selectors
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from pysyncobj import syncobj as stock

T = TypeVar("T")


class NothingWillEverHappen(Exception):
    """Everybody waits, and no timer is set."""


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Waits for nobody: time jumps to the next timer instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise NothingWillEverHappen
        if timeout > 0:
            self.now_s += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in the order of their times, at once. Also a `Clock`."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        # A millionth of a second is the finest that matters; a coarser clock could leave a timer due for ever.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual.now_s

    def monotonic_s(self) -> float:
        return self._virtual.now_s

    def wall_ms(self) -> int:
        return int(self._virtual.now_s * 1000)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """At once, on this thread: threads are not a function of a seed."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - an executor passes on whatever it is
            future.set_exception(error)
        return future


@contextlib.contextmanager
def _pysyncobj_lives_in(loop: VirtualLoop, seed: int) -> Iterator[None]:
    before = stock.monotonicTime, stock.random, stock.PIPE_NOTIFIER_ENABLED
    stock.monotonicTime, stock.random, stock.PIPE_NOTIFIER_ENABLED = loop.time, random.Random(seed), False
    try:
        yield
    finally:
        stock.monotonicTime, stock.random, stock.PIPE_NOTIFIER_ENABLED = before


def run(seed: int, main: Callable[[VirtualLoop, random.Random], Coroutine[Any, Any, T]]) -> T:
    """Run `main` in a world of its own, that of `seed`."""
    loop = VirtualLoop()
    with _pysyncobj_lives_in(loop, seed), asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop, random.Random(seed)))
