"""What was told is there, whatever happens to processes and disks while the log is compacted under load."""

import asyncio
import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.local import LocalCluster
from cluster.process import ProcessTrouble
from tests.integration.shop_world import ShopWorld
from tests.integration.world import PATIENCE_S, eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

COMPACT_BYTES = 24 * 1024
"""So little that every few dozen transactions there is a snapshot."""


class CompactingWorld(ShopWorld):
    """A shop whose nodes compact their logs all the time."""

    def __init__(self, folder: Path, *, seed: int, **named: Any) -> None:
        super().__init__(folder, seed=seed, **named)
        self.cluster = LocalCluster(folder / "c", settings={"limits": {"compact_log_bytes": COMPACT_BYTES}})

    def data(self, node: str) -> Path:
        """The folder of a node's log."""
        return self.cluster._laid_out()[node].data / "log"

    def snapshots(self, node: str) -> list[str]:
        return sorted(path.name for path in self.data(node).glob("*.snapshot"))

    async def compacts(self, node: str) -> None:
        """Return once there is one snapshot more, or one is being written."""
        before = self.snapshots(node)
        await eventually(
            lambda: self.snapshots(node) != before or list(self.data(node).glob("*.partial")), f"{node} compacts"
        )


async def test_nodes_are_killed_while_they_compact(tmp_path: Path) -> None:
    async with CompactingWorld(tmp_path, seed=31) as world:
        async with world.load():
            await world.told(100)
            for node in (*world.cluster.nodes, *world.cluster.nodes):
                await world.compacts(node)
                await world.cluster.kill(node)
                await world.told(20)
                await world.cluster.start_node(node)
                await world.ready(node)
        for node in world.cluster.nodes:
            # One that was killed between naming a new one and removing the oldest keeps that until the next.
            assert 2 <= len(world.snapshots(node)) <= 3
        await world.verify()


async def test_all_are_killed_at_once_while_they_compact(tmp_path: Path) -> None:
    async with CompactingWorld(tmp_path, seed=32) as world:
        async with world.load():
            await world.told(100)
            for _ in range(3):
                await world.compacts("n2")
                await world.kill_at_once(world.cluster.nodes)
                for node in world.cluster.nodes:
                    await world.cluster.start_node(node)
                await world.told(50)
        await world.verify()


async def test_a_node_that_was_away_is_caught_up_by_a_snapshot(tmp_path: Path) -> None:
    async with CompactingWorld(tmp_path, seed=33) as world:
        async with world.load():
            leader = await world.cluster.wait_for_leader()
            away = next(node for node in world.cluster.nodes if node != leader.node)
            await world.told(20)
            await world.cluster.kill(away)
            for _ in range(4):
                await world.compacts(leader.node)
            await world.cluster.start_node(away)
            await world.ready(away)
            await world.told(20)
        log = world.cluster.process(away).program.log.read_text()
        assert "by a snapshot" in log
        await world.verify()


class CrampedWorld(ShopWorld):
    """The disks of some nodes are small. The first, if it is one of them, is most likely to lead."""

    def __init__(self, folder: Path, *, seed: int, cramped: Sequence[str], size: str) -> None:
        super().__init__(folder, seed=seed)
        self.cramped = cramped
        self.size = size
        self.expected_lines += ["no room", "takes no part until there is room"]

    def lay_out(self) -> None:
        super().lay_out()
        for node in self.cramped:
            self.disk_of(node).mkdir(parents=True, exist_ok=True)
            self.mount(node, f"size={self.size}")

    def disk_of(self, node: str) -> Path:
        return self.cluster._laid_out()[node].data

    def mount(self, node: str, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.disk_of(node))]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip("no file system can be mounted here; tests/unit/test_raft.py fills a simulated disk instead")

    async def _end(self) -> None:
        try:
            await super()._end()
        finally:
            self.unmount()

    def unmount(self) -> None:
        for node in self.cramped:
            subprocess.run(["umount", "--lazy", str(self.disk_of(node))], check=False)

    def says(self, node: str, text: str) -> bool:
        return text in self.cluster.process(node).program.log.read_text()

    def is_full(self, node: str) -> bool:
        return self.says(node, "takes no part until there is room")


@pytest.mark.parametrize("size", ["64k", *(["300k"] if os.environ.get("OUTLAST_LONG") else [])])
async def test_a_full_disk_stops_nobody_else_and_there_is_no_harm_once_there_is_room(tmp_path: Path, size: str) -> None:
    async with CrampedWorld(tmp_path, seed=34, cramped=["n1"], size=size) as world:
        async with world.load():
            await eventually(lambda: world.is_full("n1"), "its disk is full")
            await world.told(100)
            leader = await world.cluster.wait_for_leader()
            assert leader.node != "n1"
            world.mount("n1", "remount,size=64m")
            await eventually(lambda: world.says("n1", "takes part again"), "it takes part again")
            await world.told(20)
            others = [node for node in world.cluster.nodes if node not in ("n1", leader.node)]
            # Now it counts: with one of the others gone, it is half of the majority.
            await asyncio.gather(*(world.cluster.kill(node) for node in others))
            await world.told(50)
            await world.cluster.start_node(others[0])
        await world.verify()


async def test_when_all_disks_are_full_nothing_is_lost(tmp_path: Path) -> None:
    nodes = ("n1", "n2", "n3")
    async with CrampedWorld(tmp_path, seed=37, cramped=nodes, size="64k") as world:
        async with world.load():
            await eventually(lambda: sum(map(world.is_full, nodes)) >= 2, "nobody can lead any more")
            await world.kill_at_once(nodes)
            for node in nodes:
                world.mount(node, "remount,size=64m")
                await world.cluster.start_node(node)
            await world.told(50)
        await world.verify()


async def test_a_follower_that_pauses_deposes_nobody(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=35) as world:
        leader = await world.cluster.wait_for_leader()
        async with world.load():
            for node in world.cluster.nodes:
                if node != leader.node:
                    for pause_s in (0.5, 2.0):
                        assert world.cluster.pause(node)
                        await asyncio.sleep(pause_s)
                        assert world.cluster.resume(node)
                        await world.told(20)
        assert (await world.cluster.wait_for_leader()).epoch == leader.epoch
        await world.verify()


async def test_a_damaged_log_is_refused_in_one_clear_line(tmp_path: Path) -> None:
    async with CompactingWorld(tmp_path, seed=36) as world:
        world.expected_lines += ["is damaged at byte"]
        async with world.load():
            await world.told(20)
        leader = await world.cluster.wait_for_leader()
        node = next(node for node in world.cluster.nodes if node != leader.node)
        await world.settled()
        await world.cluster.kill(node)
        segment = min(world.data(node).glob("*.segment"))
        content = bytearray(segment.read_bytes())
        content[600] ^= 0xFF
        segment.write_bytes(content)
        # Its API listens before its log is read, so whoever starts it may or may not be told.
        with contextlib.suppress(ProcessTrouble):
            await world.cluster.start_node(node)
        process = world.cluster.process(node)
        await process.gone(within_s=PATIENCE_S)
        last = process.program.log.read_text().splitlines()[-1]
        assert re.search(rf"CRITICAL coordinator: node {node} cannot start: .*\.segment is damaged .* --rejoin", last)
        await world.cluster.kill(node)
        await world.verify(nodes=world.cluster.running)
