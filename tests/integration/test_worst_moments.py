"""The leader is killed with -9 at the worst moments of one transaction, while others are under way.

Taps hold the messages of the one transaction, so the moment is exact. Whatever the moment, the next leader finishes
what it finds, and the client that asked gets its answer under the key that it asked with.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cluster.tap import Hold
from tests.integration.shop_world import APART, ShopWorld, decision_of, prepare_of
from tests.integration.world import eventually

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

Moment = Callable[[ShopWorld, str], Awaitable[list[Hold]]]


def branches_of(world: ShopWorld, name: str, hold: Hold) -> list[str | None]:
    """What the tap of `name` has seen of the transaction that is held by `hold`."""
    gid = hold.held[0].gid
    return [times.outcome for (of, _), times in world.taps[name].branches.items() if of == gid]


async def before_any_prepare(world: ShopWorld, order: str) -> list[Hold]:
    holds = [tap.hold(prepare_of(order)) for tap in world.taps.values()]
    for hold in holds:
        await hold.wait()
    assert not any(branches_of(world, name, holds[0]) for name in world.taps)
    return holds


async def after_one_of_the_votes(world: ShopWorld, order: str) -> list[Hold]:
    holds = [world.taps[name].hold(prepare_of(order)) for name in ("payments", "orders")]
    for hold in holds:
        await hold.wait()
    await eventually(lambda: branches_of(world, "inventory", holds[0]), "the first vote")
    return holds


async def after_all_votes(world: ShopWorld, order: str) -> list[Hold]:
    holds = [tap.hold(decision_of(world, order)) for tap in world.taps.values()]
    for hold in holds:
        await hold.wait()
    assert [branches_of(world, name, holds[0]) for name in world.taps] == [[None]] * 3
    return holds


async def after_one_commit(world: ShopWorld, order: str) -> list[Hold]:
    holds = [world.taps[name].hold(decision_of(world, order)) for name in ("payments", "orders")]
    for hold in holds:
        await hold.wait()
    await eventually(lambda: branches_of(world, "inventory", holds[0]) == ["committed"], "the first commit")
    return holds


@pytest.mark.parametrize("batch", [True, False], ids=["batches", "singles"])
@pytest.mark.parametrize(
    "moment",
    [before_any_prepare, after_one_of_the_votes, after_all_votes, after_one_commit],
    ids=lambda moment: moment.__name__,
)
async def test_the_leader_is_killed(tmp_path: Path, moment: Moment, batch: bool) -> None:
    async with ShopWorld(tmp_path, seed=1, batch=batch) as world:
        async with world.load(clients=3):
            await world.told(10)
            leader = await world.cluster.wait_for_leader()
            order, branches = world.checkout(APART, APART)
            asking = asyncio.create_task(world.ask(order, branches))
            holds = await moment(world, order)
            await world.cluster.kill(leader.node)
            for hold in holds:
                assert hold.held, "the fault never came to pass"
                hold.drop()
            await world.new_leader(leader)
            told = await asking
            assert told.decision == "commit"
            # Nobody began it a second time: it is still the dead leader's.
            assert f"-{leader.epoch}-" in str(told.gid)
            await world.told(10)
            await world.cluster.start_node(leader.node)
            await world.told(10)
        await world.verify()
