"""What is true of every transaction, and of every step from one state to the next.

Checked after every step in tests and in the model; each violation is said in words. Gray & Lamport's conditions of
consistency ("no two RMs disagree") follow from `check_delta` once participants do what they are told.
"""

from collections.abc import Iterable, Iterator

from coordinator.protocol.effects import Effect, Reply, Send
from coordinator.protocol.messages import Prepare
from coordinator.protocol.record import replace
from coordinator.protocol.transaction import Decision, Transaction, VoteKind


def check(txn: Transaction) -> list[str]:
    """Violations within one state; empty when all is well."""
    return list(_state_violations(txn))


def check_delta(before: Transaction | None, after: Transaction | None) -> list[str]:
    """Violations of one step by one entry; empty when all is well."""
    return list(_step_violations(before, after))


def check_owed(txn: Transaction, effects: Iterable[Effect]) -> list[str]:
    """Violations by what a state owes; empty when all is well."""
    return list(_owed_violations(txn, effects))


def _owed_violations(txn: Transaction, effects: Iterable[Effect]) -> Iterator[str]:
    for effect in effects:
        match effect:
            case Reply() if txn.decision is None:
                yield "a reply is owed before the decision"
            case Send(message=Prepare()) if txn.decision is not None:
                yield "a prepare is owed after the decision"
            case Send(message=Prepare()) if txn.active:
                yield "a prepare is owed while the application is at work"
            case Send(message=message) if txn.decision is None and not isinstance(message, Prepare):
                yield "a decision is owed before there is one"
            case _:
                pass


def _state_violations(txn: Transaction) -> Iterator[str]:
    names = [branch.name for branch in txn.branches]
    if len(set(names)) != len(names):
        yield "two branches have one name"
    if (txn.decision is None) != (txn.decided_at is None):
        yield "a decision without its date, or a date without decision"
    if txn.ended_at is not None and txn.decision is None:
        yield "ended without a decision"
    if txn.active and txn.decision is not None:
        yield "active after the decision"
    if txn.acknowledged_at is not None and all(branch.resolved is None for branch in txn.branches):
        yield "acknowledged, and nothing was resolved"
    if txn.decision is Decision.COMMIT:
        for branch in txn.branches:
            if branch.vote not in (VoteKind.PREPARED, VoteKind.READ_ONLY):
                yield f"committed although {branch.name} voted {branch.vote}"
    for branch in txn.branches:
        if txn.decision is None and (branch.vote is not None or branch.contradiction is not None):
            yield f"{branch.name} has a recorded vote before the decision"
        if branch.resolved is not None and txn.decision is None:
            yield f"{branch.name} was resolved before the decision"
        if (branch.resolved is None) != (branch.resolved_at is None):
            yield f"{branch.name} was resolved without a date, or has a date without a resolution"
        if branch.resolved is not None and branch.vote in (VoteKind.READ_ONLY, VoteKind.REFUSED):
            yield f"{branch.name} was resolved although nothing was owed to it"
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
    yield from _branch_violations(before, after)
    if after.active and not before.active:
        yield "active again"
    if before.active and after.decision is Decision.COMMIT:
        yield "committed without having been sealed"
    if before.decision is not None:
        for name in ("decision", "reason", "decided_at"):
            if getattr(before, name) != getattr(after, name):
                yield f"{name} changed after the decision"
        for old, new in zip(before.branches, after.branches, strict=False):
            if old.vote != new.vote:
                yield f"the recorded vote of {old.name} changed"
            if old.resolved is not None and (old.resolved, old.resolved_at) != (new.resolved, new.resolved_at):
                yield f"the resolution of {old.name} changed"
            if old.resolved is None and new.resolved is not None and after.acknowledged_at is not None:
                yield f"{old.name} was resolved and acknowledged in one step"
    if before.ended_at is not None and replace(before, acknowledged_at=after.acknowledged_at) != after:
        yield "something changed after the end"
    if after.ended_at is not None and before.acknowledged_at not in (None, after.acknowledged_at):
        yield "what was acknowledged is not any more"


def _branch_violations(before: Transaction, after: Transaction) -> Iterator[str]:
    old = [(branch.name, branch.participant) for branch in before.branches]
    new = [(branch.name, branch.participant) for branch in after.branches]
    if new[: len(old)] != old or (len(new) > len(old) and not before.active):
        yield "the branches changed"
    elif len(new) > len(old) and not after.active:
        yield "a branch came with the seal or the decision"
