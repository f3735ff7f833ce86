"""An outcome once seen never changes: on no node, to no client, to no participant."""

from typing import TYPE_CHECKING

from tests.simulation.checkers.base import Checker, witnessed

if TYPE_CHECKING:
    from coordinator.ledger import Ledger
    from tests.simulation.world import World


class Outcomes(Checker):
    name = "outcomes"

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, tuple[str, str]] = {}

    def saw(self, gid: str, outcome: str, where: str) -> None:
        known = self.first.setdefault(gid, (outcome, f"{where} at {self.now_s:.3f}"))
        if known[0] != outcome:
            self.complain(f"{gid} was {known[0]} ({known[1]}), and is {outcome} ({where})")

    def anew(self, world: "World", copy: "Ledger") -> None:
        self._compare(copy, "in the copy")
        self.first = {gid: seen for gid, seen in self.first.items() if witnessed(world, copy, gid, seen[0])}

    def restored(self, node: str, ledger: "Ledger") -> None:
        self._compare(ledger, f"in a snapshot on {node}")

    def _compare(self, ledger: "Ledger", where: str) -> None:
        for gid, (outcome, before) in self.first.items():
            txn = ledger.get(gid)
            if txn is not None and txn.decision is not None:
                told = "committed" if txn.decision.value == "commit" else "aborted"
                if told != outcome:
                    self.complain(f"{gid} was {outcome} ({before}), and is {told} {where}")
