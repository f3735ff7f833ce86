"""A participant on PostgreSQL as a process of its own: its command line, and kill -9 at the worst moments."""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from cluster.ports import HOST, free_ports
from cluster.process import arguments
from cluster.service import Service
from participants.postgres_names import marker_statement, transaction_name
from tests.integration.world import eventually

pytest_plugins = ["tests.support.postgres"]
pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

OPERATIONS = "tests.support.postgres_operations:operations"


@contextlib.asynccontextmanager
async def coordinator(outcome):
    """A node that knows one outcome for every transaction."""

    async def answer(request):
        return web.json_response({"gid": request.match_info["gid"], "outcome": outcome})

    app = web.Application()
    app.router.add_get("/v1/outcomes/{gid}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    try:
        yield f"http://{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Served:
    """A participant's process, a session to ask it with, and a connection to look behind it."""

    def __init__(self, folder: Path, dsn: str, node: str) -> None:
        (port,) = free_ports(1)
        self.file = folder / "dsn"
        # The server trusts whoever gets at its socket, so any password will do; it must not be seen anywhere.
        self.file.write_text(dsn.replace("outlast@", "outlast:hunter2@"))
        self.file.chmod(0o600)
        words = arguments("participant", "postgres", "--operations", OPERATIONS, "--dsn-file", self.file)
        self.service = Service(
            "accounts",
            module="cluster.cli",
            arguments=(*words, *arguments("--port", port, "--coordinator", node)),
            url=f"http://{HOST}:{port}",
            folder=folder,
        )
        self.log = folder / "log.txt"

    async def call(self, kind, gid, **body):
        message = {"gid": gid, "branch": "b", "epoch": 1, **body}
        async with self.session.post(f"{self.service.url}/{kind}", json=message) as response:
            return response.status, await response.json()

    async def until(self, query, *parameters):
        async def holds():
            return await self.behind.fetchval(query, *parameters)

        await eventually(holds, query)

    async def until_active(self, words):
        await self.until(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
            " AND application_name LIKE 'outlast:%' AND query LIKE '%' || $1 || '%'",
            words,
        )


@pytest.fixture
async def served(tmp_path, dsn):
    async with coordinator("aborted") as node, aiohttp.ClientSession() as session:
        served = Served(tmp_path, dsn, node)
        served.session, served.behind = session, await asyncpg.connect(dsn)
        await served.behind.execute(
            "CREATE TABLE account(name text PRIMARY KEY, balance int NOT NULL);"
            "INSERT INTO account VALUES ('ann', 100), ('bob', 100)"
        )
        await served.service.start()
        yield served
        await served.service.stop()
        await served.behind.close()


async def test_it_serves_and_shows_its_password_to_nobody(served):
    assert await served.call("prepare", "shop-1-1", payload={"op": "pay", "account": "ann", "amount": 1}) == (
        200,
        {"vote": "prepared"},
    )
    assert await served.call("commit", "shop-1-1") == (200, {"state": "committed"})
    assert await served.behind.fetchval("SELECT balance FROM account WHERE name = 'ann'") == 99
    line = await asyncio.to_thread(Path(f"/proc/{served.service.pid}/cmdline").read_bytes)
    assert b"postgres_operations" in line
    assert b"hunter2" not in line
    assert "hunter2" not in served.log.read_text()


async def test_killed_while_it_works_its_backend_is_ended_before_the_abort_is_acked(served):
    gid = "shop-1-1"
    with contextlib.suppress(aiohttp.ClientError):
        status, _ = await served.call("prepare", gid, payload={"op": "linger"})
        assert status == 503  # pending: nobody waits that long
    await served.until_active("pg_sleep")
    await served.service.kill()
    await served.service.start()
    assert await served.call("abort", gid) == (200, {"state": "aborted"})
    working = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
    assert await served.behind.fetchval(working, transaction_name(gid, "b")) == 0
    # Its lock is free.
    await served.behind.execute("SET lock_timeout TO '10s'; UPDATE account SET balance = 7 WHERE name = 'ann'")
    status, body = await served.call("prepare", gid, payload={"op": "linger"})
    assert (status, body["vote"]) == (200, "refused")


async def test_killed_during_the_prepare_whatever_became_of_it_is_resolved(served, dsn):
    gid, name = "shop-1-1", transaction_name("shop-1-1", "b")
    holder = await asyncpg.connect(dsn)
    await holder.execute(f"BEGIN; {marker_statement(gid, 'b')}; SET LOCAL application_name TO 'holder'")
    with contextlib.suppress(aiohttp.ClientError):
        await served.call("prepare", gid, payload={"op": "pay", "account": "ann", "amount": 1})
    await served.until_active("PREPARE TRANSACTION")
    await served.service.kill()
    # The zombie has the key now, unless the server has found out already that nobody waits for it.
    await holder.execute("ROLLBACK")
    await holder.close()
    await served.service.start()
    assert await served.call("abort", gid) == (200, {"state": "aborted"})
    await served.until("SELECT count(*) = 0 FROM pg_prepared_xacts WHERE gid = $1", name)
    assert await served.behind.fetchval("SELECT balance FROM account WHERE name = 'ann'") == 100
    assert await served.behind.fetchval("SELECT state FROM outlast_branches") == "aborted"


async def test_killed_after_its_vote_it_asks_what_became_of_it(served):
    payload = {"op": "pay", "account": "ann", "amount": 1}
    assert (await served.call("prepare", "shop-1-1", payload=payload))[1] == {"vote": "prepared"}
    await served.service.kill()
    assert await served.behind.fetchval("SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'outlast:%'") == 1
    await served.service.start()
    await served.until("SELECT count(*) = 0 FROM pg_prepared_xacts WHERE gid LIKE 'outlast:%'")
    await served.until("SELECT count(*) = 1 FROM outlast_branches WHERE state = 'aborted'")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "needs --operations"),
        (["--operations", OPERATIONS], 2, "OUTLAST_DSN"),
        (["--operations", OPERATIONS, "--dsn", "postgresql://a:hunter2@db/x"], 2, "use --dsn-file"),
        (["--operations", OPERATIONS, "--dsn", "postgresql://a@/x?host=/nowhere"], 1, "cannot be reached"),
        (["--operations", OPERATIONS, "--dsn", "http://db/x"], 1, "the DSN cannot be used"),
        (["--operations", OPERATIONS, "--dsn", "postgresql://db/x", "--file", "x.db"], 2, "--file"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_told_in_one_line(words, status, said):
    command = [sys.executable, "-P", "-m", "cluster.cli", "participant", "postgres", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr
