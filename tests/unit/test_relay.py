"""A request that a follower passes on: what its client is told when the leader does not answer."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from coordinator.relay import LEADER_PATIENCE_S
from tests.support.logs import Replicas
from tests.support.nodes import Reply, RunningNode, configs, running

BODY = {"branches": [{"participant": "stock"}], "timeout_s": 60}


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
) -> tuple[Reply, float]:
    """The answer, and how long after the leader's end it came."""
    asking = asyncio.create_task(follower.call(method, path, body))
    await leader.asked.wait()
    replicas.lead(None)
    began_s = time.monotonic()
    return await asking, time.monotonic() - began_s


async def test_a_leader_that_took_it_and_fell_silent_may_have_done_it(
    follower: RunningNode, replicas: Replicas, leader: Leader
) -> None:
    reply, took_s = await asked_when_nobody_leads_any_more(follower, replicas, leader, "POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "unknown")
    # Far from the minute that the transaction itself may take.
    assert LEADER_PATIENCE_S * 0.8 < took_s < 20


async def test_a_leader_that_took_it_and_died_may_have_done_it(
    follower: RunningNode, replicas: Replicas, leader: Leader
) -> None:
    leader.hang_up.set()
    reply, _ = await asked_when_nobody_leads_any_more(follower, replicas, leader, "POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "unknown")


async def test_a_leader_that_says_that_it_is_none_has_not_done_it(
    follower: RunningNode, replicas: Replicas, leader: Leader
) -> None:
    leader.answer = b"HTTP/1.1 503 No\r\nOutlast-Code: shutting_down\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
    reply, _ = await asked_when_nobody_leads_any_more(follower, replicas, leader, "POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "no_leader")


async def test_a_leader_that_was_never_reached_has_not_done_it(follower: RunningNode, replicas: Replicas) -> None:
    replicas.lead("n3")  # where nobody listens
    reply = await follower.call("POST", "/v1/transactions", BODY)
    assert (reply.status, reply.code) == (503, "no_leader")


async def test_what_changes_nothing_was_not_done(follower: RunningNode, replicas: Replicas, leader: Leader) -> None:
    reply, _ = await asked_when_nobody_leads_any_more(follower, replicas, leader, "GET", "/v1/transactions/test-1-0")
    assert (reply.status, reply.code) == (503, "no_leader")


async def test_a_silent_leader_is_waited_for_while_it_leads(
    follower: RunningNode, replicas: Replicas, leader: Leader
) -> None:
    asking = asyncio.create_task(follower.call("POST", "/v1/transactions", BODY))
    await leader.asked.wait()
    done, _ = await asyncio.wait({asking}, timeout=LEADER_PATIENCE_S * 1.5)
    assert not done
    replicas.lead("n1")
    reply = await asking
    assert (reply.status, reply.code) == (422, "unknown_participant"), "n1 leads, and has answered by itself"
