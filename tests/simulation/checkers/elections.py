"""Election safety: a term has at most one leader, and that in one of its lives only."""

from typing import Any

from tests.simulation.checkers.base import Checker


class ElectionSafety(Checker):
    name = "election safety"

    def __init__(self) -> None:
        super().__init__()
        self.leaders: dict[tuple[int, int], tuple[str, int]] = {}
        """By generation and term."""
        self._generation = 1

    def anew(self, world: Any, copy: Any) -> None:
        self._generation = world.generation

    def leads(self, node: str, life: int, term: int, journal: Any) -> None:
        known = self.leaders.setdefault((self._generation, term), (node, life))
        if known != (node, life):
            self.complain(f"term {term} has two leaders: {known[0]} in its life {known[1]}, {node} in its life {life}")
