"""A short run of everything that can fail, with real processes; and a participant that lies, which must not get by.

`OUTLAST_LONG=1` runs for two minutes, and over more seeds; `make soak MINUTES=10 SEED=1` for as long as one likes.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.chaos.checks import CHECKS
from cluster.chaos.history import History
from cluster.chaos.plan import KINDS
from cluster.chaos.run import Options, Verdict, run
from cluster.cli import main
from cluster.databases.server import children_of
from cluster.process import Identity
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(580)]

LONG = bool(os.environ.get("OUTLAST_LONG"))
MINUTES = 2.0 if LONG else 0.25


@pytest.mark.parametrize("seed", [1, 2, 3] if LONG else [5])
async def test_all_that_can_fail_fails_and_every_promise_is_kept(tmp_path: Path, seed: int) -> None:
    report = tmp_path / "report"
    verdict = await run(Options(minutes=MINUTES, seed=seed), report, print)
    assert verdict.ok, json.dumps(verdict.to_plain(), indent=1)
    assert verdict.counts["committed"] > 30
    assert verdict.counts["moves_committed"] > 0
    assert verdict.counts["longest_rejoin_s"] is not None
    assert set(verdict.counts["faults"]) == set(KINDS) - set(verdict.impossible)
    assert not (report / "evidence").exists()
    history = History.load(report / "history.jsonl")
    assert all(check(history) == [] for _, check in CHECKS.values())
    assert "<svg" in (report / "report.html").read_text()


async def test_a_participant_that_acknowledges_and_does_nothing_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the tests are not among what is installed
    report = tmp_path / "report"
    options = Options(minutes=0.08, seed=1, kinds=["clock"], modules={"orders": "tests.support.deaf_shop"})
    verdict = await run(options, report, print)
    assert not verdict.ok
    assert verdict.trouble is None
    assert {"atomicity", "acknowledged", "sums"} <= set(verdict.complaints)
    assert any("is at inventory, payments only" in each for each in verdict.complaints["atomicity"])
    # All of it can be looked at.
    assert (report / "evidence" / "cluster" / "n1" / "log.txt").stat().st_size > 0
    assert (report / "evidence" / "shop" / "orders.db").exists()
    assert (report / "evidence" / "postgres.txt").stat().st_size > 0
    assert "is at inventory, payments only" in (report / "report.html").read_text()
    assert json.loads((report / "verdict.json").read_text())["ok"] is False


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary folder in which even a database server finds a place."""
    with tempfile.TemporaryDirectory(prefix="oc-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_broken_off_leaves_nothing_behind(short_path: Path, how: signal.Signals) -> None:
    """With `--report` as without it; then it would be where the command was called."""
    words = ["chaos", "--minutes", "1", *(["--report", "report"] if how is signal.SIGKILL else [])]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=short_path,
        env={**os.environ, "TMPDIR": str(short_path)},
        text=True,
    ) as command:
        assert command.stderr is not None
        try:
            for line in command.stderr:
                if "faults in" in line:
                    break
            mine = [identity for pid in children_of(command.pid) if (identity := Identity.of(pid)) is not None]
            assert len(mine) >= 6, "nodes and services"
            if how is signal.SIGKILL:
                # One that is paused at that moment ends, too.
                (node, *_) = [each for each in mine if "cluster.chaos.node" in _words(each.pid)]
                assert node.signal(signal.SIGSTOP)
            command.send_signal(how)
            command.wait(timeout=60)
        finally:
            command.kill()
    assert command.returncode == (130 if how is signal.SIGINT else -how)
    wait_until(lambda: not any(identity.alive for identity in mine), "nothing runs any more", within_s=60.0)
    wait_until(lambda: str(short_path) not in Path("/proc/mounts").read_text(), "nothing is mounted", within_s=60.0)
    asked_for = ["report"] if how is signal.SIGKILL else []
    wait_until(lambda: os.listdir(short_path) == asked_for, "nothing lies about that nobody asked for", within_s=60.0)


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


@pytest.mark.parametrize("asked_for", [False, True])
def test_what_was_recorded_until_an_interruption_stays_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_for: bool
) -> None:
    async def interrupted(_options: Options, report: Path, *_: object) -> Verdict:
        await asyncio.to_thread(report.mkdir)
        await asyncio.to_thread((report / "history.jsonl").touch)
        raise asyncio.CancelledError

    monkeypatch.setattr("cluster.commands.chaos.run", interrupted)
    monkeypatch.chdir(tmp_path)
    words = ["chaos", *(["--report", "mine"] if asked_for else [])]
    assert main(words) == 130
    assert [path.name for path in tmp_path.iterdir()] == (["mine"] if asked_for else [])
