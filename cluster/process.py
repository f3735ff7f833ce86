"""One process of ours that runs on its own: started, found again, signalled, seen to end.

Processes are known by pid *and* start time, because a pid alone may long belong to somebody else. Whoever reads the
pair from a file can therefore signal the process without having started it, and never hits a stranger.

A process is *tethered* or not. A tethered one ends when its owner does, however the owner dies (see `tether.py`). One
that is not lives in a session of its own and outlasts the shell that it was started from.

Everything here polls. Waiting for a child by signal or by file descriptor would tie a process to one event loop, and
processes are handed from one loop to the next by tests, and from one command to the next by users.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

POLL_S: Final = 0.01
"""Seconds between looks at whether a process has ended."""

TERM_GRACE_S: Final = 10.0
"""Seconds that a process has between being asked to stop and being killed."""

_KILL_WAIT_S: Final = 10.0
_SIGNAL_S: Final = 30.0
"""Until a signal that cannot be caught has done its work: a thread that waits for a slow disk hears none before."""


class ProcessTrouble(Exception):
    """A process could not be started, or did not do what it was started for. The text says what to do."""


class Identity(NamedTuple):
    """A process for as long as the machine is up: no later process has the same pair.

    started: clock ticks between the machine's start and its own.
    """

    pid: int
    started: int

    @staticmethod
    def of(pid: int) -> "Identity | None":
        """The identity of the process that has `pid` now; None when there is none, or only its remains (a zombie)."""
        stat = _stat(pid)
        return None if stat is None or stat[0] in "ZX" else Identity(pid, stat[1])

    @staticmethod
    def mine() -> "Identity":
        """This process."""
        mine = Identity.of(os.getpid())
        assert mine is not None, "a running process is found in /proc"
        return mine

    @staticmethod
    def read(word: str) -> "Identity":
        """The inverse of `word`."""
        pid, started = word.split(":")
        return Identity(int(pid), int(started))

    @property
    def word(self) -> str:
        """PID:STARTED, for command lines."""
        return f"{self.pid}:{self.started}"

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (or is stopped)."""
        return Identity.of(self.pid) == self

    @property
    def paused(self) -> bool:
        """Whether it is stopped by SIGSTOP, with every thread: one after the other they stand still."""
        if not self.alive:
            return False
        try:
            threads = [_stat(f"{self.pid}/task/{thread}") for thread in os.listdir(f"/proc/{self.pid}/task")]
        except FileNotFoundError:
            return False
        # One that has just ended has no state.
        return all(stat is None or stat[0] == "T" for stat in threads) and self.alive

    def signal(self, number: signal.Signals) -> bool:
        """Send it a signal; False when it is gone."""
        if not self.alive:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def _stat(task: int | str) -> tuple[str, int] | None:
    """State letter and start time (clock ticks since the machine's own) of a process, or a thread (`PID/task/TID`)."""
    try:
        text = Path(f"/proc/{task}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run: `python -m MODULE ARGUMENTS...`, its output appended to `log`."""

    module: str
    arguments: tuple[str, ...]
    log: Path


class Process:
    """One program, which may be started, ended and started again. `name` is for messages.

    Methods that end it return when it is gone, unless they say otherwise. Signals are sent before the first `await`, so
    the moment of a kill is the moment of the call.
    """

    def __init__(self, name: str, program: Program, *, tether: Identity | None) -> None:
        self.name = name
        self.program = program
        self._tether = tether
        self._child: subprocess.Popen[bytes] | None = None
        self._identity: Identity | None = None

    @property
    def identity(self) -> Identity | None:
        """The running process; None when there is none."""
        if self._identity is not None and self._identity.alive:
            return self._identity
        if self._child is not None:
            # It is gone or a zombie, which only its parent can let go: this does not block.
            self._child.wait()
            self._child = None
        return None

    @property
    def alive(self) -> bool:
        """Whether it runs; a paused one does."""
        return self.identity is not None

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        identity = self.identity
        return None if identity is None else identity.pid

    @property
    def paused(self) -> bool:
        """Whether it is stopped by SIGSTOP."""
        return self._identity is not None and self._identity.paused

    def adopt(self, identity: Identity | None) -> None:
        """Take over a process that was started by somebody else, from this same program; not while one runs here."""
        if identity != self._identity and not self.alive:
            self._identity = identity

    def spawn(self, *more: str) -> Identity:
        """Start it, with `more` arguments this once. Raises `ProcessTrouble` when it runs or cannot be started."""
        if self.alive:
            raise ProcessTrouble(f"{self.name} is already running (pid {self.pid})")
        # -P: the folder that the user happens to be in must not shadow our packages.
        command = [sys.executable, "-P", "-m"]
        if self._tether is not None:
            command += ["cluster.tether", self._tether.word]
        command += [self.program.module, *self.program.arguments, *more]
        self.program.log.parent.mkdir(parents=True, exist_ok=True)
        with self.program.log.open("ab") as log:
            try:
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                    # Ctrl-C in a terminal goes to a whole process group: only the owner shall hear it. A tethered
                    # process stays in the session, so that the kernel wakes a paused one (SIGHUP, SIGCONT) when the
                    # owner dies and the group is orphaned.
                    process_group=0 if self._tether is not None else None,
                    start_new_session=self._tether is None,
                )
            except OSError as error:
                raise ProcessTrouble(f"{self.name} could not be started: {error.strerror}") from error
        # A child that has ended at once still has a row in /proc until it is reaped here.
        stat = _stat(self._child.pid)
        assert stat is not None, "a child that was not waited for is found in /proc"
        self._identity = Identity(self._child.pid, stat[1])
        return self._identity

    async def kill(self) -> bool:
        """SIGKILL. True when it was running; it is gone on return."""
        identity = self.identity
        if identity is None or not identity.signal(signal.SIGKILL):
            return False
        await self.gone(within_s=_KILL_WAIT_S)
        return True

    async def stop(self, *, grace_s: float = TERM_GRACE_S) -> bool:
        """SIGTERM, and kill -9 when it is still there after `grace_s`. True when it ended by itself in time.

        When this is cut short, what is still there is killed: nobody will be left to try again.
        """
        identity = self.identity
        if identity is None:
            return True
        identity.signal(signal.SIGTERM)
        identity.signal(signal.SIGCONT)  # a paused process hears nothing but this and SIGKILL
        try:
            await self.gone(within_s=grace_s)
        except TimeoutError:
            await self.kill()
            return False
        except asyncio.CancelledError:
            identity.signal(signal.SIGKILL)
            self._wait_for(lambda: not self.alive, "was sent SIGKILL and is still there")
            raise
        return True

    def pause(self) -> bool:
        """SIGSTOP; on return it stands still. False when it is not running."""
        identity = self.identity
        if identity is None or not identity.signal(signal.SIGSTOP):
            return False
        self._wait_for(lambda: identity.paused or not identity.alive, "was sent SIGSTOP and does not stand still")
        return identity.alive

    def resume(self) -> bool:
        """SIGCONT. False when it is not running."""
        identity = self.identity
        return identity is not None and identity.signal(signal.SIGCONT)

    async def gone(self, *, within_s: float) -> None:
        """Return once it has ended. Raises `TimeoutError`."""
        deadline_s = time.monotonic() + within_s
        while self.alive:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self.name} (pid {self.pid}) is still there after {within_s:g} s")
            await asyncio.sleep(POLL_S)

    def _wait_for(self, holds: Callable[[], bool], otherwise: str) -> None:
        """Block until a signal that cannot be caught has done its work: well below a millisecond, as a rule."""
        deadline_s = time.monotonic() + _SIGNAL_S
        while not holds():
            if time.monotonic() > deadline_s:
                raise ProcessTrouble(f"{self.name} (pid {self.pid}) {otherwise}")
            time.sleep(0.0005)

    def log_tail(self, lines: int = 5) -> str:
        """The last lines that it wrote, for messages about why it is not there."""
        try:
            with self.program.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def last_words(self) -> str:
        """Why it ended, as far as it said: its last line that only an end can be behind, or simply its last one."""
        lines = self.log_tail(20).splitlines()
        # Connections that are closed on the way out are told of after the reason.
        grave = (line for line in reversed(lines) if not any(f" {level} " in line for level in ("DEBUG", "INFO")))
        return next(grave, lines[-1] if lines else "").strip()


def arguments(*parts: object) -> tuple[str, ...]:
    """Words of a command line."""
    return tuple(str(part) for part in parts)


async def stop_all(processes: Sequence[Process], *, grace_s: float = TERM_GRACE_S) -> None:
    """Stop them side by side."""
    await asyncio.gather(*(process.stop(grace_s=grace_s) for process in processes))
