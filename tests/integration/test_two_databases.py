"""Transfers between PostgreSQL and MariaDB while everything is killed that can be: no cent is lost, nothing is left."""

import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cluster.databases.mariadb import MariaDbServer
from cluster.databases.postgres import PostgresServer
from cluster.ports import HOST, free_ports
from cluster.process import arguments
from cluster.service import Service
from tests.integration.world import PATIENCE_S, World, eventually
from tests.support.mariadb import connect
from tests.support.transfers import TABLES

pytest_plugins = ["tests.support.mariadb_fixtures", "tests.support.postgres"]
pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ACCOUNTS = 400
CENTS = 1_000_000
TRANSFERS = 200


class TwoDatabases(World):
    """A participant on each of two servers."""

    def __init__(self, folder: Path, dsns: Mapping[str, str], *, seed: int) -> None:
        super().__init__(folder, seed=seed, timeout_s=20.0)
        self.dsns = dsns
        self.numbers = itertools.count(1)

    def lay_out(self) -> None:
        for (kind, dsn), port in zip(self.dsns.items(), free_ports(len(self.dsns)), strict=True):
            words = arguments(kind, "--dsn", dsn, "--operations", f"tests.support.transfers:on_{kind}", "--port", port)
            for url in self.cluster.urls:
                words += ("--coordinator", url)
            self.services[kind] = Service(
                kind, module="participants", arguments=words, url=f"http://{HOST}:{port}", folder=self.folder / kind
            )

    def next_request(self, rng: random.Random) -> tuple[str, Sequence[Mapping[str, Any]]]:
        cents = rng.choice((-1, 1)) * rng.randint(1, 500)
        return f"transfer-{next(self.numbers)}", [
            {"participant": name, "payload": {"op": "move", "account": rng.randrange(ACCOUNTS), "cents": amount}}
            for name, amount in (("postgres", cents), ("mariadb", -cents))
        ]


class Books:
    """What both servers say."""

    def __init__(self, postgres: PostgresServer, dsn: str, mariadb: MariaDbServer, database: str) -> None:
        self.postgres, self.dsn, self.mariadb, self.database = postgres, dsn, mariadb, database

    async def fill(self) -> None:
        there, here = await asyncpg.connect(self.dsn), await connect(self.mariadb, self.database)
        for statement in TABLES:
            await there.execute(statement)
            await here.run(statement)
        await there.executemany("INSERT INTO account VALUES ($1, $2)", [(i, CENTS) for i in range(ACCOUNTS)])
        await here.run("INSERT INTO account VALUES " + ", ".join(f"({i}, {CENTS})" for i in range(ACCOUNTS)))
        await there.close()
        await here.close()

    async def read(self) -> tuple[int, dict[str, int], dict[str, int], list[Any]]:
        """The sum of all accounts, the movements of each side by gid, and what is prepared."""
        there, here = await asyncpg.connect(self.dsn), await connect(self.mariadb, self.database)
        total = await there.fetchval("SELECT sum(cents) FROM account")
        total += (await here.run("SELECT SUM(cents) FROM account"))[0][0]
        moved_there = {row["gid"]: row["cents"] for row in await there.fetch("SELECT gid, cents FROM moved")}
        moved_here = dict(await here.run("SELECT gid, cents FROM moved"))
        left = list(await there.fetch("SELECT gid FROM pg_prepared_xacts")) + list(await here.run("XA RECOVER"))
        await there.close()
        await here.close()
        return int(total), moved_there, moved_here, left


def wrong_between(there: Mapping[str, int], here: Mapping[str, int]) -> list[str]:
    """Movements that the other side does not have, or not so."""
    return [gid for gid in sorted(there.keys() | here.keys()) if there.get(gid) != -here.get(gid, CENTS)]


async def test_no_cent_is_lost_between_two_databases(
    tmp_path: Path,
    postgres: PostgresServer,
    dsn: str,
    mariadb: MariaDbServer,
    mariadb_database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    books = Books(postgres, dsn, mariadb, mariadb_database)
    await books.fill()
    dsns = {"postgres": dsn, "mariadb": mariadb.dsn(mariadb_database)}
    async with TwoDatabases(tmp_path, dsns, seed=31) as world:
        # What participants say of a database that is away.
        world.expected_lines += [r"a batch of \d+ is unknown", r"cannot be listed"]

        async def kill_leader() -> None:
            node = await world.cluster.kill_leader()
            await asyncio.sleep(world.rng.random())
            await world.cluster.start_node(node)

        async def kill_service(name: str) -> None:
            await world.kill_service(name)
            await asyncio.sleep(world.rng.random())
            await world.start_service(name)

        async def kill_server(server: PostgresServer | MariaDbServer) -> None:
            await server.kill()
            await asyncio.sleep(world.rng.random() / 2)
            await server.start()

        kills = [
            kill_leader,
            *(lambda name=name: kill_service(name) for name in dsns),
            *(lambda server=server: kill_server(server) for server in (postgres, mariadb)),
        ]
        world.rng.shuffle(kills)
        async with world.load(clients=TRANSFERS):
            await eventually(lambda: len(world.requests) >= TRANSFERS, "all of them ask")
            for kill in kills:
                # Some of those that are under way: the others are hit by the kill.
                enough = world.answered + TRANSFERS // 10
                await eventually(
                    lambda enough=enough: world.answered >= enough, "some are answered", within_s=2 * PATIENCE_S
                )
                await kill()
            await world.told(TRANSFERS // 4, within_s=2 * PATIENCE_S)
        await world.verify()
        committed = {told.gid for told in world.requests if told.decision == "commit"}
        assert len(committed) > TRANSFERS // 4
    total, there, here, left = await books.read()
    assert total == 2 * ACCOUNTS * CENTS
    assert left == [], "nothing is prepared any more"
    assert wrong_between(there, here) == []
    assert there.keys() == committed, "what was told to be committed is there, and nothing else"


def test_wrong_movements_are_found() -> None:
    assert wrong_between({"a": 1, "b": 2, "c": 0}, {"a": -1, "b": -3, "d": 5, "c": 0}) == ["b", "d"]
    assert wrong_between({"a": 1}, {}) == ["a"]
