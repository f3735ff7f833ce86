"""Two-phase commit, a test per rule."""

import pytest

from coordinator.protocol.effects import Reply, Send, SetDeadline
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    ContradictionSeen,
    Decided,
    Ended,
    Header,
)
from coordinator.protocol.invariants import check, check_delta
from coordinator.protocol.messages import (
    Abort,
    Acked,
    Commit,
    Contradicted,
    Pending,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    StaleEpoch,
)
from coordinator.protocol.record import replace
from coordinator.protocol.transaction import NOTHING_HEARD, Branch, Decision, State, VoteKind
from coordinator.protocol.two_phase import TwoPhaseCommit

GID = "m-1-1"
P = TwoPhaseCommit()
HEADER = Header(epoch=1, at=100)
LATER = Header(epoch=2, at=200)

PREPARED_A, PREPARED_B = Prepared(gid=GID, branch="a", result=b"1"), Prepared(gid=GID, branch="b")
READ_ONLY_A, READ_ONLY_B = ReadOnly(gid=GID, branch="a"), ReadOnly(gid=GID, branch="b")
REFUSED_A = Refused(gid=GID, branch="a", reason="sold out")
REFUSED_B = Refused(gid=GID, branch="b", reason="busy", retryable=True)


def begun(*names):
    plans = tuple(BranchPlan(name=name, participant=f"p-{name}", payload=b'{"n":1}') for name in names or ("a", "b"))
    entry = Begun(gid=GID, protocol="2pc", branches=plans, timeout_ms=50, key="k", body_hash=b"h")
    txn = P.evolve(None, entry, HEADER)
    assert txn is not None
    return txn


def heard(*answers):
    tally = NOTHING_HEARD
    for answer in answers:
        tally = tally.heard(answer)
    return tally


def decided(txn, *answers, expired=False, header=HEADER):
    wish = P.decide(txn, heard(*answers), expired=expired)
    assert isinstance(wish, Decided)
    after = P.evolve(txn, wish, header)
    assert after is not None
    assert check(after) == []
    assert check_delta(txn, after) == []
    return after


def sends(txn):
    return {
        (effect.participant, type(effect.message), effect.message.branch)
        for effect in P.owed(txn)
        if isinstance(effect, Send)
    }


# ------------------------------------------------------------------------------------------------ begin


def test_begun_makes_an_undecided_transaction_that_takes_its_dates_from_the_header():
    txn = begun()
    assert (txn.gid, txn.epoch, txn.started_at, txn.expires_at) == (GID, 1, 100, 150)
    assert (txn.key, txn.body_hash) == ("k", b"h")
    assert txn.state is State.PREPARING
    assert check(txn) == []


def test_a_second_begun_changes_nothing():
    txn = begun()
    again = Begun(gid=GID, protocol="2pc", branches=(), timeout_ms=1)
    assert P.evolve(txn, again, LATER) is txn


def test_an_undecided_transaction_owes_a_deadline_and_every_prepare_and_no_reply():
    txn = begun()
    assert sends(txn) == {("p-a", Prepare, "a"), ("p-b", Prepare, "b")}
    assert SetDeadline(at=150) in P.owed(txn)
    assert Reply() not in P.owed(txn)
    prepares = [effect.message for effect in P.owed(txn) if isinstance(effect, Send)]
    assert all(isinstance(prepare, Prepare) and prepare.payload == b'{"n":1}' for prepare in prepares)


# ------------------------------------------------------------------------------------------------ decide


def test_votes_that_are_missing_are_waited_for():
    assert P.decide(begun(), NOTHING_HEARD, expired=False) is None
    assert P.decide(begun(), heard(PREPARED_A), expired=False) is None


@pytest.mark.parametrize("votes", [(PREPARED_A, PREPARED_B), (READ_ONLY_A, PREPARED_B), (READ_ONLY_A, READ_ONLY_B)])
def test_a_commit_is_wanted_when_all_voted_and_none_refused(votes):
    wish = P.decide(begun(), heard(*votes), expired=False)
    assert isinstance(wish, Decided)
    assert wish.decision is Decision.COMMIT
    assert [vote.branch for vote in wish.votes] == ["a", "b"]


def test_a_repeated_vote_counts_once():
    assert P.decide(begun(), heard(PREPARED_A, PREPARED_A), expired=False) is None


def test_the_first_vote_of_a_branch_stays():
    tally = heard(REFUSED_A)
    assert tally.heard(PREPARED_A) is tally


@pytest.mark.parametrize("answer", [Pending(gid=GID, branch="a"), StaleEpoch(gid=GID, branch="a", epoch=9)])
def test_what_is_no_vote_says_nothing(answer):
    assert NOTHING_HEARD.heard(answer) is NOTHING_HEARD


