"""The driver: what a leader does, what it no longer does, and that nothing is ever left unfinished."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.replication.clock import SystemClock
from cluster.replication.log import Leadership, NotProposed
from coordinator.commands import decode_command, encode_command
from coordinator.config import Limits, NodeConfig
from coordinator.driver import COMMANDS_UNDER_WAY, TURNS_FOR_COMPANY, NewTransaction, _Waiting
from coordinator.errors import Gone, NotFound, NotKnownYet, NotLeader, OutcomeUnknown, Unprocessable
from coordinator.ledger import Ledger
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    Decided,
    Ended,
    Enlisted,
    Entry,
    Forgotten,
    Header,
    Raised,
    Registered,
    Sealed,
    TookOver,
)
from coordinator.protocol.messages import Gid, Prepare
from coordinator.protocol.record import replace
from coordinator.protocol.transaction import Decision, VoteKind
from participants.server import Participant
from tests.support.clocks import FakeClock
from tests.support.logs import Proposal, Replicas
from tests.support.nodes import RunningNode, configs, running
from tests.support.participants import Heard, ScriptedParticipant, hang, honest, http, on, refusing, saying
from tests.support.waiting import eventually, turns

NODES = ("n1", "n2", "n3")


@dataclass(slots=True, eq=False)
class Led:
    """A node on a log whose leadership, and the fate of every proposal, is in the test's hands."""

    replicas: Replicas
    running: RunningNode

    @property
    def driver(self) -> Any:
        return self.running.node.driver

    @property
    def ledger(self) -> Any:
        return self.running.node.ledger

    def lead(self) -> None:
        self.replicas.lead("n1")

    def follow(self, leader: str | None = None) -> None:
        self.replicas.lead(leader)

    async def led(self) -> None:
        self.lead()
        await eventually(lambda: self.driver.leading)

    def entries(self) -> list[Entry]:
        """Everything that is committed, in order."""
        return [entry for one in self.replicas.committed for entry in decode_command(one.command)[1]]

    def proposed(self) -> list[Entry]:
        """Everything that waits to be committed."""
        return [entry for one in self.replicas.waiting for entry in decode_command(one.command)[1]]

    def say(self, epoch: int, *entries: Entry) -> None:
        """Commit entries of another leader."""
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        header = Header(epoch=epoch, at=SystemClock().wall_ms())
        self.replicas.committed.append(Proposal("n2", encode_command(header, list(entries)), future))
        for log in self.replicas.logs.values():
            log.catch_up()

    async def begin(self, *participants: str, **fields: Any) -> str:
        reply = await self.running.submit(*participants, wait="none", **fields)
        assert reply.status == 200, reply.raw
        return str(reply.json["gid"])


@asynccontextmanager
async def on_hand(config: NodeConfig | None = None, clock: Any = None) -> AsyncIterator[Led]:
    replicas = Replicas(NODES)
    async with running(config or configs(NODES)[0], replicas.logs["n1"], clock, ready=False) as node:
        yield Led(replicas, node)


@pytest.fixture
async def led() -> AsyncIterator[Led]:
    """A node that leads."""
    async with on_hand() as led:
        await led.led()
        yield led


def new(*participants: str, key: str | None = None) -> NewTransaction:
    branches = tuple(BranchPlan(name=name, participant=name, payload=b"null") for name in participants)
    return NewTransaction(protocol="2pc", branches=branches, timeout_ms=10_000, key=key, body_hash=key and b"h")


# ------------------------------------------------------------------------------------------------ one transaction


async def test_a_commit_from_start_to_end(led: Led, scripted: ScriptedParticipant) -> None:
    await led.running.register("stock", scripted.url)
    gid = await led.begin("stock")
    await eventually(lambda: led.ledger.get(gid).ended_at is not None)
    assert scripted.calls(gid) == ["prepare", "commit"]
    of_it = [entry for entry in led.entries() if getattr(entry, "gid", None) == gid]
    assert [type(entry) for entry in of_it] == [Begun, Decided, Ended]
    assert led.driver._running == {}
    assert led.driver.in_flight == 0


async def test_a_read_only_branch_is_left_out_of_phase_two(node: RunningNode, scripted: ScriptedParticipant) -> None:
    async with ScriptedParticipant(on("prepare", saying({"vote": "read_only", "result": 5}))) as reader:
        await node.register("reader", reader.url)
        await node.register("stock", scripted.url)
        txn = (await node.submit("reader", "stock", wait="ended")).json
        assert (txn["state"], txn["branches"][0]["state"], txn["branches"][0]["result"]) == (
            "committed",
            "read_only",
            5,
        )
        assert reader.calls() == ["prepare"]
        alone = (await node.submit("reader")).json
        assert (alone["state"], reader.calls()) == ("committed", ["prepare", "prepare"])
        scripted.rule = refusing()
        aborted = (await node.submit("reader", "stock", wait="ended")).json
        assert aborted["state"] == "aborted"
        assert set(reader.calls()) == {"prepare"}


async def test_a_refusal_aborts_the_prepared_ones_and_not_the_refused(node: RunningNode) -> None:
    rules = {"yes": honest, "no": refusing("no_money"), "again": refusing("busy", retryable=True)}
    servers = {name: ScriptedParticipant(rule) for name, rule in rules.items()}
    for name, server in servers.items():
        await server.start()
        await node.register(name, server.url)
    txn = (await node.submit("yes", "no", wait="ended")).json
    assert (txn["reason"], txn["retryable"]) == ("no refused: no_money", False)
    assert servers["no"].calls() == ["prepare"]
    assert "abort" in servers["yes"].calls()
    txn = (await node.submit("again", wait="ended")).json
    assert (txn["reason"], txn["retryable"]) == ("again refused: busy", True)
    for server in servers.values():
        await server.stop()


async def times_out(node: RunningNode, clock: FakeClock, odd: ScriptedParticipant) -> str:
    """A transaction that "stock" votes for, and "odd" is asked for, until its deadline is over; its gid."""
    asked = len(odd.heard)
    gid = str((await node.submit("stock", "odd", timeout_s=60, wait="none")).json["gid"])
    await eventually(lambda: "stock" in node.node.driver.tally(gid).votes)
    await eventually(lambda: len(odd.heard) > asked)
    txn = node.node.ledger.get(gid)
    assert txn is not None
    assert txn.decision is None
    clock.pass_s(61)
    node.node.driver._deadlines._ring()  # its timer was set before the clock was moved
    return gid


