"""Real clusters under load, whose disks are lost: from a backup, and from the one folder that is left."""

import asyncio
import json
import random
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.calls import Unreachable
from cluster.local import LocalCluster
from cluster.tap import Hold
from participants.shop import audit
from tests.integration.shop_world import APART, ShopWorld, decision_of
from tests.integration.world import PATIENCE_S, Told, eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

NODES = ("n1", "n2", "n3")


async def outlast(*words: object, status: int = 0) -> Any:
    """What a command of ours says: JSON, or else its complaint."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cluster.cli",
        *map(str, words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == status, err.decode()
    return json.loads(out) if out else err.decode()


@asynccontextmanager
async def load(world: ShopWorld, clients: int) -> AsyncIterator[None]:
    """Clients that are gone when the cluster is: nobody asks again for what has been lost."""

    async def client(number: int) -> None:
        rng = random.Random(f"{world.seed}-{number}")
        while True:
            await world.ask(*world.next_request(rng), start=number)

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def one_commit_of_three(world: ShopWorld, name: str) -> tuple[asyncio.Task[Told], list[Hold], str]:
    """A checkout of which inventory has heard the commit, and the others have not."""
    order, branches = world.checkout(APART, name)
    asking = asyncio.create_task(world.ask(order, branches))
    holds = [world.taps[each].hold(decision_of(world, order)) for each in ("payments", "orders")]
    for hold in holds:
        await hold.wait()
    gid = holds[0].held[0].gid

    def committed() -> bool:
        return any(of == gid and t.outcome == "committed" for (of, _), t in world.taps["inventory"].branches.items())

    await eventually(committed, "one has committed")
    return asking, holds, gid


async def no_commit_of_three(world: ShopWorld, name: str) -> tuple[asyncio.Task[Told], list[Hold], str]:
    """A checkout that is prepared everywhere, whose decision nobody has heard."""
    order, branches = world.checkout(f"{APART}-1", name)
    asking = asyncio.create_task(world.ask(order, branches))
    holds = [tap.hold(decision_of(world, order)) for tap in world.taps.values()]
    for hold in holds:
        await hold.wait()
    return asking, holds, holds[0].held[0].gid


async def nothing_is_prepared(world: ShopWorld) -> None:
    async def quiet() -> bool:
        return not any([await world.prepared(name) for name in world.services])

    await eventually(quiet, "no participant holds anything prepared")


async def outcome(world: ShopWorld, gid: str) -> str:
    """What any node says of a gid, once it says anything."""

    async def said() -> str | None:
        with suppress(Unreachable):
            answer = await world.get(f"{world.cluster.url('n2')}/v1/outcomes/{gid}")
            if answer.status != 503:
                return str(answer.body.get("outcome") or answer.body["code"])
        return None

    return await eventually(said, f"the outcome of {gid}")


def books_are_right(world: ShopWorld) -> None:
    """In three databases or in none, whatever clients were told."""
    report = audit(world.books)
    assert not report.discrepancies, report.discrepancies[:10]
    assert not report.in_doubt


async def test_a_backup_under_load_is_restored(tmp_path: Path) -> None:
    file = tmp_path / "copy.outlast"
    async with ShopWorld(tmp_path, seed=3) as world:
        async with load(world, 6):
            await world.told(40)
            before = [told for told in world.requests if told.decision is not None]
            copy = await outlast("backup", file, "--data", world.cluster.data, "--json")
            await world.told(20)
            asking, holds, torn = await one_commit_of_three(world, APART)
            await world.kill_at_once(NODES)
        asking.cancel()
        for hold in holds:
            hold.drop()
        assert copy["transactions"] >= len(before)
        old = world.cluster
        for node in NODES:
            (tmp_path / "new" / node).mkdir(parents=True)
            text = (old.data / node / "node.toml").read_text()
            (tmp_path / "new" / node / "node.toml").write_text(text.replace("node =", "generation = 2\nnode =", 1))
        async with LocalCluster(tmp_path / "new") as world.cluster:
            found = await outlast("restore", file, "--data", world.cluster.data, "--json")
            assert found["open"] is False
            assert found["settled"]["committed"] >= 1
            await nothing_is_prepared(world)
            for told in before:
                assert await outcome(world, str(told.gid)) == {"commit": "committed", "abort": "aborted"}[told.decision]
            assert await outcome(world, torn) == "committed"
            again = Told(key=before[-1].key, branches=before[-1].branches, timeout_s=world.timeout_s)
            kept = await world.post(
                f"{world.cluster.url('n1')}/v1/transactions",
                {"branches": again.branches, "timeout_s": again.timeout_s},
                key=again.key,
            )
            assert kept.body["gid"] == before[-1].gid, "the key still finds its transaction"
            new = len(world.requests)
            async with load(world, 4):
                await world.told(20)
            decided = [told for told in world.requests[new:] if told.decision is not None]
            assert any(told.decision == "commit" for told in decided)
            assert all(int(str(told.gid).split("-")[-2]) > 100_000 for told in decided)
            await nothing_is_prepared(world)
            books_are_right(world)
            refused = await outlast("restore", file, "--data", world.cluster.data, status=1)
            assert "has had transactions" in str(refused)
        world.cluster = old


async def test_two_disks_of_three_are_lost(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=4) as world:
        cluster = world.cluster
        async with load(world, 6):
            await world.told(30)
            early = [told for told in world.requests if told.decision is not None]
            await cluster.stop_node("n3")  # it lags: what is told from here on it never hears
            await world.told(40)
            asking, holds, torn = await one_commit_of_three(world, APART)
            asking_too, more, unheard = await no_commit_of_three(world, f"{APART}-1")
            await world.kill_at_once(("n1", "n2"))
        for task in (asking, asking_too):
            task.cancel()
        for hold in [*holds, *more]:
            hold.drop()
        for node in ("n1", "n2"):
            shutil.rmtree(cluster.data / node / "data")
        only_said = await outlast("recover", "--data", cluster.data, "--json", status=1)
        assert only_said["from"] == "n3"
        assert only_said["nodes"]["n1"]["trouble"].startswith("there is no log")
        assert not list(cluster.data.glob("recovered-*"))
        done = await outlast("recover", "--force", "--data", cluster.data, "--json")
        assert (done["generation"], done["reconciliation"]["open"]) == (2, False)
        assert done["reconciliation"]["settled"]["committed"] >= 1
        assert done["reconciliation"]["settled"]["aborted"] >= 1
        await nothing_is_prepared(world)
        books_are_right(world)
        assert await outcome(world, torn) == "committed", "one participant had heard of it"
        assert await outcome(world, unheard) == "aborted", "nobody had"
        for told in early:
            # What n3 knew to be committed when it was stopped; its very last word may be missing.
            said = await outcome(world, str(told.gid))
            assert said in ("forgotten", {"commit": "committed", "abort": "aborted"}[str(told.decision)])
        new = len(world.requests)
        async with load(world, 4):
            await world.told(20)
        assert any(told.decision == "commit" for told in world.requests[new:])
        await nothing_is_prepared(world)
        books_are_right(world)
        await the_old_folder_is_refused(world)


async def the_old_folder_is_refused(world: ShopWorld) -> None:
    cluster = world.cluster
    aside = cluster.data / "n3" / "data.generation-1"
    assert (aside / "log").is_dir(), "nothing is deleted"
    await cluster.stop_node("n3")
    (cluster.data / "n3" / "data").rename(cluster.data / "n3" / "data.new")
    shutil.copytree(aside, cluster.data / "n3" / "data")
    world.expected_lines.append("is of generation 1 of the cluster")
    process = cluster.process("n3")
    process.spawn()
    await process.gone(within_s=PATIENCE_S)
    assert "n3 cannot start" in process.log_tail(5)
    # And an old node under its old configuration is not let in by the others.
    toml = cluster.data / "n3" / "node.toml"
    toml.write_text(toml.read_text().replace("generation = 2\n", ""))
    process.spawn()
    others = [cluster.process(node).program.log for node in ("n1", "n2")]

    def turned_away() -> bool:
        return any("it is of cluster" in log.read_text() and "generation 2" in log.read_text() for log in others)

    await eventually(turned_away, "the others turn it away")
    leader = await cluster.wait_for_leader()
    assert leader.node in ("n1", "n2")
    await cluster.stop_node("n3")
