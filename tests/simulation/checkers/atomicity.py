"""Atomicity: of a transaction's marks all are there or none, and that is what was said of it."""

from typing import TYPE_CHECKING

from tests.simulation.checkers.base import Checker, witnessed

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from coordinator.ledger import Ledger
    from tests.simulation.world import World


class Atomicity(Checker):
    name = "atomicity"

    def __init__(self) -> None:
        super().__init__()
        self._branches: dict[str, dict[str, str]] = {}
        """Of each transaction: where its branches are."""
        self._read_only: dict[str, set[str]] = {}
        self._outcomes: dict[str, str] = {}

    def saw(self, gid: str, outcome: str, where: str) -> None:
        self._outcomes.setdefault(gid, outcome)

    def anew(self, world: "World", copy: "Ledger") -> None:
        self._outcomes = {
            gid: outcome for gid, outcome in self._outcomes.items() if witnessed(world, copy, gid, outcome)
        }

    def applied(self, node: str, result: "Applied") -> None:
        txn = result.txn
        if txn is not None and txn.branches and result.verdict.name == "APPLIED":
            if len(txn.branches) > len(self._branches.get(txn.gid, ())):  # an application enlists one after the other
                self._branches[txn.gid] = {branch.name: branch.participant for branch in txn.branches}
            for branch in txn.branches:
                if branch.vote is not None and branch.vote.value == "read_only":
                    self._read_only.setdefault(txn.gid, set()).add(branch.name)

    def at_rest(self, world: "World") -> None:
        marks: dict[str, set[str]] = {}
        for name, store in world.stores.items():
            for key in store.disk["marks"]:
                if key.gid not in self._branches:
                    self.complain(f"{name} has a mark of {key.gid}, which never began")
                marks.setdefault(key.gid, set()).add(key.branch)
        for gid, branches in self._branches.items():
            wanted = set(branches) - self._read_only.get(gid, set())
            there = marks.get(gid, set())
            outcome = self._outcomes.get(gid)
            if there and there != wanted:
                self.complain(f"{gid} has marks of {sorted(there)} only, its branches are {sorted(wanted)}")
            elif there and outcome == "aborted":
                self.complain(f"{gid} was said to be aborted, and has marks of {sorted(there)}")
            elif wanted and not there and outcome == "committed":
                self.complain(f"{gid} was said to be committed, and left no mark")
