"""`outlast doctor` on a real cluster, real participants' servers and real databases; and a resolution that survives."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cluster.cli import main
from cluster.databases.mariadb import MariaDbServer
from cluster.databases.postgres import PostgresServer
from cluster.local import LocalCluster
from participants.mariadb_names import xid_of
from participants.server import Participant
from tests.integration.world import eventually
from tests.support.mariadb import connect
from tests.support.nodes import RunningNode
from tests.support.participants import ScriptedParticipant, hang, on, saying

pytestmark = pytest.mark.processes
pytest_plugins = ["tests.support.mariadb_fixtures", "tests.support.postgres"]


class Doctor:
    """Runs the command on a thread, as it has an event loop of its own, and reads what it says."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def __call__(self, *words: object) -> tuple[int, dict[str, Any]]:
        status, out = await self.run("doctor", *words, "--json")
        return status, json.loads(out)

    async def run(self, *words: object) -> tuple[int, str]:
        status = await asyncio.to_thread(main, [str(word) for word in words])
        return status, self._capsys.readouterr().out


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Doctor:
    return Doctor(capsys)


def finding(report: dict[str, Any], code: str) -> dict[str, Any]:
    found = [each for each in report["findings"] if each["code"] == code]
    assert len(found) == 1, report
    return dict(found[0])


# ------------------------------------------------------------------------------------------------ the cluster


async def test_a_cluster_from_health_through_a_heuristic_to_the_loss_of_its_majority(
    tmp_path: Path, examine: Doctor, null: Participant, scripted: ScriptedParticipant
) -> None:
    async with LocalCluster(tmp_path / "c") as cluster, cluster.caller() as caller:
        at = ("--data", cluster.data)
        for name, url in (("well", null.url), ("mad", scripted.url)):
            answer = await caller.anywhere("PUT", f"/v1/participants/{name}", body={"url": url}, within_s=30)
            assert answer.status == 200
        scripted.rule = on("branches", saying({"branches": []}), scripted.rule)
        status, report = await examine(*at)
        assert (status, report["findings"], report["unseen"]) == (0, [], []), report
        assert {"node n1", "node n2", "node n3", "participant well", "participant mad"} == set(report["seen"])
        assert (await examine.run("doctor", *at))[1].endswith("well (exit status 0)\n")

        # A participant that cannot follow, and an operator who resolves it.
        scripted.rule = on("commit", saying({"state": "aborted"}, status=409), scripted.rule)
        body = {"branches": [{"participant": "well"}, {"participant": "mad"}]}
        txn = (await caller.anywhere("POST", "/v1/transactions", body=body, within_s=30)).body

        async def contradicted() -> bool:
            answer = await caller.anywhere("GET", f"/v1/transactions/{txn['gid']}", within_s=30)
            return bool(answer.body.get("heuristic") == "contradicted")

        await eventually(contradicted, "the contradiction is logged")
        status, report = await examine(*at)
        assert status == 2
        assert txn["gid"] in finding(report, "contradicted")["todo"]
        (flight,) = report["in_flight"]
        assert "waits for an operator" in flight["why"][0]
        assert not report["restart"]["helps"]
        words = ("tx", "resolve", txn["gid"], "--branch", "mad", "--abort", "--note", "refunded", *at)
        assert (await examine.run(*words))[0] == 0

        # It survives the leader, and a restart of all.
        dead = await cluster.kill_leader()
        await cluster.wait_for_leader()
        status, report = await examine(*at)
        assert status == 1, report
        assert finding(report, "resolved_by_hand")["about"] == [txn["gid"], "mad"]
        assert "it does not answer" in finding(report, "node_down")["what"]
        await cluster.start_node(dead)
        await cluster.stop()
        await cluster.start()
        assert "refunded" in (await examine.run("tx", "show", txn["gid"], *at))[1]
        status, report = await examine(*at)
        assert (status, [each["code"] for each in report["findings"]]) == (1, ["resolved_by_hand"])
        assert (await examine.run("tx", "acknowledge", txn["gid"], *at))[0] == 0
        assert (await examine(*at))[0] == 0

        # Without a majority nobody can tell what is in flight.
        await cluster.kill("n1")
        await cluster.kill("n2")

        async def nobody_leads() -> bool:
            _, report = await examine(*at)
            return any(each["code"] == "no_leader" for each in report["findings"])

        await eventually(nobody_leads, "n3 knows that nobody leads")
        status, report = await examine(*at)
        assert (status, report["restart"]["helps"]) == (2, True)
        assert "transactions and participants" in [each["where"] for each in report["unseen"]]
        await cluster.kill("n3")
        assert (await examine(*at))[0] == 3, "nothing was seen"


