"""What a dying application says is heard to the last word, and what it had begun is found out in its place."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.calls import Answer, Unreachable
from cluster.chaos.applications import Applications
from cluster.chaos.checks.answered import answered
from cluster.chaos.checks.keys import keys
from cluster.chaos.history import History, Recorder


def line(**said: Any) -> str:
    return f"\n{json.dumps(said)}\n"


class Process:
    """Lives as long as it is looked at once, and says then what `lives` has for it."""

    def __init__(self, log: Path, lives: list[str]) -> None:
        self.program = SimpleNamespace(log=log)
        self.alive = False
        self.lives = lives
        self.over: Any = None

    def spawn(self, life: str) -> None:
        self.alive = True
        with self.program.log.open("a") as file:
            file.write(self.lives[int(life) - 1])
        self.alive = False
        if int(life) == len(self.lives):
            self.over()

    async def kill(self) -> bool:
        return False


class Nodes:
    """Does not answer first; then it is undecided; then it is decided."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def once(self, method: str, url: str, **request: Any) -> Answer:
        key = request["headers"]["Idempotency-Key"]
        self.asked.append((url, key))
        tries = sum(1 for _, each in self.asked if each == key)
        if tries == 1:
            raise Unreachable("it is paused")
        return Answer(200, {"gid": f"c-1-{key}", "decision": None if tries == 2 else "abort", "reason": "timeout"})


async def test_what_a_dead_application_had_begun_is_found_out(tmp_path: Path) -> None:
    first = line(asked="a") + line(answered="a", outcome="committed", gid="c-1-1", detail=None) + line(asked="b")
    first += "WARNING something else\n" + '\n{"asked": "cut o'
    second = line(asked="c") + line(answered="c", outcome="unknown", gid="c-1-c", detail="ClientError: no") + line()
    process, nodes = Process(tmp_path / "log.txt", [first, second]), Nodes()
    with Recorder(tmp_path / "history.jsonl") as recorder:
        caller: Any = nodes
        lived: Any = process
        one = Applications(lived, caller, {"n1": "http://n1"}, recorder, 1)
        process.over = lambda: one.stop(patience_s=30.0)
        recorder.note("rest")
        await one.run()
        history = recorder.history()
    assert one.lives == 2
    assert {url for url, _ in nodes.asked} == {"http://n1/v1/transactions/begin"}
    assert sorted(key for _, key in nodes.asked) == ["b"] * 3 + ["c"] * 3
    told = {(asked["key"], answer["outcome"]) for asked, answer in history.requests() if answer is not None}
    assert {("a", "committed"), ("b", "unknown"), ("b", "aborted"), ("c", "unknown"), ("c", "aborted")} <= told
    assert {asked["of"] for asked, _ in history.requests()} == {"application"}
    events = [{"type": "run", "participants": [], "at": 0.0}, *history.events]
    assert answered(History(events)) == []
    assert keys(History(events)) == []


async def test_it_is_not_asked_for_ever(tmp_path: Path) -> None:
    process = Process(tmp_path / "log.txt", [line(asked="a")])
    with Recorder(tmp_path / "history.jsonl") as recorder:
        caller: Any = SimpleNamespace(once=None)
        lived: Any = process
        one = Applications(lived, caller, {"n1": "http://n1"}, recorder, 1)
        process.over = lambda: one.stop(patience_s=0.0)
        recorder.note("rest")
        await one.run()
        events = [{"type": "run", "participants": [], "at": 0.0}, *recorder.events]
    assert answered(History(events)) == ["a (move) never got a definite answer"]
