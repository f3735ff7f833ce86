"""What a leader's transactions look like from above, for its metrics: who is in doubt, since when, and what went wrong.

Made when somebody asks, and not kept up with every step: a scrape is rare, a transaction is not.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.courier import LaneStatus
from coordinator.protocol.transaction import Heuristic, Tally, Transaction
from coordinator.waiting import in_doubt


@dataclass(slots=True, kw_only=True)
class Survey:
    """Counts, and dates in milliseconds since 1970. `oldest_started`: of all that is in flight.

    in_doubt: by participant, branches that are or may be prepared and have not answered the decision.
    in_doubt_since: by participant, when the transaction of the oldest of them began.
    heuristics: what an operator has not resolved, or not acknowledged.
    """

    lanes: Mapping[str, LaneStatus]
    in_doubt: Counter[str] = field(default_factory=Counter)
    in_doubt_since: dict[str, int] = field(default_factory=dict)
    oldest_started: int | None = None
    heuristics: Counter[Heuristic] = field(default_factory=Counter)

    def add(self, txn: Transaction, tally: Tally) -> None:
        """Take one more into account; one that has ended counts for nothing here."""
        if txn.ended_at is not None:
            return
        if self.oldest_started is None or txn.started_at < self.oldest_started:
            self.oldest_started = txn.started_at
        for participant in in_doubt(txn, tally):
            self.in_doubt[participant] += 1
            since = self.in_doubt_since.get(participant)
            if since is None or txn.started_at < since:
                self.in_doubt_since[participant] = txn.started_at
