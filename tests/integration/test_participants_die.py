"""A participant is killed with -9: what it voted for survives it, and nobody else waits for it."""

import asyncio
from pathlib import Path

import pytest

from cluster.ports import HOST, free_ports
from cluster.process import arguments
from cluster.service import Service
from tests.integration.shop_world import APART, ShopWorld, decision_of
from tests.integration.world import eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

MAIL = "mail"
"""A participant that the audits know nothing of; some checkouts name it besides."""


class ShopWithMail(ShopWorld):
    """A fourth service, which holds nothing."""

    def lay_out(self) -> None:
        super().lay_out()
        (port,) = free_ports(1)
        words = arguments("null", "--port", port)
        for url in self.cluster.urls:
            words += ("--coordinator", url)
        self.services[MAIL] = Service(
            MAIL, module="participants", arguments=words, url=f"http://{HOST}:{port}", folder=self.folder / MAIL
        )


async def owed(world: ShopWorld, name: str) -> int:
    leader = await world.cluster.wait_for_leader()
    answer = await world.get(f"{leader.url}/v1/participants/{name}")
    assert answer.status == 200, answer
    return int(answer.body["owed"])


async def test_one_killed_after_its_vote_asks_for_the_outcome(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=4) as world:
        async with world.load(clients=3):
            await world.told(10)
            tap = world.taps["payments"]
            order, branches = world.checkout(APART, APART)
            # It never hears of this decision from the coordinator: it has to ask.
            hold = tap.hold(decision_of(world, order))
            told = await world.ask(order, branches)
            await hold.wait()
            assert told.decision == "commit"
            assert told.gid in await world.prepared("payments")
            await world.kill_service("payments")
            await world.start_service("payments")

            async def resolved() -> bool:
                return told.gid not in await world.prepared("payments")

            await eventually(resolved, "the branch in doubt is resolved")
            assert (told.gid, "payments") in tap.prepared_now(), "it was told, and did not have to ask"
            hold.release()
            await world.told(10)
        await world.verify()


async def test_one_killed_after_its_vote_is_told_when_it_is_back(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=5) as world:
        async with world.load(clients=3):
            await world.told(10)
            order, branches = world.checkout(APART, APART)
            hold = world.taps["payments"].hold(decision_of(world, order))
            told = await world.ask(order, branches)
            await hold.wait()
            assert told.decision == "commit"
            assert told.gid in await world.prepared("payments")
            await world.kill_service("payments")
            hold.drop()
            # Neither its own leader's death nor a new one makes it forget.
            leader = await world.cluster.wait_for_leader()
            await world.cluster.kill(leader.node)
            await world.new_leader(leader)
            assert await owed(world, "payments") > 0
            await world.start_service("payments")

            async def quiet() -> bool:
                return told.gid not in await world.prepared("payments")

            await eventually(quiet, "the branch is finished")
            await world.cluster.start_node(leader.node)
            await world.told(10)
        await world.verify()


async def test_one_that_stays_down_delays_nobody_else(tmp_path: Path) -> None:
    async with ShopWithMail(tmp_path, seed=6) as world:
        await world.kill_service(MAIL)
        # Each has goods and an account of its own, so that its locks are in nobody's way.
        waiting = []
        for number in range(20):
            order, branches = world.checkout(f"apart-{number}", f"apart-{number}")
            branches.append({"participant": MAIL, "payload": {}})
            waiting.append(asyncio.create_task(world.ask(order, branches, timeout_s=120.0, within_s=120.0)))
        await eventually(lambda: len(world.taps["orders"].prepared_now()) == 20, "all but one have voted")
        async with world.load(clients=8):
            await world.told(200)
            # Order, not time: two hundred came and went while these twenty waited.
            assert not any(task.done() for task in waiting)
            # A new leader takes over the waiting ones, and is not held up by them either.
            leader = await world.cluster.wait_for_leader()
            await world.cluster.kill(leader.node)
            await world.told(200)
            assert not any(task.done() for task in waiting)
            await world.start_service(MAIL)
            done = await asyncio.gather(*waiting)
            assert {told.decision for told in done} == {"commit"}
            await world.cluster.start_node(leader.node)
        await world.verify()
