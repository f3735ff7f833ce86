"""An outcome once seen never changes: on no node, to no client, to no participant."""

from typing import Any

from tests.simulation.checkers.base import Checker


class Outcomes(Checker):
    name = "outcomes"

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, tuple[str, str]] = {}

    def saw(self, gid: str, outcome: str, where: str) -> None:
        known = self.first.setdefault(gid, (outcome, f"{where} at {self.now_s:.3f}"))
        if known[0] != outcome:
            self.complain(f"{gid} was {known[0]} ({known[1]}), and is {outcome} ({where})")

    def restored(self, node: str, ledger: Any) -> None:
        for gid, (outcome, where) in self.first.items():
            txn = ledger.get(gid)
            if txn is not None and txn.decision is not None:
                told = "committed" if txn.decision.value == "commit" else "aborted"
                if told != outcome:
                    self.complain(f"{gid} was {outcome} ({where}), and is {told} in a snapshot on {node}")