def test_one_refusal_is_enough_for_an_abort():
    wish = P.decide(begun(), heard(REFUSED_A), expired=False)
    assert isinstance(wish, Decided)
    assert (wish.decision, wish.reason, wish.retryable) == (Decision.ABORT, "a refused: sold out", False)
    assert wish.votes == (BranchVote(branch="a", vote=VoteKind.REFUSED, reason="sold out"),)


def test_an_abort_is_retryable_when_all_refusals_are():
    wish = P.decide(begun(), heard(REFUSED_B), expired=False)
    assert isinstance(wish, Decided)
    assert wish.retryable
    wish = P.decide(begun(), heard(REFUSED_B, REFUSED_A), expired=False)
    assert isinstance(wish, Decided)
    assert not wish.retryable


def test_the_deadline_aborts_and_names_who_did_not_vote():
    wish = P.decide(begun(), heard(PREPARED_A), expired=True)
    assert isinstance(wish, Decided)
    assert (wish.decision, wish.reason, wish.retryable) == (Decision.ABORT, "timeout: no vote from b", True)
    assert wish.votes == (BranchVote(branch="a", vote=VoteKind.PREPARED, result=b"1"),)


def test_a_request_to_abort_is_followed_unless_all_have_voted_already():
    tally = heard(PREPARED_A).asked_to_abort("changed my mind")
    wish = P.decide(begun(), tally, expired=False)
    assert isinstance(wish, Decided)
    assert (wish.decision, wish.reason) == (Decision.ABORT, "changed my mind")
    wish = P.decide(begun(), tally.heard(PREPARED_B), expired=True)
    assert isinstance(wish, Decided)
    assert wish.decision is Decision.COMMIT


def test_the_first_request_to_abort_stays():
    tally = NOTHING_HEARD.asked_to_abort("one")
    assert tally.asked_to_abort("two") is tally


# ------------------------------------------------------------------------------------------------ the decision


def test_the_first_decision_is_the_decision():
    txn = decided(begun(), PREPARED_A, PREPARED_B)
    abort = Decided(gid=GID, decision=Decision.ABORT, reason="late")
    assert P.evolve(txn, abort, LATER) is txn
    txn = decided(begun(), expired=True)
    commit = P.decide(begun(), heard(PREPARED_A, PREPARED_B), expired=False)
    assert isinstance(commit, Decided)
    assert P.evolve(txn, commit, LATER) is txn


@pytest.mark.parametrize(
    "votes",
    [
        (),
        (BranchVote(branch="a", vote=VoteKind.PREPARED),),
        (BranchVote(branch="a", vote=VoteKind.PREPARED), BranchVote(branch="b", vote=VoteKind.REFUSED)),
        (BranchVote(branch="a", vote=VoteKind.PREPARED), BranchVote(branch="c", vote=VoteKind.PREPARED)),
        (
            BranchVote(branch="a", vote=VoteKind.PREPARED),
            BranchVote(branch="b", vote=VoteKind.PREPARED),
            BranchVote(branch="b", vote=VoteKind.REFUSED),
        ),
    ],
)
def test_a_commit_that_does_not_rest_on_every_vote_changes_nothing(votes):
    txn = begun()
    assert P.evolve(txn, Decided(gid=GID, decision=Decision.COMMIT, votes=votes), HEADER) is txn


@pytest.mark.parametrize(
    "entry",
    [
        Decided(gid=GID, decision=Decision.COMMIT),
        Decided(gid=GID, decision=Decision.ABORT),
        ContradictionSeen(gid=GID, branch="a", state="aborted"),
        Ended(gid=GID),
    ],
)
def test_nothing_comes_of_entries_about_nothing(entry):
    assert P.evolve(None, entry, HEADER) is None


def test_a_decision_changes_what_it_is_about_and_nothing_else():
    first = begun()
    other = {int: 7, str: "x", bytes: b"x", bool: True, type(None): 7}
    decided_upon = {"branches", "decision", "reason", "retryable", "decided_at", "ended_at", "active"}
    kept = set(first.__struct_fields__) - decided_upon
    before = replace(first, **{name: other[type(getattr(first, name))] for name in kept})
    after = P.evolve(before, Decided(gid=GID, decision=Decision.ABORT), LATER)
    assert after is not None
    assert after.decision is Decision.ABORT
    assert {name: getattr(after, name) for name in kept} == {name: getattr(before, name) for name in kept}


def test_of_a_branch_a_decision_leaves_who_it_is_and_the_recorded_vote():
    # Nothing but a strange copy can bring such branches; they end as on every replica there ever was.
    strange = Branch(
        name="a", participant="x", payload=b"1", vote=VoteKind.REFUSED, reason="r", retryable=True, result=b"2",
        contradiction="committed", resolved=Decision.COMMIT, resolved_at=3, note="n",
    )  # fmt: skip
    before = replace(begun(), branches=(strange, replace(strange, name="b")))
    votes = (BranchVote(branch="a", vote=VoteKind.PREPARED),)
    after = P.evolve(before, Decided(gid=GID, decision=Decision.ABORT, votes=votes), LATER)
    assert after is not None
    assert after.branches == (
        Branch(name="a", participant="x", vote=VoteKind.PREPARED),
        Branch(name="b", participant="x"),
    )


