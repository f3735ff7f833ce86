"""Who looks on: a probe is a client like any other, and whoever says that it leads is noted."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.calls import Answer, Unreachable
from cluster.chaos import watch
from cluster.chaos.checks.answered import answered
from cluster.chaos.checks.leaders import leaders
from cluster.chaos.history import History, Recorder
from cluster.chaos.watch import Watch

BUSY = Answer(503, {"code": "no_leader"})
UNDECIDED = Answer(202, {"gid": "c-1-1", "decision": None})
ABORTED = Answer(200, {"gid": "c-1-1", "decision": "abort", "reason": "locked"})
COMMITTED = Answer(200, {"gid": "c-1-2", "decision": "commit"})


class Replies:
    """Nodes that say `answers`, one after the other, and the last of them from then on."""

    def __init__(self, *answers: Answer | None) -> None:
        self._answers = list(answers)
        self.keys: list[str] = []

    async def once(self, method: str, url: str, **request: Any) -> Answer:
        self.keys.append(request["headers"]["Idempotency-Key"])
        assert request["body"]["branches"][0]["payload"]["order_id"] == self.keys[-1]
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is None:
            raise Unreachable("nobody there")
        return answer


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.0)


async def probed(tmp_path: Any, replies: Any) -> tuple[str, list[str]]:
    """What a probe came to, and what the check says of its requests."""
    with Recorder(tmp_path / "history.jsonl") as recorder:
        recorder.note("rest")
        await Watch(SimpleNamespace(), replies, recorder).probe([("sku-1", "account-1")], "http://n1")  # type: ignore[arg-type]
        history = History(recorder.events)
        return next(history.of("probe"))["outcome"], answered(history)


@pytest.mark.parametrize("first", [BUSY, UNDECIDED, None])
async def test_a_probe_keeps_its_key_until_the_answer_is_definite(tmp_path, first):
    replies = Replies(first, COMMITTED)
    assert await probed(tmp_path, replies) == ("committed", [])
    assert replies.keys == ["probe-0-0"] * 2


async def test_a_probe_that_was_refused_is_another_order(tmp_path):
    replies = Replies(BUSY, ABORTED, BUSY, COMMITTED)
    assert await probed(tmp_path, replies) == ("committed", [])
    assert replies.keys == ["probe-0-0"] * 2 + ["probe-0-1"] * 2


@pytest.mark.parametrize(
    ("ever", "outcome", "complaints"),
    [
        (BUSY, "unknown", ["probe-0-0 (order) never got a definite answer"]),
        (UNDECIDED, "undecided", ["probe-0-0 (order) never got a definite answer"]),
        (None, "unknown", ["probe-0-0 (order) never got a definite answer"]),
        (ABORTED, "aborted", []),  # what is locked for ever is the other check's
    ],
)
async def test_a_probe_that_gets_nowhere_is_a_complaint(tmp_path, ever, outcome, complaints):
    assert await probed(tmp_path, Replies(ever)) == (outcome, complaints)


class Looks:
    """A cluster of which each node says in turn what is in `said`: role, ready, epoch; None: it is silent."""

    def __init__(self, said: dict[str, list[tuple[str, bool, int] | None]]) -> None:
        self.cluster = self
        self.running = tuple(said)
        self._said = said

    def process(self, node: str) -> Any:
        return SimpleNamespace(paused=node == "n4")

    async def status(self, node: str) -> dict[str, Any] | None:
        assert node != "n4", "it is paused, and would not answer"
        if not self._said[node]:
            raise asyncio.CancelledError
        now = self._said[node].pop(0)
        return None if now is None else dict(zip(("role", "ready", "epoch"), now, strict=True))


async def test_all_who_say_that_they_lead_are_noted(tmp_path):
    stage: Any = Looks(
        {
            # Cut off, and back in the last look.
            "n1": [("leader", True, 2), ("leader", True, 2), ("leader", True, 2), ("follower", True, 4)],
            # It is not past its barrier at first, and leads again later.
            "n2": [("follower", True, 2), ("leader", False, 2), ("leader", True, 3), ("leader", True, 4)],
            "n3": [None, ("follower", True, 2), ("leader", True, 3), ("follower", True, 4)],
            "n4": [],
        }
    )
    nobody: Any = None
    with Recorder(tmp_path / "history.jsonl") as recorder:
        with pytest.raises(asyncio.CancelledError):
            await Watch(stage, nobody, recorder).leader()
        said = [(event["type"], event["node"], event["epoch"]) for event in recorder.events]
        (complaint,) = leaders(recorder.history())
    assert complaint.startswith("epoch 3 has 2 leaders: n2 (at ")
    assert [each for each in said if each[0] == "leads"] == [
        ("leads", "n1", 2),
        ("leads", "n2", 3),
        ("leads", "n3", 3),
        ("leads", "n2", 4),
    ]
    assert [each for each in said if each[0] == "leader"] == [
        ("leader", "n1", 2),
        ("leader", "n2", 3),
        ("leader", "n2", 4),
    ]
