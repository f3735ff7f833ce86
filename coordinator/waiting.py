"""What an unfinished transaction waits for, branch by branch, so that nobody has to guess. Pure.

Only the leader can tell: votes and acknowledgements are soft state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from coordinator.courier import LaneStatus
from coordinator.protocol.messages import ReadOnly, Refused
from coordinator.protocol.transaction import Tally, Transaction
from coordinator.protocol.two_phase import is_owed


class Awaited(StrEnum):
    """What is missing."""

    VOTE = "vote"
    ACK = "ack"
    OPERATOR = "operator"
    APPLICATION = "application"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One thing that is missing. Of an application there is no branch.

    trouble: why the last request to the participant failed, or the state that it claims against the decision.
    down_since: since when the participant has not answered, milliseconds since 1970; None while it answers.
    """

    awaited: Awaited
    branch: str | None = None
    participant: str | None = None
    trouble: str | None = None
    down_since: int | None = None


def waiting_for(txn: Transaction, tally: Tally, lane_of: Callable[[str], LaneStatus | None]) -> tuple[Waiting, ...]:
    """What is missing until it goes on; nothing, when that is only the log. `lane_of` says how a participant is."""
    if txn.ended_at is not None:
        return ()
    if txn.active:
        return (Waiting(awaited=Awaited.APPLICATION),)
    found = []
    for branch in txn.branches:
        if txn.decision is None:
            if branch.name in tally.votes:
                continue
            awaited, trouble = Awaited.VOTE, None
        else:
            if not is_owed(branch) or branch.name in tally.acked:
                continue
            trouble = branch.contradiction or tally.contradictions.get(branch.name)
            awaited = Awaited.ACK if trouble is None else Awaited.OPERATOR
        lane = lane_of(branch.participant)
        found.append(
            Waiting(
                awaited=awaited,
                branch=branch.name,
                participant=branch.participant,
                trouble=trouble if trouble is not None or lane is None else lane.trouble,
                down_since=None if lane is None else lane.down_since,
            )
        )
    return tuple(found)


def in_doubt(txn: Transaction, tally: Tally) -> tuple[str, ...]:
    """Participants, once per branch, that hold a prepared branch, or may, and have not answered the decision."""
    if txn.ended_at is not None or txn.active:
        return ()
    if txn.decision is None:
        return tuple(
            branch.participant
            for branch in txn.branches
            if not isinstance(tally.votes.get(branch.name), ReadOnly | Refused)
        )
    return tuple(branch.participant for branch in txn.branches if is_owed(branch) and branch.name not in tally.acked)
