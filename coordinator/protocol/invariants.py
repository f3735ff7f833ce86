"""What is true of every transaction, and of every step from one state to the next.

Checked after every step in tests and in the model; each violation is said in words. Gray & Lamport's conditions of
consistency ("no two RMs disagree") follow from `check_delta` once participants do what they are told.
"""

from collections.abc import Iterator

from coordinator.protocol.transaction import Decision, Transaction, VoteKind


def check(txn: Transaction) -> list[str]:
    """Violations within one state; empty when all is well."""
    return list(_state_violations(txn))


def check_delta(before: Transaction | None, after: Transaction | None) -> list[str]:
    """Violations of one step by one entry; empty when all is well."""
    return list(_step_violations(before, after))


def _state_violations(txn: Transaction) -> Iterator[str]:
    names = [branch.name for branch in txn.branches]
    if len(set(names)) != len(names):
        yield "two branches have one name"
    if (txn.decision is None) != (txn.decided_at is None):
        yield "a decision without its date, or a date without decision"
    if txn.ended_at is not None and txn.decision is None:
        yield "ended without a decision"
    if txn.decision is Decision.COMMIT:
        for branch in txn.branches:
            if branch.vote not in (VoteKind.PREPARED, VoteKind.READ_ONLY):
                yield f"committed although {branch.name} voted {branch.vote}"
    for branch in txn.branches:
        if txn.decision is None and (branch.vote is not None or branch.contradiction is not None):
            yield f"{branch.name} has a recorded vote before the decision"
        if txn.decision is not None and branch.payload is not None:
            yield f"the payload of {branch.name} has outlived the decision"
        if txn.decision is None and branch.payload is None:
            yield f"the payload of {branch.name} is gone before the decision"


def _step_violations(before: Transaction | None, after: Transaction | None) -> Iterator[str]:
    if before is None:
        return
    if after is None:
        yield "a transaction vanished by an entry of its own"
        return
    for name in ("gid", "protocol", "epoch", "started_at", "timeout_ms", "key", "body_hash"):
        if getattr(before, name) != getattr(after, name):
            yield f"{name} changed"
    if [branch.name for branch in before.branches] != [branch.name for branch in after.branches]:
        yield "the branches changed"
    if before.decision is not None:
        for name in ("decision", "reason", "decided_at"):
            if getattr(before, name) != getattr(after, name):
                yield f"{name} changed after the decision"
        for old, new in zip(before.branches, after.branches, strict=False):
            if old.vote != new.vote:
                yield f"the recorded vote of {old.name} changed"
    if before.ended_at is not None and before != after:
        yield "something changed after the end"
