"""No lock outlives its transaction: what is locked belongs to a prepared branch of a transaction that has not ended."""

from typing import TYPE_CHECKING

from coordinator.lost import EPOCH_MARGIN
from coordinator.protocol.messages import Gid
from participants.resource import State
from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from coordinator.ledger import Ledger
    from tests.simulation.bank import Bank
    from tests.simulation.world import World


class Locks(Checker):
    name = "locks"

    def __init__(self) -> None:
        super().__init__()
        self._ended: set[str] = set()
        self._lost: int = -1
        """Epochs up to this one are of a cluster that was lost: applications may prepare what nobody knows of."""

    def anew(self, world: "World", copy: "Ledger") -> None:
        self._lost = copy.epoch + EPOCH_MARGIN

    def applied(self, node: str, result: "Applied") -> None:
        if result.txn is not None and result.txn.ended_at is not None:
            self._ended.add(result.txn.gid)

    def bank_changed(self, bank: "Bank") -> None:
        for account, key in bank.tables["locks"].items():
            branch = bank.tables["branches"].get(key)
            if branch is None or branch.state is not State.PREPARED:
                self.complain(f"{account} of {bank.name} is locked by {key.gid}, which is {branch and branch.state}")
            elif key.gid in self._ended and not self._is_lost(key.gid):
                self.complain(f"{account} of {bank.name} is locked by {key.gid}, which has ended")

    def _is_lost(self, gid: str) -> bool:
        parsed = Gid.parse(gid)
        return parsed is not None and parsed.epoch <= self._lost

    def at_rest(self, world: "World") -> None:
        for name, store in sorted(world.stores.items()):
            for account, key in store.disk["locks"].items():
                self.complain(f"{account} of {name} is locked by {key.gid} at rest")
