"""One MariaDB server per test session, and a fresh database per test."""

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from cluster.databases.mariadb import MariaDbServer
from tests.support.mariadb import new_server

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDbServer]:
    """Shared by all tests of the session: whoever kills it starts it again, and nobody changes its settings."""
    server = new_server()
    asyncio.run(server.start())
    yield server
    asyncio.run(server.kill())
    server.remove()


@pytest.fixture
async def mariadb_database(mariadb: MariaDbServer) -> str:
    """The name of an empty database."""
    name = f"test_{next(_numbers)}"
    await mariadb.create_database(name)
    return name
