"""No lock outlives its transaction: what is locked belongs to a prepared branch of a transaction that has not ended."""

from typing import TYPE_CHECKING

from participants.resource import State
from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from tests.simulation.bank import Bank
    from tests.simulation.world import World


class Locks(Checker):
    name = "locks"

    def __init__(self) -> None:
        super().__init__()
        self._ended: set[str] = set()

    def applied(self, node: str, result: "Applied") -> None:
        if result.txn is not None and result.txn.ended_at is not None:
            self._ended.add(result.txn.gid)

    def bank_changed(self, bank: "Bank") -> None:
        for account, key in bank.tables["locks"].items():
            branch = bank.tables["branches"].get(key)
            if branch is None or branch.state is not State.PREPARED:
                self.complain(f"{account} of {bank.name} is locked by {key.gid}, which is {branch and branch.state}")
            elif key.gid in self._ended:
                self.complain(f"{account} of {bank.name} is locked by {key.gid}, which has ended")

    def at_rest(self, world: "World") -> None:
        for name, store in sorted(world.stores.items()):
            for account, key in store.disk["locks"].items():
                self.complain(f"{account} of {name} is locked by {key.gid} at rest")