def test_payloads_leave_with_the_decision_and_results_stay():
    txn = decided(begun(), PREPARED_A, PREPARED_B)
    assert [branch.payload for branch in txn.branches] == [None, None]
    assert txn.branches[0].result == b"1"
    assert (txn.decided_at, txn.ended_at) == (100, None)


# ------------------------------------------------------------------------------------------------ debts


@pytest.mark.parametrize(
    ("answers", "expired", "debts"),
    [
        ((PREPARED_A, PREPARED_B), False, {("p-a", Commit, "a"), ("p-b", Commit, "b")}),
        ((READ_ONLY_A, PREPARED_B), False, {("p-b", Commit, "b")}),
        ((PREPARED_A, REFUSED_B), False, {("p-a", Abort, "a")}),
        ((REFUSED_B,), False, {("p-a", Abort, "a")}),
        ((READ_ONLY_A, REFUSED_B), False, set()),
        ((PREPARED_A,), True, {("p-a", Abort, "a"), ("p-b", Abort, "b")}),
        ((READ_ONLY_A,), True, {("p-b", Abort, "b")}),
        ((), True, {("p-a", Abort, "a"), ("p-b", Abort, "b")}),
    ],
)
def test_phase_two_is_owed_by_the_recorded_vote(answers, expired, debts):
    txn = decided(begun(), *answers, expired=expired)
    assert sends(txn) == debts
    assert Reply() in P.owed(txn)
    assert (txn.ended_at is not None) == (not debts), "who owes nothing has ended"


# ------------------------------------------------------------------------------------------------ the end


def test_it_ends_when_all_who_owe_have_acknowledged():
    txn = decided(begun(), PREPARED_A, READ_ONLY_B)
    assert P.decide(txn, heard(PREPARED_A), expired=True) is None
    wish = P.decide(txn, heard(Acked(gid=GID, branch="a")), expired=False)
    assert wish == Ended(gid=GID)
    ended = P.evolve(txn, Ended(gid=GID), LATER)
    assert ended is not None
    assert (ended.ended_at, ended.state) == (200, State.COMMITTED)
    assert P.owed(ended) == [Reply()]
    assert P.decide(ended, heard(Acked(gid=GID, branch="a")), expired=True) is None


def test_an_acknowledgement_of_another_branch_does_not_help():
    txn = decided(begun(), PREPARED_A, PREPARED_B)
    assert P.decide(txn, heard(Acked(gid=GID, branch="a"), Acked(gid=GID, branch="a")), expired=True) is None


def test_nothing_ends_before_its_decision_and_nothing_happens_after_the_end():
    txn = begun()
    assert P.evolve(txn, Ended(gid=GID), LATER) is txn
    ended = P.evolve(decided(txn, expired=True), Ended(gid=GID), LATER)
    assert ended is not None
    for entry in (
        Ended(gid=GID),
        Decided(gid=GID, decision=Decision.ABORT),
        ContradictionSeen(gid=GID, branch="a", state="committed"),
    ):
        assert P.evolve(ended, entry, LATER) is ended


def test_a_contradiction_is_kept_and_never_counts_as_an_acknowledgement():
    txn = decided(begun(), PREPARED_A, PREPARED_B)
    tally = heard(Acked(gid=GID, branch="a"), Contradicted(gid=GID, branch="b", state="aborted"))
    wish = P.decide(txn, tally, expired=False)
    assert wish == ContradictionSeen(gid=GID, branch="b", state="aborted")
    after = P.evolve(txn, wish, LATER)
    assert after is not None
    assert after.branches[1].contradiction == "aborted"
    assert check_delta(txn, after) == []
    assert P.decide(after, tally, expired=False) is None, "said once, and still not ended"
    assert ("p-b", Commit, "b") in sends(after)
    assert P.decide(after, tally.heard(Acked(gid=GID, branch="b")), expired=False) == Ended(gid=GID)


def test_a_contradiction_that_says_nothing_new_changes_nothing():
    txn = begun()
    seen = ContradictionSeen(gid=GID, branch="a", state="aborted")
    assert P.evolve(txn, seen, LATER) is txn
    committed = decided(txn, PREPARED_A, PREPARED_B)
    assert P.evolve(committed, replace(seen, branch="nobody"), LATER) is committed
    once = P.evolve(committed, seen, LATER)
    assert P.evolve(once, seen, LATER) is once


def test_one_branch_alone_takes_the_same_path():
    txn = decided(begun("a"), PREPARED_A)
    assert sends(txn) == {("p-a", Commit, "a")}
    assert txn.ended_at is None
