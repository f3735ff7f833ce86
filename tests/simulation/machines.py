"""An event loop for many machines: each has its own clock, can stand still, and can die between any two callbacks.

Whatever runs belongs to the *life* of a machine, which travels in a context variable: tasks, timers and callbacks that
begin in a life are of that life. When it ends, they never run again: no `finally`, no farewell, as by `kill -9`. When
the machine pauses, they wait, and all that has become due is there at once when it goes on, as after SIGSTOP.

Time is a number that jumps to the next timer. `loop.time()` tells a machine its own time, which may drift, and timers
are set by it. What depends on addresses in memory elsewhere (the order of sets of futures) depends on numbers here.
"""

import asyncio
import contextlib
import contextvars
import heapq
import random
from collections.abc import Callable, Coroutine
from typing import Any

AT_ONCE_MAX = 200_000
"""Callbacks without time passing; more are a loop that never ends."""


class NothingWillEverHappen(Exception):
    """Everybody waits, and no timer is set."""


class NeverEnds(Exception):
    """Callbacks call each other for ever, and no time passes."""


class Life:
    """From a start of a machine's process to its end."""

    __slots__ = ("alive", "context", "machine", "stops", "tasks")

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine
        self.alive = True
        self.stops = False
        self.tasks: list[asyncio.Task[Any]] = []
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, self)

    def dies(self) -> None:
        """Nothing of it runs any more; what has ended badly in it until now is told."""
        if self.alive:
            self.machine.loop.judge(self)
            self.alive = False


LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)


class Machine:
    """A computer with one process of ours. A `Clock`: its own, which drifts and is set by people."""

    def __init__(self, loop: "SimLoop", name: str, address: str) -> None:
        self.loop = loop
        self.name = name
        self.address = address
        self.life: Life | None = None
        self.powered = True
        """False after a power cut, until the next start: it does not even refuse a connection."""
        self.paused = False
        self.deferred: list[asyncio.Handle] = []
        self.rate = 1.0
        self._since = (0.0, 0.0)
        self.wall_offset_ms = 1_700_000_000_000
        self.lives = 0
        self.began_s = 0.0
        """When the last one did, by the world's time."""

    def local(self, now_s: float) -> float:
        own, true = self._since
        return own + (now_s - true) * self.rate

    def true(self, local_s: float) -> float:
        own, true = self._since
        return true + (local_s - own) / self.rate

    def drift(self, rate: float) -> None:
        now_s = self.loop.now_s
        self._since = (self.local(now_s), now_s)
        self.rate = rate

    def monotonic_s(self) -> float:
        return self.local(self.loop.now_s)

    def wall_ms(self) -> int:
        return self.wall_offset_ms + int(self.monotonic_s() * 1000)

    def begin(self) -> Life:
        """A process starts."""
        assert self.life is None
        self.powered = True
        self.lives += 1
        self.began_s = self.loop.now_s
        self.life = Life(self)
        return self.life

    def end(self, *, power: bool) -> None:
        """The process is gone."""
        if self.life is not None:
            self.life.dies()
            self.loop.dead.append(self.life)
            self.life = None
        self.deferred.clear()
        self.paused = False
        self.powered = not power

    def pause(self) -> None:
        self.paused = True

    def go_on(self) -> None:
        self.paused = False
        waiting, self.deferred = self.deferred, []
        self.loop.again(waiting)


class _Future(asyncio.Future[Any]):
    """Its hash is its number: sets of futures have one order in every run."""

    __slots__ = ("life", "number")

    def __init__(self, loop: "SimLoop") -> None:
        super().__init__(loop=loop)
        self.number = loop.next_number()
        self.life = LIFE.get()

    def __hash__(self) -> int:
        return self.number


