"""Faults that last, and overlap: what is suffered is the worst of those that are not over yet."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.simulation.bank import Mood, Store
from tests.simulation.faults import BANKS, NODES, Fault, Miss
from tests.simulation.injection import Injector
from tests.simulation.internet import Internet
from tests.simulation.machines import Machine, SimLoop
from tests.simulation.watched import NodeDisk

USUAL, MILD, BAD = "usual", "mild", "bad"


@pytest.fixture
def world() -> Iterator[Any]:
    loop = SimLoop(random.Random(0))
    machines = {name: Machine(loop, name, f"127.0.1.{index}") for index, name in enumerate((*NODES, *BANKS))}
    for machine in machines.values():
        machine.begin()
    world = SimpleNamespace(
        loop=loop,
        net=Internet(loop, random.Random(0)),
        machines=machines,
        disks={},
        stores={"oak": Store(random.Random(0), ())},
        moods={"oak": Mood()},
        leader=lambda: "n1",
        is_down=False,
        heard=[],
        note=lambda *_: None,
    )
    world.disks["n1"] = NodeDisk(world, "n1", random.Random(0))
    world.hear = lambda _what, _fault, *about: world.heard.append(about)
    yield world
    loop.finish([machine.life for machine in machines.values() if machine.life is not None])


SUFFERED: dict[str, tuple[str, float, float, Any]] = {
    "lossy network": ("", 0.1, 0.3, lambda world: world.net.lose),
    "unruly network": ("", 0.1, 0.3, lambda world: world.net.overtake),
    "slow network": ("", 0.1, 0.3, lambda world: world.net.delay_s),
    "slow disk": ("oak", 0.1, 0.3, lambda world: world.stores["oak"].sync_s),
    "full disk": ("n1", 8.0, 3.0, lambda world: world.disks["n1"].room),
    "mute": ("oak", 0.1, 0.3, lambda world: world.moods["oak"].mute),
    "pause": ("n1", 0.0, 0.0, lambda world: world.machines["n1"].paused),
}


@pytest.mark.parametrize("kind", SUFFERED)
@pytest.mark.parametrize("worse_first", [True, False])
def test_faults_that_overlap_do_not_undo_each_other(world: Any, kind: str, *, worse_first: bool) -> None:
    who, mild, bad, suffered = SUFFERED[kind]
    values = [suffered(world)]
    for size in (mild, bad):  # each for itself: what it is like
        alone = Injector(world)
        alone.inject(Fault(at_s=0, kind=kind, who=who, for_s=1.0, size=size), who, lambda *_: None)
        values.append(suffered(world))
        alone.heal()
        assert suffered(world) == values[0]
    names = dict(zip((USUAL, MILD, BAD), values, strict=True))

    sizes = (bad, mild) if worse_first else (mild, bad)
    injector = Injector(world)
    at_s = world.loop.now_s
    seen: list[Any] = []
    for start_s, for_s, size in ((1.0, 4.0, sizes[0]), (2.0, 1.0, sizes[1])):
        fault = Fault(at_s=start_s, kind=kind, who=who, for_s=for_s, size=size)
        world.loop.call_at(at_s + start_s, injector._happen, fault)
    for look_s in (1.5, 2.5, 3.5, 5.5):
        world.loop.call_at(at_s + look_s, lambda: seen.append(suffered(world)))
    done = world.loop.create_future()
    world.loop.call_at(at_s + 6.0, done.set_result, None)
    world.loop.run_until_complete(done)
    expected = (BAD, BAD, BAD, USUAL) if worse_first else (MILD, BAD, MILD, USUAL)
    assert seen == [names[each] for each in expected]
    assert [missed for _who, missed in world.heard] == [None, None]


def test_what_waits_for_a_write_tells_why_it_came_to_nothing(world: Any) -> None:
    injector = Injector(world)
    for name in ("n1", "oak"):
        injector._happen(Fault(at_s=0, kind="failing disk", who=name, size=3))
    world.machines["n1"].end(power=True)
    injector.heal()
    assert sorted(world.heard, key=str) == [("n1", Miss.DIED_BEFORE), ("oak", Miss.HEALED)]
