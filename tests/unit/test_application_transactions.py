"""Transactions that an application does itself: the rules, what the leader does, and the calls of the API."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from coordinator.codec import Malformed
from coordinator.commands import ENTRIES, decode_command, encode_command
from coordinator.config import Compatibility, Limits
from coordinator.protocol.effects import Reply, Send, SetDeadline
from coordinator.protocol.entries import (
    BranchVote,
    Decided,
    Enlisted,
    Entry,
    Header,
    Opened,
    Sealed,
)
from coordinator.protocol.invariants import check, check_delta, check_owed
from coordinator.protocol.messages import ENLISTED_PAYLOAD, Abort, Prepare, Prepared
from coordinator.protocol.transaction import NOTHING_HEARD, Decision, State, Transaction, VoteKind
from coordinator.protocol.two_phase import TwoPhaseCommit
from participants.server import Participant
from tests.support.logs import Replicas
from tests.support.nodes import Reply as HttpReply
from tests.support.nodes import RunningNode, configs, running
from tests.support.participants import ScriptedParticipant, hang, on, refusing
from tests.support.waiting import eventually

GID = "m-1-1"
P = TwoPhaseCommit()
HEADER = Header(epoch=1, at=100)


# ------------------------------------------------------------------------------------------------ rules


def after(*entries: Any) -> Transaction:
    txn: Transaction | None = None
    for entry in (Opened(gid=GID, protocol="2pc", timeout_ms=50, key="k", body_hash=b"h"), *entries):
        before, txn = txn, P.evolve(txn, entry, HEADER)
        assert txn is not None
        assert check(txn) == []
        assert check_delta(before, txn) == []
        assert check_owed(txn, P.owed(txn)) == []
    assert txn is not None
    return txn


def enlisted(name: str) -> Enlisted:
    return Enlisted(gid=GID, branch=name, participant=f"p-{name}")


def sealed(*names: str) -> Sealed:
    return Sealed(gid=GID, branches=names)


ABORTED = Decided(gid=GID, decision=Decision.ABORT, reason="x")
ALL_VOTED = tuple(BranchVote(branch=name, vote=VoteKind.PREPARED) for name in ("a", "b"))


def test_while_the_application_works_only_its_deadline_is_owed() -> None:
    txn = after(enlisted("a"))
    assert txn.state is State.ACTIVE
    assert (txn.key, txn.body_hash, txn.started_at) == ("k", b"h", 100)
    assert P.owed(txn) == [SetDeadline(at=150)]


def test_sealed_it_is_a_transaction_like_any_other_and_participants_are_asked_to_look() -> None:
    txn = after(enlisted("a"), enlisted("b"), sealed("b", "a"))
    assert txn.state is State.PREPARING
    messages = [effect.message for effect in P.owed(txn) if isinstance(effect, Send)]
    assert messages == [Prepare(gid=GID, branch=name, payload=ENLISTED_PAYLOAD) for name in ("a", "b")]
    tally = NOTHING_HEARD.heard(Prepared(gid=GID, branch="a")).heard(Prepared(gid=GID, branch="b"))
    wish = P.decide(txn, tally, expired=False)
    assert isinstance(wish, Decided)
    assert wish.decision is Decision.COMMIT


@pytest.mark.parametrize("names", [(), ("a",), ("a", "b", "c"), ("a", "a"), ("a", "a", "b"), ("a", "c")])
def test_a_seal_must_name_the_branches_that_are_enlisted(names: tuple[str, ...]) -> None:
    txn = after(enlisted("a"), enlisted("b"))
    assert P.evolve(txn, sealed(*names), HEADER) is txn


def test_what_has_no_branches_commits_at_once() -> None:
    txn = after(sealed())
    wish = P.decide(txn, NOTHING_HEARD, expired=False)
    assert wish == Decided(gid=GID, decision=Decision.COMMIT)
    done = P.evolve(txn, wish, HEADER)
    assert done is not None
    assert done.state is State.COMMITTED


def test_a_branch_is_enlisted_once_and_stays_its_participants() -> None:
    txn = after(enlisted("a"))
    assert P.evolve(txn, enlisted("a"), HEADER) is txn
    assert P.evolve(txn, Enlisted(gid=GID, branch="a", participant="other"), HEADER) is txn


def test_nothing_is_enlisted_after_the_seal_or_the_decision() -> None:
    for txn in (after(enlisted("a"), sealed("a")), after(enlisted("a"), ABORTED)):
        assert P.evolve(txn, enlisted("b"), HEADER) is txn


def test_a_seal_after_the_abort_changes_nothing() -> None:
    txn = after(enlisted("a"), ABORTED)
    assert P.evolve(txn, sealed("a"), HEADER) is txn


def test_a_second_opened_changes_nothing() -> None:
    txn = after(enlisted("a"))
    assert P.evolve(txn, Opened(gid=GID, protocol="2pc", timeout_ms=1), HEADER) is txn


def test_no_entry_commits_what_is_not_sealed() -> None:
    for txn in (after(), after(enlisted("a"), enlisted("b"))):
        commit = Decided(gid=GID, decision=Decision.COMMIT, votes=ALL_VOTED)
        assert P.evolve(txn, commit, HEADER) is txn


def test_an_application_that_says_nothing_more_is_aborted_everywhere() -> None:
    txn = after(enlisted("a"), enlisted("b"))
    assert P.decide(txn, NOTHING_HEARD, expired=False) is None
    wish = P.decide(txn, NOTHING_HEARD, expired=True)
    assert isinstance(wish, Decided)
    assert (wish.decision, wish.retryable) == (Decision.ABORT, True)
    done = P.evolve(txn, wish, HEADER)
    assert done is not None
    assert done.state is State.ABORTING
    assert list(P.owed(done)) == [
        Reply(),
        *(Send(participant=f"p-{name}", message=Abort(gid=GID, branch=name)) for name in ("a", "b")),
    ]


def test_an_abort_is_asked_for_and_wanted_at_once() -> None:
    wish = P.decide(after(enlisted("a")), NOTHING_HEARD.asked_to_abort("enough"), expired=False)
    assert isinstance(wish, Decided)
    assert (wish.decision, wish.reason) == (Decision.ABORT, "enough")


def test_an_empty_one_that_is_aborted_has_ended() -> None:
    assert after(ABORTED).state is State.ABORTED


def test_entries_come_back_as_they_were_written() -> None:
    entries: list[Entry] = [
        Opened(gid=GID, protocol="2pc", timeout_ms=50, key="k", body_hash=b"h"),
        enlisted("a"),
        sealed("a", "b"),
        sealed(),
    ]
    assert decode_command(encode_command(HEADER, entries)) == (HEADER, entries)


@pytest.mark.parametrize("names", [[1], [["a"]], [b"a"], [None], "a", None])
def test_names_that_are_none_are_malformed(names: object) -> None:
    with pytest.raises(Malformed):
        ENTRIES.from_plain([18, GID, names])


# ------------------------------------------------------------------------------------------------ the API


@pytest.fixture
async def shop(node: RunningNode, null: Participant) -> RunningNode:
    """A node with two participants that find everything prepared."""
    await node.register("stock", null.url)
    await node.register("money", null.url, batch=True)
    return node


async def begin(node: RunningNode, key: str | None = None, **body: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    reply = await node.call("POST", "/v1/transactions/begin", body, headers=headers)
    assert reply.status == 200, reply.raw
    return reply.json


async def enlist(node: RunningNode, gid: str, participant: str, **body: Any) -> HttpReply:
    return await node.call("POST", f"/v1/transactions/{gid}/branches", {"participant": participant, **body})


async def commit(node: RunningNode, gid: str, *names: str, **body: Any) -> HttpReply:
    return await node.call("POST", f"/v1/transactions/{gid}/commit", {"branches": list(names), **body})


async def test_from_begin_to_commit(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    await shop.register("stock", scripted.url)
    txn = await begin(shop, timeout_s=20)
    gid = txn["gid"]
    assert (txn["state"], txn["decision"], txn["branches"]) == ("active", None, [])
    assert txn["started_at"] < txn["expires_at"]
    for _ in range(2):
        reply = await enlist(shop, gid, "stock")
        assert reply.status == 200
        assert reply.json["branches"] == [
            {"branch": "stock", "participant": "stock", "state": "active", "reason": None}
        ]
    await enlist(shop, gid, "money", branch="money-2")
    assert scripted.calls() == []
    listed = (await shop.call("GET", "/v1/transactions?state=active")).json["transactions"]
    assert [one["gid"] for one in listed] == [gid]
    assert b"outlast_transactions_active 1.0" in (await shop.call("GET", "/metrics")).raw
    assert (await shop.call("GET", f"/v1/outcomes/{gid}")).code == "not_known_yet"
    for _ in range(2):
        reply = await commit(shop, gid, "money-2", "stock", wait="ended")
        assert (reply.status, reply.json["state"], reply.json["decision"]) == (200, "committed", "commit")
    assert scripted.calls() == ["prepare", "commit"]
    assert scripted.heard[0].body["payload"] == {"op": "outlast.enlisted"}
    assert b"outlast_transactions_active 0.0" in (await shop.call("GET", "/metrics")).raw
    assert (await enlist(shop, gid, "stock")).status == 200
    assert (await enlist(shop, gid, "stock", branch="late")).code == "not_active"


async def test_an_empty_one_commits(shop: RunningNode) -> None:
    gid = (await begin(shop))["gid"]
    assert (await commit(shop, gid)).json["state"] == "committed"


async def test_a_branch_that_is_not_prepared_aborts_it(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = refusing("not_enlisted")
    await shop.register("money", scripted.url)
    gid = (await begin(shop))["gid"]
    await enlist(shop, gid, "stock")
    await enlist(shop, gid, "money")
    reply = await commit(shop, gid, "stock", "money", wait="ended")
    assert (reply.json["state"], reply.json["reason"]) == ("aborted", "money refused: not_enlisted")


async def test_an_abort_reaches_everybody_who_is_enlisted(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    await shop.register("stock", scripted.url)
    gid = (await begin(shop))["gid"]
    await enlist(shop, gid, "stock")
    reply = await shop.call("POST", f"/v1/transactions/{gid}/abort")
    assert reply.json["decision"] == "abort"
    await eventually(lambda: not shop.node.ledger.unfinished)
    assert scripted.calls() == ["abort"]
    late = await commit(shop, gid, "stock")
    assert (late.status, late.json["decision"]) == (200, "abort")
    assert (await commit(shop, gid, "stock", "lost")).json["decision"] == "abort"
    assert (await enlist(shop, gid, "money")).code == "not_active"


async def test_an_application_that_dies_is_aborted_at_its_deadline(
    shop: RunningNode, scripted: ScriptedParticipant
) -> None:
    await shop.register("stock", scripted.url)
    gid = (await begin(shop, timeout_s=0.2))["gid"]
    await enlist(shop, gid, "stock")
    await eventually(lambda: not shop.node.ledger.unfinished)
    shown = await shop.show(gid)
    assert (shown["state"], shown["retryable"]) == ("aborted", True)
    assert shown["reason"] == "timeout: the application did not ask for the commit in time"
    assert scripted.calls() == ["abort"]


async def test_the_deadline_still_counts_after_the_seal(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    await shop.register("stock", scripted.url)
    gid = (await begin(shop, timeout_s=0.3))["gid"]
    await enlist(shop, gid, "stock")
    reply = await commit(shop, gid, "stock")
    assert (reply.json["decision"], reply.json["reason"]) == ("abort", "timeout: no vote from stock")


async def test_who_waits_for_nothing_is_answered_once_it_is_sealed(
    shop: RunningNode, scripted: ScriptedParticipant
) -> None:
    scripted.rule = on("prepare", hang)
    await shop.register("stock", scripted.url)
    gid = (await begin(shop))["gid"]
    await enlist(shop, gid, "stock")
    assert (await commit(shop, gid, "stock", wait="none")).json["state"] == "preparing"
    reply = await shop.call(
        "POST", f"/v1/transactions/{gid}/commit", {"branches": ["stock"]}, headers={"Outlast-Wait-Ms": "20"}
    )
    assert (reply.status, reply.json["state"]) == (202, "preparing")


async def test_a_commit_must_name_the_branches(shop: RunningNode) -> None:
    gid = (await begin(shop))["gid"]
    await enlist(shop, gid, "stock")
    for names in ((), ("stock", "money"), ("money",)):
        reply = await commit(shop, gid, *names)
        assert (reply.status, reply.code) == (409, "branches_differ")
    assert (await shop.show(gid))["state"] == "active"
    assert (await commit(shop, gid, "stock")).json["decision"] == "commit"
    assert (await commit(shop, gid)).code == "branches_differ"


async def test_a_name_belongs_to_one_participant(shop: RunningNode) -> None:
    gid = (await begin(shop))["gid"]
    await enlist(shop, gid, "stock", branch="b")
    reply = await enlist(shop, gid, "money", branch="b")
    assert (reply.status, reply.code) == (409, "branch_taken")


async def test_one_key_names_one_beginning(shop: RunningNode) -> None:
    first, again = await begin(shop, "k", timeout_s=5), await begin(shop, "k", timeout_s=5)
    assert first == again
    other = await shop.call("POST", "/v1/transactions/begin", {"timeout_s": 6}, headers={"Idempotency-Key": "k"})
    assert other.code == "idempotency_key_reused"
    assert (await shop.submit("stock", key="k", timeout_s=5)).code == "idempotency_key_reused"
    assert len(shop.node.ledger) == 1


async def test_what_was_submitted_whole_takes_no_branches(shop: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", hang)
    await shop.register("stock", scripted.url)
    gid = (await shop.submit("stock", wait="none")).json["gid"]
    assert (await enlist(shop, gid, "money")).code == "not_active"


@pytest.mark.parametrize(
    ("call", "body", "status", "code"),
    [
        ("begin", {"timeout_s": 0}, 422, "invalid_timeout"),
        ("begin", {"timeout_s": 10**6}, 422, "invalid_timeout"),
        ("begin", {"protocol": "3pc"}, 422, "unknown_protocol"),
        ("begin", {"branches": []}, 422, "unknown_field"),
        ("{gid}/branches", {}, 422, "invalid"),
        ("{gid}/branches", {"participant": 1}, 422, "invalid"),
        ("{gid}/branches", {"participant": "stock", "branch": "A"}, 422, "invalid"),
        ("{gid}/branches", {"participant": "stock", "payload": 1}, 422, "unknown_field"),
        ("{gid}/branches", {"participant": "nobody"}, 422, "unknown_participant"),
        ("{gid}/commit", {}, 422, "no_branches"),
        ("{gid}/commit", {"branches": "stock"}, 422, "no_branches"),
        ("{gid}/commit", {"branches": [1]}, 422, "no_branches"),
        ("{gid}/commit", {"branches": ["A"]}, 422, "no_branches"),
        ("{gid}/commit", {"branches": ["stock", "stock"]}, 422, "duplicate_branch"),
        ("{gid}/commit", {"branches": [f"b{n}" for n in range(33)]}, 422, "too_many_branches"),
        ("{gid}/commit", {"branches": [], "wait": "long"}, 422, "invalid_wait"),
        ("test-1-999/branches", {"participant": "stock"}, 404, "not_found"),
        ("test-1-999/commit", {"branches": []}, 404, "not_found"),
        ("other-1-0/branches", {"participant": "stock"}, 404, "not_found"),
    ],
)
async def test_bad_requests_change_nothing(
    shop: RunningNode, call: str, body: dict[str, Any], status: int, code: str
) -> None:
    gid = (await begin(shop))["gid"]
    reply = await shop.call("POST", f"/v1/transactions/{call.format(gid=gid)}", body)
    assert (reply.status, reply.code) == (status, code)
    assert (await shop.show(gid))["state"] == "active"
    assert len(shop.node.ledger) == 1


async def test_limits(null: Participant) -> None:
    config = configs(limits=Limits(max_in_flight=2, max_branches=3))[0]
    async with running(config) as node:
        await node.register("stock", null.url)
        gids = [(await begin(node))["gid"] for _ in range(2)]
        assert (await node.call("POST", "/v1/transactions/begin", {})).code == "too_many_in_flight"
        replies = await asyncio.gather(*(enlist(node, gids[0], "stock", branch=f"b{n}") for n in range(6)))
        assert sorted(reply.status for reply in replies) == [200, 200, 200, 422, 422, 422]
        assert {reply.code for reply in replies if reply.status != 200} == {"too_many_branches"}
        assert node.node.driver._enlisting == {}
        await commit(node, gids[1])
        await begin(node)


async def test_a_participant_that_is_enlisted_stays_registered(shop: RunningNode) -> None:
    gid = (await begin(shop))["gid"]
    await enlist(shop, gid, "stock")
    assert (await shop.call("DELETE", "/v1/participants/stock")).code == "conflict"
    assert (await shop.call("DELETE", "/v1/participants/money")).status == 204
    assert (await enlist(shop, gid, "money")).code == "unknown_participant"


async def test_what_is_active_may_come_to_name_anybody_and_holds_every_floor(
    shop: RunningNode, scripted: ScriptedParticipant
) -> None:
    await shop.register("stock", scripted.url)
    gid = (await begin(shop))["gid"]
    for _ in range(3):
        assert (await shop.submit("stock", wait="ended")).json["state"] == "committed"
    assert {heard.body["floor"] for heard in scripted.heard} == {gid}
    await enlist(shop, gid, "stock")
    await commit(shop, gid, "stock", wait="ended")
    assert (await shop.submit("stock", wait="ended")).json["state"] == "committed"
    assert scripted.heard[-1].body["floor"] == scripted.heard[-1].body["gid"]


async def test_it_needs_a_cluster_whose_nodes_all_understand_it(null: Participant) -> None:
    config = replace(configs()[0], compatibility=Compatibility(highest_level=1))
    async with running(config) as node:
        await node.register("stock", null.url)
        assert (await node.call("POST", "/v1/transactions/begin", {})).code == "not_before_upgrade"
        assert (await node.submit("stock")).json["decision"] == "commit"
        assert len(node.node.ledger) == 1


# ------------------------------------------------------------------------------------------------ many nodes


@pytest.fixture
async def three() -> AsyncIterator[tuple[Replicas, list[RunningNode]]]:
    """Three nodes, the first of which leads."""
    names = ("n1", "n2", "n3")
    replicas = Replicas(names)
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(running(config, replicas.logs[config.node], ready=False))
            for config in configs(names)
        ]
        replicas.lead("n1")
        await eventually(lambda: nodes[0].node.driver.leading)
        yield replicas, nodes


async def test_an_active_transaction_goes_on_with_the_next_leader(
    three: tuple[Replicas, list[RunningNode]], scripted: ScriptedParticipant
) -> None:
    replicas, nodes = three
    await nodes[2].register("stock", scripted.url)
    gid = (await begin(nodes[1], "k"))["gid"]
    assert (await enlist(nodes[2], gid, "stock")).status == 200
    replicas.lead("n2")
    await eventually(lambda: nodes[1].node.driver.leading)
    assert (await begin(nodes[0], "k"))["gid"] == gid
    assert (await enlist(nodes[0], gid, "stock", branch="more")).status == 200
    assert (await commit(nodes[0], gid, "stock", "more", wait="ended")).json["state"] == "committed"
    assert sorted(scripted.calls(gid)) == ["commit", "commit", "prepare", "prepare"]


async def test_a_leader_that_goes_between_seal_and_decision(
    three: tuple[Replicas, list[RunningNode]], scripted: ScriptedParticipant
) -> None:
    replicas, nodes = three
    scripted.rule = on("prepare", hang)
    await nodes[0].register("stock", scripted.url)
    gid = (await begin(nodes[1]))["gid"]
    await enlist(nodes[1], gid, "stock")
    waiting = asyncio.create_task(commit(nodes[1], gid, "stock"))
    await eventually(lambda: scripted.calls(gid))
    replicas.lead("n3")
    await eventually(lambda: nodes[2].node.driver.leading)
    scripted.rule = ScriptedParticipant().rule
    scripted.cut()
    reply = await waiting
    assert (reply.status, reply.json["decision"]) == (200, "commit")


async def test_the_next_leader_aborts_what_its_application_has_left(
    three: tuple[Replicas, list[RunningNode]], scripted: ScriptedParticipant
) -> None:
    replicas, nodes = three
    await nodes[0].register("stock", scripted.url)
    gid = (await begin(nodes[0], timeout_s=0.5))["gid"]
    await enlist(nodes[0], gid, "stock")
    replicas.lead("n2")
    await eventually(lambda: not nodes[1].node.ledger.unfinished)
    assert scripted.calls(gid) == ["abort"]


async def test_a_lost_seal_is_asked_for_again_at_the_next_leader(
    three: tuple[Replicas, list[RunningNode]], null: Participant
) -> None:
    replicas, nodes = three
    await nodes[0].register("stock", null.url)
    gid = (await begin(nodes[0]))["gid"]
    await enlist(nodes[0], gid, "stock")
    replicas.hold = True
    waiting = asyncio.create_task(commit(nodes[1], gid, "stock"))
    await eventually(lambda: replicas.waiting)
    replicas.hold = False
    replicas.lead("n2", unheard_by=())
    assert (await waiting).json["decision"] == "commit"
