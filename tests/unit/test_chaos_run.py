"""Whatever ends a run, there are a verdict, a page, and something to look at."""

import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cluster.chaos import run as running
from cluster.chaos.history import History
from cluster.chaos.run import Options, Verdict, _judge, run
from cluster.chaos.stage import Stage
from cluster.process import ProcessTrouble


@pytest.fixture(autouse=True)
def without_a_database_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "has_postgres", lambda: "not for this test")


async def judged(report: Path) -> Verdict:
    """The verdict on a run; all that shall be there is there."""
    verdict = await run(Options(minutes=0.01, kinds=["kill"]), report, lambda _: None)
    assert json.loads((report / "verdict.json").read_text()) == verdict.to_plain()
    assert not verdict.ok
    assert verdict.trouble is not None
    assert verdict.trouble in (report / "report.html").read_text()
    assert (report / "evidence" / "cluster" / "n1" / "node.toml").exists()
    return verdict


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (ProcessTrouble("n1 has ended"), "ProcessTrouble: n1 has ended"),
        (asyncpg.PostgresError("the database is gone\nHINT: none"), "PostgresError: the database is gone"),
        (AssertionError("a run is bounded"), "AssertionError: a run is bounded"),
        (
            ExceptionGroup("several", [OSError("one"), ExceptionGroup("more", [ValueError("two")])]),
            "OSError: one; ValueError: two",
        ),
    ],
)
async def test_whatever_ends_a_run_is_its_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, trouble: str
) -> None:
    def fail(_stage: Stage) -> None:
        raise error

    monkeypatch.setattr(Stage, "_seed", fail)
    assert (await judged(tmp_path)).trouble == trouble
    traceback = (tmp_path / "evidence" / "traceback.txt").read_text()
    assert "in fail" in traceback
    assert trouble.partition(";")[0] in traceback


async def test_a_run_that_fails_only_in_stopping_leaves_its_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(stage: Stage) -> Stage:
        stage.cluster.lay_out()
        stage._exit.push(stage._ended)
        stage._exit.push_async_callback(stop)
        return stage

    async def stop() -> None:
        raise ProcessTrouble("n1 was sent SIGKILL and is still there")

    async def nothing_else(stage: Stage, *_: Any) -> None:
        async with stage:
            pass

    monkeypatch.setattr(Stage, "__aenter__", start)
    monkeypatch.setattr(running, "_run", nothing_else)
    monkeypatch.setattr(running, "_judge", lambda *_: {})
    verdict = await judged(tmp_path)
    assert verdict.complaints == {}
    assert verdict.trouble == "ProcessTrouble: n1 was sent SIGKILL and is still there"


def test_a_check_that_cannot_be_made_is_a_complaint() -> None:
    run_ = {"at": 0.0, "type": "run", "nodes": [], "participants": {}, "bound_s": 1.0, "retention_s": 1.0}
    found = _judge(History([run_, {"at": 0.1, "type": "audit"}]), [])
    assert found["sums"] == ["it could not be made: KeyError: 'discrepancies'"]
    assert found["locks"] == ["nobody tried at rest whether anything is locked"]