async def test_a_dead_participant_is_named_and_what_waits_for_it(
    node: RunningNode, examine: Doctor, scripted: ScriptedParticipant
) -> None:
    async with ScriptedParticipant(rule=on("commit", hang)) as dying:
        await node.register("dead", dying.url)
        gid = (await node.submit("dead")).json["gid"]
    await eventually(lambda: node.node.driver.lanes()["dead"].down, "its lane is down")
    status, report = await examine("--url", node.url, "--prepared-limit", "0.01")
    assert status == 2
    assert finding(report, "participant_down")["severity"] == "critical"
    assert "waits for the acknowledgement of dead" in finding(report, "transaction_stuck")["what"]
    assert [each["gid"] for each in report["in_flight"]] == [gid]
    assert [each["where"] for each in report["unseen"]] == ["participant dead"]
    assert "dead would not answer a new leader either" in report["restart"]["why"]
    assert (await examine("--url", node.url, "--prepared-limit", "1000"))[0] == 3, "what it holds was not seen"


async def test_what_cannot_be_asked_was_not_seen(tmp_path: Path, examine: Doctor) -> None:
    for words in (
        ("--postgres", tmp_path / "none"),
        ("--postgres", "env:NO_SUCH"),
        ("--postgres", "postgresql://a@b/c"),
    ):
        assert (await examine.run("doctor", "--data", tmp_path, *words))[0] == 3
    status, report = await examine("--data", tmp_path)
    assert (status, report["seen"]) == (3, [])


# ------------------------------------------------------------------------------------------------ PostgreSQL


