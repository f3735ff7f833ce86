"""Networks that fail in every direction, between real nodes on hosts of their own: nothing is lost, nothing false told.

Load goes on through all of it. Each test ends with the same question as every other: is every acknowledged transaction
there, and do all nodes tell of it what its client was told?
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from cluster.local import Leader
from cluster.tap import Message, is_prepare
from tests.integration.net_world import NetShopWorld
from tests.integration.shop_world import APART, prepare_of
from tests.integration.world import eventually
from tests.support.networks import NoNetworks

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

SLACK_S: Final = 2.0
"""For a machine that is busy with other things."""

STEPS_DOWN_S: Final = 2.0
ANSWERS_S: Final = 3.0
DECIDED_S: Final = 1.2
"""What is promised on a machine that is not."""

LONG: Final = bool(os.environ.get("OUTLAST_LONG"))


class _Decisions:
    """Every decision that any node has sent to a participant, true or not."""

    def __init__(self, world: NetShopWorld) -> None:
        self._world = world
        self._sent: set[tuple[str, str]] = set()
        for tap in world.taps.values():
            tap.watchers.append(self._note)

    def _note(self, message: Message, _status: int, _answer: object) -> None:
        if message.call != "prepare":
            self._sent.add((message.gid, message.call))

    async def check(self, *, at_most: int = 200) -> None:
        """No participant was ever told two things of one transaction, and what it was told is the outcome."""
        assert not two_decisions(self._sent)
        by_gid = dict(self._sent)
        assert by_gid, "nothing was decided at all"
        url = self._world.cluster.urls[0]
        for gid in self._world.rng.sample(sorted(by_gid), min(at_most, len(by_gid))):
            answer = await self._world.get(f"{url}/v1/outcomes/{gid}")
            assert answer.body == {"outcome": {"commit": "committed", "abort": "aborted"}[by_gid[gid]]}, (gid, answer)


def two_decisions(sent: AbstractSet[tuple[str, str]]) -> set[str]:
    """Gids of which both were sent."""
    return {gid for gid, _ in sent if {(gid, "commit"), (gid, "abort")} <= sent}


def test_two_decisions_of_one_transaction_are_noticed() -> None:
    assert two_decisions({("a", "commit"), ("b", "abort"), ("a", "abort")}) == {"a"}


@asynccontextmanager
async def shop(
    folder: Path, *, seed: int, clients: int = 6, slow_disks: bool = False
) -> AsyncIterator[tuple[NetShopWorld, Leader]]:
    """A world under load, and its first leader; in the end all is over, and right."""
    async with NetShopWorld(folder, seed=seed, slow_disks=slow_disks) as world:
        decisions = _Decisions(world)
        async with world.load(clients=clients):
            await world.told(20)
            yield world, await world.cluster.wait_for_leader()
            world.network.heal()
            for node in world.cluster.nodes:
                await world.ready(node)
            await world.told(10)
        await world.verify()
        await decisions.check()


async def test_a_leader_that_is_cut_off_from_the_others_steps_down_and_says_so(tmp_path: Path) -> None:
    async with shop(tmp_path, seed=41) as (world, leader):
        order, branches = world.checkout(APART, APART)
        hold = world.taps["orders"].hold(prepare_of(order))
        asking = asyncio.create_task(world.ask(order, branches, timeout_s=120.0, within_s=120.0))
        gid = (await hold.wait())[0].gid
        async with world.watching() as watches:
            cut_s = time.monotonic()
            world.cut_off(leader.node)
            after = await world.new_leader(leader)
            elected_s = time.monotonic() - cut_s
            await eventually(lambda: not watches[leader.node].leads_now, "it steps down")
            old = world.cluster.url(leader.node)
            # It knows of the transaction, and not what has become of it; nor can it begin or end anything.

            async def refused(path: str, body: object = None) -> None:
                asked_s = time.monotonic()
                asked = (
                    world.get(old + path, within_s=30) if body is None else world.post(old + path, body, within_s=30)
                )
                assert (answer := await asked).status == 503, (path, answer)
                assert time.monotonic() - asked_s < ANSWERS_S + SLACK_S

            await asyncio.gather(
                refused(f"/v1/transactions/{gid}"),
                refused(f"/v1/outcomes/{gid}"),
                refused("/readyz"),
                refused(f"/v1/transactions/{gid}/abort", {}),
                refused("/v1/transactions", {"branches": world.checkout(APART, APART)[1]}),
            )
            hold.release()
            told = await asking
            assert (told.decision, told.gid) == ("commit", gid)
            answer = await world.get(f"{old}/v1/outcomes/{gid}")
            assert answer.status == 503, answer
            await world.told(30)
        led_s = (watches[leader.node].last_led_s() or cut_s) - cut_s
        print(f"cut off: another leads after {elected_s:.3f} s, it has led for {led_s:.3f} s")
        assert led_s < STEPS_DOWN_S + SLACK_S
        assert watches[leader.node].times_elected() == 0
        # One election, and everybody stays with it.
        assert (await world.cluster.wait_for_leader()).epoch == after.epoch


async def test_a_host_that_falls_silent_leaves_nobody_in_doubt(tmp_path: Path) -> None:
    async with shop(tmp_path, seed=42, clients=2) as (world, leader):
        hold = world.taps["orders"].hold(is_prepare)
        checkouts = [world.checkout(f"apart-{i}", f"apart-{i}") for i in range(10)]
        start = world.cluster.nodes.index(leader.node)
        asking = [asyncio.create_task(world.ask(*each, start=start, timeout_s=60.0)) for each in checkouts]
        await hold.wait(10)
        gids = {message.gid for message in hold.held}
        cut_s = time.monotonic()
        world.cut_off(leader.node, besides=())
        hold.drop()

        def over() -> bool:
            return all(
                times.finished_s is not None
                for tap in world.taps.values()
                for (gid, _), times in tap.branches.items()
                if gid in gids
            ) and all((gid, "orders") in world.taps["orders"].branches for gid in gids)

        await eventually(over, "all of them are decided, and everybody has heard it")
        took_s = time.monotonic() - cut_s
        print(f"silent: all decided, and heard by all, after {took_s:.3f} s")
        assert took_s < DECIDED_S + SLACK_S
        world.network.heal()
        for told in await asyncio.gather(*asking):
            assert told.decision == "commit", told


LOST: Final = {
    "the leader is heard by nobody": ("leader -> one", "leader -> two"),
    "the leader hears nobody": ("one -> leader", "two -> leader"),
    "a follower does not hear the leader": ("leader -> two",),
    "the leader does not hear a follower": ("two -> leader",),
    "the followers hear each other one way only": ("one -> two",),
    "a follower is heard by nobody": ("two -> leader", "two -> one"),
    "a follower hears nobody": ("leader -> two", "one -> two"),
}
"""In which case what is lost."""

SELDOM: Final = ("the followers hear each other one way only", "a follower is heard by nobody")
"""Like others in what comes of it."""


async def test_links_that_carry_one_way_only(tmp_path: Path) -> None:
    async with shop(tmp_path, seed=43) as (world, _):
        for case, ways in LOST.items():
            if case in SELDOM and not LONG:
                continue
            leader = await world.cluster.wait_for_leader()
            one, two = (node for node in world.cluster.nodes if node != leader.node)
            nodes = {"leader": leader.node, "one": one, "two": two}
            cut_s = time.monotonic()
            for way in ways:
                source, _, target = way.partition(" -> ")
                world.network.cut(nodes[source], nodes[target], both=False)
            await world.told(20)
            usable_s = time.monotonic() - cut_s
            async with world.watching() as watches:
                await asyncio.sleep(4.0 if LONG else 1.0)
            # Whoever leads by now is let lead.
            changes = sum(watch.times_elected() for watch in watches.values())
            now = await world.cluster.wait_for_leader()
            print(f"{case}: usable after {usable_s:.3f} s, epoch {leader.epoch} -> {now.epoch}")
            assert changes <= 1, (case, changes)
            assert now.epoch - leader.epoch <= 3, case
            if "follower" in case:
                assert now == leader, f"{case}: a healthy leader was deposed"
            world.network.heal()
            for node in world.cluster.nodes:
                await world.ready(node)
            await world.told(20)
            assert (await world.cluster.wait_for_leader()) == now, f"{case}: healing it deposed the leader"


async def test_a_link_that_comes_and_goes(tmp_path: Path) -> None:
    async with shop(tmp_path, seed=44) as (world, leader):
        one, two = (node for node in world.cluster.nodes if node != leader.node)
        for step in range(24 if LONG else 8):
            for node in (one, two)[step % 2 :]:
                world.network.cut(leader.node, node, both=step % 3 > 0)
            await asyncio.sleep(0.1 + 0.5 * world.rng.random())
            world.network.heal()
            await asyncio.sleep(0.3 * world.rng.random())
        healed_s = time.monotonic()
        await world.told(30)
        now = await world.cluster.wait_for_leader()
        print(f"after the last: usable after {time.monotonic() - healed_s:.3f} s, epoch {leader.epoch} -> {now.epoch}")
        async with world.watching() as watches:
            await asyncio.sleep(1.5)
        assert sum(watch.times_elected() for watch in watches.values()) == 0, "it goes on although all is well"


async def test_a_slow_network_deposes_nobody(tmp_path: Path) -> None:
    async with shop(tmp_path, seed=45) as (world, leader):
        for one, other in (("n1", "n2"), ("n2", "n3"), ("n1", "n3")):
            try:
                world.network.delay(one, other, 0.05)
            except NoNetworks as error:
                pytest.skip(str(error))
        for node in world.cluster.nodes:
            if node != leader.node:
                await world.told(5)
                assert world.cluster.pause(node)
                await asyncio.sleep(0.5)
                assert world.cluster.resume(node)
        await world.told(20)
        slow = [delay.carried for way, delay in world.network._delays.items() if leader.node in way]
        assert min(slow) > 20, "the links were not slow"
        assert (await world.cluster.wait_for_leader()) == leader


async def test_a_slow_disk_deposes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    async with shop(tmp_path, seed=46, slow_disks=True) as (world, leader):
        follower = next(node for node in world.cluster.nodes if node != leader.node)
        for slow in (follower, leader.node):
            world.cluster.slow_disk(slow, 0.5)
            await asyncio.sleep(1.5)
            await world.told(10)
            world.cluster.slow_disk(slow, 0.0)
        assert (await world.cluster.wait_for_leader()) == leader
        world.cluster.slow_disk(leader.node, 0.5)
        world.cluster.slow_disk(follower, 0.5)
        slow_s = time.monotonic()
        await world.told(6)
        assert time.monotonic() - slow_s > 0.5, "the disks were not slow"
        for node in (leader.node, follower):
            world.cluster.slow_disk(node, 0.0)
        assert (await world.cluster.wait_for_leader()) == leader
