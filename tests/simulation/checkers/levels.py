"""Levels: nothing of a newer level is applied before the software of every node understands it."""

from typing import TYPE_CHECKING

from coordinator.levels import level_of
from coordinator.protocol.entries import Raised
from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from tests.simulation.world import World


class Levels(Checker):
    name = "levels"

    def __init__(self) -> None:
        super().__init__()
        self._understands: dict[str, int] = {}

    def starts(self, world: "World") -> None:
        self._understands = world.understands  # which changes with every upgrade

    def applied(self, node: str, result: "Applied") -> None:
        if result.verdict.name != "APPLIED":
            return
        entry = result.entry
        level = max(level_of(entry), entry.level if isinstance(entry, Raised) else 0)
        behind = [name for name, understood in self._understands.items() if understood < level]
        if behind:
            self.complain(f"{node} has applied {type(entry).__name__}, of level {level}: too new for {behind}")