async def test_postgres_shows_the_holder_that_it_hides_and_who_waits_behind(
    node: RunningNode,
    examine: Doctor,
    scripted: ScriptedParticipant,
    postgres: PostgresServer,
    dsn: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "stock.dsn"
    file.write_text(dsn + "\n")
    at = ("--url", node.url, "--postgres", file)
    status, report = await examine(*at)
    assert (status, report["findings"]) == (0, []), report
    scripted.rule = on("branches", saying({"branches": []}), on("commit", hang))
    await node.register("orders", scripted.url)
    gid = (await node.submit("orders")).json["gid"]
    names = f"outlast:{gid}:orders", "somebody-else's", "outlast:test-1-999:orders"
    owner, *waiters = [await asyncpg.connect(dsn) for _ in range(4)]
    tasks: list[asyncio.Task[Any]] = []
    try:
        await owner.execute("CREATE TABLE stock(sku int PRIMARY KEY, left_over int)")
        await owner.execute("INSERT INTO stock VALUES (1, 1), (2, 2), (3, 3)")
        for at_row, name in enumerate(names, 1):
            quoted = name.replace("'", "''")
            change = f"UPDATE stock SET left_over = 0 WHERE sku = {at_row}"
            await owner.execute(f"BEGIN; {change}; PREPARE TRANSACTION '{quoted}'")
        # Two for the row, so that one waits behind the other; one for the table.
        first, second, third = waiters
        for connection, statement in (
            (first, "UPDATE stock SET left_over = 1 WHERE sku = 1"),
            (second, "UPDATE stock SET left_over = 2 WHERE sku = 1"),
            (third, "LOCK TABLE stock IN ACCESS EXCLUSIVE MODE"),
        ):
            pid = connection.get_server_pid()
            begin = "BEGIN; " if connection is third else ""
            tasks.append(asyncio.create_task(connection.execute(begin + statement)))

            async def waits(pid: int = pid) -> bool:
                return bool(await owner.fetchval("SELECT count(*) FROM pg_locks WHERE pid = $1 AND NOT granted", pid))

            await eventually(waits, f"{statement} waits")
        hidden = await owner.fetchval("SELECT pg_blocking_pids($1)", first.get_server_pid())
        assert hidden == [0], "PostgreSQL does not say who"
        status, report = await examine(*at, "--prepared-limit", "0.01")
        assert status == 2
        prepared = [each for each in report["findings"] if each["code"] == "prepared_too_long"]
        held, unknown = sorted(prepared, key=lambda each: each["about"][0] != gid)
        pids = [connection.get_server_pid() for connection in waiters]
        assert all(f"pid {pid} " in held["what"] for pid in pids), held
        assert held["severity"] == "critical"
        assert "decided to commit" in held["what"]
        assert "locks on stock" in held["what"]
        assert f"COMMIT PREPARED 'outlast:{gid}:orders'" in held["todo"]
        assert "never heard of it" in unknown["what"]
        assert "ROLLBACK PREPARED 'outlast:test-1-999:orders'" in unknown["todo"]
        foreign = finding(report, "foreign_prepared")
        assert (foreign["severity"], foreign["about"][0]) == ("info", names[1])
        assert (await node.show(gid))["state"] == "committing", "to look changes nothing"
        assert (await node.call("GET", "/v1/transactions/test-1-999")).status == 404
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in waiters:
            connection.terminate()
        for name in names:
            quoted = name.replace("'", "''")
            if await owner.fetchval("SELECT count(*) FROM pg_prepared_xacts WHERE gid = $1", name):
                await owner.execute(f"ROLLBACK PREPARED '{quoted}'")
        await owner.close()


async def test_a_postgres_that_does_not_answer_was_not_seen(
    node: RunningNode, examine: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOCK_DSN", "postgresql://ann:secret@127.0.0.1:1/stock")
    status, report = await examine("--url", node.url, "--postgres", "env:STOCK_DSN")
    assert (status, [each["where"] for each in report["unseen"]]) == (3, ["PostgreSQL env:STOCK_DSN"])
    assert "secret" not in json.dumps(report)


# ------------------------------------------------------------------------------------------------ MariaDB


async def test_mariadb_shows_who_waits_behind_a_branch_and_what_ends_it(
    node: RunningNode,
    examine: Doctor,
    scripted: ScriptedParticipant,
    mariadb: MariaDbServer,
    mariadb_database: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "stock.dsn"
    file.write_text(mariadb.dsn(mariadb_database))
    at = ("--url", node.url, "--mariadb", file)
    status, report = await examine(*at)
    assert (status, report["findings"]) == (0, []), report
    scripted.rule = on("branches", saying({"branches": []}), on("commit", hang))
    await node.register("stock", scripted.url)
    gid = (await node.submit("stock")).json["gid"]
    owner, preparing, *waiters = [await connect(mariadb, mariadb_database) for _ in range(4)]
    xid = xid_of(gid, "stock", database=mariadb_database, connection=preparing.id).sql
    tasks: list[asyncio.Task[Any]] = []
    try:
        await owner.run("CREATE TABLE stock(sku int PRIMARY KEY, n int)", "INSERT INTO stock VALUES (1, 1)")
        change = "UPDATE stock SET n = 0 WHERE sku = 1"
        await preparing.run(f"XA START {xid}", change, f"XA END {xid}", f"XA PREPARE {xid}")
        for connection in waiters:
            await connection.run("SET SESSION innodb_lock_wait_timeout = 60")
            tasks.append(asyncio.create_task(connection.run("UPDATE stock SET n = 2 WHERE sku = 1")))

        async def held(first: str) -> dict[str, Any] | None:
            status, report = await examine(*at, "--prepared-limit", "0.01")
            found = [each for each in report["findings"] if each["code"] == "prepared_too_long"]
            if not found or any(f"connection {each.id} " not in found[0]["what"] for each in waiters):
                return None
            assert (status, found[0]["severity"]) == (2, "critical")
            return found[0] if (first in found[0]["todo"]) else None

        found = await eventually(lambda: held(f"first KILL {preparing.id}"), "the holder is shown with its connection")
        assert f"XA COMMIT {xid};" in found["todo"]
        assert f"{mariadb_database}.stock" in found["what"]
        assert found["about"][:2] == [gid, "stock"]
        await preparing.close()
        found = await eventually(lambda: held(f"XA COMMIT {xid};"), "and without")
        await eventually(
            lambda: _without(held, "first KILL"), "its connection is gone, and nobody has to be ended before"
        )
    finally:
        for connection in waiters:
            await owner.run(f"KILL {connection.id}")
        await asyncio.gather(*tasks, return_exceptions=True)
        await preparing.close()
        # Finished only once InnoDB has let go of the connection: before, MariaDB would not do it.
        owners = "SELECT count(*) FROM information_schema.INNODB_TRX WHERE trx_mysql_thread_id <> 0"

        async def nobody() -> bool:
            await asyncio.sleep(0.15)
            return bool((await owner.run(owners))[0][0] == 0)

        await eventually(nobody, "nobody owns the branch")
        await owner.run(f"XA ROLLBACK {xid}")
        await owner.close()


async def _without(look: Any, words: str) -> bool:
    found = await look("")
    return found is not None and words not in found["todo"]
