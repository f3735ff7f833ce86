"""A request that a follower passes on: to whom, with what, and what its client is told when the leader is silent."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from coordinator import relay
from participants.server import Participant
from tests.support.logs import Replicas
from tests.support.nodes import Reply, RunningNode, configs, running
from tests.support.waiting import eventually, turns

NODES = ("n1", "n2", "n3")
TOKEN = "a-token-of-enough-length"
BODY = {"branches": [{"participant": "stock"}], "timeout_s": 60}
PATIENCE_S = 0.3


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody leads for longer than a test would like to wait."""
    assert relay.LEADER_PATIENCE_S + 0.5 <= 3.0, "503 within 3 s"
    monkeypatch.setattr("coordinator.relay.LEADER_PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr("coordinator.relay.PASSED_ON_PATIENCE_S", 0.05)


class Leader:
    """Listens where the leader should; takes every request, and does with it what a test says."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer: bytes | None = None
        """None: nothing, ever."""
        self.hang_up = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.asked.set()
            if self.answer is not None:
                writer.write(self.answer)
                await writer.drain()
            await self.hang_up.wait()
        finally:
            writer.close()


@pytest.fixture
def replicas() -> Replicas:
    return Replicas(nodes=("n1", "n2"))


@pytest.fixture
def leader() -> Leader:
    return Leader()


@pytest.fixture
async def follower(replicas: Replicas, leader: Leader) -> AsyncIterator[RunningNode]:
    """n1, which believes that n2 leads; in n2's place listens `leader`."""
    one, two, _ = configs(("n1", "n2", "n3"))
    port = int(two.me.api.rpartition(":")[2])
    server = await asyncio.start_server(leader.serve, "127.0.0.1", port)
    async with running(one, replicas.logs["n1"], ready=False) as node:
        replicas.lead("n2")
        yield node
        leader.hang_up.set()
        server.close()
        await server.wait_closed()


async def asked_when_nobody_leads_any_more(
    follower: RunningNode, replicas: Replicas, leader: Leader, method: str, path: str, body: object = None
) -> Reply:
    asking = asyncio.create_task(follower.call(method, path, body))
    await leader.asked.wait()
    replicas.lead(None)
    return await asking


async def test_a_leader_that_took_it_and_fell_silent_may_have_done_it(
    follower: RunningNode, replicas: Replicas, leader: Leader
) -> None:
    # The transaction itself may take a minute, which this test does not.
    reply = await asked_when_nobody_leads_any_more(follower, replicas, leader, "POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "unknown")


async def test_a_leader_that_took_it_and_died_may_have_done_it(
    follower: RunningNode, replicas: Replicas, leader: Leader
) -> None:
    leader.hang_up.set()
    reply = await asked_when_nobody_leads_any_more(follower, replicas, leader, "POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "unknown")


@pytest.mark.parametrize("code", [b"shutting_down", b"too_many_connections"])
async def test_a_leader_that_says_that_it_has_not_begun_has_not_done_it(
    follower: RunningNode, replicas: Replicas, leader: Leader, code: bytes
) -> None:
    leader.answer = b"HTTP/1.1 503 No\r\nOutlast-Code: %s\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n" % code
    reply = await asked_when_nobody_leads_any_more(follower, replicas, leader, "POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "no_leader")


async def test_a_leader_that_was_never_reached_has_not_done_it(follower: RunningNode, replicas: Replicas) -> None:
    replicas.lead("n3")  # where nobody listens
    reply = await follower.call("POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "no_leader")


async def test_what_changes_nothing_was_not_done(follower: RunningNode, replicas: Replicas, leader: Leader) -> None:
    reply = await asked_when_nobody_leads_any_more(follower, replicas, leader, "GET", "/v1/transactions/test-1-0")
    assert (reply.status, reply.code) == (503, "no_leader")


async def test_a_silent_leader_is_waited_for_while_it_leads(
    follower: RunningNode, replicas: Replicas, leader: Leader
) -> None:
    asking = asyncio.create_task(follower.call("POST", "/v1/transactions", BODY))
    await leader.asked.wait()
    done, _ = await asyncio.wait({asking}, timeout=PATIENCE_S * 2)
    assert not done
    replicas.lead("n1")
    reply = await asking
    assert (reply.status, reply.code) == (422, "unknown_participant"), "n1 leads, and has answered by itself"


# ------------------------------------------------------------------------------------------------ real nodes


@asynccontextmanager
async def cluster(*, token: str | None = None) -> AsyncIterator[tuple[Replicas, list[RunningNode]]]:
    """Three nodes on one log; n1 leads."""
    replicas = Replicas(NODES)
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(running(config, replicas.logs[config.node], ready=False))
            for config in configs(NODES, token=token)
        ]
        replicas.lead("n1")
        await eventually(lambda: nodes[0].node.driver.leading)
        yield replicas, nodes


async def test_every_node_answers_every_call(null: Participant) -> None:
    async with cluster() as (_, (leader, follower, third)):
        await follower.register("stock", null.url)
        reply = await follower.submit("stock", key="k", wait="ended")
        assert (reply.status, reply.json["state"]) == (200, "committed")
        assert reply.headers["Outlast-Leader"] == leader.url
        gid = reply.json["gid"]
        await eventually(lambda: all(node.node.ledger.get(gid) is not None for node in (follower, third)))
        for path in (
            f"/v1/transactions/{gid}",
            "/v1/transactions?limit=5&state=committed",
            "/v1/participants",
            "/v1/participants/stock",
            f"/v1/outcomes/{gid}",
        ):
            answers = [await node.call("GET", path) for node in (leader, follower, third)]
            assert [answer.status for answer in answers] == [200] * 3, path
            assert answers[0].json == answers[1].json == answers[2].json, path
        assert (await third.call("POST", f"/v1/transactions/{gid}/abort")).json["decision"] == "commit"
        again = await third.submit("stock", key="k", wait="ended")
        assert again.json["gid"] == gid, "the key came through"
        assert (await third.call("DELETE", "/v1/participants/stock")).status == 204
        reply = await third.call("GET", "/v1/participants/stock")
        assert (reply.status, reply.code) == (404, "not_found")


async def test_decided_transactions_need_no_leader(null: Participant) -> None:
    async with cluster() as (replicas, (leader, follower, _)):
        await leader.register("stock", null.url)
        gid = (await leader.submit("stock", wait="ended")).json["gid"]
        replicas.lead(None)
        assert (await follower.call("GET", f"/v1/transactions/{gid}")).json["state"] == "committed"
        assert (await follower.call("GET", f"/v1/outcomes/{gid}")).json == {"outcome": "committed"}


async def test_the_leaders_errors_come_through_as_they_are() -> None:
    async with cluster() as (_, (_, follower, _)):
        reply = await follower.submit("ghost")
        assert (reply.status, reply.code) == (422, "unknown_participant")
        assert reply.headers["Outlast-Code"] == "unknown_participant"
        reply = await follower.call("GET", "/v1/transactions/test-1-99")
        assert (reply.status, reply.code) == (404, "not_found")
        reply = await follower.call("GET", "/v1/transactions?after=%74est-1-5&state=lost")
        assert (reply.status, reply.code) == (422, "invalid")


async def test_the_token_is_passed_on_and_checked_at_every_node(null: Participant) -> None:
    async with cluster(token=TOKEN) as (_, (_, follower, _)):
        await follower.register("stock", null.url)
        assert (await follower.submit("stock")).json["decision"] == "commit"
        follower.headers = {}
        reply = await follower.submit("stock")
        assert (reply.status, reply.code) == (401, "unauthorized")


async def test_a_request_is_passed_on_once_whoever_is_thought_to_lead() -> None:
    async with cluster() as (replicas, nodes):
        # Each takes the next one for the leader, and nobody leads.
        replicas.lead(None)
        for log, leader in zip(replicas.logs.values(), ("n2", "n3", "n1"), strict=True):
            log.tell(type(log.view)(term=9, leader=leader, is_leader=False))
        for node in nodes:
            reply = await node.call("GET", "/v1/participants")
            assert (reply.status, reply.code) == (503, "no_leader")
            assert reply.headers["Retry-After"] == "1"


async def commits_and_dies(replicas: Replicas, successor: str) -> None:
    """What n1 proposes is held until now: it is committed, and n1 dies before it can say so."""
    await eventually(lambda: replicas.waiting)
    replicas.logs["n1"].deaf = True
    replicas.hold = False
    replicas.commit_unheard()
    replicas.lead(successor)


async def test_when_the_leader_dies_the_next_one_is_asked(null: Participant) -> None:
    async with cluster() as (replicas, (leader, follower, third)):
        await leader.register("stock", null.url)
        replicas.hold = True
        asking = asyncio.create_task(follower.submit("stock", key="k"))
        await commits_and_dies(replicas, successor="n3")
        reply = await asking
        assert (reply.status, reply.json["decision"]) == (200, "commit")
        assert reply.headers["Outlast-Leader"] == third.url
        assert len(third.node.ledger) == 1


@pytest.mark.parametrize(
    ("path", "body", "decision"), [("/v1/transactions", BODY, "commit"), ("/v1/transactions/begin", {}, None)]
)
async def test_what_a_dead_leader_has_begun_is_found_again_without_a_key_of_the_client(
    path: str, body: object, decision: str | None, null: Participant
) -> None:
    async with cluster() as (replicas, (leader, follower, _)):
        await leader.register("stock", null.url)
        replicas.hold = True
        asking = asyncio.create_task(follower.call("POST", path, body))
        await commits_and_dies(replicas, successor="n2")
        reply = await asking
        assert (reply.status, reply.json["decision"]) == (200, decision)
        assert "Outlast-Leader" not in reply.headers, "it is the leader itself by now"
        assert reply.json["gid"].startswith("test-1-")
        assert len(follower.node.ledger) == 1


async def test_when_this_node_becomes_the_leader_it_does_the_work_itself(null: Participant) -> None:
    async with cluster() as (replicas, (leader, follower, _)):
        await leader.register("stock", null.url)
        replicas.hold = True
        asking = asyncio.create_task(follower.submit("stock"))
        await eventually(lambda: replicas.waiting)
        replicas.hold = False
        replicas.lead("n2")
        replicas.lose()
        reply = await asking
        assert (reply.status, reply.json["decision"]) == (200, "commit")
        assert "Outlast-Leader" not in reply.headers
        assert reply.json["gid"].startswith("test-2-")


async def test_a_request_without_a_leader_waits_for_one(null: Participant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.relay.LEADER_PATIENCE_S", 100.0)
    async with cluster() as (replicas, (leader, follower, _)):
        await leader.register("stock", null.url)
        replicas.lead(None)
        asking = [asyncio.create_task(node.submit("stock")) for node in (leader, follower)]
        await turns(50)
        assert not any(task.done() for task in asking)
        replicas.lead("n3")
        assert {reply.json["decision"] for reply in await asyncio.gather(*asking)} == {"commit"}


async def test_the_wait_is_passed_on(null: Participant) -> None:
    async with cluster() as (_, (leader, follower, _)):
        await leader.register("gone", "http://127.0.0.1:9")
        reply = await follower.call(
            "POST", "/v1/transactions", {"branches": [{"participant": "gone"}]}, headers={"Outlast-Wait-Ms": "5"}
        )
        assert reply.status == 202
        gid = reply.json["gid"]
        reply = await follower.call("GET", f"/v1/transactions/{gid}?wait=ended", headers={"Outlast-Wait-Ms": "5"})
        assert (reply.status, reply.json["decision"]) == (202, None)
        reply = await follower.call("POST", f"/v1/transactions/{gid}/abort")
        assert (reply.status, reply.json["decision"]) == (200, "abort")


async def test_a_whole_url_in_the_request_line_is_passed_on_as_a_path() -> None:
    async with cluster() as (_, (_, follower, _)):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(follower.url.rpartition(":")[2]))
        writer.write(b"GET http://elsewhere.invalid/v1/participants HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"participants": []}


async def test_who_waits_here_leaves_nothing_behind(replicas: Replicas, follower: RunningNode, leader: Leader) -> None:
    asking = [asyncio.create_task(follower.call("POST", "/v1/transactions", BODY)) for _ in range(20)]
    driver = follower.node.driver
    await eventually(lambda: len(driver._leadership_waiters) == 20)
    replicas.lead("n1")
    for reply in await asyncio.gather(*asking):
        assert reply.code == "unknown_participant"
    assert not driver._leadership_waiters
