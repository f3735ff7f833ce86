"""A cluster that is upgraded node by node, under load: nobody waits, nothing is lost, and what is new comes last.

The older software is today's, held at level 1: it announces no more, and writes no more than that. With another
checkout in OUTLAST_OLDER (`make test-upgrade OLDER=COMMIT`) it is that one.
"""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from coordinator.levels import NEWEST
from tests.integration.shop_world import ShopWorld
from tests.integration.world import PATIENCE_S, eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

OLDER = """
import sys
from coordinator import levels
levels.NEWEST = 1
from coordinator.__main__ import main
sys.exit(main(["--config", sys.argv[1]]))
"""
"""A node that knows levels, and understands no more than the first."""

NOT_YET = (503, "not_before_upgrade")
HELD = "[compatibility]\nhighest_level = 1\n"


OLDER_CHECKOUT = os.environ.get("OUTLAST_OLDER", "")


class HeldWorld(ShopWorld):
    """Its nodes begin at level 1, and stay there until `let_go`. Snapshots are taken all the time."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        super().__init__(folder, seed=seed)
        settings = {"compatibility": {"highest_level": 1}, "limits": {"compact_log_bytes": 50_000}}
        self.cluster = LocalCluster(folder / "c", settings=settings)

    async def let_go(self, node: str) -> None:
        """Stop `node`, and start it as newer software, in the same folder."""
        assert await self.cluster.stop_node(node), "it had to be killed"
        path = self.cluster.data / node / "node.toml"
        text = path.read_text()
        assert text.count(HELD) == 1
        path.write_text(text.replace(HELD, ""))
        await self.told(20)
        await self.cluster.start_node(node)
        await self.ready(node)

    async def level(self) -> tuple[int, dict[str, int | None]]:
        """What the leader's cluster works at, and what it has heard of each node."""
        status = await self.cluster.status((await self.cluster.wait_for_leader()).node)
        if status is None:
            return 0, {}
        return status["level"], {row["id"]: row["understands"] for row in status["nodes"]}

    async def run(self, *arguments: object) -> tuple[int | None, str]:
        """Run Python until it ends: its status, and what it said."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode, said.decode()

    async def begin(self) -> tuple[int, str]:
        """Ask each node for what needs level 2; status and code, on which all agree."""
        answers = [await self.post(f"{url}/v1/transactions/begin", {"timeout_s": 5}) for url in self.cluster.urls]
        (found,) = {(answer.status, answer.body.get("code", "")) for answer in answers}
        if found == NOT_YET:
            assert all("announces level 1" in answer.body["detail"] for answer in answers), answers
        return found

    async def at_level(self, level: int, understood: dict[str, int]) -> None:
        """Return once the cluster works at this level, and its leader knows this of the nodes."""

        async def looks_so() -> bool:
            return await self.level() == (level, understood)

        await eventually(looks_so, f"level {level} with {understood}")


async def test_a_cluster_is_upgraded_node_by_node_under_load(tmp_path: Path) -> None:
    async with HeldWorld(tmp_path, seed=21) as world:
        first, second, last = world.cluster.nodes
        async with world.load(sdk=True):
            await world.told(30)
            assert await world.begin() == NOT_YET
            for upgraded in ([first], [first, second]):
                await world.let_go(upgraded[-1])
                await world.at_level(1, {node: NEWEST if node in upgraded else 1 for node in world.cluster.nodes})
                assert await world.begin() == NOT_YET
                await world.told(30)
            await world.let_go(last)
            await world.at_level(NEWEST, dict.fromkeys(world.cluster.nodes, NEWEST))
            assert await world.begin() == (200, "")
            await world.told(30)
            # It is in the log, and in snapshots: who comes back knows it before he hears of a leader.
            await world.kill_at_once(world.cluster.nodes)
            for node in world.cluster.nodes:
                await world.cluster.start_node(node)
            await world.at_level(NEWEST, dict.fromkeys(world.cluster.nodes, NEWEST))
            await world.told(30)
        await world.verify()


async def test_software_that_is_too_old_stops_and_harms_nothing(tmp_path: Path) -> None:
    async with HeldWorld(tmp_path, seed=22) as world:
        first, *others = world.cluster.nodes
        async with world.load(sdk=True):
            await world.let_go(first)
            status, said = await world.run("-m", "cluster.cli", "status", "--data", world.cluster.data)
            assert status == 0, said
            assert f"works at level 1; {first} understands {NEWEST}" in said, "people see that nodes differ"
            for node in others:
                await world.let_go(node)
            await world.at_level(NEWEST, dict.fromkeys(world.cluster.nodes, NEWEST))
            log = world.cluster.data / first / "data" / "log"
            assert await world.cluster.stop_node(first), "it had to be killed"
            kept = sorted(log.glob("*.snapshot"))
            status, said = await world.run("-c", OLDER, world.cluster.data / first / "node.toml")
            assert status == 1, said
            assert "this cluster works at level 2, and this software understands level 1: install" in said
            assert "Traceback" not in said
            assert sorted(log.glob("*.snapshot*")) == kept
            await world.told(20)
            await world.cluster.start_node(first)
            await world.ready(first)
        await world.verify()


@pytest.mark.older
async def test_a_cluster_of_older_software_is_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back and there again, the last old node being caught up by a snapshot of the new ones meanwhile."""
    here = str(Path(__file__).parents[2])
    world = ShopWorld(tmp_path, seed=23)
    world.cluster = LocalCluster(tmp_path / "c", settings={"limits": {"compact_log_bytes": 50_000}})

    async def restart(node: str, software: str, *, away: int = 20) -> None:
        assert await world.cluster.stop_node(node), "it had to be killed"
        await world.told(away)
        monkeypatch.setenv("PYTHONPATH", software)
        await world.cluster.start_node(node)
        await world.ready(node)
        await world.told(50)

    async def levels() -> set[int | None]:
        return {(await world.cluster.status(node) or {}).get("level") for node in world.cluster.nodes}

    monkeypatch.setenv("PYTHONPATH", OLDER_CHECKOUT)
    async with world:
        async with world.load():
            await world.told(50)
            first, second, last = world.cluster.nodes
            begun = await levels()
            await restart(first, here)
            await restart(second, here)
            await restart(last, OLDER_CHECKOUT, away=2000)
            assert "caught up to entry" in world.cluster.process(last).program.log.read_text(), "by a snapshot"
            await restart(first, OLDER_CHECKOUT)
            await restart(first, here)
            assert (NEWEST in await levels()) == (NEWEST in begun), "it rises after the last one"
            await restart(last, here)

            async def raised() -> bool:
                return await levels() == {NEWEST}

            await eventually(raised, f"all nodes work at level {NEWEST}")
            await world.told(100)
        await world.verify()
