"""Who runs a writer, and where it reports: a thread of its own beside an event loop, or whatever a test has.

A disk may stall for longer than an election takes, so nothing may wait for it on the event loop. What a writer does is
a *round*: take all there is, write it, and say when to be called again. Under virtual time there are no threads; then
a pump calls rounds when the simulation says that the disk is done.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Protocol

Round = Callable[[], float | None]
"""Does what there is to do: call it again after so many seconds (0: at once), or when woken (None). Never raises."""


class Pump(Protocol):
    """Runs rounds, one at a time."""

    def start(self, round_: Round) -> None:
        """Call it now, and whenever it or `wake` asks for that."""
        ...

    def wake(self) -> None:
        """There is something to do. From the owner's thread; cheap, often called."""
        ...

    def post(self, callback: Callable[[], None]) -> None:
        """Run the callback on the owner's thread. From any thread."""
        ...

    def stop(self) -> None:
        """Wait for the round that runs, and begin no other."""
        ...


class ThreadPump:
    """Rounds on a thread of their own, reports on an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._name = name
        self._woken = False
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self, round_: Round) -> None:
        """Start the thread."""
        assert self._thread is None
        # A daemon: a stalled disk must not keep a process alive that has decided to end.
        self._thread = threading.Thread(target=self._run, args=(round_,), name=self._name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to do."""
        if not self._woken:
            self._woken = True
            self._tokens.put(None)

    def post(self, callback: Callable[[], None]) -> None:
        """Run the callback on the event loop."""
        self._loop.call_soon_threadsafe(callback)

    def stop(self) -> None:
        """Wait for the round that runs, and end the thread."""
        if self._thread is not None:
            self._stopping = True
            self._tokens.put(None)
            self._thread.join()
            self._thread = None

    def _run(self, round_: Round) -> None:
        while not self._stopping:
            # Before the round: what comes while it runs may come too late for it.
            self._woken = False
            delay_s = round_()
            if delay_s != 0:
                with contextlib.suppress(queue.Empty):  # the time has passed
                    self._tokens.get(timeout=delay_s)
