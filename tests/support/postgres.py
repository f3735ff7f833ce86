"""One PostgreSQL server per test session, and an empty database per test."""

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest

from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder

_DATABASE = "test"


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
    """A database with nothing in it: always the same one, because making one for each test takes its time."""
    if _DATABASE not in postgres.databases:
        await postgres.create_database(_DATABASE)
    connection = await asyncpg.connect(postgres.dsn(_DATABASE))
    try:
        await connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        for row in await connection.fetch("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"):
            await connection.execute(f"ROLLBACK PREPARED '{row['gid']}'")
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    finally:
        await connection.close()
    return postgres.dsn(_DATABASE)
