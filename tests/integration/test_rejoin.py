"""A node whose data is gone is replaced while the cluster works, and counts again only when it may."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.shop_world import ShopWorld
from tests.integration.test_durability import CompactingWorld
from tests.integration.world import PATIENCE_S, eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


async def outlast(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "cluster.cli", *map(str, words)]
    return await asyncio.to_thread(
        subprocess.run, command, check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )


async def test_a_node_whose_disk_is_lost_is_replaced_under_load(tmp_path: Path) -> None:
    async with CompactingWorld(tmp_path, seed=41) as world:
        world.expected_lines += ["was a member of this cluster", "n[123]: this node must stop", "is not empty"]
        cluster = world.cluster
        async with world.load():
            leader = await cluster.wait_for_leader()
            lost, third = (node for node in cluster.nodes if node != leader.node)
            folder = cluster._laid_out()[lost].data
            await world.told(50)
            for _ in range(2):
                await world.compacts(leader.node)
            await cluster.kill(lost)
            shutil.rmtree(folder)
            await world.told(20)

            for _ in range(2):
                # Trying once more makes no member of it.
                refused = await outlast("start", lost, "--data", cluster.data)
                assert refused.returncode == 1, refused
            assert f"{lost} was a member of this cluster" in refused.stderr
            assert f"its log is not in {folder / 'log'}" in refused.stderr
            assert f"outlast start {lost} --rejoin" in refused.stderr
            assert "Traceback" not in refused.stderr
            await world.told(20)

            # In the middle of joining it is killed once more; from there on it needs no second word.
            rejoins = await outlast("start", lost, "--rejoin", "--data", cluster.data)
            assert rejoins.returncode == 0, rejoins
            await cluster.kill(lost)
            again = await outlast("start", lost, "--data", cluster.data)
            assert again.returncode == 0, again
            await world.ready(lost)
            status = await cluster.status(lost)
            assert status is not None
            assert status["role"] == "follower"
            assert "by a snapshot" in cluster.process(lost).program.log.read_text()

            # Now it counts: it is half of the majority, and may lead it.
            await cluster.kill(leader.node)
            await world.told(50)
            await cluster.start_node(leader.node)
            await world.ready(leader.node)
            await cluster.kill(third)
            await world.told(50)
            await cluster.start_node(third)
            await world.ready(third)
        await world.settled()

        await cluster.kill(lost)
        refused = await outlast("start", lost, "--rejoin", "--data", cluster.data)
        assert refused.returncode == 1, refused
        assert "is not empty" in refused.stderr
        started = await outlast("start", lost, "--data", cluster.data)
        assert started.returncode == 0, started
        await world.ready(lost)
        await world.verify()


async def test_an_empty_node_is_seen_to_be_joining(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=42) as world:
        cluster = world.cluster
        leader = await cluster.wait_for_leader()
        lost, third = (node for node in cluster.nodes if node != leader.node)
        async with world.load():
            await world.told(20)
        await world.settled()
        # With one of the others gone nobody can lead, so it stays as it is.
        await world.kill_at_once([lost, third])
        shutil.rmtree(cluster._laid_out()[lost].data)
        await cluster.start_node(lost, rejoin=True)

        async def joining() -> bool:
            status = await cluster.status(lost)
            return status is not None and status["role"] == "joining" and not status["ready"]

        await eventually(joining, f"{lost} is joining")
        assert (await world.get(f"{cluster.url(lost)}/readyz")).status == 503
        shown = await outlast("status", "--wait", "0.5", "--data", cluster.data)
        assert "joining" in shown.stdout
        await cluster.start_node(third)
        for node in cluster.nodes:
            await world.ready(node)
        await world.verify()
