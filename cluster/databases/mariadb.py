"""A MariaDB server of one's own: the programs of the package `mariadb-server`, never its service.

    server = MariaDbServer(server_folder("outlast-mariadb-"))
    await server.start()
    dsn = await server.create_database("shop")
    ...                                         # user root without a password, on server.socket
    await server.stop()
    server.remove()

No option file is read, so nothing of the machine's own configuration takes part.
"""

import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cluster.databases.server import SOCKET_PATH_LIMIT, DatabaseServer
from cluster.process import ProcessTrouble

SETTINGS: Final[Mapping[str, str]] = {
    "max-connections": "200",
    "innodb-buffer-pool-size": "64M",
    "innodb-log-file-size": "48M",
    "innodb-buffer-pool-load-at-startup": "OFF",
    "innodb-buffer-pool-dump-at-shutdown": "OFF",
}
"""What a server gets unless it is told otherwise."""

_OWNER: Final = "root"
_GREETING: Final = 10
"""The version of the protocol, in the fifth byte of what the server says first; an error has 255 there."""


class MariaDbServer(DatabaseServer):
    """See the top of the module. `settings`: options of mariadbd, over `SETTINGS`; they count at the next `start`."""

    users = ("mysql", "nobody")
    how_to_install = "apt-get install mariadb-server (its service is not needed)"

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.settings = {**SETTINGS, **(settings or {})}
        self.socket = self.folder / "mariadb.sock"
        if len(str(self.socket)) > SOCKET_PATH_LIMIT:
            raise ProcessTrouble(f"{self.folder} is too long for the path of a socket; use a shorter one")
        (self._install,) = self.programs(("mariadb-install-db",), _folders("mariadb-install-db"))
        (self._mariadbd,) = self.programs(("mariadbd",), _folders("mariadbd"))

    @property
    def name(self) -> str:
        """For messages."""
        return "MariaDB"

    def setup_command(self) -> list[str]:
        """Trusts whoever gets at the socket: only the owner of the folder, and root, can."""
        return [
            *(
                str(self._install),
                "--no-defaults",
                f"--datadir={self.data}",
                "--auth-root-authentication-method=normal",
            ),
            *("--skip-test-db", "--skip-name-resolve", *self._options()),
        ]

    def command(self) -> list[str]:
        """Listens on a socket in the folder."""
        return [
            *(str(self._mariadbd), "--no-defaults", f"--datadir={self.data}", f"--socket={self.socket}"),
            *("--skip-networking", f"--pid-file={self.folder / 'pid'}", *self._options()),
        ]

    def _options(self) -> list[str]:
        return [f"--{name}={value}" for name, value in self.settings.items()]

    def is_ready(self) -> bool:
        """It greets whoever connects, once it has recovered."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.socket))
                said = probe.recv(5)
            except OSError:
                return False
        return len(said) == 5 and said[4] == _GREETING

    def dsn(self, database: str) -> str:
        """Where a database is, for the owner of all. It holds no secret."""
        return f"mariadb://{_OWNER}@localhost/{database}?socket={quote(str(self.socket), safe='/')}"

    async def create_database(self, name: str) -> str:
        """A new empty database; its DSN. Raises `ProcessTrouble`."""
        if re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name) is None:
            raise ProcessTrouble(f"{name!r} is no name for a database here: lower-case letters, digits, underscores")
        await self.single(f"CREATE DATABASE {name}")
        return self.dsn(name)

    async def single(self, statement: str, *, database: str = "mysql") -> str:
        """Run one statement as the owner of all, with the server's own client; its output. Raises `ProcessTrouble`."""
        (client,) = self.programs(("mariadb",), _folders("mariadb"))
        words = [str(client), "--no-defaults", "--batch", "--skip-column-names", f"--socket={self.socket}"]
        return await self._run_client([*words, f"--user={_OWNER}", f"--execute={statement}", database], statement)


def _folders(program: str) -> list[Path]:
    """Where the programs may be: Debian keeps the server out of the users' PATH."""
    on_path = shutil.which(program)
    found = [] if on_path is None else [Path(on_path).resolve().parent]
    return [*found, *map(Path, ("/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/libexec"))]
