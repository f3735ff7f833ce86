"""Nothing acknowledged is lost, whatever the network and the nodes do; and this would be noticed."""

import asyncio
import random
from typing import Any

import pytest

from cluster.replication.guard import Guard
from cluster.replication.raft_log import RaftLog
from tests.simulation.replicas import (
    NODES,
    Cluster,
    ForgetfulRaftLog,
    HastyRaftLog,
    HeedlessRaftLog,
    NoGuard,
    StockRaftLog,
    UnsyncedRaftLog,
    VainRaftLog,
)
from tests.simulation.virtual import VirtualLoop, run

ROUNDS = 4


async def chaos(cluster: Cluster) -> list[str]:
    """Bursts of proposals, and a disaster in the middle of each; then heal, demand progress, and judge."""
    rng = cluster.rng
    for node in NODES:
        await cluster.start(node)
    for _ in range(ROUNDS):
        await cluster.until(lambda: cluster.leader() is not None or cluster.fatal)
        for _ in range(rng.randrange(1, 60)):
            cluster.propose()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.uniform(0, 0.004))
        leader = cluster.leader()
        disaster = rng.choice(
            (
                "kill the leader",
                "kill the leader",
                "cut it off",
                "cut one link",
                "none",
                "no power",
                "no power for two",
                "no room",
            )
        )
        if leader is not None and disaster == "kill the leader":
            await cluster.kill(leader)
        elif leader is not None and disaster == "cut it off":
            for other in NODES:
                if other != leader:
                    cluster.network.cut(leader, other)
        elif disaster == "no room":
            for node in rng.sample(NODES, rng.randrange(1, 4)):
                disk = cluster.disks[node]
                disk.room = (disk.sectors_used() + rng.randrange(20)) * 512
                cluster.cramped += 1
        elif disaster.startswith("no power"):
            for node in NODES if disaster == "no power" else rng.sample(NODES, 2):
                await cluster.kill(node, power=True)
        elif disaster == "cut one link":
            cluster.network.cut(*rng.sample(NODES, 2))
        for _ in range(rng.randrange(0, 60)):
            cluster.propose()
            await asyncio.sleep(rng.uniform(0, 0.04))
        cluster.network.heal()
        for disk in cluster.disks.values():
            disk.room = None
        for node in NODES:
            if node not in cluster.logs:
                await cluster.start(node)
    settled = await cluster.settle()
    found = cluster.violations()
    if not settled and cluster.must_settle:
        found.append("the cluster does not come to rest")
    for log in cluster.logs.values():
        await log.stop()
    return found


def lived_through(
    seed: int, log_type: type[RaftLog] = RaftLog, guard_type: type[Guard] = Guard, **how: Any
) -> tuple[Cluster, list[str]]:
    """One life of a cluster, and what was wrong with it."""

    async def main(loop: VirtualLoop, rng: random.Random) -> tuple[Cluster, list[str]]:
        cluster = Cluster(loop, rng, log_type=log_type, guard_type=guard_type, **how)
        return cluster, await chaos(cluster)

    return run(seed, main)


@pytest.mark.parametrize("log_type", [RaftLog, StockRaftLog])
@pytest.mark.parametrize("unruly", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_acknowledged_is_lost(seed: int, log_type: type[RaftLog], unruly: bool) -> None:
    _cluster, found = lived_through(seed, log_type, unruly=unruly)
    assert not found, f"seed {seed}: {found}"


@pytest.mark.parametrize("log_type", [RaftLog, StockRaftLog])
@pytest.mark.parametrize("unruly", [False, True])
def test_without_the_guard_it_is_lost(log_type: type[RaftLog], unruly: bool) -> None:
    seeds = range(100)
    for seed in seeds:
        _cluster, found = lived_through(seed, log_type, NoGuard, unruly=unruly)
        if any("acknowledged" in violation for violation in found):
            return
    pytest.fail(f"no loss found with the seeds {seeds}: these tests prove nothing")


SLOW_S = (0.005, 0.06)


@pytest.mark.parametrize("seed", range(40))
def test_nothing_acknowledged_is_lost_on_slow_disks(seed: int) -> None:
    _cluster, found = lived_through(seed, sync_s=SLOW_S)
    assert not found, f"seed {seed}: {found}"


@pytest.mark.parametrize(
    ("log_type", "violation"),
    [
        (HastyRaftLog, "acknowledged"),
        (VainRaftLog, "acknowledged"),
        (ForgetfulRaftLog, "leaders"),
        (HeedlessRaftLog, "cannot start"),
        (UnsyncedRaftLog, "cannot start"),
    ],
)
def test_words_that_leave_before_the_disk_holds_them_are_noticed(log_type: type[RaftLog], violation: str) -> None:
    seeds = range(600)
    for seed in seeds:
        _cluster, found = lived_through(seed, log_type, sync_s=SLOW_S)
        if any(violation in one for one in found):
            return
    pytest.fail(f"nothing found with the seeds {seeds}: these tests prove nothing")


def test_the_disasters_happen() -> None:
    lives = [lived_through(seed, unruly=True)[0] for seed in range(20)]
    assert sum(len(cluster.leaders) for cluster in lives) > 2 * len(lives)
    assert sum(len(cluster.acknowledged) for cluster in lives) > 10 * len(lives)
    assert sum(cluster.installed for cluster in lives) > 0
    assert sum(cluster.cramped for cluster in lives) > 0
    assert sum(cluster.powerless for cluster in lives) > len(lives)
    assert sum(cluster.network.lost for cluster in lives) > 0
    assert sum(cluster.network.repeated for cluster in lives) > 0


def test_a_seed_has_one_outcome() -> None:
    (one, _), (other, _) = lived_through(5), lived_through(5)
    assert one.acknowledged == other.acknowledged
    assert one.leaders == other.leaders
    assert one.loop.time() == other.loop.time()
    assert one.network.delivered == other.network.delivered


def test_a_long_tail_of_a_deposed_leader_is_overcome() -> None:
    """Far more conflicting entries than fit one message, with a heartbeat overtaking every denial."""

    async def main(loop: VirtualLoop, rng: random.Random) -> None:
        cluster = Cluster(loop, rng)
        cluster.network.delay_s = (0.02, 0.03)
        for node in NODES:
            await cluster.start(node)
        for _ in range(3):
            await cluster.until(lambda: cluster.leader() is not None)
            leader = cluster.leader()
            assert leader is not None
            for other in NODES:
                if other != leader:
                    cluster.network.cut(leader, other)
            for _ in range(500):
                cluster.propose()
            await cluster.until(lambda old=leader: cluster.leader() not in (None, old))
            cluster.network.heal()
        assert await cluster.settle()
        assert not cluster.violations()
        for log in cluster.logs.values():
            await log.stop()

    run(11, main)