async def test_the_deadline_aborts_and_the_silent_one_hears_of_it(
    null: Participant, scripted: ScriptedParticipant
) -> None:
    clock = FakeClock()
    async with running(clock=clock) as node:
        await node.register("stock", null.url)
        await node.register("odd", scripted.url)
        scripted.rule = on("prepare", hang)
        gid = await times_out(node, clock, scripted)
        await eventually(lambda: not node.node.ledger.unfinished)
        txn = await node.show(gid)
        assert (txn["state"], txn["reason"]) == ("aborted", "timeout: no vote from odd")
        assert scripted.calls() == ["prepare", "abort"]
        assert len(node.node.driver._deadlines) == 0


async def test_a_vote_after_the_abort_changes_nothing(led: Led, scripted: ScriptedParticipant) -> None:
    released = asyncio.Event()

    async def late(heard: Heard) -> bytes:
        await released.wait()
        return honest(heard)

    scripted.rule = on("prepare", late)
    await led.running.register("slow", scripted.url)
    gid = await led.begin("slow")
    await eventually(lambda: scripted.heard)
    await led.driver.abort(gid, "enough", 5.0)
    released.set()
    await eventually(lambda: led.ledger.get(gid).ended_at is not None)
    assert led.ledger.get(gid).decision is Decision.ABORT
    assert scripted.calls(gid) == ["prepare", "abort"]


async def test_the_first_vote_counts(led: Led, scripted: ScriptedParticipant) -> None:
    votes = iter([{"vote": "prepared", "result": 1}, {"vote": "refused", "reason": "changed my mind"}])
    scripted.rule = on("prepare", lambda _: http(200, next(votes)))
    async with ScriptedParticipant(on("prepare", hang)) as slow:
        await led.running.register("fickle", scripted.url)
        await led.running.register("slow", slow.url)
        gid = await led.begin("fickle", "slow")
        await eventually(lambda: "fickle" in led.driver.tally(gid).votes)
        # A new leader would ask again; here the same message is sent once more.
        participant = led.ledger.participants["fickle"]
        led.driver._courier.send(participant, Prepare(gid=gid, branch="fickle", payload=b"null"))
        await eventually(lambda: len(scripted.calls(gid)) == 2 and led.driver._courier.owed("fickle") == 0)
        slow.rule = honest
        slow.cut()
        await eventually(lambda: led.ledger.get(gid).ended_at is not None)
        assert led.ledger.get(gid).decision is Decision.COMMIT
        assert led.ledger.get(gid).branches[0].result == b"1"


