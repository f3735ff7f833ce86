"""Nodes are killed, paused and stopped while clients keep asking: everybody gets an answer, and the right one."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.integration.shop_world import ShopWorld

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


async def test_all_nodes_are_killed_at_once(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=9) as world:
        async with world.load():
            await world.told(50)
            await world.kill_at_once(world.cluster.nodes)
            for node in world.cluster.nodes:
                await world.cluster.start_node(node)
            await world.told(50)
        await world.verify()


async def test_the_leader_is_paused_for_ten_seconds(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=10) as world:
        async with world.load():
            await world.told(50)
            paused = await world.cluster.wait_for_leader()
            assert world.cluster.pause(paused.node)
            pause = asyncio.create_task(asyncio.sleep(10.0))
            leader = await world.new_leader(paused)
            # The others go on meanwhile: hundreds of times while one stands still.
            await world.told(100)
            await pause
            assert world.cluster.resume(paused.node)
            await world.told(100)
            assert (await world.cluster.wait_for_leader()).epoch >= leader.epoch
        await world.verify()


async def test_the_leader_is_asked_to_stop(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=11) as world:
        async with world.load(sdk=True):
            await world.told(50)
            leader = await world.cluster.wait_for_leader()
            assert await world.cluster.stop_node(leader.node), "it had to be killed"
            assert "leadership handed over" in world.cluster.process(leader.node).log_tail(50)
            await world.told(50)
            await world.cluster.start_node(leader.node)
            await world.told(50)
        await world.verify()


async def test_all_nodes_are_restarted_one_after_the_other(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=12) as world:
        async with world.load(sdk=True):
            for node in world.cluster.nodes:
                await world.told(30)
                assert await world.cluster.stop_node(node), "it had to be killed"
                await world.told(30)
                await world.cluster.start_node(node)
                await world.ready(node)
        await world.verify()


async def test_one_leader_after_the_other_is_killed(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    async with ShopWorld(tmp_path, seed=seed) as world:
        async with world.load():
            for _ in range(5):
                await world.told(world.rng.randint(1, 60))
                leader = await world.cluster.wait_for_leader()
                await world.cluster.kill(leader.node)
                await world.told(world.rng.randint(1, 30))
                await world.cluster.start_node(leader.node)
                await world.ready(leader.node)
        await world.verify()