class _Task(asyncio.Task[Any]):
    __slots__ = ("number",)

    def __init__(self, coroutine: Any, *, loop: "SimLoop", **how: Any) -> None:
        self.number = loop.next_number()
        self._log_destroy_pending = False
        super().__init__(coroutine, loop=loop, **how)

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.BaseEventLoop):
    """See the module's text. `executor_s` draws how long work on a thread takes."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now_s = 0.0
        self.rng = rng
        self.executor_s = (0.0002, 0.004)
        self.handled = 0
        self.errors: list[str] = []
        """What nobody has caught."""
        self.dead: list[Life] = []
        self.over = False
        self._numbers = 0
        self._heap: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = 0
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._note_error)
        self._tasks: list[asyncio.Task[Any]] = []

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _make_task(self, loop: Any, coroutine: Coroutine[Any, Any, Any], **how: Any) -> asyncio.Task[Any]:
        task = _Task(coroutine, loop=self, **how)
        life = LIFE.get() if how.get("context") is None else how["context"].get(LIFE)
        tasks = self._tasks if life is None else life.tasks
        tasks.append(task)
        if len(tasks) % 512 == 0:
            tasks[:] = [one for one in tasks if not one.done() or one._log_traceback]  # type: ignore[attr-defined]
        return task

    def judge(self, life: Life | None) -> None:
        """Tasks of this life (None: of nobody's) that an exception has ended, and nobody has looked: `errors`.

        Who is about to look, but has not had its turn yet, or gathers several, would have.
        """
        tasks = self._tasks if life is None else life.tasks
        failed: list[Any] = [task for task in tasks if task.done() and task._log_traceback]  # type: ignore[attr-defined]
        if not failed:
            return
        handles = [*self._ready, *(life.machine.deferred if life is not None else ())]
        told = {id(one) for handle in handles for one in handle._args or ()}  # type: ignore[attr-defined]
        gathers: list[Any] = [task._fut_waiter for task in tasks if not task.done()]  # type: ignore[attr-defined]
        told |= {id(one) for gathering in gathers for one in getattr(gathering, "_children", ())}
        who = "?" if life is None else life.machine.name
        for task in failed:
            error = task.exception()
            if id(task) not in told:
                self.errors.append(f"{who}: nobody heard how {task.get_coro().__qualname__} ended: {error!r}")

    def _note_error(self, _loop: Any, what: dict[str, Any]) -> None:
        # Of a future that is let go of, whoever does that: who was about to look at it may have died.
        life = getattr(what.get("future"), "life", None) or LIFE.get()
        if life is not None and not life.alive:
            return
        who = "?" if life is None else life.machine.name
        error = what.get("exception")
        self.errors.append(f"{who}: {what.get('message')}: {error!r}")

    # asyncio's.

    def time(self) -> float:
        life = LIFE.get()
        return self.now_s if life is None else life.machine.local(self.now_s)

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(self)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self.over:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        life = LIFE.get()
        if life is not None:
            # A hair later, so that it is that late by the machine's own clock, too, whatever was rounded.
            when = life.machine.true(when) + 1e-7
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._order += 1
        if not self.over:
            heapq.heappush(self._heap, (when, self._order, handle))
        return handle

    def _timer_handle_cancelled(self, handle: Any) -> None:
        pass

    def again(self, handles: list[asyncio.Handle]) -> None:
        """What had become due while a machine stood still."""
        self._ready.extend(handles)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Later, in one go, on this thread: threads are not a function of a seed."""
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - an executor passes on whatever it is
                self.call_later(self.rng.uniform(*self.executor_s), settle, None, error)
            else:
                self.call_later(self.rng.uniform(*self.executor_s), settle, result, None)

        def settle(result: Any, error: Exception | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        self.call_later(self.rng.uniform(*self.executor_s), work)
        return future

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass

    def _run_once(self) -> None:
        ready, heap = self._ready, self._heap
        if not ready:
            while heap and heap[0][2]._cancelled:
                heapq.heappop(heap)
            if not heap:
                raise NothingWillEverHappen
            if heap[0][0] > self.now_s:
                self.now_s = heap[0][0]
                self.handled = 0
        now_s = self.now_s
        while heap and heap[0][0] <= now_s:
            handle = heapq.heappop(heap)[2]
            if not handle._cancelled:
                ready.append(handle)
        count = len(ready)
        self.handled += count
        if self.handled > AT_ONCE_MAX:
            raise NeverEnds(f"at {now_s:.3f}: {[str(handle) for handle in list(ready)[:5]]}")
        for _ in range(count):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            life = handle._context.get(LIFE)  # type: ignore[attr-defined]
            if life is not None:
                if not life.alive:
                    continue
                if life.machine.paused:
                    life.machine.deferred.append(handle)
                    continue
            handle._run()

    def finish(self, lives: list[Life]) -> None:
        """The world ends: let go of all that still waits, quietly."""
        self.over = True
        self._ready.clear()
        self._heap.clear()
        tasks = [*self._tasks, *[task for life in [*lives, *self.dead] for task in life.tasks]]
        for task in tasks:
            if not task.done():
                with contextlib.suppress(BaseException):  # whatever a coroutine says at its end, nobody is there
                    task.get_coro().close()
        self._tasks.clear()
        self.dead.clear()
        self.close()
