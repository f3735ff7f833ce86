"""The resource manager's automaton: every rule of the table by name, and the properties that hold in every state."""

import dataclasses
import itertools

import pytest

from coordinator.protocol.messages import (
    Abort,
    Acked,
    Commit,
    Contradicted,
    Gid,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    StaleEpoch,
    Stamp,
)
from participants import resource
from participants.resource import Branch, Horizon, State, Work, crashed, finish, observe, prunable, receive, walk_away

GID = "shop-2-7"
PREPARE = Prepare(gid=GID, branch="stock", payload=b"{}")
COMMIT = Commit(gid=GID, branch="stock")
ABORT = Abort(gid=GID, branch="stock")
MESSAGES = (PREPARE, COMMIT, ABORT)
STAMP = Stamp(epoch=2)
FAR = Gid("shop", 2, 8).number

PREPARED = Prepared(gid=GID, branch="stock", result=b'{"left":3}')
READ_ONLY = ReadOnly(gid=GID, branch="stock", result=b"1")
REFUSED = Refused(gid=GID, branch="stock", reason="out_of_stock", retryable=True)
ACKED = Acked(gid=GID, branch="stock")


def contradicted(state: str) -> Contradicted:
    return Contradicted(gid=GID, branch="stock", state=state)


def branch_in(state: State) -> Branch:
    match state:
        case State.PREPARED | State.COMMITTED:
            return Branch(state=state, result=PREPARED.result)
        case State.READ_ONLY:
            return Branch(state=state, result=READ_ONLY.result)
        case State.ABORTED:
            return Branch(state=state, reason=REFUSED.reason, retryable=REFUSED.retryable)
        case _:
            return Branch(state=state)


@pytest.mark.parametrize(
    ("state", "message", "after", "work", "answer"),
    [
        (State.UNKNOWN, PREPARE, State.WORKING, Work.RUN, None),
        (State.WORKING, PREPARE, State.WORKING, Work.JOIN, None),
        (State.FENCED, PREPARE, State.FENCED, Work.FENCE, None),
        (State.PREPARED, PREPARE, State.PREPARED, Work.NOTHING, PREPARED),
        (State.COMMITTED, PREPARE, State.COMMITTED, Work.NOTHING, PREPARED),
        (State.ABORTED, PREPARE, State.ABORTED, Work.NOTHING, REFUSED),
        (State.READ_ONLY, PREPARE, State.READ_ONLY, Work.NOTHING, READ_ONLY),
        (State.UNKNOWN, COMMIT, State.UNKNOWN, Work.NOTHING, contradicted("unknown")),
        (State.WORKING, COMMIT, State.WORKING, Work.NOTHING, contradicted("working")),
        (State.FENCED, COMMIT, State.FENCED, Work.NOTHING, contradicted("aborted")),
        (State.PREPARED, COMMIT, State.COMMITTED, Work.APPLY, ACKED),
        (State.COMMITTED, COMMIT, State.COMMITTED, Work.NOTHING, ACKED),
        (State.ABORTED, COMMIT, State.ABORTED, Work.NOTHING, contradicted("aborted")),
        (State.READ_ONLY, COMMIT, State.READ_ONLY, Work.NOTHING, ACKED),
        (State.UNKNOWN, ABORT, State.ABORTED, Work.NOTHING, ACKED),
        (State.WORKING, ABORT, State.FENCED, Work.FENCE, None),
        (State.FENCED, ABORT, State.FENCED, Work.FENCE, None),
        (State.PREPARED, ABORT, State.ABORTED, Work.UNDO, ACKED),
        (State.COMMITTED, ABORT, State.COMMITTED, Work.NOTHING, contradicted("committed")),
        (State.ABORTED, ABORT, State.ABORTED, Work.NOTHING, ACKED),
        (State.READ_ONLY, ABORT, State.ABORTED, Work.NOTHING, ACKED),
    ],
    ids=lambda value: value.value if isinstance(value, State) else type(value).__name__,
)
def test_every_row_of_the_table(state, message, after, work, answer):
    step = receive(branch_in(state), Horizon(epoch=2), message, STAMP)
    assert step.branch.state is after
    assert (step.work, step.answer) == (work, answer)


def test_the_table_is_total():
    assert set(resource.TRANSITIONS) == set(itertools.product(State, (Prepare, Commit, Abort)))


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_that_is_repeated_is_answered_alike_and_works_once(state, message):
    first = receive(branch_in(state), Horizon(), message, STAMP)
    again = receive(first.branch, Horizon(), message, STAMP)
    assert again.branch == first.branch
    if first.answer is not None:
        assert again.answer == first.answer
        assert again.work is Work.NOTHING


@pytest.mark.parametrize("state", list(State))
def test_a_prepare_of_an_older_epoch_is_no_vote(state):
    before = branch_in(state)
    step = receive(before, Horizon(epoch=5), PREPARE, STAMP)
    assert step.answer == StaleEpoch(gid=GID, branch="stock", epoch=5)
    assert (step.branch, step.work) == (before, Work.NOTHING)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("message", [COMMIT, ABORT], ids=["commit", "abort"])
