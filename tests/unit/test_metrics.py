"""What is measured, on real nodes and servers; and that every alert rule names what there is."""

import logging
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from participants.null import NullManager
from participants.server import Participant, start
from participants.settings import ServerSettings
from tests.support.clocks import FakeClock
from tests.support.logs import Replicas
from tests.support.nodes import RunningNode, configs, running
from tests.support.participants import ScriptedParticipant, hang, on, saying
from tests.support.waiting import eventually

DOCS = Path(__file__).parents[2] / "docs"
TYPE = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)
SAMPLE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


async def scrape(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return await response.text()


def value(text: str, name: str, labels: str = "") -> float | None:
    for sample in SAMPLE.finditer(text):
        if (sample[1], sample[2] or "") == (name, labels):
            return float(sample[3])
    return None


# ------------------------------------------------------------------------------------------------ a node


async def test_a_leader_shows_who_is_in_doubt_and_since_when(scripted: ScriptedParticipant, null: Participant) -> None:
    clock = FakeClock()
    async with running(clock=clock) as node:
        scripted.rule = on("commit", hang)
        await node.register("slow", scripted.url)
        await node.register("well", null.url)
        text = await scrape(node.url)
        assert value(text, "outlast_branches_in_doubt", 'participant="slow"') == 0
        assert value(text, "outlast_branch_in_doubt_oldest_seconds", 'participant="slow"') == 0
        assert value(text, "outlast_transaction_oldest_seconds") == 0
        assert value(text, "outlast_ready") == value(text, "outlast_leader") == 1
        for _ in range(2):
            assert (await node.submit("slow", "well")).status == 200
            await eventually(lambda: node.node.driver.lanes()["well"].owed == 0)
            clock.pass_s(30.0)
        text = await scrape(node.url)
        assert value(text, "outlast_branches_in_doubt", 'participant="slow"') == 2
        assert value(text, "outlast_branches_in_doubt", 'participant="well"') == 0
        assert value(text, "outlast_branch_in_doubt_oldest_seconds", 'participant="slow"') == pytest.approx(60)
        assert value(text, "outlast_transaction_oldest_seconds") == pytest.approx(60)
        assert value(text, "outlast_participant_owed", 'participant="slow"') == 2
        scripted.cut()


async def test_undecided_branches_are_in_doubt_until_they_refuse(
    node: RunningNode, scripted: ScriptedParticipant
) -> None:
    scripted.rule = on("prepare", hang)
    await node.register("slow", scripted.url)
    await node.submit("slow", wait="none")
    assert value(await scrape(node.url), "outlast_branches_in_doubt", 'participant="slow"') == 1
    scripted.cut()


async def test_a_participant_that_is_down_is_shown_so_with_the_time(node: RunningNode) -> None:
    async with ScriptedParticipant(rule=on("commit", hang)) as dying:
        await node.register("dead", dying.url)
        await node.submit("dead")
    await eventually(lambda: node.node.driver.lanes()["dead"].down)

    async def shown() -> bool:
        return (value(await scrape(node.url), "outlast_participant_down_seconds", 'participant="dead"') or 0.0) > 0

    await eventually(shown)


async def test_heuristics_are_counted_until_they_are_acknowledged(
    node: RunningNode, scripted: ScriptedParticipant
) -> None:
    scripted.rule = on("commit", saying({"state": "aborted"}, status=409))
    await node.register("mad", scripted.url)
    gid = (await node.submit("mad")).json["gid"]

    async def counted(kind: str) -> bool:
        text = await scrape(node.url)
        kinds = ("contradicted", "mixed", "resolved")
        found = {each: value(text, "outlast_heuristic_transactions", f'kind="{each}"') for each in kinds}
        return found == {each: float(each == kind) for each in kinds}

    await eventually(node.node.ledger.heuristic)
    assert await counted("contradicted")
    await node.call("POST", f"/v1/transactions/{gid}/resolve", {"branch": "mad", "outcome": "abort"})
    assert await counted("mixed")
    await node.call("POST", f"/v1/transactions/{gid}/acknowledge")
    assert await counted("")


async def test_a_follower_says_nothing_of_what_only_a_leader_knows() -> None:
    replicas = Replicas(("n1",))
    async with running(configs()[0], replicas.logs["n1"], ready=False) as node:
        replicas.lead("n1")
        await eventually(lambda: node.node.driver.leading)
        await node.register("a", "http://127.0.0.1:9")
        assert value(await scrape(node.url), "outlast_branches_in_doubt", 'participant="a"') == 0
        replicas.lead(None)
        await eventually(lambda: not node.node.driver.leading)
        text = await scrape(node.url)
        assert value(text, "outlast_branches_in_doubt", 'participant="a"') is None
        assert value(text, "outlast_leader") == 0


# ------------------------------------------------------------------------------------------------ a participant


@pytest.fixture
async def swept() -> Any:
    participant = await start(NullManager(), settings=ServerSettings(sweep_every_s=0.02))
    yield participant
    await participant.stop()


async def test_a_participant_shows_what_is_prepared_and_since_when(node: RunningNode, null: Participant) -> None:
    async with ScriptedParticipant(rule=on("prepare", hang)) as slow:
        await node.register("null", null.url)
        await node.register("slow", slow.url)
        await node.submit("null", "slow", wait="none")

        async def prepared() -> bool:
            text = await scrape(null.url)
            oldest_s = value(text, "outlast_participant_prepared_oldest_seconds") or 0.0
            return value(text, "outlast_participant_prepared") == 1 and oldest_s > 0

        await eventually(prepared)


async def test_sweeps_and_alarms_are_counted(swept: Participant, monkeypatch: pytest.MonkeyPatch) -> None:
    async def listed() -> bool:
        return bool(value(await scrape(swept.url), "outlast_participant_sweeps_total", 'result="listed"'))

    await eventually(listed)
    before = await scrape(swept.url)
    assert value(before, "outlast_participant_alarms_total") == 0
    logging.getLogger("participants.prepared").error("ALARM: %s", "somebody ended a branch by hand")
    logging.getLogger("participants.prepared").error("no alarm")
    assert value(await scrape(swept.url), "outlast_participant_alarms_total") == 1
    await swept.stop()
    assert not [each for each in logging.getLogger("participants").handlers if "metrics" in type(each).__module__]


# ------------------------------------------------------------------------------------------------ the rules


def rules() -> list[dict[str, str]]:
    """The alerts, read as the plain YAML that they are written in: two levels of maps in a list."""
    found: list[dict[str, str]] = []
    for line in (DOCS / "alerts.yml").read_text().splitlines():
        match = re.fullmatch(r"( *)(- )?([a-z]+): ?(.*)", line)
        if line.startswith("#"):
            continue
        assert match, f"not in the plain style: {line}"
        if match[3] == "alert":
            assert (match[1], match[2]) == ("      ", "- ")
            found.append({})
        if found:
            assert match[3] not in found[-1], line
            # Unquoted text that YAML would read as something else.
            assert ": " not in match[4], line
            assert " #" not in match[4], line
            assert not re.match(r"[\[\]{}>|*&!%@`'\"]", match[4]), line
            found[-1][match[3]] = match[4]
    return found


def complaints(expression: str, texts: list[str]) -> list[str]:
    """Names and labels in a rule that nobody shows."""
    samples = [(sample[1], sample[2] or "") for text in texts for sample in SAMPLE.finditer(text)]
    wanted: list[tuple[str, str]] = []
    for name, labels in re.findall(r"(outlast_[a-z_]+)(?:\{([^}]*)\})?", expression):
        wanted.append((name, ""))
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', labels):
            wanted += [(name, f'{label}="{each}"') for each in values.split("|")]
    wanted += [(name, f'{label}="') for label, name in re.findall(r"by \((\w+)\) \((outlast_[a-z_]+)", expression)]
    return [
        f"nobody shows {name} with {label!r}"
        for name, label in wanted
        if not any(there == name and label in labels for there, labels in samples)
    ]


@pytest.fixture
async def shown(node: RunningNode, swept: Participant) -> list[str]:
    await node.register("a", swept.url)
    await node.submit("a", wait="ended")
    return [await scrape(node.url), await scrape(swept.url)]


async def test_every_alert_names_metrics_and_labels_that_there_are(shown: list[str]) -> None:
    found = rules()
    assert len(found) > 8
    for rule in found:
        assert {"alert", "expr", "labels", "severity", "annotations", "summary", "action"} <= set(rule), rule
        assert rule["severity"] in ("warning", "critical")
        assert complaints(rule["expr"], shown) == [], rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")")


@pytest.mark.parametrize(
    "expression",
    [
        "outlast_branches_in_doubts > 0",
        'outlast_heuristic_transactions{kind="contradictory"} > 0',
        "max by (node) (outlast_branches_in_doubt) > 0",
        'outlast_participant_sweeps_total{result=~"listed|missed"} > 0',
    ],
)
async def test_a_rule_that_names_something_else_is_noticed(shown: list[str], expression: str) -> None:
    assert complaints(expression, shown)


async def test_the_manual_lists_every_metric_and_every_alert_and_no_others(shown: list[str]) -> None:
    manual = (DOCS / "MONITORING.md").read_text()
    there = {
        name if kind != "counter" or name.endswith("_total") else f"{name}_total"
        for text in shown
        for name, kind in TYPE.findall(text)
        if not name.endswith("_created")
    }
    assert set(re.findall(r"`(outlast_[a-z_]+)`", manual)) == there
    assert set(re.findall(r"^\| `(Outlast\w+)`", manual, re.MULTILINE)) == {rule["alert"] for rule in rules()}
