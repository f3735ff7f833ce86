"""The demo keeps its promise, its verdict can fail, and it leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import apsw
import asyncpg
import pytest

from cluster.cli import main
from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder
from cluster.demo.databases import PARTICIPANTS, Databases
from cluster.demo.load import Told
from cluster.demo.show import Options, replicated, run
from cluster.demo.verdict import Evidence, judge
from cluster.demo.view import View
from participants.shop.places import dsn_of
from tests.support.mariadb import new_server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.processes
LONG: Final = bool(os.environ.get("OUTLAST_LONG"))

OUTLAST = [sys.executable, "-P", "-m", "cluster.cli"]


def execute(database: Path, sql: str) -> None:
    connection = apsw.Connection(str(database))
    connection.execute(sql)
    connection.close()


def failing(evidence: Evidence, shop: Path) -> list[str]:
    return [check.name for check in judge(evidence, shop).checks if not check.ok]


async def test_a_short_demo_and_a_verdict_that_can_fail(tmp_path: Path) -> None:
    evidence = await replicated(tmp_path, Options(seconds=4, seed=1), View(), seed=1)
    shop = tmp_path / "shop"
    verdict = judge(evidence, shop)
    assert verdict.ok, list(verdict.failures())
    assert len(evidence.crashes) == 2
    for crash in evidence.crashes:
        assert len(crash.blocked) >= 3
        assert crash.decided
        assert crash.leader_after_s is not None
        assert crash.finished_after_s is not None
    assert verdict.report.orders == evidence.count("committed") > 0
    assert evidence.count("refused") > 0
    assert verdict.report.in_doubt == 0

    # What customers were told is taken at their word.
    placed = next(told for told in evidence.told if told.outcome == "committed")
    refused = next(told for told in evidence.told if told.outcome == "refused")

    def with_told(old: Told, new: Told) -> Evidence:
        return replace(evidence, told=tuple(new if told is old else told for told in evidence.told))

    assert failing(with_told(placed, replace(placed, outcome="refused")), shop) == ["nothing else is there"]
    lied = with_told(refused, replace(refused, outcome="committed"))
    assert failing(lied, shop) == ["what was told committed is there, once"]
    assert failing(with_told(placed, replace(placed, outcome="error")), shop) == [
        "every customer got an answer",
        "nothing else is there",
    ]
    assert failing(replace(evidence, begun=evidence.begun + 1), shop) == ["every customer got an answer"]
    crash = evidence.crashes[0]
    undone = replace(crash, decided=(*crash.decided, "local-1-999999"))
    assert failing(replace(evidence, crashes=(undone,)), shop) == [f"what {crash.node} had decided was carried out"]

    # Each way in which a database could be wrong.
    assert placed.order
    execute(shop / "inventory.db", "UPDATE stock SET available = available + 1 WHERE sku = 'sku-0'")
    assert failing(evidence, shop) == ["money and stock add up"]
    execute(shop / "inventory.db", "UPDATE stock SET available = available - 1 WHERE sku = 'sku-0'")
    assert failing(evidence, shop) == []
    execute(shop / "payments.db", f"DELETE FROM charge WHERE order_id = '{placed.order}'")
    assert failing(evidence, shop) == ["money and stock add up"]
    execute(shop / "orders.db", f"DELETE FROM purchase WHERE order_id = '{placed.order}'")
    assert "what was told committed is there, once" in failing(evidence, shop)


async def test_the_contrast_stays_blocked_until_its_restart(tmp_path: Path) -> None:
    verdict, contrast = await run(
        tmp_path, Databases(tmp_path, "sqlite"), Options(seconds=3, outage_s=1.0, seed=2), View()
    )
    assert verdict.ok, list(verdict.failures())
    assert contrast is not None
    assert contrast.ok, list(contrast.failures())
    (crash,) = contrast.evidence.crashes
    assert crash.finished_after_s is not None
    # Nobody else could finish them: this is no timing, but the order of events.
    assert contrast.evidence.longest_prepared_s >= crash.finished_after_s >= 1.0


def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [*OUTLAST, "demo", "--seconds", "4", "--no-contrast", "--json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["ok"]
    assert verdict["alone"] is None
    assert verdict["replicated"]["in_doubt"] == 0
    assert verdict["replicated"]["client_errors"] == 0
    assert list(tmp_path.iterdir()) == []


def demo_that_says(words: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """A demo that has come as far as a line with these words; its files are in `folder`."""
    process = subprocess.Popen(
        [*OUTLAST, "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert process.stdout is not None
    while words not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    return process


def test_an_interrupted_demo_cleans_up(tmp_path: Path) -> None:
    process = demo_that_says("kill -9", tmp_path)
    pids = pids_of(tmp_path)
    assert len(pids) >= 5
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not set(pids) & set(pids_of(tmp_path)), "all have ended")


# ------------------------------------------------------------------------------------------------ on database servers


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the unprivileged user of a database server can reach, unlike those of pytest."""
    folder = server_folder("outlast-test-")
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "participants",
    ["mixed", *(["postgres", "mariadb"] if LONG else [])],
)
async def test_on_database_servers(open_folder: Path, participants: str) -> None:
    needs_mariadb(participants)
    options = Options(seconds=4, per_s=15, seed=3)
    async with Databases(open_folder, participants) as databases:
        evidence = await replicated(open_folder / "three", options, View(), seed=3, databases=databases)
        shop = open_folder / "three" / "shop"
        verdict = judge(evidence, shop)
        assert verdict.ok, list(verdict.failures())
        assert len(evidence.crashes) == 2
        assert [outage.server for outage in evidence.outages] == databases.names
        for outage in evidence.outages:
            assert len(outage.blocked) >= 3
            assert outage.decided
            assert outage.back_after_s is not None
            assert outage.finished_after_s is not None
        assert verdict.report.orders == evidence.count("committed") > 0
        # The verdict can fail.
        outage = evidence.outages[0]
        wrong = [replace(outage, decided=("local-1-999999",)), replace(outage, finished_after_s=None)]
        for each in wrong:
            name = f"what was decided while {outage.server} was dead was carried out"
            assert failing(replace(evidence, outages=(each,)), shop) == [name]
        server = databases.servers[PARTICIPANTS[participants]["payments"]]
        if isinstance(server, PostgresServer):
            connection = await asyncpg.connect(dsn_of(shop, "payments"))
            await connection.execute("DELETE FROM charge")
            await connection.close()
        else:
            await server.single("DELETE FROM charge", database="three_payments")
        assert "money and stock add up" in failing(evidence, shop)
    pids = [server.pid for server in databases.servers.values()]
    assert pids == [None] * len(pids)


