"""Without a majority nothing is decided, whoever asks; with it everything is finished."""

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import pytest

from cluster.calls import Answer
from cluster.tap import Hold, is_prepare
from tests.integration.shop_world import APART, ShopWorld
from tests.integration.world import Told, eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

PROMISED_S: Final = 3.0
"""Until a node says that it cannot."""

SLACK_S: Final = 3.0
"""For a machine that is busy with other things."""


async def all_but_one_vote(world: ShopWorld) -> tuple["asyncio.Task[Told]", str, Hold]:
    """A checkout, its gid, and what holds its last vote."""
    await world.settled()
    hold = world.taps["orders"].hold(is_prepare)
    order, branches = world.checkout(APART, APART)
    asking = asyncio.create_task(world.ask(order, branches, timeout_s=120.0, within_s=120.0))
    (message, *_) = await hold.wait()
    for name in ("inventory", "payments"):
        await eventually(
            lambda name=name: (message.gid, name) in world.taps[name].prepared_now(), f"the vote of {name}"
        )
    return asking, message.gid, hold


async def nothing_can_be_decided(world: ShopWorld, node: str, gid: str) -> None:
    """The only node that is left says so, soon, to everybody; and the branches stay as they are."""
    url = world.cluster.url(node)
    order, branches = world.checkout("sku-1", "account-1")
    # It may yet come to be: not knowing is an answer, too.
    world.requests.append(Told(key=order, branches=branches, timeout_s=world.timeout_s))
    body = {"branches": branches}

    async def refused(asked: Coroutine[Any, Any, Answer]) -> None:
        began_s = time.monotonic()
        answer = await asked
        took_s = time.monotonic() - began_s
        assert answer.status == 503, answer
        assert answer.retry_after_s is not None
        assert answer.body["code"] in ("no_leader", "unknown", "not_known_yet"), answer
        assert took_s < PROMISED_S + SLACK_S, (took_s, answer)

    await asyncio.gather(
        refused(world.post(f"{url}/v1/transactions", body, within_s=30)),
        refused(world.post(f"{url}/v1/transactions", body, within_s=30, key=order)),
        refused(world.get(f"{url}/v1/outcomes/{gid}", within_s=30)),
    )
    # By now it knows that it does not know.
    await asyncio.gather(
        refused(world.post(f"{url}/v1/transactions", body, within_s=30, key=order)),
        refused(world.get(f"{url}/v1/transactions/{gid}", within_s=30)),
        refused(world.get(f"{url}/v1/transactions/{gid}?wait=decided&timeout_s=60", within_s=30)),
        refused(world.get(f"{url}/v1/outcomes/{gid}", within_s=30)),
        refused(world.get(f"{url}/readyz", within_s=30)),
    )
    assert (await world.get(f"{url}/healthz")).status == 200
    for name in ("inventory", "payments"):
        assert gid in await world.prepared(name)


@pytest.mark.parametrize("leader_survives", [True, False], ids=["its leader is left", "a follower is left"])
async def test_two_of_three_nodes_are_killed(tmp_path: Path, leader_survives: bool) -> None:
    async with ShopWorld(tmp_path, seed=7) as world:
        async with world.load(clients=2):
            await world.told(10)
        leader = await world.cluster.wait_for_leader()
        followers = [node for node in world.cluster.nodes if node != leader.node]
        asking, gid, hold = await all_but_one_vote(world)
        left = leader.node if leader_survives else followers[0]
        dead = [node for node in world.cluster.nodes if node != left]
        await world.kill_at_once(dead)
        # The last vote arrives, if there is anybody left to hear it.
        hold.release()
        await nothing_can_be_decided(world, left, gid)
        if not leader_survives:
            # Nobody took it: that it was not done is certain, as the commit below shows.
            answer = await world.post(f"{world.cluster.url(left)}/v1/transactions/{gid}/abort", {})
            assert (answer.status, answer.body["code"]) == (503, "no_leader")
        assert not asking.done()
        await world.cluster.start_node(dead[0])
        told = await asking
        assert (told.decision, told.gid) == ("commit", gid), (told.reason, told.tries)
        await world.cluster.start_node(dead[1])
        async with world.load(clients=2):
            await world.told(10)
        await world.verify()


async def test_two_of_three_nodes_are_silent(tmp_path: Path) -> None:
    """No leader, although no connection is broken and nobody refuses one."""
    async with ShopWorld(tmp_path, seed=8) as world:
        leader = await world.cluster.wait_for_leader()
        left, other = (node for node in world.cluster.nodes if node != leader.node)
        asking, gid, hold = await all_but_one_vote(world)
        for node in (leader.node, other):
            assert world.cluster.pause(node)
        hold.release()
        await nothing_can_be_decided(world, left, gid)
        assert not asking.done()
        assert world.cluster.resume(other)
        told = await asking
        assert (told.decision, told.gid) == ("commit", gid), (told.reason, told.tries)
        assert world.cluster.resume(leader.node)
        await world.verify()
