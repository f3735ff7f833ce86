"""Applications that move money themselves, between PostgreSQL and MariaDB, while everything is killed and stopped.

Killed with kill -9: applications, nodes, database servers. Stopped for longer than some deadlines, and continued:
applications, whose branches then come too late. Restarted: the participants' servers. Afterwards nothing is prepared,
the money adds up, every transfer is in both databases or in neither, and as everybody was told. OUTLAST_LONG makes it
go on for a minute; without, it is left out.
"""

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cluster.databases.mariadb import MariaDbServer
from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder
from cluster.local import LocalCluster
from coordinator.client import Client
from participants.mariadb import MariaDbManager
from participants.operations import Operations
from participants.postgres import PostgresManager
from participants.server import start
from participants.settings import ServerSettings
from tests.integration.application_contract import until
from tests.support.mariadb import connect, new_server
from tests.support.transfers import ACCOUNTS, TABLES

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not os.environ.get("OUTLAST_LONG"), reason="takes two minutes; OUTLAST_LONG=1 runs it"),
]

SECONDS = 60.0
APPLICATIONS = 3
CENTS = 100_000
"""Of each account."""


class Fire:
    """Servers, nodes, participants and applications, and what can happen to each."""

    def __init__(self, cluster: LocalCluster, postgres: PostgresServer, mariadb: MariaDbServer, seed: int) -> None:
        self.cluster, self.postgres, self.mariadb = cluster, postgres, mariadb
        self.rng = random.Random(seed)
        self.dsn = ""
        self.told: dict[str, str] = {}
        self.participants: dict[str, Any] = {}
        self.applications: list[tuple[asyncio.subprocess.Process, asyncio.Task[None]]] = []

    @property
    def mariadb_dsn(self) -> str:
        return f"mariadb://root@localhost/there?socket={self.mariadb.socket}"

    async def lay_out(self) -> None:
        """Accounts in both databases."""
        self.dsn = await self.postgres.create_database("here")
        await self.mariadb.create_database("there")
        here, there = await self.look()
        for table in TABLES:
            await here.execute(table)
            await there.run(table)
        for number in range(ACCOUNTS):
            await here.execute("INSERT INTO account VALUES ($1, $2)", number, CENTS)
            await there.run(f"INSERT INTO account VALUES ({number}, {CENTS})")
        await here.close()
        await there.close()

    async def look(self) -> tuple[Any, Any]:
        """Connections with both databases."""
        return await asyncpg.connect(self.dsn), await connect(self.mariadb, "there")

    async def serve(self, name: str, client: Client) -> None:
        """A participant's server, again if there was one."""
        if name in self.participants:
            await self.participants[name].stop()
        new = {
            "here": lambda: PostgresManager(self.dsn, Operations()),
            "there": lambda: MariaDbManager(self.mariadb_dsn, Operations()),
        }
        settings = ServerSettings(coordinators=self.cluster.urls, coordinator_token=self.cluster.token)
        self.participants[name] = await start(new[name](), settings=settings)
        await client.register(name, self.participants[name].url)

    async def apply(self) -> None:
        """One application more."""
        words = (",".join(self.cluster.urls), self.cluster.token or "", self.dsn, self.mariadb_dsn)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.application_load", *words, str(self.rng.randrange(10**9))),
            stdout=asyncio.subprocess.PIPE,
        )

        async def listen() -> None:
            assert process.stdout is not None
            async for line in process.stdout:
                what, gid = line.decode().split()
                self.told[gid] = what

        self.applications.append((process, asyncio.create_task(listen())))

    async def kill_application(self) -> None:
        process, listening = self.applications.pop(self.rng.randrange(len(self.applications)))
        process.kill()
        await process.wait()
        await listening

    async def happen(self, client: Client) -> str:
        """Something bad, and the end of it."""
        what = self.rng.choice(("application", "application", "stop", "stop", "leader", "node", "participant", "db"))
        match what:
            case "application":
                await self.kill_application()
                await self.apply()
            case "stop":
                process, _ = self.rng.choice(self.applications)
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(self.rng.uniform(1, 6))
                process.send_signal(signal.SIGCONT)
            case "leader":
                await self.cluster.start_node(await self.cluster.kill_leader())
            case "node":
                node = self.rng.choice(self.cluster.nodes)
                await self.cluster.kill(node)
                await self.cluster.start_node(node)
            case "participant":
                await self.serve(self.rng.choice(("here", "there")), client)
            case _:
                server = self.rng.choice((self.postgres, self.mariadb))
                await server.kill()
                await server.start()
        return what


@pytest.fixture
async def fire(tmp_path: Path) -> AsyncIterator[Fire]:
    postgres, mariadb = PostgresServer(server_folder("outlast-pg-")), new_server()
    try:
        await asyncio.gather(postgres.start(), mariadb.start())
        async with LocalCluster(tmp_path / "c") as cluster:
            fire = Fire(cluster, postgres, mariadb, int(os.environ.get("OUTLAST_SEED", "7")))
            try:
                yield fire
            finally:
                while fire.applications:
                    await fire.kill_application()
                for participant in fire.participants.values():
                    await participant.stop()
    finally:
        await asyncio.gather(postgres.kill(), mariadb.kill())
        postgres.remove()
        mariadb.remove()


async def test_the_money_adds_up_whatever_dies(fire: Fire) -> None:
    await fire.lay_out()
    async with Client(fire.cluster.urls, token=fire.cluster.token) as client:
        for name in ("here", "there"):
            await fire.serve(name, client)
        for _ in range(APPLICATIONS):
            await fire.apply()
        loop = asyncio.get_running_loop()
        end_s, happened = loop.time() + SECONDS, Counter[str]()
        while loop.time() < end_s:
            await asyncio.sleep(fire.rng.uniform(0.5, 1.5))
            happened[await fire.happen(client)] += 1
        while fire.applications:
            await fire.kill_application()

        here, there = await fire.look()

        async def over() -> bool:
            prepared = await here.fetch("SELECT FROM pg_prepared_xacts") or await there.run("XA RECOVER")
            return not prepared and all([txn.ended async for txn in client.list(page=1000)])

        await until(over, "all transactions have ended, and nothing is prepared", within_s=90)
        decided = {txn.gid: txn.committed async for txn in client.list(page=1000)}
        moved_here = {row["gid"]: row["cents"] for row in await here.fetch("SELECT gid, cents FROM moved")}
        moved_there = dict(await there.run("SELECT gid, cents FROM moved"))
        total = await here.fetchval("SELECT sum(cents)::bigint FROM account")
        total += int((await there.run("SELECT sum(cents) FROM account"))[0][0])
        await here.close()
        await there.close()

    print(dict(happened), Counter(fire.told.values()))
    assert {gid for gid, committed in decided.items() if committed} == set(moved_here) == set(moved_there)
    assert all(moved_here[gid] == -cents for gid, cents in moved_there.items())
    assert total == 2 * ACCOUNTS * CENTS
    for gid, what in fire.told.items():
        if what != "unknown":
            assert (gid in moved_here) == (what == "committed"), f"{gid} was told {what}"
    # It was no quiet minute, and yet work was done.
    assert len(moved_here) > 20
    assert len(happened) > 4
    assert "aborted" in fire.told.values()
