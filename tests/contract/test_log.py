"""The contract of `ReplicatedLog`, for every implementation."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import uvloop

from cluster.replication.log import CannotStart, NotProposed, ProposalUnknown
from tests.contract.worlds import MAX_COMMAND_BYTES, POISON, RaftWorld, World, until, world_of


@pytest.fixture(params=["memory", "solo", "raft"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(request.param, tmp_path) as running:
        yield running


@pytest.fixture(params=["solo", "raft"])
async def durable(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(request.param, tmp_path) as running:
        yield running


@pytest.fixture
async def raft(tmp_path: Path) -> AsyncIterator[World]:
    async with world_of("raft", tmp_path) as running:
        yield running


# Of every log.


async def test_the_result_of_apply_reaches_the_proposer(world: World) -> None:
    assert await world.commit(b"abc") == b"cba"
    assert await world.commit(b"") == b""


async def test_thousands_at_once_are_applied_in_the_order_of_proposal(world: World) -> None:
    commands = [b"%d" % number for number in range(5000)]
    await world.commit(b"first")
    log = world.logs[await world.leader()]
    results = await asyncio.gather(*[log.propose(command) for command in commands])
    assert results == [command[::-1] for command in commands]
    for machine in world.machines.values():
        await until(lambda machine=machine: len(machine.commands) == 5001)
        assert machine.commands == [b"first", *commands]


async def test_a_command_above_the_bound_is_refused(world: World) -> None:
    largest = bytes(MAX_COMMAND_BYTES)
    assert await world.commit(largest) == largest
    leader = world.logs[await world.leader()]
    with pytest.raises(NotProposed, match="limit"):
        await leader.propose(largest + b"x")
    assert await world.commit(b"after") == b"retfa"


async def test_leadership_is_told(world: World) -> None:
    leader = await world.leader()
    await until(lambda: all(told and told[-1].leader == leader for told in world.told.values()))
    for node, told in world.told.items():
        assert told[-1] == world.logs[node].leadership()
        assert told[-1].is_leader == (node == leader)
        assert told[-1].term >= 1
        assert all(earlier != later for earlier, later in pairwise(told))


async def test_reachable_are_the_others(world: World) -> None:
    for node, log in world.logs.items():
        assert log.node == node
        await until(lambda node=node, log=log: log.reachable() == set(world.nodes) - {node})


async def test_every_node_hears_what_every_node_understands(world: World) -> None:
    wanted: dict[str, int | None] = {node: world.understand.get(node, 1) for node in world.nodes}
    for log in world.logs.values():
        await until(lambda log=log: log.understands() == wanted)


async def test_a_node_that_is_away_may_come_back_with_other_software(raft: World) -> None:
    await raft.stop("n2")
    for node in ("n1", "n3"):
        log = raft.logs[node]
        await until(lambda log=log: log.understands() == {"n1": 4, "n2": None, "n3": 1})
    raft.understand["n2"] = 2
    await raft.start("n2")
    for log in raft.logs.values():
        await until(lambda log=log: log.understands() == {"n1": 4, "n2": 2, "n3": 1})


async def test_an_abandoned_future_harms_nobody(world: World) -> None:
    await world.commit(b"first")
    log = world.logs[await world.leader()]
    abandoned = log.propose(b"abandoned")
    abandoned.cancel()
    assert await world.commit(b"next") == b"txen"


async def test_what_is_open_at_the_stop_is_unknown_and_later_ones_are_refused(world: World) -> None:
    await world.commit(b"first")
    leader = await world.leader()
    log = world.logs[leader]
    opened = [log.propose(b"open") for _ in range(3)]
    await world.stop(leader)
    for future in opened:
        with contextlib.suppress(ProposalUnknown):
            assert await future == b"nepo"
    with pytest.raises(NotProposed):
        await log.propose(b"late")
    assert not log.leadership().is_leader
    assert log.reachable() == frozenset()
    await log.stop()


async def test_a_log_that_was_not_started_refuses(world: World) -> None:
    with pytest.raises(NotProposed):
        await world.make("n1").propose(b"early")


async def test_a_state_machine_that_raises_stops_the_node_and_is_told(world: World) -> None:
    await world.commit(b"first")
    leader = await world.leader()
    log = world.logs[leader]
    poisoned = log.propose(POISON)
    behind = log.propose(b"behind it")
    for future in (poisoned, behind):
        with pytest.raises(ProposalUnknown):
            await future
    await until(lambda: world.fatal)
    with pytest.raises(NotProposed):
        await log.propose(b"late")
    assert not log.leadership().is_leader
    assert world.machines[leader].commands == [b"first"]
    # A follower may not have been told yet that the first is committed.
    assert all(machine.commands in ([], [b"first"]) for machine in world.machines.values())
    assert {type(error) for error in world.fatal} == {ZeroDivisionError}


async def test_a_restart_replays_everything_under_a_later_term(durable: World) -> None:
    commands = [b"%d" % number for number in range(100)]
    for command in commands:
        await durable.commit(command)
    term = durable.logs[await durable.leader()].leadership().term
    await durable.stop()
    await durable.start()
    await durable.commit(b"after")
    assert durable.logs[await durable.leader()].leadership().term > term
    for machine in durable.machines.values():
        await until(lambda machine=machine: len(machine.commands) == 101)
        assert machine.commands == [*commands, b"after"]


# Of a replicated one.


async def test_only_the_leader_takes_proposals(raft: World) -> None:
    await raft.commit(b"first")
    leader = await raft.leader()
    for node, log in raft.logs.items():
        if node != leader:
            with pytest.raises(NotProposed):
                await log.propose(b"here?")
    await raft.commit(b"last")
    assert raft.machines[leader].commands == [b"first", b"last"]


async def test_another_leads_when_the_leader_stops_and_nothing_is_lost(raft: World) -> None:
    acknowledged = []
    for round_ in range(3):
        for number in range(50):
            command = b"%d.%d" % (round_, number)
            await raft.commit(command)
            acknowledged.append(command)
        stopped = await raft.leader()
        await raft.stop(stopped)
        await raft.commit(b"without %s" % stopped.encode())
        acknowledged.append(b"without %s" % stopped.encode())
        await raft.start(stopped)
    await raft.commit(b"end")
    for machine in raft.machines.values():
        await until(lambda machine=machine: b"end" in machine.commands)
        assert machine.commands == [*acknowledged, b"end"]


async def test_a_node_that_was_away_catches_up(raft: World) -> None:
    await raft.commit(b"first")
    away = next(node for node in raft.nodes if node != raft.logs[node].leadership().leader)
    await raft.stop(away)
    for _ in range(12):  # more than one message may hold
        await asyncio.gather(*[raft.commit(bytes(1000)) for _ in range(500)])
    await raft.start(away)
    await until(lambda: len(raft.machines[away].commands) == 6001)


async def test_the_log_is_compacted_and_a_node_that_was_away_is_caught_up_by_a_snapshot(raft: World) -> None:
    raft.settings = replace(RaftWorld.settings, snapshot_log_entries=50, snapshot_piece_bytes=2000)
    await raft.stop()
    await raft.start()
    await raft.commit(b"first")
    away = next(node for node in raft.nodes if node != raft.logs[node].leadership().leader)
    await raft.stop(away)
    expected = [b"first"]
    for number in range(400):
        expected.append(b"%d" % number)
        await raft.commit(expected[-1])
    for node in raft.logs:
        await until(lambda node=node: raft.logs[node]._journal.first_index > 200, "the log is compacted")
    await raft.start(away)
    await until(lambda: raft.machines[away].commands == expected)
    assert raft.machines[away].restored == 1
    await raft.stop()
    await raft.start()
    await raft.commit(b"last")
    for node, machine in raft.machines.items():
        await until(lambda machine=machine: b"last" in machine.commands)
        assert machine.commands == [*expected, b"last"]
        assert machine.restored == 1, f"{node} starts with its snapshot"
        assert len(list((raft.folder / node).glob("*.snapshot"))) <= 2


async def test_leadership_is_handed_over_under_load(raft: World) -> None:
    acknowledged = []
    running = True

    async def client(number: int) -> None:
        count = 0
        while running:
            count += 1
            command = b"%d.%d" % (number, count)
            with contextlib.suppress(ProposalUnknown):
                await raft.commit(command)
                acknowledged.append(command)

    clients = [asyncio.create_task(client(number)) for number in range(4)]
    for _ in range(3):
        before = len(acknowledged)
        await until(lambda before=before: len(acknowledged) > before + 20)
        old = await raft.leader()
        assert await raft.logs[old].transfer()
        assert raft.logs[old].leadership().leader != old
    running = False
    await asyncio.gather(*clients)
    await raft.commit(b"end")
    for machine in raft.machines.values():
        await until(lambda machine=machine: b"end" in machine.commands)
        assert set(acknowledged) <= set(machine.commands)
        assert len(machine.commands) == len(set(machine.commands))


async def test_a_follower_has_nothing_to_hand_over(raft: World) -> None:
    leader = await raft.leader()
    for node, log in raft.logs.items():
        if node != leader:
            assert not await log.transfer()


async def test_without_a_majority_proposals_end_unknown_and_the_leader_steps_down(raft: World) -> None:
    await raft.commit(b"first")
    leader = await raft.leader()
    log = raft.logs[leader]
    others = [node for node in raft.nodes if node != leader]
    await raft.stop(*others)
    if log.leadership().is_leader:
        assert not await log.transfer()
        late = log.propose(b"late")
        with pytest.raises((ProposalUnknown, NotProposed)):
            await late
    await until(lambda: not log.leadership().is_leader)
    with pytest.raises(NotProposed):
        await log.propose(b"later")
    await raft.start(*others)
    await raft.commit(b"last")
    for machine in raft.machines.values():
        await until(lambda machine=machine: b"last" in machine.commands)
        assert [one for one in machine.commands if one != b"late"] == [b"first", b"last"]


async def test_a_follower_that_is_left_alone_knows_no_leader(raft: World) -> None:
    await raft.commit(b"first")
    leader = await raft.leader()
    left, other = (node for node in raft.nodes if node != leader)
    log = raft.logs[left]
    await until(lambda: log.leadership().leader == leader)
    # The leader last: with somebody to vote for it, this node would campaign, and so forget its leader.
    await raft.stop(other, leader)
    await until(lambda: log.leadership().leader is None)
    await until(lambda: raft.told[left][-1] == log.leadership(), "it is told, too")


async def test_a_folder_in_use_is_told_at_the_start(raft: World) -> None:
    twin = raft.make("n1")
    with pytest.raises(CannotStart, match="in use"):
        await twin.start(raft.machines["n1"], raft.told["n1"].append)
    await twin.stop()


async def test_an_address_in_use_is_told_at_the_start(raft: World, tmp_path: Path) -> None:
    raft.folder = tmp_path / "another"
    twin = raft.make("n1")
    with pytest.raises(OSError, match="in use"):
        await twin.start(raft.machines["n1"], raft.told["n1"].append)
    with pytest.raises(NotProposed):
        await twin.propose(b"x")


async def test_a_cluster_of_one(tmp_path: Path) -> None:
    class Lonely(RaftWorld):
        nodes = ("n1",)

    world = Lonely(tmp_path, {"n1": ("127.0.0.1", 0)})
    await world.start()
    assert await world.commit(b"abc") == b"cba"
    assert not await world.logs["n1"].transfer()
    await world.stop()


@pytest.mark.parametrize(
    "scenario",
    [
        test_thousands_at_once_are_applied_in_the_order_of_proposal,
        test_another_leads_when_the_leader_stops_and_nothing_is_lost,
        test_the_log_is_compacted_and_a_node_that_was_away_is_caught_up_by_a_snapshot,
        test_leadership_is_handed_over_under_load,
        test_without_a_majority_proposals_end_unknown_and_the_leader_steps_down,
    ],
)
def test_the_same_on_the_loop_of_production(tmp_path: Path, scenario: Callable[[World], Awaitable[None]]) -> None:
    """Its transports, and the order of its turns, are not those of asyncio."""

    async def main() -> None:
        async with world_of("raft", tmp_path) as running:
            await scenario(running)

    uvloop.run(main())
