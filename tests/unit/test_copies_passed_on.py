"""Backup and restore by way of a follower, and while the leader changes: streams that nobody holds as a whole."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from cluster.calls import Caller
from cluster.commands.copies import put_back
from coordinator.copies import CopyReader
from coordinator.copying import Copying
from coordinator.ledger import Ledger
from coordinator.relay import break_off
from participants.null import NullManager
from participants.server import start
from tests.support.logs import Replicas
from tests.support.nodes import RunningNode, configs, running
from tests.support.waiting import eventually

NODES = ("n1", "n2", "n3")


@asynccontextmanager
async def three(replicas: Replicas, generation: int = 1) -> AsyncIterator[list[RunningNode]]:
    """Three nodes; n1 leads, at level 2."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                running(replace(config, generation=generation), replicas.logs[config.node], ready=False)
            )
            for config in configs(NODES)
        ]
        replicas.lead("n1")
        await eventually(lambda: all(each.node.ledger.level == 2 for each in nodes))
        yield nodes


@pytest.fixture
async def copy() -> bytes:
    """Of a cluster that did twenty transactions; as a follower passes it on."""
    async with three(Replicas(nodes=NODES)) as (first, second, _third):
        participant = await start(NullManager())
        await first.register("p", participant.url)
        told = [(await second.submit("p", wait="ended")).json["gid"] for _ in range(20)]
        by_leader = await first.call("GET", "/v1/backup")
        by_follower = await second.call("GET", "/v1/backup")
        assert (by_leader.status, by_follower.status) == (200, 200)
        assert by_follower.headers["Outlast-Leader"] == first.url
        await participant.stop()
    for raw in (by_leader.raw, by_follower.raw):
        reader = CopyReader()
        ledger = Ledger("test")
        ledger.restore(reader.feed(raw))()
        reader.end()
        assert all(ledger.get(gid) for gid in told)
    return by_follower.raw


async def test_a_follower_passes_a_copy_on(copy: bytes) -> None:
    async with three(Replicas(nodes=NODES), generation=2) as (_first, second, third):
        broken = await second.call("POST", "/v1/restore", raw=copy[:-9])
        assert (broken.status, broken.code) == (422, "broken_copy")
        reply = await second.call("POST", "/v1/restore", raw=copy)
        assert reply.status == 200, reply.raw
        assert len(third.node.ledger) == 20
        again = await third.call("POST", "/v1/restore", raw=copy)
        assert (again.status, again.code) == (409, "not_empty")


@pytest.mark.parametrize("by", [0, 1])
async def test_a_leader_that_changes_midway_has_done_nothing(copy: bytes, by: int) -> None:
    replicas = Replicas(nodes=NODES)
    async with three(replicas, generation=2) as nodes:
        gate = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield copy[:-40]
            await gate.wait()
            yield copy[-40:]

        async def upload() -> tuple[int, str]:
            url = f"{nodes[by].url}/v1/restore"
            async with nodes[by].session.post(url, data=slowly()) as response:
                return response.status, response.headers.get("Outlast-Code", "")

        uploading = asyncio.ensure_future(upload())
        await eventually(lambda: all(node.node.ledger.staged is not None for node in nodes))
        replicas.lead("n2")
        await eventually(lambda: nodes[1].node.driver.leading)
        gate.set()
        assert await uploading == (503, "not_restored")
        assert all(node.node.ledger.staged is None and node.node.ledger.is_fresh for node in nodes)
        reply = await nodes[0].call("POST", "/v1/restore", raw=copy)
        assert reply.status == 200, reply.raw
        assert [len(node.node.ledger) for node in nodes] == [20] * 3
        assert all(node.node.ledger.epoch == node.node.ledger.epoch_base + 2 for node in nodes)


async def test_when_the_leader_is_lost_before_it_has_answered_nobody_is_told_that_nothing_was_done(
    copy: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_in = Copying._take_in

    async def and_gone(self: Copying, request: web.Request, above: int) -> web.Response:
        answer = await take_in(self, request, above)
        break_off(request)
        return answer

    monkeypatch.setattr(Copying, "_take_in", and_gone)
    async with three(Replicas(nodes=NODES), generation=2) as (first, second, _third):
        reply = await second.call("POST", "/v1/restore", raw=copy)
        assert (reply.status, reply.code) == (503, "unknown")
        assert len(first.node.ledger) == 20
        file = tmp_path / "copy"
        file.write_bytes(copy)
        async with Caller([second.url]) as caller:
            assert (await put_back(caller, file, len(copy), within_s=0.1)).status == 409, "it is there"


async def test_a_restore_whose_leader_was_lost_is_asked_for_again_where_nothing_came_of_it(
    copy: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_in = Copying._take_in
    tries = 0

    async def gone_at_first(self: Copying, request: web.Request, above: int) -> web.Response:
        nonlocal tries
        tries += 1
        if tries > 1:
            return await take_in(self, request, above)
        break_off(request)
        return web.Response()

    monkeypatch.setattr(Copying, "_take_in", gone_at_first)
    file = tmp_path / "copy"
    file.write_bytes(copy)
    async with three(Replicas(nodes=NODES), generation=2) as (first, second, _third):
        async with Caller([second.url]) as caller:
            assert (await put_back(caller, file, len(copy))).status == 200
        assert tries == 2
        assert len(first.node.ledger) == 20


async def test_what_was_restored_is_kept_for_its_clients_whoever_leads_next(copy: bytes) -> None:
    replicas = Replicas(nodes=NODES)
    async with three(replicas, generation=2) as nodes:
        participant = await start(NullManager())
        await nodes[0].register("p", participant.url)
        assert (await nodes[0].call("POST", "/v1/restore", raw=copy)).status == 200
        await eventually(lambda: all(node.node.ledger.lost is None for node in nodes))
        replicas.lead("n2")
        await eventually(lambda: nodes[1].node.driver.leading)
        assert nodes[1].node.driver._house._keeps_all()
        await participant.stop()


async def test_who_leads_before_it_has_heard_of_the_restore_takes_over_all_the_same(copy: bytes) -> None:
    """It claims an epoch without the base, which is fenced; and claims another when it has caught up."""
    replicas = Replicas(nodes=NODES)
    async with three(replicas, generation=2) as (first, second, third):
        replicas.logs["n2"].deaf = True
        assert (await first.call("POST", "/v1/restore", raw=copy)).status == 200
        assert second.node.ledger.is_fresh
        replicas.lead("n2")
        await eventually(lambda: b"n2" in replicas.committed[-1].command)
        assert not second.node.driver.leading
        assert third.node.ledger.leader == "n1"
        replicas.logs["n2"].deaf = False
        replicas.logs["n2"].catch_up()
        await eventually(lambda: second.node.driver.leading)
        base = second.node.ledger.epoch_base
        assert {node.node.ledger.epoch for node in (first, second, third)} == {base + 2}
        participant = await start(NullManager())
        await second.register("p", participant.url)
        told = await first.submit("p")
        assert told.json["gid"] == f"test-{base + 2}-0"
        await participant.stop()


async def test_who_is_told_nothing_is_told_nothing_false(copy: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody leads: nothing was begun."""
    monkeypatch.setattr("coordinator.relay.LEADER_PATIENCE_S", 0.2)
    replicas = Replicas(nodes=NODES)
    async with three(replicas, generation=2) as (first, _second, _third):
        replicas.lead(None)
        for method, path in (("GET", "/v1/backup"), ("POST", "/v1/restore"), ("GET", "/v1/reconciliation")):
            reply = await first.call(method, path, raw=copy if method == "POST" else None)
            assert (reply.status, reply.code) == (503, "no_leader")
