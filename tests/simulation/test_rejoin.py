"""Nothing acknowledged is lost when one disk after the other is, and its node comes back empty; and this is noticed."""

import asyncio
import contextlib
import random
from typing import Any

import pytest

from cluster.replication.raft_log import RaftLog
from tests.simulation.replicas import (
    NODES,
    Cluster,
    EagerRaftLog,
    GullibleRaftLog,
    ImpatientRaftLog,
    RashRaftLog,
)
from tests.simulation.virtual import VirtualLoop, run

ROUNDS = 3
JOINS_WITHIN_S = 20.0


async def burst(cluster: Cluster, most: int, pause_s: float) -> None:
    for _ in range(cluster.rng.randrange(most)):
        cluster.propose()
        await asyncio.sleep(cluster.rng.uniform(0, pause_s))


async def behind_the_leaders_back(cluster: Cluster, lost: str) -> None:
    """The others elect another leader, and the next that the old one hears of is the empty node, and of nobody else."""
    leader = cluster.leader()
    if leader in (None, lost):
        return
    assert leader is not None
    others = [node for node in cluster.nodes if node not in (leader, lost)]
    for node in (*others, lost):
        cluster.network.cut(leader, node)
    with contextlib.suppress(TimeoutError):
        await cluster.until(lambda: cluster.leader() != leader, limit_s=0.9)
    await burst(cluster, 20, 0.005)
    for node in others:
        cluster.network.cut(node, lost)
    await cluster.lose_disk(lost)
    cluster.network.mend(leader, lost)
    await cluster.start(lost, rejoin=True)
    for _ in range(20):
        # To the old leader, too, if it still believes that it is one.
        if cluster.logs[leader].leadership().is_leader:
            cluster.propose_to(leader)
        await asyncio.sleep(cluster.rng.uniform(0, 0.02))


