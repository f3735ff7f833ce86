"""No branch is prepared for longer than the bound while a majority is up.

That is: two nodes at least and the branch's participant are well, and hear each other.
"""

from typing import TYPE_CHECKING

from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from tests.simulation.world import World

BOUND_S = 12.0
"""The longest timeout of a transaction, and what an election, a slow answer and a backoff take."""


class Doubt(Checker):
    name = "doubt"

    def __init__(self) -> None:
        super().__init__()
        self._calm_since: dict[str, float] = {}
        """Since when the majority has been well, and each bank with it."""

    def look(self, world: "World") -> None:
        for bank in world.stores:
            if not world.is_calm(bank):
                self._calm_since.pop(bank, None)
                continue
            since = self._calm_since.setdefault(bank, self.now_s)
            for key, prepared_s in world.stores[bank].disk["since"].items():
                if self.now_s - max(prepared_s, since) > BOUND_S:
                    self.complain(f"{key.gid} is prepared at {bank} since {prepared_s:.3f}; all was well for so long")
