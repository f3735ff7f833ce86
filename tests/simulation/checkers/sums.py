"""Money is neither made nor lost: at rest the sum over all banks is what it was."""

from typing import TYPE_CHECKING

from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from tests.simulation.bank import Bank
    from tests.simulation.world import World


class Sums(Checker):
    name = "sums"

    def bank_changed(self, bank: "Bank") -> None:
        for account, balance in bank.tables["balances"].items():
            if balance < 0:
                self.complain(f"{account} of {bank.name} has {balance}")

    def at_rest(self, world: "World") -> None:
        total = sum(sum(store.disk["balances"].values()) for store in world.stores.values())
        if total != world.money:
            self.complain(f"there were {world.money}, and there are {total}")
