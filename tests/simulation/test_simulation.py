"""The whole cluster under any faults, a few hundred times; and what would be noticed if the code were wrong."""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.__main__ import KEPT, KEPT_STRUCK, show, summed
from tests.simulation.checkers import CHECKERS
from tests.simulation.faults import KINDS, NODES, Disaster, Fault, Plan, draw
from tests.simulation.machines import Machine, SimLoop
from tests.simulation.shrink import shrink
from tests.simulation.variants import VARIANTS
from tests.simulation.world import Report

ROOT = Path(__file__).parents[2]
SEEDS = int(os.environ.get("OUTLAST_SEEDS", "200"))
SHRUNK = "a stop fails"
"""A variant that takes one fault, in whatever run."""
STRUCK_SEED = 6
"""In its run all nodes are lost."""
MISS_AT_MOST = 1 / 3
"""Of the faults of each kind, and of the disasters, those that hit nobody: most when they come to lost clusters."""
LASTS_AT_MOST_S = 900
"""On a machine that has much else to do."""

EFFECTS = (
    "an application dies",
    "an application falls silent",
    "an application is late",
    "an application lies",
    "applications that are told to wait for an upgrade",
    "applications that prepare too late",
    "died in a write",
    "disasters after which a backup was left",
    "disasters after which one disk was left",
    "doubled",
    "failed syncs of banks",
    "fault: upgrade",
    "lost",
    "lost in a cut",
    "lost with its connection",
    "overtaken",
    "power cuts with something unsynced",
    "states from a snapshot",
    "tcp held by a cut",
    "tcp reset after a cut",
    "tcp segment sent again",
    "torn writes",
    "unsynced batches of banks lost",
    "writes that found no room",
)


