"""Records as clients see them. Words of an enumeration are texts already, and go into JSON as such."""

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from coordinator.codec import json_value
from coordinator.facts import Participant
from coordinator.protocol.messages import Prepared, ReadOnly, Refused
from coordinator.protocol.transaction import Branch, Decision, Tally, Transaction, VoteKind
from coordinator.waiting import Waiting

_COMMIT: Final = Decision.COMMIT
_REFUSED: Final = VoteKind.REFUSED
_LAST_WORDS: Final = (VoteKind.READ_ONLY, _REFUSED)
"""Votes that tell where a branch is for good."""

_FIRST_MS: Final = 0
LAST_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999: what is beyond is a clock's fault, and can still be shown."""


def transaction(txn: Transaction, tally: Tally, waiting: tuple[Waiting, ...] | None = None) -> dict[str, Any]:
    """A transaction; `tally` adds what only the leader has heard, and `waiting` what it waits for."""
    rendered: dict[str, Any] = {
        "gid": txn.gid,
        "protocol": txn.protocol,
        "state": txn.state,
        "decision": txn.decision,
        "reason": txn.reason,
        "retryable": txn.retryable,
        "epoch": txn.epoch,
        "branches": [_branch(txn, branch, tally) for branch in txn.branches],
        "started_at": date(txn.started_at),
        "decided_at": date(txn.decided_at),
        "ended_at": date(txn.ended_at),
    }
    if waiting is not None:
        rendered["waiting_for"] = [_waiting(each) for each in waiting]
    if (heuristic := txn.heuristic) is not None:
        rendered["heuristic"] = heuristic
        rendered["acknowledged_at"] = date(txn.acknowledged_at)
    return rendered


def _waiting(each: Waiting) -> dict[str, Any]:
    return {
        "for": each.awaited,
        "branch": each.branch,
        "participant": each.participant,
        "trouble": each.trouble,
        "down_since": date(each.down_since),
    }


def application_transaction(txn: Transaction, tally: Tally) -> dict[str, Any]:
    """The same, for the application that does it: it has to be sealed before `expires_at`."""
    return {**transaction(txn, tally), "expires_at": date(txn.expires_at)}


def _branch(txn: Transaction, branch: Branch, tally: Tally) -> dict[str, Any]:
    vote = tally.votes.get(branch.name)
    reason, result, retryable = branch.reason, branch.result, branch.retryable
    match vote:
        case Prepared() | ReadOnly():
            result = vote.result
        case Refused():
            reason, retryable = vote.reason, vote.retryable
    rendered: dict[str, Any] = {
        "branch": branch.name,
        "participant": branch.participant,
        "state": branch_state(txn, branch, tally),
        "reason": reason,
    }
    if branch.vote is _REFUSED or type(vote) is Refused:
        rendered["retryable"] = retryable
    if result is not None:
        rendered["result"] = json_value(result)
    claimed = branch.contradiction or tally.contradictions.get(branch.name)
    if claimed is not None:
        rendered["heuristic"] = claimed
        rendered["reason"] = f"the participant says that the branch is {claimed}, against the decision"
    if branch.resolved is not None:
        rendered["resolved"] = {
            "outcome": branch.resolved,
            "at": date(branch.resolved_at),
            "note": branch.note,
        }
    return rendered


def branch_state(txn: Transaction, branch: Branch, tally: Tally) -> str:
    """How far a branch is, in one word."""
    if txn.active:
        return "active"
    if txn.decision is None:
        match tally.votes.get(branch.name):
            case Prepared():
                return "prepared"
            case ReadOnly():
                return "read_only"
            case Refused():
                return "refused"
            case _:
                return "preparing"
    if branch.vote in _LAST_WORDS:
        return branch.vote
    if branch.resolved is not None:
        return "committed" if branch.resolved is _COMMIT else "aborted"
    finished = txn.ended_at is not None or branch.name in tally.acked
    if txn.decision is _COMMIT:
        return "committed" if finished else "committing"
    return "aborted" if finished else "aborting"


def participant(record: Participant) -> dict[str, Any]:
    """A participant's registration."""
    return {"name": record.name, "url": record.url, "batch": record.batch}


@lru_cache(maxsize=256)
def date(at_ms: int | None) -> str | None:
    """Milliseconds since 1970 as RFC 3339 has it. Remembered, because what one command did has one date."""
    if at_ms is None:
        return None
    at_s, ms = divmod(min(max(at_ms, _FIRST_MS), LAST_MS), 1000)
    return f"{datetime.fromtimestamp(at_s, UTC).replace(tzinfo=None).isoformat()}.{ms:03d}Z"
