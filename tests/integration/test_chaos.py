"""A short run of everything that can fail, with real processes; and a participant that lies, which must not get by.

`OUTLAST_LONG=1` runs for two minutes, and over more seeds; `make soak MINUTES=10 SEED=1` for as long as one likes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.chaos.checks import CHECKS
from cluster.chaos.history import History
from cluster.chaos.plan import KINDS
from cluster.chaos.run import Options, run
from cluster.process import Identity

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
    words = ["chaos", "--minutes", "1", "--report", str(short_path / "report")]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(short_path)},
        text=True,
    ) as command:
        assert command.stderr is not None
        try:
            for line in command.stderr:
                if "faults in" in line:
                    break
            mine = [identity for pid in _descendants(command.pid) if (identity := Identity.of(pid)) is not None]
            assert len(mine) >= 6, "nodes and services"
            command.send_signal(how)
            command.wait(timeout=60)
        finally:
            command.kill()
    assert command.returncode == (130 if how is signal.SIGINT else -how)
    deadline_s = time.monotonic() + 60
    while any(identity.alive for identity in mine) or str(short_path) in Path("/proc/mounts").read_text():
        assert time.monotonic() < deadline_s, "something still runs, or is mounted"
        time.sleep(0.05)
    if how is signal.SIGINT:
        assert not list(short_path.glob("outlast-chaos-*"))


def _descendants(pid: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = file.read_text()
        except OSError:
            continue
        if int(text[text.rindex(")") + 2 :].split()[1]) == pid:
            child = int(file.parent.name)
            found += [child, *_descendants(child)]
    return found