def test_an_interrupted_demo_leaves_no_server(open_folder: Path) -> None:
    process = demo_that_says("starting 3 nodes", open_folder, "--participants", "postgres")
    pids = pids_of(open_folder)
    assert any("postgres" in read(Path(f"/proc/{pid}/cmdline")) for pid in pids), "the server runs already"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 130, stderr
    assert list(open_folder.iterdir()) == []
    wait_until(lambda: not set(pids) & set(pids_of(open_folder)), "all servers have ended")


def test_a_server_that_is_not_installed_is_named(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: object) -> list[Path]:
        return []

    monkeypatch.setattr("cluster.databases.mariadb._folders", absent)
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    assert main(["demo", "--participants", "mixed"]) == 1
    said = capsys.readouterr().err
    assert "MariaDB is not installed here: apt-get install mariadb-server" in said
    assert "data and logs" not in said
    assert list(open_folder.iterdir()) == []


def needs_mariadb(participants: str) -> None:
    """Skips where it is not installed."""
    if "mariadb" in PARTICIPANTS[participants].values():
        new_server().remove()


def pids_of(folder: Path) -> list[int]:
    """Of the processes that have this folder on their command line."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in read(path)]


def read(path: Path) -> str:
    """The command line of a process; empty when it has ended meanwhile."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