async def test_a_contradiction_is_kept_shown_and_never_an_ack(node: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("commit", saying({"state": "aborted"}, status=409))
    await node.register("mad", scripted.url)
    gid = (await node.submit("mad")).json["gid"]
    await eventually(lambda: node.node.ledger.get(gid).branches[0].contradiction == "aborted")  # type: ignore[union-attr]
    await eventually(lambda: len(scripted.calls(gid)) > 4)
    shown = await node.show(gid)
    assert (shown["state"], shown["branches"][0]["heuristic"]) == ("committing", "aborted")
    assert "against the decision" in shown["branches"][0]["reason"]
    scripted.rule = honest
    await eventually(lambda: not node.node.ledger.unfinished)
    shown = await node.show(gid)
    assert (shown["state"], shown["branches"][0]["heuristic"]) == ("committed", "aborted")


async def test_a_stale_epoch_is_no_vote(node: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", saying({"code": "stale_epoch", "epoch": 99}, status=409))
    await node.register("ahead", scripted.url)
    txn = (await node.submit("ahead", timeout_s=0.1, wait="ended")).json
    assert txn["reason"] == "timeout: no vote from ahead"
    assert scripted.calls() == ["prepare", "abort"]


@pytest.mark.parametrize(
    "rule",
    [
        lambda _: b"\x00\xff\x00",
        lambda _: None,
        lambda _: http(500, {"vote": "prepared"}),
        lambda _: http(307, b"", headers={"Location": "http://127.0.0.1:9/prepare"}),
        lambda _: http(200, b'{"vote":"prepared","x":"' + b"x" * (1 << 20) + b'"}'),
        lambda _: http(200, b"\x1f\x8b\x08\x00", headers={"Content-Encoding": "gzip"}),
        saying({"vote": "perhaps"}),
        hang,
    ],
    ids=["garbage", "hanging up", "500", "redirect", "huge", "packed", "an unknown vote", "nothing at all"],
)
@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
async def test_whatever_a_participant_answers_the_transaction_ends_and_others_work(
    null: Participant, scripted: ScriptedParticipant, rule: Any, batch: bool
) -> None:
    scripted.rule = lambda heard: (
        rule(heard) if any(item.get("call", heard.call) == "prepare" for item in heard.items) else honest(heard)
    )
    clock = FakeClock()
    async with running(clock=clock) as node:
        await node.register("odd", scripted.url, batch=batch)
        await node.register("stock", null.url)
        gid = await times_out(node, clock, scripted)
        await node.call("GET", f"/v1/transactions/{gid}?wait=decided")
        txn = await node.show(gid)
        assert (txn["decision"], txn["reason"]) == ("abort", "timeout: no vote from odd")
        assert (await node.submit("stock", wait="ended")).json["state"] == "committed"
        scripted.rule = honest
        scripted.cut()
        await eventually(lambda: not node.node.ledger.unfinished)
        assert (await node.submit("odd", "stock", wait="ended")).json["state"] == "committed"


async def test_a_committed_answer_to_a_prepare_is_no_vote(node: RunningNode, scripted: ScriptedParticipant) -> None:
    scripted.rule = on("prepare", saying({"state": "committed"}))
    await node.register("eager", scripted.url)
    gid = (await node.submit("eager", timeout_s=0.1)).json["gid"]
    await eventually(lambda: not node.node.ledger.unfinished)
    txn = await node.show(gid)
    assert (txn["state"], txn["reason"]) == ("aborted", "timeout: no vote from eager")


# ------------------------------------------------------------------------------------------------ down and back


async def test_a_participant_that_is_down_gets_its_decision_when_it_is_back(node: RunningNode) -> None:
    server = ScriptedParticipant(on("commit", lambda _: None))
    await server.start()
    await node.register("stock", server.url)
    gid = (await node.submit("stock")).json["gid"]
    await server.stop()
    await eventually(lambda: node.node.driver.lanes()["stock"].down)
    server.rule = honest
    await server.start()
    await node.register("stock", server.url)
    await eventually(lambda: not node.node.ledger.unfinished)
    assert (await node.show(gid))["state"] == "committed"
    await server.stop()


async def test_a_dead_participant_never_delays_a_healthy_one(
    node: RunningNode, null: Participant, scripted: ScriptedParticipant
) -> None:
    scripted.rule = hang
    gone = ScriptedParticipant()
    await node.register("hanging", scripted.url)
    await node.register("gone", gone.url)
    await node.register("quick", null.url)
    stuck = [
        (await node.submit(name, "quick", wait="none", timeout_s=300)).json["gid"]
        for name in ("hanging", "gone")
        for _ in range(40)
    ]
    for _ in range(20):
        assert (await node.submit("quick", wait="ended")).json["state"] == "committed"
    assert all(node.node.ledger.get(gid).decision is None for gid in stuck)  # type: ignore[union-attr]


async def test_who_asks_for_an_outcome_is_tried_at_once(led: Led) -> None:
    server = ScriptedParticipant(on("commit", lambda _: None))
    await server.start()
    await led.running.register("stock", server.url)
    gid = await led.begin("stock")
    await eventually(lambda: led.ledger.get(gid).decision is not None)
    await server.stop()
    await eventually(lambda: led.driver.lanes()["stock"].down)
    courier = led.driver._courier
    lane = courier._lanes["stock"]
    # A rest that no test could outlast; only the question can end it.
    courier._backoff_s = lambda _: 1000.0
    courier.wake("stock")
    await eventually(lambda: lane.down_timer is not None and lane.down_timer.when() > _now() + 500)
    server.rule = honest
    await server.start()
    assert (await led.running.call("GET", f"/v1/outcomes/{gid}")).json == {"outcome": "committed"}
    await eventually(lambda: led.ledger.get(gid).ended_at is not None)
    await server.stop()


def _now() -> float:
    return asyncio.get_running_loop().time()


# ------------------------------------------------------------------------------------------------ leadership


async def test_nothing_is_done_before_the_barrier(scripted: ScriptedParticipant) -> None:
    async with on_hand() as led:
        gid = "test-1-0"
        led.say(1, TookOver(node="n2"))
        led.say(1, *[_registered("stock", scripted.url)])
        led.say(1, Begun(gid=gid, protocol="2pc", branches=new("stock").branches, timeout_ms=10_000))
        led.replicas.term = 1
        led.replicas.hold = True
        led.lead()
        await eventually(lambda: led.replicas.waiting)
        await turns(20)
        assert not led.driver.leading
        assert scripted.heard == []
        with pytest.raises(NotLeader):
            await led.driver.submit(new("stock"))
        led.replicas.hold = False
        led.replicas.commit()
        assert led.driver.leading
        await eventually(lambda: led.ledger.get(gid).ended_at is not None)
        assert scripted.heard[0].body["epoch"] == 2


def _registered(name: str, url: str) -> Entry:
    return Registered(name=name, url=url, batch=False)


async def test_a_new_leader_finishes_what_is_unfinished(scripted: ScriptedParticipant) -> None:
    async with on_hand() as led:
        led.say(1, TookOver(node="n2"), _registered("stock", scripted.url))
        gids = [f"test-1-{number}" for number in range(4)]
        for gid in gids:
            led.say(1, Begun(gid=gid, protocol="2pc", branches=new("stock").branches, timeout_ms=10**9))
        votes = _votes("stock")
        led.say(1, Decided(gid=gids[1], decision=Decision.COMMIT, votes=votes))
        led.say(1, Decided(gid=gids[2], decision=Decision.ABORT, reason="x"))
        led.say(1, Decided(gid=gids[3], decision=Decision.COMMIT, votes=votes), Ended(gid=gids[3]))
        led.replicas.term = 1
        await led.led()
        await eventually(lambda: not led.ledger.unfinished)
        assert scripted.calls(gids[0]) == ["prepare", "commit"]
        assert scripted.calls(gids[1]) == ["commit"]
        assert scripted.calls(gids[2]) == ["abort"]
        assert scripted.calls(gids[3]) == []


def _votes(*names: str) -> tuple[BranchVote, ...]:
    return tuple(BranchVote(branch=name, vote=VoteKind.PREPARED) for name in names)


async def test_a_lost_leader_says_nothing_more(led: Led, scripted: ScriptedParticipant) -> None:
    released = asyncio.Event()

    async def when_released(heard: Heard) -> bytes:
        await released.wait()
        return honest(heard)

    scripted.rule = when_released
    await led.running.register("stock", scripted.url)
    gone = ScriptedParticipant()
    await led.running.register("gone", gone.url)
    for _ in range(5):
        await led.begin("stock", "gone")
    await eventually(lambda: len(scripted.heard) == 5)
    led.follow("n2")
    assert not led.driver.leading
    assert led.driver._running == {}
    assert led.driver._floors._naming == {}
    assert led.driver._undecided == 0
    assert len(led.driver._deadlines) == 0
    assert not led.driver._timers
    assert led.driver.lanes() == {}
    assert led.driver.in_flight == 5, "as far as it has applied"
    released.set()
    before = led.replicas.proposed
    async with gone:
        await eventually(lambda: not led.driver._courier._tasks)
        await turns(50)
        assert gone.heard == []
    assert led.replicas.proposed == before


async def test_without_a_leader_nobody_waits_for_long(
    led: Led, scripted: ScriptedParticipant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.driver.LEADERLESS_S", 0.1)
    scripted.rule = on("prepare", hang)
    await led.running.register("stock", scripted.url)
    gid = await led.begin("stock")
    waiting = [
        asyncio.create_task(led.running.submit("stock", wait="decided", timeout_s=300)),
        asyncio.create_task(led.running.call("GET", f"/v1/transactions/{gid}?wait=ended&timeout_s=300")),
    ]
    await eventually(lambda: len(led.driver._decided_waiters) == len(led.driver._ended_waiters) == 1)
    led.follow("n2")
    # Another leads, and its decisions come here too: whoever waits goes on waiting.
    assert led.driver._leaderless is None
    led.follow(None)
    led.follow("n2")
    assert led.driver._leaderless is None
    assert not any(task.done() for task in waiting)
    led.follow(None)
    for task in waiting:
        reply = await task
        assert (reply.status, reply.json["decision"]) == (202, None)
    assert not led.driver._decided_waiters
    assert not led.driver._ended_waiters


async def test_entries_that_wait_when_leadership_goes_fail_definitely(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    tasks = []
    for number in range(COMMANDS_UNDER_WAY + 3):
        tasks.append(asyncio.create_task(led.driver.submit(new("stock", key=str(number)))))
        await turns(TURNS_FOR_COMPANY)
    assert len(led.replicas.waiting) == COMMANDS_UNDER_WAY
    led.follow("n2")
    waiting = tasks[COMMANDS_UNDER_WAY:]
    await asyncio.wait(waiting)
    assert all(isinstance(task.exception(), NotLeader) for task in waiting)
    under_way = tasks[:COMMANDS_UNDER_WAY]
    assert not any(task.done() for task in under_way), "those are in the log, or may be"
    led.replicas.lose()
    await asyncio.wait(under_way)
    assert all(isinstance(task.exception(), OutcomeUnknown) for task in under_way)


async def test_what_was_under_way_in_an_earlier_reign_does_not_slow_the_next(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    lost = []
    for number in range(COMMANDS_UNDER_WAY):
        lost.append(asyncio.create_task(led.driver.submit(new("stock", key=str(number)))))
        await turns(3)
    stuck, led.replicas.waiting = led.replicas.waiting, []
    led.replicas.hold = False
    led.follow(None)
    await led.led()
    txn = await asyncio.wait_for(led.driver.submit(new("stock", key="new")), 10)
    await eventually(lambda: led.ledger.get(txn.gid).ended_at is not None)
    led.replicas.waiting = stuck
    led.replicas.lose()
    await asyncio.wait(lost)
    assert all(isinstance(task.exception(), OutcomeUnknown) for task in lost)
    assert led.driver._under_way == 0


async def test_a_seal_whose_leadership_goes_with_its_barrier_was_never_asked_for(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    gid = (await led.driver.submit(replace(new(), active=True))).gid
    led.replicas.hold = True
    seal = asyncio.create_task(led.driver.seal(gid, ("b",)))
    await eventually(lambda: led.replicas.waiting)
    led.say(led.driver._epoch, Enlisted(gid=gid, branch="b", participant="stock"))
    led.replicas.commit()
    led.follow("n2")  # before the seal hears that its barrier has held
    with pytest.raises(NotLeader):
        await asyncio.wait_for(seal, 15)
    led.replicas.hold = False
    await led.led()
    assert Sealed not in {type(entry) for entry in [*led.entries(), *led.proposed()]}


async def test_a_node_that_stops_keeps_nobody_waiting(led: Led) -> None:
    led.follow("n2")
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    led.driver._enqueue(_Waiting(TookOver(node="n1"), 1, future))
    await led.driver.stop()
    assert isinstance(future.exception(), NotLeader)


async def test_a_node_that_stops_takes_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_hand() as led:
        led.replicas.hold = True
        led.lead()
        await eventually(lambda: led.replicas.waiting)
        log = led.replicas.logs["n1"]
        stop = log.stop

        async def late() -> None:
            led.replicas.commit()
            assert led.ledger.leader == "n1", "its claim has come true meanwhile"
            assert not led.driver.leading
            await stop()

        monkeypatch.setattr(log, "stop", late)
        await led.driver.stop()


async def test_a_barrier_that_nobody_knows_about_has_done_nothing(led: Led) -> None:
    led.replicas.hold = True
    barrier = asyncio.create_task(led.driver.barrier())
    await eventually(lambda: led.replicas.waiting)
    led.replicas.lose()
    with pytest.raises(NotLeader, match="nothing was done"):
        await barrier


async def test_an_entry_of_a_deposed_leader_is_fenced(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    task = asyncio.create_task(led.driver.submit(new("stock", key="k")))
    await eventually(lambda: led.replicas.waiting)
    led.say(led.replicas.term + 1, TookOver(node="n2"))
    assert not led.driver.leading, "the log says so, before the node hears of the election"
    led.replicas.commit()
    with pytest.raises(NotLeader):
        await task
    assert len(led.ledger) == 0


async def test_a_barrier_that_is_applied_twice_starts_the_epoch_once(led: Led, scripted: ScriptedParticipant) -> None:
    scripted.rule = hang
    await led.running.register("stock", scripted.url)
    gid = await led.begin("stock")
    await eventually(lambda: scripted.heard)
    led.say(led.replicas.term, TookOver(node="n1"))
    await turns(20)
    assert led.driver.leading
    assert scripted.calls(gid) == ["prepare"]
    again = await led.begin("stock")
    assert again != gid


async def test_an_epoch_that_is_lost_and_regained_gives_no_gid_twice(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    gids = [await led.begin("stock")]
    for _ in range(3):
        led.replicas.lead(None, term=led.replicas.term)
        assert not led.driver.leading
        led.replicas.lead("n1", term=led.replicas.term)
        await eventually(lambda: led.driver.leading)
        gids.append((await led.driver.submit(new("stock"))).gid)
    assert len(set(gids)) == 4
    assert gids == sorted(gids)


async def test_leadership_that_flips_fast(led: Led, scripted: ScriptedParticipant) -> None:
    await led.running.register("stock", scripted.url)
    gids = [await led.begin("stock")]
    for round_ in range(20):
        led.follow("n2" if round_ % 2 else None)
        await turns(round_ % 4)
        led.lead()
        await turns(round_ % 5)
    await eventually(lambda: led.driver.leading)
    gids.append(await led.begin("stock"))
    await eventually(lambda: not led.ledger.unfinished)
    for gid in gids:
        assert led.ledger.get(gid).decision is Decision.COMMIT
    epochs = [entry for entry in led.entries() if isinstance(entry, TookOver)]
    assert len(epochs) <= 22


async def test_the_barrier_is_proposed_until_it_is_taken(null: Participant) -> None:
    async with on_hand() as led:
        led.replicas.hold = True
        led.lead()
        for fate in (led.replicas.refuse, led.replicas.lose, led.replicas.refuse):
            await eventually(lambda: led.replicas.waiting)
            fate()
        await eventually(lambda: led.replicas.waiting)
        assert [type(entry) for entry in led.proposed()] == [TookOver, Raised]
        led.replicas.hold = False
        led.replicas.commit_unheard()
        assert led.driver.leading, "it is applied, whatever its proposer was told"
        await turns(5)
        await led.running.register("stock", null.url)
        gid = await led.begin("stock")
        await eventually(lambda: led.ledger.get(gid).ended_at is not None)
        assert sum(isinstance(entry, TookOver) for entry in led.entries()) == 1


async def test_a_claim_is_not_repeated_for_a_term_that_is_over() -> None:
    async with on_hand() as led:
        led.replicas.hold = True
        led.lead()
        led.replicas.refuse()
        await turns(3)
        led.follow("n2")
        led.replicas.waiting.clear()
        led.replicas.hold = False
        await led.led()
        assert [type(entry) for entry in led.entries()] == [TookOver, Raised]
        await eventually(lambda: not led.driver._timers)
        assert sum(isinstance(entry, TookOver) for entry in led.entries()) == 1


async def test_two_believe_that_they_lead(scripted: ScriptedParticipant) -> None:
    """The deposed one can repeat true decisions, and nothing else."""
    replicas = Replicas(NODES)
    first, second, _ = configs(NODES)
    async with (
        running(first, replicas.logs["n1"], ready=False) as old,
        running(second, replicas.logs["n2"], ready=False) as new_,
    ):
        replicas.lead("n1")
        await eventually(lambda: old.node.driver.leading)
        await old.register("stock", scripted.url)
        await eventually(lambda: "stock" in new_.node.ledger.participants)
        scripted.rule = hang
        gid = (await old.submit("stock", wait="none")).json["gid"]
        await eventually(lambda: scripted.heard)
        replicas.logs["n1"].deaf = True
        replicas.lead("n2", unheard_by=("n1",))
        await eventually(lambda: new_.node.driver.leading)
        assert old.node.driver.leading
        scripted.rule = honest
        scripted.cut()
        await eventually(lambda: new_.node.ledger.get(gid).ended_at is not None)  # type: ignore[union-attr]
        task = asyncio.create_task(old.node.driver.submit(new("stock", key="late")))
        await eventually(lambda: not replicas.waiting)
        replicas.logs["n1"].deaf = False
        replicas.logs["n1"].catch_up()
        assert not old.node.driver.leading
        with pytest.raises(NotLeader):
            await task
        assert len(new_.node.ledger.keys) == len(old.node.ledger.keys) == 0


# ------------------------------------------------------------------------------------------------ proposals that fail


async def test_wishes_are_expressed_until_they_come_true(led: Led, scripted: ScriptedParticipant) -> None:
    await led.running.register("stock", scripted.url)
    gid = await led.begin("stock")
    await eventually(lambda: led.ledger.get(gid).ended_at is not None)
    for fate in (led.replicas.refuse, led.replicas.lose, led.replicas.commit_unheard):
        gid = (await led.driver.submit(new("stock"))).gid
        led.replicas.hold = True
        for kind in (Decided, Ended):
            await eventually(lambda kind=kind: any(isinstance(one, kind) for one in led.proposed()))  # type: ignore[misc]
            fate()
            if fate != led.replicas.commit_unheard:
                await eventually(lambda kind=kind: any(isinstance(one, kind) for one in led.proposed()))  # type: ignore[misc]
                led.replicas.commit()
        led.replicas.hold = False
        led.replicas.commit()
        await eventually(lambda gid=gid: led.ledger.get(gid).ended_at is not None)  # type: ignore[misc]
        assert led.ledger.get(gid).decision is Decision.COMMIT
    await eventually(lambda: not led.driver._timers)


async def test_a_proposal_that_is_refused_was_not_done(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    task = asyncio.create_task(led.driver.submit(new("stock", key="k")))
    await eventually(lambda: led.replicas.waiting)
    led.replicas.refuse()
    with pytest.raises(NotLeader):
        await task
    assert led.driver._beginning == set()
    assert led.driver._perhaps_begun == set()


async def test_a_log_that_fails_otherwise_is_reported(
    led: Led, null: Participant, caplog: pytest.LogCaptureFixture
) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    task = asyncio.create_task(led.driver.submit(new("stock", key="k")))
    await eventually(lambda: led.replicas.waiting)
    led.replicas._fail(RuntimeError("planted"))
    with pytest.raises(OutcomeUnknown):
        await task
    assert "in a way that it does not promise" in caplog.text


async def test_submissions_of_unknown_fate_do_not_fill_the_room_for_ever(null: Participant) -> None:
    async with on_hand(configs(NODES, limits=Limits(max_in_flight=3))[0]) as led:
        await led.led()
        await led.running.register("stock", null.url)
        led.replicas.hold = True
        tasks = [asyncio.create_task(led.driver.submit(new("stock", key=str(n)))) for n in range(3)]
        await eventually(lambda: led.replicas.waiting)
        led.replicas.lose()
        await asyncio.wait(tasks)
        assert led.driver._beginning == set()
        assert len(led.driver._perhaps_begun) == 3
        led.replicas.hold = False
        txn = await led.driver.submit(new("stock", key="3"))
        await eventually(lambda: led.driver._perhaps_begun == set())
        assert Gid.parse(txn.gid).sequence == 3  # type: ignore[union-attr]
        assert await led.driver.outcome(f"test-{led.replicas.term}-1") is Decision.ABORT


async def test_a_client_that_gives_up_does_not_leave_its_place_taken(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    given_up = [asyncio.create_task(led.driver.submit(new("stock", key="same"))) for _ in range(3)]
    await eventually(lambda: led.replicas.waiting)
    for task in given_up:
        task.cancel()
    await asyncio.wait(given_up)
    led.replicas.hold = False
    led.replicas.commit()
    await eventually(lambda: len(led.ledger) == 1 and not led.ledger.unfinished)
    assert led.driver._beginning == set()


async def test_what_may_have_begun_is_not_said_to_be_missing(led: Led, null: Participant) -> None:
    """This leader may have been deposed unawares, and its successor have told the client."""
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    task = asyncio.create_task(led.driver.submit(new("stock", key="k")))
    await eventually(lambda: led.replicas.waiting)
    gid = f"test-{led.replicas.term}-0"
    with pytest.raises(NotKnownYet):
        led.driver.read(gid)
    with pytest.raises(NotKnownYet):
        await led.driver.abort(gid, "a client's wish", 1.0)
    led.replicas.hold = False
    led.replicas.commit()
    assert (await task).gid == gid


# ------------------------------------------------------------------------------------------------ outcomes


async def outcome_of(led: Led, gid: str) -> object:
    try:
        return await led.driver.outcome(gid)
    except (NotKnownYet, NotFound, Gone, NotLeader) as error:
        return type(error)


async def test_outcomes_on_a_leader(led: Led, scripted: ScriptedParticipant) -> None:
    await led.running.register("stock", scripted.url)
    term = led.replicas.term
    committed = await led.begin("stock")
    await eventually(lambda: led.ledger.get(committed).decision is not None)
    scripted.rule = hang
    undecided = await led.begin("stock")
    led.replicas.hold = True
    task = asyncio.create_task(led.driver.submit(new("stock", key="k")))
    await eventually(lambda: led.replicas.waiting)
    beginning = f"test-{term}-2"
    assert await outcome_of(led, committed) is Decision.COMMIT
    assert await outcome_of(led, undecided) is NotKnownYet
    assert await outcome_of(led, beginning) is NotKnownYet
    assert await outcome_of(led, f"test-{term}-3") is NotFound, "never given to anybody"
    assert await outcome_of(led, f"test-{term + 1}-0") is NotKnownYet, "of a leader that this node has not heard of"
    assert await outcome_of(led, f"test-{term - 1}-77") is Decision.ABORT, "its epoch is over"
    assert await outcome_of(led, "other-1-1") is NotFound
    assert await outcome_of(led, "nonsense") is NotFound
    led.replicas.lose()
    await asyncio.wait([task])
    assert isinstance(task.exception(), OutcomeUnknown)
    assert await outcome_of(led, beginning) is NotKnownYet, "it may still come to be"


async def test_a_gid_that_was_refused_is_settled_by_the_question(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    task = asyncio.create_task(led.driver.submit(new("stock", key="k")))
    await eventually(lambda: led.replicas.waiting)
    led.replicas.refuse()
    await asyncio.wait([task])
    assert isinstance(task.exception(), NotLeader)
    led.replicas.hold = False
    gid = f"test-{led.replicas.term}-0"
    assert await outcome_of(led, gid) is Decision.ABORT
    assert led.ledger.get(gid).decision is Decision.ABORT, "logged, so that it never can begin"
    assert await outcome_of(led, gid) is Decision.ABORT
    assert (await led.running.show(gid))["branches"] == []


async def test_a_question_that_cannot_be_settled_is_not_answered(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    task = asyncio.create_task(led.driver.submit(new("stock", key="k")))
    await eventually(lambda: led.replicas.waiting)
    led.replicas.refuse()
    await asyncio.wait([task])
    assert task.exception()
    question = asyncio.create_task(led.driver.outcome(f"test-{led.replicas.term}-0"))
    await eventually(lambda: led.replicas.waiting)
    led.replicas.lose()
    with pytest.raises(OutcomeUnknown):
        await question


async def test_outcomes_on_a_follower(scripted: ScriptedParticipant) -> None:
    async with on_hand() as led:
        led.say(3, TookOver(node="n2"), _registered("stock", scripted.url))
        for number in range(3):
            led.say(3, Begun(gid=f"test-3-{number}", protocol="2pc", branches=new("stock").branches, timeout_ms=10**9))
        led.say(3, Decided(gid="test-3-0", decision=Decision.COMMIT, votes=_votes("stock")))
        led.say(3, Decided(gid="test-3-1", decision=Decision.ABORT, reason="x"))
        assert await outcome_of(led, "test-3-0") is Decision.COMMIT
        assert await outcome_of(led, "test-3-1") is Decision.ABORT
        assert await outcome_of(led, "test-3-2") is NotKnownYet
        assert await outcome_of(led, "test-2-5") is Decision.ABORT, "decisions and ended epochs need no leader"
        assert await outcome_of(led, "test-3-9") is NotLeader
        assert await outcome_of(led, "test-4-0") is NotLeader
        assert await outcome_of(led, "other-1-1") is NotFound
        assert scripted.heard == []


# ------------------------------------------------------------------------------------------------ floors


async def test_floors_only_rise_and_spare_what_is_unfinished(led: Led, scripted: ScriptedParticipant) -> None:
    unfinished: dict[str, set[int]] = {"a": set(), "b": set()}
    floors: dict[str, int] = {}
    wrong: list[str] = []

    def watch(name: str) -> Callable[[Heard], bytes]:
        def rule(heard: Heard) -> bytes:
            for item in heard.items:
                floor = item.get("floor")
                if floor is None:
                    wrong.append(f"{item} without a floor, although it is about an unfinished transaction")
                    continue
                number = Gid.parse(floor).number  # type: ignore[union-attr]
                if number < floors.get(name, -1):
                    wrong.append(f"the floor of {name} fell to {floor}")
                floors[name] = number
                if unfinished[name] and number > min(unfinished[name]):
                    wrong.append(f"the floor of {name} is {floor}, above an unfinished one")
            return honest(heard)

        return rule

    async with ScriptedParticipant(watch("b")) as other:
        scripted.rule = watch("a")
        await led.running.register("a", scripted.url)
        await led.running.register("b", other.url, batch=True)
        stuck: list[str] = []
        for round_ in range(12):
            gid = await led.begin("a", "b")
            number = Gid.parse(gid).number  # type: ignore[union-attr]
            if round_ % 4 == 2:
                # Decided, and held up by one participant alone.
                await led.driver.abort(gid, "test", 5.0)
            unfinished["a"].add(number)
            unfinished["b"].add(number)
            await eventually(lambda gid=gid: led.ledger.get(gid).ended_at is not None)  # type: ignore[misc]
            unfinished["a"].discard(number)
            unfinished["b"].discard(number)
            stuck.append(gid)
        assert wrong == []
        assert floors["a"] > Gid.parse(stuck[9]).number  # type: ignore[union-attr]


async def test_an_unfinished_transaction_holds_the_floor_of_its_participants_only(
    led: Led, scripted: ScriptedParticipant
) -> None:
    async with ScriptedParticipant(on("commit", saying({}))) as slow, ScriptedParticipant() as third:
        await led.running.register("stock", scripted.url)
        await led.running.register("slow", slow.url)
        await led.running.register("third", third.url)
        oldest = await led.begin("stock", "slow")
        await eventually(lambda: led.ledger.get(oldest).decision is not None)
        for _ in range(5):
            assert (await led.running.submit("stock", "third", wait="ended")).json["state"] == "committed"
        assert {heard.body["floor"] for heard in scripted.heard} == {oldest}
        floors = [heard.body["floor"] for heard in third.heard]
        assert oldest not in floors
        assert floors[-1] == third.heard[-1].body["gid"]
        slow.rule = honest
        await eventually(lambda: led.ledger.get(oldest).ended_at is not None)
        gid = (await led.running.submit("stock", wait="ended")).json["gid"]
        assert scripted.heard[-1].body["floor"] == gid


async def test_one_that_does_not_end_costs_no_memory_for_those_behind_it(
    led: Led, scripted: ScriptedParticipant, null: Participant
) -> None:
    scripted.rule = on("commit", saying({}))
    await led.running.register("slow", scripted.url)
    await led.running.register("quick", null.url, batch=True)
    await led.begin("slow", "quick")
    for _ in range(8):
        await asyncio.gather(*(led.driver.submit(new("quick")) for _ in range(200)))
        await eventually(lambda: len(led.ledger.unfinished) == 1)
    assert len(led.driver._floors._naming["quick"]) < 1500


# ------------------------------------------------------------------------------------------------ forgetting


async def test_forgetting_comes_after_the_retention_time_and_in_pieces(
    null: Participant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.housekeeping.FORGET_AT_ONCE", 10)
    clock = FakeClock()
    async with on_hand(configs(NODES, limits=Limits(retention_s=1000))[0], clock) as led:
        await led.led()
        await led.running.register("stock", null.url, batch=True)
        gids = [(await led.driver.submit(new("stock", key=f"k{number}"))).gid for number in range(35)]
        await eventually(lambda: not led.ledger.unfinished)
        clock.pass_s(999)
        await led.driver.submit(new("stock", key="young"))
        await eventually(lambda: not led.ledger.unfinished)
        assert len(led.ledger) == 36
        clock.pass_s(2)
        await eventually(lambda: len(led.ledger) == 1)
        assert len(led.ledger.keys) == 1
        assert "young" in led.ledger.keys
        pieces = [entry for entry in led.entries() if isinstance(entry, Forgotten)]
        assert len(pieces) == 4, "ten at a time, and nothing asked for twice"
        assert [piece.floor for piece in pieces] == sorted({piece.floor for piece in pieces})
        assert await outcome_of(led, gids[0]) is Gone
        assert await outcome_of(led, gids[-1]) is Gone


async def test_below_a_floor_that_a_restore_has_raised_it_goes_in_pieces_too(
    null: Participant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.housekeeping.FORGET_AT_ONCE", 10)
    clock = FakeClock()
    async with on_hand(configs(NODES, limits=Limits(retention_s=1000))[0], clock) as led:
        await led.led()
        await led.running.register("stock", null.url, batch=True)
        await eventually(lambda: led.ledger.level == 2)
        for _ in range(35):
            await led.driver.submit(new("stock"))
        await eventually(lambda: not led.ledger.unfinished)
        led.ledger.floor = floor = 2**60  # as once all is found out that was lost
        clock.pass_s(1001)
        await eventually(lambda: not len(led.ledger))
        pieces = [entry for entry in led.entries() if isinstance(entry, Forgotten)]
        assert len(pieces) == 4
        assert led.ledger.floor == floor


async def test_who_hears_late_of_a_restore_keeps_for_its_clients_what_it_brought() -> None:
    """From a snapshot, in which the range that was lost is closed already."""
    clock = FakeClock()
    async with on_hand(configs(NODES, limits=Limits(retention_s=1000))[0], clock) as led:
        house, state = led.driver._house, led.ledger.fork()
        assert not house._keeps_all()
        state.epoch_base = 200_000
        led.ledger.restore(state.snapshot()())()
        assert house._keeps_all()
        clock.pass_s(999)
        led.ledger.restore(state.snapshot()())()
        assert house._keeps_all()
        clock.pass_s(2)
        assert not house._keeps_all(), "for as long as anything is kept, and no longer"


async def test_what_is_unfinished_is_never_forgotten(scripted: ScriptedParticipant) -> None:
    clock = FakeClock()
    async with on_hand(configs(NODES)[0], clock) as led:
        await led.led()
        await led.running.register("stock", scripted.url)
        scripted.rule = on("commit", saying({}))
        stuck = await led.begin("stock")
        await eventually(lambda: led.ledger.get(stuck).decision is not None)
        scripted.rule = lambda heard: honest(heard) if heard.body["gid"] != stuck else http(200, {})
        for _ in range(3):
            await led.begin("stock")
        await eventually(lambda: len(led.ledger.unfinished) == 1)
        clock.pass_s(10_000)
        await eventually(lambda: len(led.ledger) == 1)
        assert (await led.running.show(stuck))["state"] == "committing"
        scripted.rule = honest
        await eventually(lambda: led.ledger.get(stuck).ended_at is not None)


async def test_while_the_log_is_slow_forgetting_is_asked_for_once(null: Participant) -> None:
    clock = FakeClock()
    async with on_hand(configs(NODES)[0], clock) as led:
        await led.led()
        await led.running.register("stock", null.url)
        await led.begin("stock")
        await eventually(lambda: not led.ledger.unfinished)
        led.replicas.hold = True
        clock.pass_s(10_000)
        await eventually(led.proposed)
        housekeeper = led.driver._housekeeper
        for _ in range(3):
            await eventually(lambda before=housekeeper: led.driver._housekeeper is not before)  # type: ignore[misc]
            housekeeper = led.driver._housekeeper
        assert len(led.proposed()) == 1
        led.replicas.refuse()
        await eventually(led.proposed)
        led.replicas.commit()
        assert len(led.ledger) == 0


# ------------------------------------------------------------------------------------------------ group commit


async def test_what_waits_becomes_few_commands(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url, batch=True)
    led.replicas.hold = True
    before = led.replicas.proposed
    tasks = [asyncio.create_task(led.driver.submit(new("stock"))) for _ in range(500)]
    await eventually(lambda: led.replicas.waiting)
    await turns(10)
    assert led.replicas.proposed == before + 1, "all that waited in one turn is one command"
    assert len(led.proposed()) == 500
    led.replicas.hold = False
    led.replicas.commit()
    await asyncio.gather(*tasks)
    await eventually(lambda: not led.ledger.unfinished)
    assert led.replicas.proposed - before < 60, "1500 entries"


async def test_a_branch_that_has_just_been_enlisted_counts_once(null: Participant) -> None:
    async with on_hand(configs(NODES, limits=Limits(max_branches=2))[0]) as led:
        await led.led()
        await led.running.register("stock", null.url)
        gid = (await led.driver.submit(replace(new(), active=True))).gid
        led.replicas.hold = True
        first = asyncio.create_task(led.driver.enlist(gid, "a", "stock"))
        await eventually(lambda: led.replicas.waiting)
        led.replicas.hold = False
        led.replicas.commit()
        assert len(led.ledger.get(gid).branches) == 1
        assert not first.done(), "it is applied, and whoever asked for it has had no turn yet"
        second = asyncio.create_task(led.driver.enlist(gid, "b", "stock"))
        assert len((await second).branches) == 2
        await first
        with pytest.raises(Unprocessable, match="max_branches"):
            await led.driver.enlist(gid, "c", "stock")
        assert led.driver._enlisting == {}


async def test_a_command_waits_for_what_comes_turn_by_turn_but_not_for_ever(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    before = led.replicas.proposed
    tasks = []
    for _ in range(3 * TURNS_FOR_COMPANY):
        tasks.append(asyncio.create_task(led.driver.submit(new("stock"))))
        await turns(1)
    assert led.replicas.proposed == before + 1, "it left although there was more each time"
    count = len(led.proposed())
    assert TURNS_FOR_COMPANY <= count <= TURNS_FOR_COMPANY + 2
    led.replicas.hold = False
    led.replicas.commit()
    await asyncio.gather(*tasks)


async def test_no_more_commands_are_under_way_than_allowed(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    led.replicas.hold = True
    tasks = []
    for _ in range(20):
        tasks.append(asyncio.create_task(led.driver.submit(new("stock"))))
        await turns(TURNS_FOR_COMPANY)
    assert len(led.replicas.waiting) == COMMANDS_UNDER_WAY
    led.replicas.commit(1)
    await eventually(lambda: len(led.replicas.waiting) == COMMANDS_UNDER_WAY)
    assert len(decode_command(led.replicas.waiting[-1].command)[1]) >= 20 - COMMANDS_UNDER_WAY
    led.replicas.hold = False
    led.replicas.commit()
    await asyncio.gather(*tasks)


async def test_commands_are_bounded_in_size_and_one_large_entry_still_goes(null: Participant) -> None:
    limits = Limits(
        max_command_bytes=20_000, max_body_bytes=20_000, max_payload_bytes=600, max_answer_bytes=600, max_branches=32
    )
    async with on_hand(configs(NODES, limits=limits)[0]) as led:
        await led.led()
        await led.running.register("stock", null.url)
        large = NewTransaction(
            protocol="2pc",
            branches=tuple(BranchPlan(name=f"b{n}", participant="stock", payload=b"7" * 700) for n in range(32)),
            timeout_ms=10_000,
            key=None,
            body_hash=None,
        )
        led.replicas.hold = True
        tasks = [asyncio.create_task(led.driver.submit(large)) for _ in range(3)]
        for _ in range(3):
            await eventually(lambda: led.replicas.waiting)
            assert [len(decode_command(one.command)[1]) for one in led.replicas.waiting] == [1] * len(
                led.replicas.waiting
            )
            led.replicas.commit(1)
        led.replicas.hold = False
        led.replicas.commit()
        await asyncio.gather(*tasks)
        await eventually(lambda: not led.ledger.unfinished)


async def test_the_end_travels_with_company_and_not_for_ever_alone(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    await led.begin("stock")
    await eventually(lambda: not led.ledger.unfinished)
    assert led.driver._lazy == []
    assert led.driver._lazy_timer is None


async def test_who_waits_for_the_end_does_not_wait_for_company(
    led: Led, null: Participant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.driver.ENDED_WAITS_S", 1000.0)
    await led.running.register("stock", null.url)
    assert (await led.running.submit("stock", wait="ended")).json["state"] == "committed"
    gid = await led.begin("stock")
    await eventually(lambda: led.driver._lazy)
    reply = await led.running.call("GET", f"/v1/transactions/{gid}?wait=ended")
    assert (reply.status, reply.json["state"]) == (200, "committed")
    assert not led.driver._timers


# ------------------------------------------------------------------------------------------------ nothing is left


async def test_nothing_is_kept_per_transaction(led: Led, null: Participant) -> None:
    await led.running.register("stock", null.url)
    await led.running.register("money", null.url, batch=True)
    for _ in range(3):
        await asyncio.gather(*(led.running.submit("stock", "money", wait="ended") for _ in range(40)))
    driver = led.driver
    await eventually(lambda: not driver._timers)
    assert driver._running == {}
    assert driver._beginning == driver._perhaps_begun == set()
    assert driver._undecided == 0
    assert driver._decided_waiters == driver._ended_waiters == {}
    assert len(driver._deadlines) == 0
    assert len(driver._deadlines._heap) <= 70
    assert not driver._outbox
    assert not driver._lazy
    assert all(len(numbers) <= 120 for numbers in driver._floors._naming.values())
    assert (await led.running.call("DELETE", "/v1/participants/stock")).status == 204
    assert "stock" not in driver._floors._naming
    assert "stock" not in driver.lanes()


async def test_stopping_in_the_middle_of_everything(scripted: ScriptedParticipant) -> None:
    scripted.rule = hang
    async with on_hand() as led:
        await led.led()
        await led.running.register("stock", scripted.url)
        gone = ScriptedParticipant()
        await led.running.register("gone", gone.url)
        for _ in range(3):
            await led.begin("stock", "gone")
        await eventually(lambda: led.driver.lanes()["gone"].down)
        led.replicas.hold = True
        task = asyncio.create_task(led.driver.submit(new("stock")))
        await eventually(lambda: led.replicas.waiting)
        await led.driver.stop()
        led.replicas.lose()
        await asyncio.wait([task])
        assert isinstance(task.exception(), OutcomeUnknown)
        assert not led.driver._timers
        assert led.driver._deadlines._timer is None
        assert led.driver._housekeeper.cancelled()
        proposed = led.replicas.proposed
        await turns(50)
        assert led.replicas.proposed == proposed


async def test_a_stopped_node_claims_nothing() -> None:
    async with on_hand() as led:
        led.replicas.hold = True
        led.lead()
        await led.driver.stop()
        led.replicas.refuse()
        await turns(5)
        assert not led.driver._timers
        led.driver._leadership(Leadership(term=9, leader="n1", is_leader=True))
        assert led.replicas.waiting == []


async def test_leadership_is_handed_over_on_the_way_out(null: Participant) -> None:
    async with on_hand() as led:
        await led.led()
        led.replicas.successor = "n2"
        await led.driver.drain()
        assert not led.driver.leading
        assert led.replicas.logs["n1"].leadership().leader == "n2"


async def test_waiters_on_leadership_are_woken_and_leave_nothing(led: Led) -> None:
    waiting = [asyncio.create_task(led.driver.leadership_changed(100)) for _ in range(5)]
    given_up = asyncio.create_task(led.driver.leadership_changed(100))
    await turns()
    given_up.cancel()
    await asyncio.wait([given_up])
    led.follow("n2")
    await asyncio.gather(*waiting)
    assert not led.driver._leadership_waiters
    await led.driver.leadership_changed(0.001)
    assert not led.driver._leadership_waiters


async def test_a_refused_proposal_is_an_error_of_the_log_alone() -> None:
    """What the fake log promises is what the driver relies on."""
    replicas = Replicas(("n1",))
    future = replicas.logs["n1"].propose(b"")
    with pytest.raises(NotProposed):
        await future


async def test_who_waits_is_told_when_a_snapshot_passes_the_decision_by() -> None:
    """A follower that was far behind jumps over the entries that would have answered."""
    async with running() as far:
        ahead = far.node.ledger
        header = Header(epoch=5, at=1)
        behind = Ledger(ahead.cluster)
        for entries in (
            [TookOver(node="n2"), Registered(name="a", url="http://a", batch=False)],
            [_begun_of(ahead.cluster, 5, number) for number in (1, 2, 3)],
        ):
            ahead.apply(encode_command(header, entries))
            behind.apply(encode_command(header, entries))
        gids = [str(Gid(ahead.cluster, 5, number)) for number in (1, 2, 3)]
        decided = Decided(
            gid=gids[0], decision=Decision.COMMIT, votes=(BranchVote(branch="a", vote=VoteKind.PREPARED),)
        )
        behind.apply(encode_command(header, [decided, Decided(gid=gids[1], decision=Decision.ABORT)]))
        driver = far.node.driver
        waiting = [asyncio.create_task(driver.wait_decided(gid, 60.0)) for gid in gids]
        ending = asyncio.create_task(driver.wait_ended(gids[1], 60.0))
        await turns(3)
        assert not any(task.done() for task in (*waiting, ending))
        ahead.restore(behind.snapshot()())()
        await turns(3)
        assert [task.done() for task in waiting] == [True, True, False]
        assert not driver.leading
        for task in (*waiting, ending):
            task.cancel()


def _begun_of(cluster: str, epoch: int, sequence: int) -> Begun:
    plan = BranchPlan(name="a", participant="a", payload=b"{}")
    return Begun(
        gid=str(Gid(cluster, epoch, sequence)),
        protocol="2pc",
        branches=(plan,),
        timeout_ms=60_000,
        key=None,
        body_hash=b"x",
    )
