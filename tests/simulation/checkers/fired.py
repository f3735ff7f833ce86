"""Every fault that was scheduled did hit, or could not: a run without its disasters proves less than it says.

Whoever says that one has missed says why, and that is looked at. How many may miss is for many runs to say.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tests.simulation.checkers.base import Checker
from tests.simulation.faults import BANKS, NODES, Disaster, Fault, Miss

if TYPE_CHECKING:
    from tests.simulation.world import World


def _nobody(world: "World", fault: Fault, who: str) -> bool:
    group = BANKS if who in BANKS else (*NODES, *BANKS) if who == "all" else NODES
    return all(world.machines[name].life is None for name in group)


def _died_before(world: "World", fault: Fault, who: str) -> bool:
    machine = world.machines[who]
    return machine.life is None or machine.began_s > world.injector.start_s + fault.at_s


def _stops(world: "World", fault: Fault, who: str) -> bool:
    life = world.machines[who].life
    return life is not None and life.stops


_EXCUSES: Mapping[Miss, Callable[["World", Fault, str], bool]] = {
    Miss.NOBODY: _nobody,
    Miss.NO_CLUSTER: lambda world, _fault, _who: world.is_down,
    Miss.NO_LEADER: lambda world, _fault, _who: world.leader() is None,
    Miss.NOT_STARTED: lambda world, _fault, who: world.replica(who) is None,
    Miss.STOPS: _stops,
    Miss.GONE: lambda world, _fault, who: world.machines[who].life is None,
    Miss.DIED_BEFORE: _died_before,
    Miss.HEALED: lambda world, _fault, _who: world.injector.healed,
}


class Fired(Checker):
    name = "fired"

    def __init__(self) -> None:
        super().__init__()
        self._world: World | None = None
        self._told: list[Fault | Disaster] = []

    def starts(self, world: "World") -> None:
        self._world = world

    def injected(self, fault: Fault, who: str, missed: Miss | None) -> None:
        self._told.append(fault)
        assert self._world is not None
        if missed is not None and not (missed in _EXCUSES and _EXCUSES[missed](self._world, fault, who)):
            self.complain(f"{fault}: it has missed {who}, and it is not so that {missed.value}")

    def struck(self, disaster: Disaster, missed: Miss | None) -> None:
        self._told.append(disaster)
        world = self._world
        assert world is not None
        left_s = world.injector.start_s + world.plan.heal_s - world.loop.now_s
        excused = missed is None or (
            not disaster.survivor and (world.closing if missed is Miss.NO_BACKUP else left_s < disaster.down_s)
        )
        if not excused:
            self.complain(f"{disaster}: it has not come, and for no good reason")

    def at_rest(self, world: "World") -> None:
        due: list[Fault | Disaster] = [
            *world.plan.faults,
            *([world.plan.disaster] if world.plan.disaster is not None else []),
        ]
        for each in due:
            if self._told.count(each) != due.count(each):
                self.complain(f"{each}: this never happened")