def test_decisions_are_true_at_any_epoch(state, message):
    branch = branch_in(state)
    assert receive(branch, Horizon(epoch=5), message, STAMP) == receive(branch, Horizon(epoch=1), message, STAMP)


def test_below_the_floor_a_prepare_is_refused_and_the_rest_has_been_acked():
    horizon = Horizon(epoch=2, floor=FAR)
    prepare, commit, abort = (receive(Branch(), horizon, message, STAMP) for message in MESSAGES)
    assert prepare.answer == Refused(gid=GID, branch="stock", reason="ended")
    assert commit.answer == abort.answer == ACKED
    assert {prepare.branch, commit.branch, abort.branch} == {Branch()}, "nothing is written below the floor"
    assert {prepare.work, commit.work, abort.work} == {Work.NOTHING}


def test_a_gid_at_the_floor_has_not_ended():
    at_floor = Horizon(epoch=2, floor=Gid("shop", 2, 7).number)
    assert receive(Branch(), at_floor, PREPARE, STAMP).work is Work.RUN
    assert not prunable(branch_in(State.ABORTED), GID, at_floor)


def test_a_prepared_branch_below_the_floor_still_takes_its_decision():
    horizon = Horizon(epoch=2, floor=FAR)
    assert receive(branch_in(State.PREPARED), horizon, COMMIT, STAMP).work is Work.APPLY
    assert receive(branch_in(State.PREPARED), horizon, PREPARE, STAMP).answer == PREPARED


@pytest.mark.parametrize("state", list(State))
def test_only_ended_records_below_the_floor_are_prunable(state):
    branch = branch_in(state)
    assert not prunable(branch, GID, Horizon())
    assert prunable(branch, GID, Horizon(floor=FAR)) is (state in (State.COMMITTED, State.ABORTED, State.READ_ONLY))


@pytest.mark.parametrize(
    ("vote", "state"), [(PREPARED, State.PREPARED), (READ_ONLY, State.READ_ONLY), (REFUSED, State.ABORTED)]
)
def test_work_ends_in_a_vote_and_the_record_answers_repeats_with_it(vote, state):
    step = finish(Branch(state=State.WORKING), vote)
    assert (step.branch.state, step.work, step.answer) == (state, Work.NOTHING, vote)
    assert receive(step.branch, Horizon(), PREPARE, STAMP).answer == vote


@pytest.mark.parametrize(("vote", "work"), [(PREPARED, Work.UNDO), (READ_ONLY, Work.NOTHING), (REFUSED, Work.NOTHING)])
def test_fenced_work_never_becomes_prepared(vote, work):
    fenced = receive(Branch(state=State.WORKING), Horizon(), ABORT, STAMP).branch
    step = finish(fenced, vote)
    assert (step.branch.state, step.work) == (State.ABORTED, work)
    assert step.answer == Refused(gid=GID, branch="stock", reason="aborted")
    assert receive(step.branch, Horizon(), ABORT, STAMP).answer == ACKED


@pytest.mark.parametrize("state", sorted(set(State) - {State.WORKING, State.FENCED}, key=lambda s: s.value))
@pytest.mark.parametrize("vote", [PREPARED, READ_ONLY, REFUSED], ids=lambda v: type(v).__name__)
def test_a_vote_nobody_waits_for_changes_nothing(state, vote):
    step = finish(branch_in(state), vote)
    assert (step.branch, step.work, step.answer) == (branch_in(state), Work.NOTHING, None)


def test_a_branch_may_walk_away_before_its_vote_and_never_after():
    early = walk_away(Branch(), "lock_timeout", retryable=True)
    refusal = Refused(gid=GID, branch="stock", reason="lock_timeout", retryable=True)
    assert receive(early.branch, Horizon(), PREPARE, STAMP).answer == refusal

    running = walk_away(Branch(state=State.WORKING), "lock_timeout", retryable=True)
    assert (running.branch.state, running.work) == (State.FENCED, Work.FENCE)
    assert receive(running.branch, Horizon(), ABORT, STAMP).answer is None, "no ack while the work runs"
    ended = finish(running.branch, PREPARED)
    assert (ended.branch, ended.answer) == (early.branch, refusal)

    for state in set(State) - {State.UNKNOWN, State.WORKING}:
        assert walk_away(branch_in(state), "too late").branch == branch_in(state)


def test_a_crash_forgets_work_and_keeps_records():
    for state in State:
        left = crashed(branch_in(state))
        assert left == (Branch() if state in (State.WORKING, State.FENCED) else branch_in(state))


def test_the_horizon_only_rises():
    start = Horizon(epoch=3, floor=FAR)
    assert observe(start, GID, Stamp(epoch=2, floor="shop-1-1")) is start
    assert observe(start, GID, Stamp(epoch=4, floor="shop-2-9")) == Horizon(epoch=4, floor=FAR + 1)


def test_a_floor_of_another_cluster_is_ignored():
    assert observe(Horizon(), GID, Stamp(epoch=0, floor="other-9-9")) == Horizon()


@pytest.mark.parametrize("value", [Branch(), Horizon(), receive(Branch(), Horizon(), PREPARE, STAMP)])
def test_values_are_frozen_and_hashable(value):
    assert hash(value) == hash(dataclasses.replace(value))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)