async def trouble(cluster: Cluster) -> tuple[str, ...]:
    """A minority loses its disks, and begins to rejoin, while others die, too. Returns who it is."""
    rng = cluster.rng
    lost = tuple(rng.sample(cluster.nodes, rng.randint(1, len(cluster.nodes) // 2)))
    others = [node for node in cluster.nodes if node not in lost]
    if rng.random() < 0.3:
        cluster.network.cut(*rng.sample(others, 2))
        await burst(cluster, 20, 0.04)
    if rng.random() < 0.25:
        await behind_the_leaders_back(cluster, lost[0])
    for node in lost:
        if node in cluster.logs and cluster.logs[node].joining() & {node}:
            continue  # it has lost it a moment ago
        await cluster.lose_disk(node)
        await burst(cluster, rng.choice((1, 30)), 0.02)
        await cluster.start(node, rejoin=True)
        await asyncio.sleep(rng.choice((0.0, 0.02, 0.1, 0.5)) * rng.random())
    if rng.random() < 0.6:
        await cluster.kill(rng.choice(others))
    for node in lost:
        if rng.random() < 0.5:
            await burst(cluster, 30, 0.03)
            # From here on it needs no second word.
            await cluster.kill(node)
            await cluster.start(node)
    await burst(cluster, 40, 0.04)
    cluster.network.heal()
    for node in cluster.nodes:
        if node not in cluster.logs:
            await cluster.start(node)
            await burst(cluster, 10, 0.03)
    leader = cluster.leader()
    if leader is not None and rng.random() < 0.3:
        await burst(cluster, 10, 0.01)
        await cluster.kill(leader)
        await burst(cluster, 20, 0.04)
        await cluster.start(leader)
    return lost


async def replaced(cluster: Cluster) -> list[str]:
    """Disks are lost in the middle of trouble, time and again; then demand progress, and judge."""
    for node in cluster.nodes:
        await cluster.start(node)
    found = []
    for _ in range(ROUNDS):
        # A node that has not joined since the cluster began does not count either, and there is one minority only.
        await cluster.until(
            lambda: (
                cluster.fatal
                or (cluster.leader() and not any(node in log.joining() for node, log in cluster.logs.items()))
            )
        )
        await burst(cluster, 60, 0.004)
        lost = await trouble(cluster)
        end_s = cluster.loop.time() + JOINS_WITHIN_S
        while (
            any(node in cluster.logs[node].joining() for node in lost)
            and cluster.loop.time() < end_s
            and not cluster.fatal
        ):
            cluster.propose()
            await asyncio.sleep(cluster.rng.uniform(0, 0.1))
        found += [f"{node} does not join" for node in lost if node in cluster.logs[node].joining()]
        if found or cluster.fatal:
            break  # another disk would be one too many
    settled = await cluster.settle()
    found += cluster.violations()
    if not settled:
        found.append("the cluster does not come to rest")
    for log in cluster.logs.values():
        await log.stop()
    return found


def lived_through(seed: int, log_type: type[RaftLog] = RaftLog, **how: Any) -> tuple[Cluster, list[str]]:
    """One life of a cluster, and what was wrong with it."""

    async def main(loop: VirtualLoop, rng: random.Random) -> tuple[Cluster, list[str]]:
        settings = {
            "append_entries_max": rng.choice((2, 8, 4096)),
            # Less, and with a snapshot every 8 entries nobody would ever catch up under load.
            "snapshot_piece_bytes": rng.choice((4_000, 20_000)),
        }
        cluster = Cluster(loop, rng, log_type=log_type, **settings, **how)
        return cluster, await replaced(cluster)

    return run(seed, main)


@pytest.mark.parametrize("unruly", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_nothing_acknowledged_is_lost_with_a_disk(seed: int, unruly: bool) -> None:
    _cluster, found = lived_through(seed, unruly=unruly)
    assert not found, f"seed {seed}: {found}"


@pytest.mark.parametrize("seed", range(5))
def test_nor_with_two_of_five(seed: int) -> None:
    _cluster, found = lived_through(seed, nodes=("n1", "n2", "n3", "n4", "n5"))
    assert not found, f"seed {seed}: {found}"


@pytest.mark.parametrize(
    ("log_type", "violation"),
    [
        (EagerRaftLog, "acknowledged"),
        (ImpatientRaftLog, "acknowledged|LogDiverged|another history"),
        (GullibleRaftLog, "acknowledged|LogDiverged|another history"),
    ],
)
def test_nodes_that_count_too_soon_are_noticed(log_type: type[RaftLog], violation: str) -> None:
    seeds = range(600)
    for seed in seeds:
        _cluster, found = lived_through(seed, log_type)
        if any(kind in one for one in found for kind in violation.split("|")):
            return
    pytest.fail(f"nothing found with the seeds {seeds}: these tests prove nothing")


def test_the_disasters_happen() -> None:
    lives = [lived_through(seed)[0] for seed in range(10)]
    assert sum(cluster.lost for cluster in lives) > 2 * len(lives)
    assert sum(len(cluster.acknowledged) for cluster in lives) > 50 * len(lives)
    assert sum(cluster.installed for cluster in lives) > 0
    assert sum(len(cluster.leaders) for cluster in lives) > 2 * len(lives)


def two_of_three_disks_are_lost(log_type: type[RaftLog]) -> tuple[str | None, list[str]]:
    """Who leads before the third node is there, which alone remembers; and what the two say when it is."""

    async def main(loop: VirtualLoop, rng: random.Random) -> tuple[str | None, list[str]]:
        cluster = Cluster(loop, rng, log_type=log_type)
        for node in NODES:
            await cluster.start(node)
        await cluster.until(lambda: cluster.leader() is not None)
        await burst(cluster, 50, 0.01)
        await asyncio.sleep(1.0)
        for node in NODES:
            await cluster.kill(node)
        for node in NODES[:2]:
            await cluster.lose_disk(node)
            await cluster.start(node)
        await asyncio.sleep(5.0)
        leader = cluster.leader()
        await cluster.start(NODES[2])
        await asyncio.sleep(5.0)
        for log in cluster.logs.values():
            await log.stop()
        return leader, cluster.fatal

    return run(3, main)


def test_lost_disks_found_no_cluster_anew_while_the_one_that_remembers_is_away() -> None:
    leader, fatal = two_of_three_disks_are_lost(RaftLog)
    assert leader is None
    assert len(fatal) == 2
    assert all("was a member of this cluster, as n3 knows" in line for line in fatal)


def test_else_that_would_be_noticed() -> None:
    leader, _fatal = two_of_three_disks_are_lost(RashRaftLog)
    assert leader is not None


@pytest.mark.parametrize("seed", range(20))
def test_a_cluster_is_founded_whenever_its_nodes_are_killed_meanwhile(seed: int) -> None:
    async def main(loop: VirtualLoop, rng: random.Random) -> None:
        cluster = Cluster(loop, rng)
        for _ in range(4):
            for node in NODES:
                if node not in cluster.logs:
                    await cluster.start(node)
            await asyncio.sleep(rng.uniform(0, 0.08))
            for node in NODES:
                if rng.random() < 0.6:
                    await cluster.kill(node)
        assert await cluster.settle()
        await cluster.until(lambda: not any(log.joining() for log in cluster.logs.values()))
        assert not cluster.violations()
        for log in cluster.logs.values():
            await log.stop()

    run(seed, main)
