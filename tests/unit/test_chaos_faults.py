"""Whom a fault is meant for is decided at its time, and nobody is hit twice at once."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.chaos import faults
from cluster.chaos.checks.fired import fired
from cluster.chaos.faults import Nemesis
from cluster.chaos.history import History
from cluster.chaos.plan import Fault
from cluster.process import ProcessTrouble
from cluster.replication.disk import RealDisk
from cluster.replication.standing import at_start


class Stage:
    """As much of a stage as is looked at when somebody is chosen."""

    def __init__(self) -> None:
        self.cluster = self
        self.nodes = ("n1", "n2", "n3")
        self.services = {"inventory": None, "orders": None}
        self.servers: dict[str, Any] = {"postgres": None}
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


class Hours:
    """A recorder by whose clock a minute and a half passes while it looks twice."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._now_s = 0.0

    @property
    def now_s(self) -> float:
        self._now_s += 45.0
        return self._now_s

    def note(self, type_: str, **fields: Any) -> None:
        self.events.append({"at": self.now_s, "type": type_, **fields})


class Waiting(Nemesis):
    """At its third look the one that had lost its disk counts again, if it ever does."""

    def __init__(self, recorder: Any, *, comes_back: bool = True) -> None:
        stage: Any = Stage()
        super().__init__(stage, recorder, [], 1, lambda _: None)
        self.looks = 0
        self.lost = "n1" if comes_back else None
        self.busy = set() if comes_back else {"n1", "n2", "n3"}

    async def _choose(self, fault: Fault) -> str | None:
        self.looks += 1
        if self.looks == 3:
            self.lost = None
        return await super()._choose(fault)

    async def _begin(self, fault: Fault, target: str) -> Any:
        self._note(fault, target, fired=True, detail="it is lost")
        return self._nothing

    async def _nothing(self) -> None:
        self.lost = None


def lost(number: int = 1) -> Fault:
    return Fault(number=number, kind="lose", target="leader", due_s=0.0, for_s=0.0)


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_second_loss_waits_for_the_first_however_long_that_takes(comes_back: bool) -> None:
    recorder: Any = Hours()
    one = Waiting(recorder, comes_back=comes_back)
    recorder.note("planned", fault=1, kind="lose", target="leader")
    await one._one(lost())
    assert fired(History(recorder.events)) == (
        [] if comes_back else ["fault 1 (lose leader) had no effect: everyone was impaired already"]
    )
    assert one.looks == 3 or not comes_back


class Starting:
    """A cluster whose node n1 fails to start twice, before and after there is a marker in its folder."""

    def __init__(self, folder: Path) -> None:
        self.cluster = self
        self.services: dict[str, Any] = {}
        self.configs = [SimpleNamespace(node="n1", data=folder)]
        self.told: list[bool] = []

    def process(self, name: str) -> Any:
        return SimpleNamespace(alive=False)

    async def start_node(self, node: str, *, rejoin: bool) -> None:
        self.told.append(rejoin)
        if len(self.told) == 2:
            disk = RealDisk(self.configs[0].data / "log")
            at_start(disk, "n1", has_log=False, has_history=False, rejoin=rejoin, nonce=b"x")
        if len(self.told) < 4:
            raise ProcessTrouble("it has ended")


async def test_a_node_is_told_to_rejoin_until_its_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_AGAIN_S", 0.0)
    stage: Any = Starting(tmp_path)
    recorder: Any = Hours()
    await Nemesis(stage, recorder, [], 1, print)._start("n1", rejoin=True)
    assert stage.told == [True, True, False, False]
    stage.told.clear()
    await Nemesis(stage, recorder, [], 1, print)._start("n1")
    assert not any(stage.told)


class Server:
    """A database server that says nothing at first, and is killed and started when that takes too long."""

    def __init__(self, silent: int) -> None:
        self.silent = silent
        self.pid: int | None = 1
        self.lived: list[str] = []

    async def single(self, statement: str) -> None:
        self.silent -= 1
        if self.silent >= 0:
            raise ProcessTrouble(f"it said nothing to {statement}")

    async def kill(self) -> None:
        self.pid = None
        self.lived.append("killed")

    async def stop(self) -> None:
        self.lived.append("stopped")

    async def start(self) -> None:
        self.pid = 2
        self.lived.append("started")


async def test_a_server_that_says_nothing_after_its_disk_was_full_is_started_anew() -> None:
    stage, recorder = Stage(), Hours()
    one = Nemesis(stage, recorder, [], 1, lambda _: None)  # type: ignore[arg-type]
    stage.servers = {"postgres": Server(1)}
    await one._restart_server()
    assert stage.servers["postgres"].lived == ["killed", "stopped", "started"]
    stage.servers = {"postgres": Server(100)}
    with pytest.raises(ProcessTrouble, match="said nothing"):
        await one._restart_server()
