"""What database servers of one's own have in common.

A server lives in a folder: its data, its socket, its log. It may be stopped, or killed with all of its children, and
started again in the same place. Database servers refuse to run as root, so root runs them as an unprivileged user, who
must be able to reach the folder and the programs.

A server ends when the process that started it is gone, even by kill -9: a small process watches both (`watch`).
"""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cluster.process import Identity, ProcessTrouble

SOCKET_PATH_LIMIT: Final = 100
"""Characters of a socket's path, which the system limits to 107."""

_POLL_S: Final = 0.01
_READY_S: Final = 60.0
_SETUP_S: Final = 120.0
_GONE_S: Final = 30.0
_STATEMENT_S: Final = 60.0


class DatabaseServer(ABC):
    """One server. `folder` is created, and given to the user that the server runs as.

    Raises `ProcessTrouble` wherever something does not work; the text says what to do.
    """

    users: Sequence[str] = ("nobody",)
    """Who may run it when root starts it: the first that exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.data = self.folder / "data"
        self.log = self.folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    # --------------------------------------------------------------------------------------------- each has its own

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages."""

    @abstractmethod
    def setup_command(self) -> list[str]:
        """Fills `self.data`, which does not exist yet."""

    @abstractmethod
    def command(self) -> list[str]:
        """Runs the server in the foreground."""

    @abstractmethod
    def dsn(self, database: str) -> str:
        """Where a database is, for the owner of all. It holds no secret."""

    @abstractmethod
    async def create_database(self, name: str) -> str:
        """A new empty database; its DSN. Raises `ProcessTrouble`."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Does it take connections? Asked while its process runs."""

    stop_signal: signal.Signals = signal.SIGTERM
    """Ends it in good order, at once."""

    # --------------------------------------------------------------------------------------------- life

    @property
    def pid(self) -> int | None:
        """Of the running server."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Start it, in a new folder or where it was before; on return it takes connections."""
        if self.pid is not None:
            raise ProcessTrouble(f"{self.name} in {self.folder} is already running (pid {self.pid})")
        if not self.data.exists():
            await self._set_up()
        self._process = self._spawn(self.command())
        self._watch_over(self._process.pid)
        deadline_s = time.monotonic() + _READY_S
        while not self.is_ready():
            if self._process.poll() is not None:
                raise ProcessTrouble(f"{self.name} ended before it took connections: {self._said()}")
            if time.monotonic() > deadline_s:
                await self.kill()
                raise ProcessTrouble(f"{self.name} takes no connections after {_READY_S:g} s: {self._said()}")
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """End it in good order; after a while, kill it."""
        if self._process is not None and self.pid is not None:
            self._process.send_signal(self.stop_signal)
            if not await self._gone([self._process.pid]):
                await self.kill()
        self._let_go()

    async def kill(self) -> None:
        """SIGKILL, to the server and all of its children at once; on return they are gone."""
        if self._process is None or self.pid is None:
            return
        # Its children have sessions of their own, so there is no group that could be killed.
        found = [Identity.of(pid) for pid in (self._process.pid, *children_of(self._process.pid))]
        killed = [identity for identity in found if identity is not None]
        for identity in killed:
            identity.signal(signal.SIGKILL)
        if not await self._gone([identity.pid for identity in killed]):
            raise ProcessTrouble(f"{self.name} was sent SIGKILL and is still there after {_GONE_S:g} s")
        self._let_go()

    def remove(self) -> None:
        """Delete the folder of a stopped server."""
        assert self.pid is None, "stop it first"
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _gone(self, pids: Sequence[int]) -> bool:
        deadline_s = time.monotonic() + _GONE_S
        while self.pid is not None or any(Identity.of(pid) is not None for pid in pids):
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _watch_over(self, pid: int) -> None:
        server, owner = Identity.of(pid), Identity.mine()
        if server is None:
            return
        words = [owner.word, server.word]
        self._watch = subprocess.Popen(
            [sys.executable, "-P", "-m", "cluster.databases.watch", *words, str(int(self.stop_signal))],
            stdin=subprocess.DEVNULL,
            process_group=0,
        )

    def _let_go(self) -> None:
        if self._watch is not None:
            self._watch.terminate()
            self._watch.wait()
            self._watch = None
        if self._process is not None:
            self._process.wait()
            self._process = None

    # --------------------------------------------------------------------------------------------- folder and user

    async def _set_up(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        user = self._user()
        if user is not None:
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            if not _reaches(user, self.folder):
                raise ProcessTrouble(
                    f"{self.name} cannot run as root, and user {user.pw_name} cannot reach {self.folder}; use a folder "
                    "below one that everybody may enter, such as /tmp"
                )
        self.folder.chmod(0o700)
        self.log.touch(mode=0o600)
        if user is not None:
            os.chown(self.log, user.pw_uid, user.pw_gid)
        setup = self._spawn(self.setup_command())
        try:
            status = await asyncio.to_thread(setup.wait, _SETUP_S)
        finally:
            if setup.poll() is None:
                setup.kill()
        if status != 0:
            shutil.rmtree(self.data, ignore_errors=True)
            raise ProcessTrouble(f"{self.name} could not be set up in {self.folder}: {self._said()}")

    def _user(self) -> pwd.struct_passwd | None:
        """Who runs it instead of root; None when this process is not root's."""
        if os.geteuid() != 0:
            return None
        for name in self.users:
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(name)
        raise ProcessTrouble(f"{self.name} cannot run as root; add a user such as {self.users[0]} (adduser --system)")

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        user = self._user()
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in a terminal is for whoever started it
                env=self._environment(),
                user=None if user is None else user.pw_uid,
                group=None if user is None else user.pw_gid,
                extra_groups=None if user is None else (),
            )

    async def _run_client(self, words: Sequence[str], statement: str) -> str:
        """Output of the server's own client. Raises `ProcessTrouble` when it fails, or takes too long."""
        try:
            done = await asyncio.to_thread(
                subprocess.run,
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_STATEMENT_S,
                check=False,
                env=self._environment(),
            )
        except subprocess.TimeoutExpired:
            raise ProcessTrouble(f"{self.name} said nothing to {statement!r} for {_STATEMENT_S:g} s") from None
        if done.returncode != 0:
            raise ProcessTrouble(f"{self.name} did not run {statement!r}: {done.stderr.strip()}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        # Whatever PGPORT or MYSQL_HOME mean to the person who starts this, they are about other servers.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "MYSQL", "MARIADB"))}
        return {**kept, "LC_ALL": "C.UTF-8", "HOME": str(self.folder)}

    def _said(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"{lines[-1] if lines else 'nothing was said'} (see {self.log})"

    def programs(self, names: Sequence[str], folders: Sequence[Path]) -> list[Path]:
        """The programs `names`, all from the first of `folders` that has them and lets the server's user run them."""
        user = self._user()
        hidden: Path | None = None
        for folder in folders:
            found = [folder / name for name in names]
            if not all(program.is_file() for program in found):
                continue
            if user is None or all(_reaches(user, program.resolve()) for program in found):
                return found
            hidden = folder
        if hidden is not None and user is not None:
            raise ProcessTrouble(f"{self.name} cannot run as root, and user {user.pw_name} cannot reach {hidden}")
        raise ProcessTrouble(f"{self.name} is not installed here: {self.how_to_install}")

    how_to_install: str = "install it"


def server_folder(prefix: str) -> Path:
    """A new temporary folder that an unprivileged user can reach, with a path short enough for a socket."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > SOCKET_PATH_LIMIT // 2:
        base = Path("/tmp")  # noqa: S108  # mkdtemp makes a folder that nobody else can have made
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base))


def children_of(parent: int) -> list[int]:
    """The pids of all descendants, whatever sessions they are in."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                text = (entry / "stat").read_text()
                parents[int(entry.name)] = int(text[text.rindex(")") + 2 :].split()[1])
    found = [parent]
    for pid in found:
        found += [child for child, its in parents.items() if its == pid]
    return found[1:]


def _reaches(user: pwd.struct_passwd, path: Path) -> bool:
    """May `user` enter every folder on the way to `path`, and `path` itself?"""
    for each in (path, *path.parents):
        status = each.stat()
        shift = 6 if status.st_uid == user.pw_uid else 3 if status.st_gid == user.pw_gid else 0
        if not status.st_mode >> shift & 1:
            return False
    return True
