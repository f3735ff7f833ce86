"""Database servers for the demo: started for it, killed in it, removed with its folder."""

import importlib.util
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

from cluster.databases.mariadb import MariaDbServer
from cluster.databases.postgres import PostgresServer
from cluster.process import ProcessTrouble
from participants.shop.places import put_on_server

Server = PostgresServer | MariaDbServer

PARTICIPANTS: Final[dict[str, dict[str, str]]] = {
    "sqlite": {},
    "postgres": {"inventory": "postgres", "payments": "postgres", "orders": "postgres"},
    "mariadb": {"inventory": "mariadb", "payments": "mariadb", "orders": "mariadb"},
    "mixed": {"payments": "postgres", "orders": "mariadb"},
}
"""For each choice: which services are on what kind of server. The others have a file."""

_KINDS: Final[dict[str, type[PostgresServer] | type[MariaDbServer]]] = {
    "postgres": PostgresServer,
    "mariadb": MariaDbServer,
}
_DRIVERS: Final = {"postgres": "asyncpg", "mariadb": "asyncmy"}


class Databases:
    """The servers of one choice of `PARTICIPANTS`; up while its context is entered. They live in `folder`.

    An unprivileged user runs them when root starts the demo, so that user must be able to pass through `folder`.
    """

    def __init__(self, folder: Path, participants: str) -> None:
        self._places = PARTICIPANTS[participants]
        self.servers: dict[str, Server] = {}
        """By kind. Raises `ProcessTrouble` for one that is not installed, with what to do about it."""
        for kind in sorted(set(self._places.values()), reverse=True):
            server = self.servers[kind] = _KINDS[kind](folder / kind)
            if importlib.util.find_spec(_DRIVERS[kind]) is None:
                driver = _DRIVERS[kind]
                raise ProcessTrouble(f"{server.name} needs {driver}, which is not here: pip install 'outlast[{kind}]'")
        self._exit = AsyncExitStack()

    @property
    def names(self) -> list[str]:
        """Of the servers, for people."""
        return [server.name for server in self.servers.values()]

    async def __aenter__(self) -> "Databases":
        async with AsyncExitStack() as stack:
            for server in self.servers.values():
                # What they hold goes with the folder, so nothing needs to be synced; and a kill always ends.
                stack.push_async_callback(server.kill)
                await server.start()
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    async def place(self, shop: Path, *, prefix: str) -> None:
        """Puts the services of the shop in `shop` into new databases, whose names begin with `prefix`."""
        for service, kind in self._places.items():
            put_on_server(shop, service, await self.servers[kind].create_database(f"{prefix}_{service}"))
