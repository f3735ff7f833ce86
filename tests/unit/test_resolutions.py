"""Branches that an operator ends by hand: what may be resolved, what it changes, and how long it is remembered."""

import asyncio
from typing import Any

import pytest

from cluster.cli import main
from coordinator.commands import encode_command
from coordinator.facts import Verdict
from coordinator.ledger import Ledger
from coordinator.levels import NEWEST, OLDEST
from coordinator.protocol.entries import (
    Acknowledged,
    Begun,
    BranchPlan,
    BranchVote,
    ContradictionSeen,
    Decided,
    Ended,
    Forgotten,
    Header,
    Raised,
    Registered,
    Resolved,
    TookOver,
)
from coordinator.protocol.messages import Gid
from coordinator.protocol.transaction import Decision, Heuristic, State, VoteKind
from participants.server import Participant
from tests.support.logs import Replicas
from tests.support.nodes import RunningNode, configs, running
from tests.support.participants import ScriptedParticipant, hang, http, on, saying
from tests.support.waiting import eventually

GID = "m-1-1"
NUMBER = Gid("m", 1, 1).number


def ledger_with(decision: Decision | None = Decision.COMMIT, *, level: int = NEWEST) -> Ledger:
    """A transaction at a and b, prepared at both, decided or not."""
    ledger = Ledger("m")
    do(ledger, TookOver(node="n1"), *(Registered(name=name, url=f"http://{name}") for name in ("a", "b")))
    if level > OLDEST:
        do(ledger, Raised(level=level))
    plans = tuple(BranchPlan(name=name, participant=name, payload=b"1") for name in ("a", "b"))
    do(ledger, Begun(gid=GID, protocol="2pc", branches=plans, timeout_ms=50))
    if decision is not None:
        votes = tuple(BranchVote(branch=name, vote=VoteKind.PREPARED) for name in ("a", "b"))
        do(ledger, Decided(gid=GID, decision=decision, votes=votes))
    return ledger


def do(ledger: Ledger, *entries: Any, epoch: int = 1, at: int = 5) -> list[Verdict]:
    return [each.verdict for each in ledger.apply(encode_command(Header(epoch=epoch, at=at), list(entries)))]


def resolved(branch: str = "a", outcome: Decision = Decision.ABORT, note: str | None = None) -> Resolved:
    return Resolved(gid=GID, branch=branch, outcome=outcome, note=note)


# ------------------------------------------------------------------------------------------------ the ledger


def test_a_resolution_is_recorded_beside_the_decision_and_changes_it_for_nobody():
    ledger = ledger_with()
    assert do(ledger, resolved(note="disk lost"), at=9) == [Verdict.APPLIED]
    txn = ledger.get(GID)
    assert txn is not None
    a, b = txn.branches
    assert (a.resolved, a.resolved_at, a.note) == (Decision.ABORT, 9, "disk lost")
    assert (b.resolved, txn.decision, txn.state, txn.heuristic) == (
        None, Decision.COMMIT, State.COMMITTING, Heuristic.MIXED
    )  # fmt: skip


def test_it_settles_its_branch_only_and_survives_the_end_the_row_and_the_snapshot():
    ledger = ledger_with()
    do(ledger, resolved(note="by hand"), Ended(gid=GID), at=9)
    txn = ledger.get(GID)
    assert txn is not None
    assert txn.ended_at == 9
    assert ledger.kept == {NUMBER}
    again = Ledger("m")
    again.restore(ledger.snapshot()())()
    assert (again.get(GID), again.kept) == (txn, {NUMBER})
    unfinished = ledger_with()
    do(unfinished, resolved())
    again.restore(unfinished.snapshot()())()
    assert (again.get(GID), again.kept) == (unfinished.get(GID), {NUMBER})
    assert unfinished.fork().kept == {NUMBER}


def test_retention_forgets_it_only_once_it_is_acknowledged():
    ledger = ledger_with()
    do(ledger, resolved(), Ended(gid=GID))
    assert list(ledger.forgettable(100)) == []
    do(ledger, Forgotten(floor=NUMBER, before=100), at=100)
    assert ledger.get(GID) is not None
    assert do(ledger, Acknowledged(gid=GID), at=200) == [Verdict.APPLIED]
    txn = ledger.get(GID)
    assert txn is not None
    assert (txn.acknowledged_at, txn.kept, txn.heuristic) == (200, False, Heuristic.MIXED)
    assert do(ledger, Acknowledged(gid=GID), at=300) == [Verdict.UNCHANGED]
    do(ledger, Forgotten(floor=NUMBER, before=100), at=300)
    assert ledger.get(GID) is None


def test_a_later_resolution_wants_to_be_acknowledged_too():
    ledger = ledger_with()
    do(ledger, resolved("a"), Acknowledged(gid=GID), resolved("b", Decision.COMMIT))
    txn = ledger.get(GID)
    assert txn is not None
    assert txn.kept
    assert ledger.kept == {NUMBER}


