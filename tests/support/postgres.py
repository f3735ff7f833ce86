"""One PostgreSQL server per test session, and a fresh database per test."""

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Shared by all tests of the session: whoever kills it starts it again, and nobody changes its settings."""
    server = PostgresServer(server_folder("outlast-pg-"))
    asyncio.run(server.start())
    yield server
    # Not `stop`, which would sync all that the tests wrote.
    asyncio.run(server.kill())
    server.remove()


@pytest.fixture
async def dsn(postgres: PostgresServer) -> str:
    """An empty database."""
    return await postgres.create_database(f"test_{next(_numbers)}")
