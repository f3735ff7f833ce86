"""The shape that every protocol has."""

from collections.abc import Sequence
from typing import Protocol

from coordinator.protocol.effects import Effect
from coordinator.protocol.entries import Header, TransactionEntry
from coordinator.protocol.transaction import Tally, Transaction


class CommitProtocol(Protocol):
    """Three pure functions. None of them raises on any transaction and entry that can be built."""

    @property
    def name(self) -> str:
        """What clients ask for under `protocol`."""
        ...

    def decide(self, txn: Transaction, tally: Tally, *, expired: bool) -> TransactionEntry | None:
        """What a leader now wants logged, or None. A wish: asking twice is harmless."""
        ...

    def evolve(self, txn: Transaction | None, entry: TransactionEntry, header: Header) -> Transaction | None:
        """The transaction after `entry`, which is committed. Total: an entry out of turn changes nothing."""
        ...

    def owed(self, txn: Transaction) -> Sequence[Effect]:
        """What this state still owes the world, whoever leads."""
        ...
