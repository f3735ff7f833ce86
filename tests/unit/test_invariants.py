"""A checker that has never failed proves nothing: every invariant, broken once."""

import pytest

from coordinator.protocol.effects import Reply, Send
from coordinator.protocol.invariants import check, check_delta, check_owed
from coordinator.protocol.messages import Abort, Commit, Prepare
from coordinator.protocol.record import replace
from coordinator.protocol.transaction import Branch, Decision, Transaction, VoteKind

UNDECIDED = Transaction(
    gid="m-1-1",
    protocol="2pc",
    epoch=1,
    branches=(Branch(name="a", participant="a", payload=b"1"), Branch(name="b", participant="b", payload=b"1")),
    timeout_ms=1,
    started_at=1,
)
COMMITTED = replace(
    UNDECIDED,
    branches=(
        Branch(name="a", participant="a", vote=VoteKind.PREPARED),
        Branch(name="b", participant="b", vote=VoteKind.READ_ONLY),
    ),
    decision=Decision.COMMIT,
    decided_at=2,
)
ENDED = replace(COMMITTED, ended_at=3)
ACTIVE = replace(UNDECIDED, active=True)
THIRD = Branch(name="c", participant="c", payload=b"1")
PREPARE = Send(participant="a", message=Prepare(gid="m-1-1", branch="a", payload=b"1"))
COMMIT = Send(participant="a", message=Commit(gid="m-1-1", branch="a"))
ABORT = Send(participant="a", message=Abort(gid="m-1-1", branch="a"))


def with_branch(txn, **changes):
    return replace(txn, branches=(replace(txn.branches[0], **changes), *txn.branches[1:]))


@pytest.mark.parametrize("txn", [UNDECIDED, COMMITTED, ENDED, ACTIVE])
def test_sound_states_have_no_violations(txn):
    assert check(txn) == []
    assert check_delta(txn, txn) == []
    assert check_delta(None, txn) == []


@pytest.mark.parametrize(
    ("txn", "complaint"),
    [
        (with_branch(UNDECIDED, name="b"), "two branches have one name"),
        (replace(UNDECIDED, decided_at=1), "a decision without its date"),
        (replace(COMMITTED, decided_at=None), "a decision without its date"),
        (replace(UNDECIDED, ended_at=1), "ended without a decision"),
        (with_branch(COMMITTED, vote=None), "committed although a voted None"),
        (with_branch(COMMITTED, vote=VoteKind.REFUSED), "committed although a voted refused"),
        (with_branch(UNDECIDED, vote=VoteKind.PREPARED), "a has a recorded vote before the decision"),
        (with_branch(UNDECIDED, contradiction="aborted"), "a has a recorded vote before the decision"),
        (with_branch(COMMITTED, payload=b"1"), "the payload of a has outlived the decision"),
        (with_branch(UNDECIDED, payload=None), "the payload of a is gone before the decision"),
        (replace(COMMITTED, active=True), "active after the decision"),
    ],
)
def test_every_unsound_state_is_noticed(txn, complaint):
    assert any(complaint in violation for violation in check(txn))


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (UNDECIDED, None, "vanished"),
        *((UNDECIDED, replace(UNDECIDED, **{name: value}), f"{name} changed") for name, value in {
            "gid": "m-1-2", "protocol": "x", "epoch": 2, "started_at": 2, "timeout_ms": 2, "key": "k", "body_hash": b"h"
        }.items()),
        (UNDECIDED, replace(UNDECIDED, branches=UNDECIDED.branches[:1]), "the branches changed"),
        (UNDECIDED, replace(UNDECIDED, branches=(*UNDECIDED.branches, THIRD)), "the branches changed"),
        (ACTIVE, replace(ACTIVE, branches=ACTIVE.branches[1:]), "the branches changed"),
        (ACTIVE, with_branch(ACTIVE, participant="b"), "the branches changed"),
        (ACTIVE, replace(UNDECIDED, branches=(*ACTIVE.branches, THIRD)), "a branch came with the seal"),
        (UNDECIDED, ACTIVE, "active again"),
        (ACTIVE, COMMITTED, "committed without having been sealed"),
        (COMMITTED, replace(COMMITTED, decision=Decision.ABORT), "decision changed after the decision"),
        (COMMITTED, replace(COMMITTED, reason="x"), "reason changed after the decision"),
        (COMMITTED, replace(COMMITTED, decided_at=9), "decided_at changed after the decision"),
        (COMMITTED, with_branch(COMMITTED, vote=VoteKind.READ_ONLY), "the recorded vote of a changed"),
        (ENDED, with_branch(ENDED, contradiction="aborted"), "something changed after the end"),
        (ENDED, COMMITTED, "something changed after the end"),
    ],
)  # fmt: skip
def test_every_unsound_step_is_noticed(before, after, complaint):
    assert any(complaint in violation for violation in check_delta(before, after))


def test_a_branch_more_is_sound_while_the_application_works():
    assert check_delta(ACTIVE, replace(ACTIVE, branches=(*ACTIVE.branches, THIRD))) == []
    assert check_delta(ACTIVE, UNDECIDED) == []


@pytest.mark.parametrize(
    ("txn", "effects"),
    [(UNDECIDED, [PREPARE]), (ACTIVE, []), (COMMITTED, [Reply(), COMMIT]), (ENDED, [Reply()])],
)
def test_sound_debts_have_no_violations(txn, effects):
    assert check_owed(txn, effects) == []


@pytest.mark.parametrize(
    ("txn", "effect", "complaint"),
    [
        (UNDECIDED, Reply(), "a reply is owed before the decision"),
        (COMMITTED, PREPARE, "a prepare is owed after the decision"),
        (ACTIVE, PREPARE, "a prepare is owed while the application is at work"),
        (ACTIVE, ABORT, "a decision is owed before there is one"),
        (UNDECIDED, COMMIT, "a decision is owed before there is one"),
    ],
)
def test_every_unsound_debt_is_noticed(txn, effect, complaint):
    assert check_owed(txn, [effect]) == [complaint]
