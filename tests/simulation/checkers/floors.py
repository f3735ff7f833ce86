"""Floors: what a participant is told that it may forget has ended, and will never be asked about again.

Below the floor that a participant has heard nothing is unfinished that names it, or that may yet come to name it: an
application may enlist any participant as long as its transaction is active.
"""

from typing import TYPE_CHECKING

from coordinator.facts import Verdict
from coordinator.lost import EPOCH_MARGIN, first_of
from coordinator.protocol.entries import Reconciled
from coordinator.protocol.messages import Gid
from tests.simulation.checkers.base import Checker

if TYPE_CHECKING:
    from coordinator.facts import Applied
    from coordinator.ledger import Ledger
    from coordinator.protocol.transaction import Transaction
    from tests.simulation.bank import Bank
    from tests.simulation.world import World


def _named(txn: "Transaction") -> frozenset[str] | None:
    """Whom it names; None: it may come to name anybody."""
    return None if txn.active else frozenset(branch.participant for branch in txn.branches)


class FloorsHold(Checker):
    name = "floors"

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[int, frozenset[str] | None] = {}
        """By its number, whom an unfinished transaction names; None: it may come to name anybody."""
        self._closed: set[int] = set()
        self._heard: dict[str, int] = {}
        self._told_from = 0
        """The least floor that can come from the cluster that is there now: one that is lost knew nothing better."""

    def anew(self, world: "World", copy: "Ledger") -> None:
        # Whatever became of it later: what the copy holds unfinished is so again, as it was.
        self._open = {number: _named(txn) for number, txn in copy.unfinished.items()}
        self._closed -= self._open.keys()
        self._told_from = first_of(copy.epoch + EPOCH_MARGIN)

    def applied(self, node: str, result: "Applied") -> None:
        txn, entry = result.txn, result.entry
        if isinstance(entry, Reconciled) and entry.decision is None and result.verdict is Verdict.APPLIED:
            gone = Gid.parse(entry.gid)
            assert gone is not None
            self._closed.add(gone.number)
            self._open.pop(gone.number, None)
        parsed = None if txn is None else Gid.parse(txn.gid)
        if txn is None or parsed is None or parsed.number in self._closed:
            return
        if txn.ended_at is not None:
            self._closed.add(parsed.number)
            self._open.pop(parsed.number, None)
        elif not txn.active:
            self._open[parsed.number] = _named(txn)
        elif parsed.number not in self._open:
            self._open[parsed.number] = None

    def bank_changed(self, bank: "Bank") -> None:
        for horizon in bank.tables["horizons"].values():
            if horizon.floor == self._heard.get(bank.name):
                continue
            self._heard[bank.name] = horizon.floor
            if horizon.floor < self._told_from:
                continue
            for number, names in self._open.items():
                if number < horizon.floor and (names is None or bank.name in names):
                    is_active = " is active, and" if names is None else ""
                    self.complain(f"{Gid.of_number('sim', number)}{is_active} is below the floor of {bank.name}")