@pytest.mark.parametrize(
    ("before", "entry"),
    [
        ((), Acknowledged(gid=GID)),
        ((), resolved("c")),
        ((resolved("a", Decision.COMMIT),), resolved("a", Decision.ABORT)),
        ((Ended(gid=GID),), resolved()),
    ],
    ids=["acknowledged for nothing", "no such branch", "resolved already", "ended"],
)
def test_what_is_out_of_turn_changes_nothing(before, entry):
    ledger = ledger_with()
    do(ledger, *before)
    state = list(ledger.snapshot()())
    assert do(ledger, entry) == [Verdict.UNCHANGED]
    assert list(ledger.snapshot()()) == state


def test_before_the_decision_there_is_nothing_to_resolve():
    assert do(ledger_with(None), resolved()) == [Verdict.UNCHANGED]


def test_a_cluster_of_the_oldest_level_knows_no_resolutions():
    ledger = ledger_with(level=OLDEST)
    assert do(ledger, resolved(), Acknowledged(gid=GID)) == [Verdict.TOO_EARLY] * 2


def test_what_an_operator_should_see_to_is_listed_newest_first():
    ledger = ledger_with()
    do(ledger, ContradictionSeen(gid=GID, branch="a", state="aborted"))
    txn = ledger.get(GID)
    assert txn is not None
    assert (txn.heuristic, ledger.heuristic()) == (Heuristic.CONTRADICTED, [NUMBER])
    do(ledger, resolved("a", Decision.ABORT), Acknowledged(gid=GID))
    assert ledger.heuristic() == []
    found, more = ledger.page(state=None, after=None, limit=10, scan=10, heuristic=True)
    assert (found, more) == ([], None)


# ------------------------------------------------------------------------------------------------ a node


@pytest.fixture
async def stuck(node: RunningNode, scripted: ScriptedParticipant, null: Participant) -> str:
    """The gid of a transaction that is committed at one participant, and that the other cannot follow."""
    scripted.rule = on("commit", saying({"state": "aborted"}, status=409))
    await node.register("well", null.url)
    await node.register("mad", scripted.url)
    gid: str = (await node.submit("well", "mad")).json["gid"]
    await eventually(lambda: node.node.ledger.get(gid).branches[1].contradiction is not None)  # type: ignore[union-attr]
    return gid


async def resolve(node: RunningNode, gid: str, **body: Any) -> Any:
    return await node.call("POST", f"/v1/transactions/{gid}/resolve", body)


async def test_a_contradicted_transaction_waits_for_an_operator_and_ends_by_the_resolution(
    node: RunningNode, scripted: ScriptedParticipant, stuck: str
) -> None:
    shown = await node.show(stuck)
    assert shown["heuristic"] == "contradicted"
    (waiting,) = shown["waiting_for"]
    assert waiting == {
        "for": "operator", "branch": "mad", "participant": "mad", "trouble": "aborted", "down_since": None
    }  # fmt: skip
    reply = await resolve(node, stuck, branch="mad", outcome="abort", note="refunded by hand")
    assert reply.status == 200
    await eventually(lambda: not node.node.ledger.unfinished)
    assert node.node.driver.lanes()["mad"].owed == 0, "what was on its way to it is taken back"
    shown = await node.show(stuck)
    assert (shown["state"], shown["decision"], shown["heuristic"]) == ("committed", "commit", "mixed")
    assert shown["acknowledged_at"] is None
    branch = shown["branches"][1]
    assert (branch["state"], branch["heuristic"]) == ("aborted", "aborted")
    assert (branch["resolved"]["outcome"], branch["resolved"]["note"]) == ("abort", "refunded by hand")
    heard = len(scripted.heard)
    page = (await node.call("GET", "/v1/transactions?heuristic=true")).json
    assert [txn["gid"] for txn in page["transactions"]] == [stuck]
    assert (await resolve(node, stuck, branch="mad", outcome="abort")).json == shown, "again is the same"
    assert (await node.call("POST", f"/v1/transactions/{stuck}/acknowledge")).json["acknowledged_at"]
    assert (await node.call("POST", f"/v1/transactions/{stuck}/acknowledge")).status == 200
    assert (await node.call("GET", "/v1/transactions?heuristic=true")).json["transactions"] == []
    assert len(scripted.heard) == heard, "nothing is owed to it any more"


async def test_what_cannot_be_resolved_is_refused_with_a_code(node: RunningNode, stuck: str) -> None:
    for body, status, code in (
        ({"branch": "none", "outcome": "abort"}, 404, "not_found"),
        ({"branch": "well", "outcome": "abort"}, 409, "nothing_owed"),
        ({"branch": "mad", "outcome": "perhaps"}, 422, "invalid_outcome"),
        ({"branch": "mad", "outcome": "abort", "note": 7}, 422, "invalid_note"),
        ({"branch": "mad", "outcome": "abort", "note": "x" * 501}, 422, "invalid_note"),
        ({"branch": "mad", "outcome": "abort", "note": "\x1b[2J"}, 422, "invalid_note"),
        ({"branch": 7, "outcome": "abort"}, 422, "invalid"),
        ({"branch": "mad", "outcome": "abort", "force": True}, 422, "unknown_field"),
    ):
        reply = await resolve(node, stuck, **body)  # type: ignore[arg-type]
        assert (reply.status, reply.code) == (status, code), body
    reply = await node.call("POST", f"/v1/transactions/{stuck}/acknowledge")
    assert (reply.status, reply.code) == (409, "not_resolved")
    await resolve(node, stuck, branch="mad", outcome="abort")
    reply = await resolve(node, stuck, branch="mad", outcome="commit")
    assert (reply.status, reply.code) == (409, "already_resolved")
    assert (await resolve(node, "test-1-99", branch="mad", outcome="abort")).status == 404
    assert (await node.call("GET", "/v1/transactions?heuristic=maybe")).status == 422


