"""Every fault that was scheduled did happen: a run without its disasters proves less than it says."""

from typing import TYPE_CHECKING

from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from tests.simulation.faults import Fault
    from tests.simulation.world import World


class Fired(Checker):
    name = "fired"

    def __init__(self) -> None:
        super().__init__()
        self._happened: list[Fault] = []

    def injected(self, fault: "Fault") -> None:
        self._happened.append(fault)

    def at_rest(self, world: "World") -> None:
        for fault in world.plan.faults:
            if fault not in self._happened:
                self.complain(f"{fault}: this never happened")
