"""Whom a fault is meant for is decided at its time, and nobody is hit twice at once."""

import asyncio
from types import SimpleNamespace
from typing import Any

from cluster.chaos.faults import Nemesis
from cluster.chaos.plan import Fault


class Stage:
    """As much of a stage as is looked at when somebody is chosen."""

    def __init__(self) -> None:
        self.cluster = self
        self.nodes = ("n1", "n2", "n3")
        self.services = {"inventory": None, "orders": None}
        self.servers = {"postgres": None}
        self.disks = {"n1": None, "shop": None}
        self.application = SimpleNamespace(alive=False)

    def process(self, name: str) -> Any:
        assert name == "application"
        return self.application

    async def leader(self) -> Any:
        for _ in range(3):
            await asyncio.sleep(0)  # others are asked meanwhile
        return SimpleNamespace(node="n2")


def fault(kind: str, target: str) -> Fault:
    return Fault(number=1, kind=kind, target=target, due_s=0.0, for_s=1.0)


def nemesis() -> Nemesis:
    stage: Any = Stage()
    return Nemesis(stage, None, [], 1, print)


async def choose(one: Nemesis, *faults: Fault) -> list[str | None]:
    return list(await asyncio.gather(*(one._choose(each) for each in faults)))


async def test_no_two_disks_are_lost_at_a_time():
    one = nemesis()
    assert await choose(one, fault("lose", "leader"), fault("lose", "follower")) == ["n2", None]
    assert await choose(one, fault("kill", "follower")) != [None]
    one.busy.clear()
    assert await choose(one, fault("lose", "leader")) == [None], "it has come back, and does not count yet"
    one.lost = None
    assert await choose(one, fault("lose", "leader")) == ["n2"]


async def test_nobody_is_hit_twice_at_once():
    one = nemesis()
    chosen = await choose(one, *[fault("kill", "leader")] * 4, *[fault("pause", "orders")] * 3)
    assert sorted(chosen[:3]) == ["n1", "n2", "n3"]
    assert chosen[3] is None
    assert chosen[4:] == ["orders", "inventory", None]
    assert await choose(one, fault("disk", "shop"), fault("disk", "shop")) == ["shop", None]


async def test_an_application_that_is_dead_is_not_killed():
    one = nemesis()
    assert await choose(one, fault("kill", "application")) == [None]
    one._stage.application.alive = True
    assert await choose(one, fault("kill", "application")) == ["application"]


async def test_a_clock_is_set_where_it_is_looked_at():
    one = nemesis()
    one.busy.add("n2")
    assert await choose(one, fault("clock", "leader")) == [None]
    one.busy.clear()
    assert await choose(one, fault("clock", "leader")) == ["n2"]