async def test_what_is_undecided_is_aborted_and_not_resolved(node: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = hang
    await node.register("slow", scripted.url)
    gid = (await node.submit("slow", wait="none")).json["gid"]
    reply = await resolve(node, gid, branch="slow", outcome="abort")
    assert (reply.status, reply.code) == (409, "not_decided")
    assert "outlast tx abort" in reply.json["detail"]
    (waiting,) = (await node.show(gid))["waiting_for"]
    assert (waiting["for"], waiting["branch"]) == ("vote", "slow")


async def test_the_next_leader_keeps_to_it_and_owes_nothing(scripted: ScriptedParticipant, null: Participant) -> None:
    replicas = Replicas(("n1", "n2", "n3"))
    first, second, third = configs(("n1", "n2", "n3"))
    scripted.rule = on("commit", hang)
    async with (
        running(first, replicas.logs["n1"], ready=False) as n1,
        running(second, replicas.logs["n2"], ready=False) as n2,
        running(third, replicas.logs["n3"], ready=False),
    ):
        replicas.lead("n1")
        await eventually(lambda: n1.node.driver.leading)
        await eventually(lambda: n1.node.ledger.level == NEWEST)
        await n1.register("well", null.url)
        await n1.register("dead", scripted.url)
        both = [(await n1.submit("well", "dead")).json["gid"] for _ in range(2)]
        assert (await resolve(n1, both[0], branch="dead", outcome="commit")).status == 200
        await eventually(lambda: set(n1.node.ledger.unfinished) == {Gid.parse(both[1]).number})  # type: ignore[union-attr]
        scripted.heard.clear()
        replicas.lead("n2")
        await eventually(lambda: n2.node.driver.leading)
        await eventually(lambda: both[1] in [item["gid"] for heard in scripted.heard for item in heard.items])
        assert both[0] not in [item["gid"] for heard in scripted.heard for item in heard.items]
        shown = await n2.show(both[0])
        assert (shown["heuristic"], shown["branches"][1]["resolved"]["outcome"]) == ("resolved", "commit")
        scripted.cut()


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def tx(node: RunningNode, capsys: pytest.CaptureFixture[str]) -> Any:
    async def run(*words: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(main, ["tx", *words, "--url", node.url])
        out, err = capsys.readouterr()
        return status, out, err

    return run


async def test_the_command_records_and_says_that_nobody_was_told(tx: Any, stuck: str) -> None:
    status, out, _ = await tx("show", stuck)
    assert "waits for an operator: mad says that its branch is aborted, against the decision" in out
    status, out, _ = await tx("resolve", stuck, "--branch", "mad", "--abort", "--note", "by hand")
    assert status == 0
    assert "abort by an operator" in out
    assert "recorded; the participant was not told" in out
    status, out, _ = await tx("list", "--heuristic")
    assert (status, stuck in out, "mixed" in out) == (0, True, True)
    status, out, _ = await tx("acknowledge", stuck)
    assert (status, "heuristic: mixed, acknowledged" in out) == (0, True)
    assert stuck not in (await tx("list", "--heuristic"))[1]


@pytest.mark.parametrize(
    ("rule", "status", "says"),
    [
        (saying({"state": "aborted"}), 0, "mad has done it"),
        (saying({"state": "committed"}, status=409), 1, "its branch is committed, and did nothing"),
        (lambda _: http(500), 3, "was asked for the abort, and said"),
        (lambda _: None, 3, "it is not known whether it did it"),
    ],
    ids=["done", "contradicts", "unwell", "hangs up"],
)
async def test_with_tell_the_participant_is_asked_once_it_is_recorded(
    node: RunningNode, tx: Any, stuck: str, scripted: ScriptedParticipant, rule: Any, status: int, says: str
) -> None:
    scripted.rule = on("abort", rule, scripted.rule)
    got, out, err = await tx("resolve", stuck, "--branch", "mad", "--abort", "--tell")
    assert got == status
    assert says in out + err
    assert [each.call for each in scripted.heard if each.call == "abort"] == ["abort"]
    assert (await node.show(stuck))["branches"][1]["resolved"]["outcome"] == "abort"


async def test_a_refused_resolution_tells_nobody(tx: Any, stuck: str, scripted: ScriptedParticipant) -> None:
    got, _, err = await tx("resolve", stuck, "--branch", "well", "--abort", "--tell")
    assert (got, "nothing is owed" in err) == (1, True)
    assert "abort" not in [each.call for each in scripted.heard]