@contextlib.contextmanager
def begun(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """It does not outlive the block."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Any]]:
    """What came of the seeds, and of the variants; all at the same time, for two cores."""
    half = SEEDS // 2
    with (
        begun("--seeds", str(half), "--kept", "--json") as seeds,
        begun("--seeds", str(SEEDS - half), "--start", str(half), "--json") as more,
        begun("--variants", "--json") as variants_of_it,
    ):
        processes = {"seeds": seeds, "more seeds": more, "variants": variants_of_it}
        output = {name: process.communicate(timeout=LASTS_AT_MOST_S) for name, process in processes.items()}
        variants = [json.loads(line) for line in output["variants"][0].splitlines()]
        for name in ("seeds", "more seeds"):
            assert processes[name].returncode == 0, output[name][1][-2000:]
        yield {
            "seeds": summed(json.loads(output[name][0]) for name in ("seeds", "more seeds")),
            "variants": {each["variant"]: each["caught"] for each in variants},
            "errors": output["variants"][1][-2000:],
        }


@pytest.mark.timeout(LASTS_AT_MOST_S)
def test_nothing_is_wrong_under_any_faults(runs: dict[str, Any]) -> None:
    found = runs["seeds"]["found"]
    assert not found, f"python -m tests.simulation --seed {next(iter(found))} --trace shows it: {found}"
    assert runs["seeds"]["seeds"] == SEEDS + len(KEPT) + len(KEPT_STRUCK)


def summed_where(counts: dict[str, int], start: str, end: str = "") -> int:
    return sum(count for what, count in counts.items() if what.startswith(start) and what.endswith(end))


@pytest.mark.timeout(LASTS_AT_MOST_S)
def test_the_disasters_happen(runs: dict[str, Any]) -> None:
    counts = runs["seeds"]["counts"]
    assert [effect for effect in (*EFFECTS, *[f"fault: {kind}" for kind in KINDS]) if not counts.get(effect)] == []
    for kind in KINDS:
        missed = summed_where(counts, "missed, ", f": {kind}")
        assert missed < MISS_AT_MOST * (missed + counts[f"fault: {kind}"]), (kind, counts)
    missed = summed_where(counts, "disasters that did not come")
    assert missed < MISS_AT_MOST * (missed + summed_where(counts, "disasters after which")), counts
    assert runs["seeds"]["leaders"] > 2 * SEEDS
    assert runs["seeds"]["committed"] > 20 * SEEDS
    assert runs["seeds"]["transactions"] > runs["seeds"]["committed"] + SEEDS


@pytest.mark.timeout(LASTS_AT_MOST_S)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_wrong_is_noticed(runs: dict[str, Any], name: str) -> None:
    assert set(runs["variants"].get(name, ())) == set(VARIANTS[name].caught_by), runs["errors"]


def test_every_checker_has_something_to_notice() -> None:
    noticing = {who for variant in VARIANTS.values() for who in variant.caught_by}
    assert {checker.name for checker in CHECKERS} | {"progress", "defect"} == noticing


@pytest.mark.timeout(LASTS_AT_MOST_S)
@pytest.mark.parametrize("seed", [3, STRUCK_SEED])
def test_a_seed_is_one_run_byte_for_byte(seed: int) -> None:
    with begun("--seed", str(seed), "--fine") as one, begun("--seed", str(seed), "--fine") as other:
        traces = [process.communicate(timeout=LASTS_AT_MOST_S) for process in (one, other)]
        assert (one.returncode, other.returncode) == (0, 0), traces[0][1][-2000:]
    assert traces[0][0] == traces[1][0]
    assert traces[0][0].count("\n") > 1000
    assert ("DISASTER" in traces[0][0]) == (seed == STRUCK_SEED)


def test_a_plan_is_shown_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    plan = replace(draw(STRUCK_SEED), left_out="n3", old=("n1", "n2"), stays_old="n1")
    show(
        0,
        plan,
        Report(seed=0, complaints=[], virtual_s=0, transactions=0, committed=0, leaders=0, counts={}),
        fine=False,
    )
    told = capsys.readouterr().out
    assert all(f"  {fault}\n" in told for fault in plan.faults)
    assert f"\n{plan.disaster}\n" in told
    assert "but for n3\n" in told
    assert "n1, n2 begin with software of the oldest level; n1 is never upgraded\n" in told


def test_a_plan_depends_on_its_seed_alone() -> None:
    assert draw(7) == draw(7) != draw(8)
    assert all(0 < fault.at_s < draw(7).heal_s for fault in draw(7).faults)


def test_what_is_not_needed_for_a_failure_is_taken_out() -> None:
    faults = tuple(Fault(at_s=at_s, kind="kill", who=NODES[at_s % 3]) for at_s in range(12))
    tried = []

    def run(plan: Plan) -> Report:
        tried.append(plan)
        wrong = {3, 8} <= {fault.at_s for fault in plan.faults}
        complaints = ["sums: wrong"] if wrong else ["locks: another matter"]
        return Report(seed=0, complaints=complaints, virtual_s=0.0, transactions=0, committed=0, leaders=0, counts={})

    disaster = Disaster(at_s=3.0, down_s=1.0, survivor="n2")
    whole = Plan(faults=faults, heal_s=20.0, left_out="n1", disaster=disaster, old=("n1", "n2"), stays_old="n1")
    plan, report = shrink(whole, run)
    assert [fault.at_s for fault in plan.faults] == [3, 8]
    assert replace(plan, faults=()) == Plan(faults=(), heal_s=20.0)
    assert report.complaints == ["sums: wrong"]
    assert len(tried) < 60


def test_a_run_that_fails_is_shrunk_to_what_it_takes() -> None:
    with begun("--seed", str(VARIANTS[SHRUNK].first), "--variant", SHRUNK, "--shrink") as process:
        told = process.communicate(timeout=LASTS_AT_MOST_S)[0]
    plan, _, rest = told.partition("\nfaults:\n")[2].partition("healed at")
    faults = plan.splitlines()
    assert 1 <= len(faults) <= 3, told[-2000:]
    assert "defect: " in rest
    assert len(VARIANTS[SHRUNK].plan(draw(VARIANTS[SHRUNK].first)).faults) > 10


# The machines themselves.


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    loop = SimLoop(random.Random(0))
    yield loop
    loop.finish([])


def passed(loop: SimLoop, until_s: float) -> None:
    done = loop.create_future()
    loop.call_at(until_s, done.set_result, None)
    loop.run_until_complete(done)


def test_a_dead_machine_does_nothing_more(loop: SimLoop) -> None:
    machine = Machine(loop, "n1", "127.0.0.1")
    heard: list[str] = []

    async def work() -> None:
        try:
            while True:
                await asyncio.sleep(1)
                heard.append("alive")
        finally:
            heard.append("a farewell")

    loop.create_task(work(), context=machine.begin().context)
    passed(loop, 2.5)
    machine.end(power=False)
    passed(loop, 9.0)
    assert heard == ["alive", "alive"]


def test_nothing_ends_badly_unheard(loop: SimLoop) -> None:
    machine = Machine(loop, "n1", "127.0.0.1")

    async def stumble() -> None:
        await asyncio.sleep(1)
        raise KeyError("a defect")

    async def cares() -> None:
        with contextlib.suppress(KeyError):
            await loop.create_task(stumble())

    life = machine.begin()
    loop.create_task(stumble(), context=life.context)
    loop.create_task(cares(), context=life.context)
    passed(loop, 2.0)
    assert loop.errors == []
    machine.end(power=True)
    assert [error.partition(" ended: ")[2] for error in loop.errors] == ["KeyError('a defect')"]

    loop.create_task(stumble(), context=machine.begin().context)
    machine.end(power=True)
    loop.create_task(stumble())
    passed(loop, 4.0)
    loop.judge(None)
    assert [error.partition(":")[0] for error in loop.errors] == ["n1", "?"]


@pytest.mark.parametrize("dies", [False, True])
def test_a_future_that_nobody_looks_at_is_a_defect_of_the_living(loop: SimLoop, *, dies: bool) -> None:
    machine = Machine(loop, "n1", "127.0.0.1")

    def fail() -> None:
        future = loop.create_future()
        if dies:
            future.add_done_callback(asyncio.Future.exception)
        future.set_exception(KeyError("a defect"))
        if dies:
            machine.end(power=True)

    loop.call_later(1, fail, context=machine.begin().context)
    passed(loop, 2.0)
    assert [error.partition(":")[0] for error in loop.errors] == ([] if dies else ["n1"])


@pytest.mark.parametrize("gathers", [False, True])
def test_who_was_about_to_hear_of_an_end_would_have(loop: SimLoop, *, gathers: bool) -> None:
    machine = Machine(loop, "n1", "127.0.0.1")

    async def stumble() -> None:
        await asyncio.sleep(1)
        raise KeyError("a defect")

    async def cares() -> None:
        task = loop.create_task(stumble())
        if not gathers:
            task.add_done_callback(lambda _: machine.end(power=True))
        else:
            loop.call_later(1.5, lambda: machine.end(power=True))
            await asyncio.gather(task, asyncio.sleep(2), return_exceptions=True)
        with contextlib.suppress(KeyError):
            await task

    loop.create_task(cares(), context=machine.begin().context)
    passed(loop, 3.0)
    assert machine.life is None
    assert loop.errors == []


def test_a_paused_machine_catches_up(loop: SimLoop) -> None:
    machine = Machine(loop, "n1", "127.0.0.1")
    heard: list[float] = []
    context = machine.begin().context
    for at_s in (1.0, 2.0, 3.0):
        loop.call_at(at_s, lambda: heard.append(loop.time()), context=context)
    loop.call_at(0.5, machine.pause)
    loop.call_at(2.5, machine.go_on)
    passed(loop, 4.0)
    assert heard == [2.5, 2.5, pytest.approx(3.0)]


def test_a_fast_clock_rings_early(loop: SimLoop) -> None:
    machine = Machine(loop, "n1", "127.0.0.1")
    machine.drift(2.0)
    rang: list[tuple[float, float]] = []

    def ring() -> None:
        rang.append((loop.time(), loop.now_s))

    machine.begin().context.run(loop.call_later, 10.0, ring)
    passed(loop, 20.0)
    assert rang == [(pytest.approx(10.0), pytest.approx(5.0))]
