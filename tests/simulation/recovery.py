"""All nodes are lost, and the cluster is made anew: from a backup, or from the one disk that is left.

What operators do is done here, with the code that `outlast backup`, `recover` and `restore` use: new nodes of the next
generation, with empty disks, are given the copy, and ask the participants what it does not know. Meanwhile
participants, clients and applications go on as they do; and soon faults do, too.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.recovery import Remains, choose, copy_of
from cluster.replication.journal import DurableJournal
from cluster.replication.log import CannotStart
from cluster.replication.offline import committed_of
from cluster.replication.raft_journal import RaftJournal
from coordinator.config import NodeConfig
from coordinator.copies import CopyReader
from coordinator.ledger import Ledger
from tests.simulation.clients import API_PORT
from tests.simulation.faults import NODES, Disaster, Miss
from tests.simulation.http import NoAnswer, call
from tests.simulation.pumps import InstantPump

if TYPE_CHECKING:
    from tests.simulation.world import World

_LOOK_S = 0.05


class Recovery:
    """Of one disaster."""

    def __init__(self, world: "World", disaster: Disaster, began_s: float) -> None:
        self._world = world
        self._disaster = disaster
        self._began_s = began_s
        self._copy = b""

    async def run(self) -> None:
        """From the backup to the last answer. The world's business: it runs in no machine's life."""
        world, disaster = self._world, self._disaster
        if not disaster.survivor:
            await self._until(disaster.backup_s)
            backup = world.as_admin(self._backup())
            while not backup.done() and not world.closing:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)
            if not backup.done():
                backup.cancel()
                world.net.count("disasters that did not come: no backup was made")
                world.hear("struck", disaster, Miss.NO_BACKUP)
                return
            self._copy = backup.result()
        await self._until(disaster.at_s)
        if world.injector.healed or self._left_s() < disaster.down_s:
            world.net.count("disasters that did not come: the backup took too long")
            world.hear("struck", disaster, Miss.NO_TIME)
            return
        world.is_down = world.recovering = True
        world.hear("struck", disaster, None)
        world.note("world", f"DISASTER {disaster}")
        for name in NODES:
            world.end(name, power=True)
            world.machines[name].lives += 1  # whoever is to start it again comes too late
        if disaster.survivor:
            self._copy = self._left_on(disaster.survivor)
        await asyncio.sleep(disaster.down_s)
        await self._anew()

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._began_s + at_s - self._world.loop.now_s))

    def _left_s(self) -> float:
        return self._began_s + self._world.plan.heal_s - self._world.loop.now_s

    async def _backup(self) -> bytes:
        """As `outlast backup`."""
        world = self._world
        while True:
            node = world.rng.choice(NODES)
            try:
                status, told = await call(world.machines[node].address, API_PORT, "GET", "/v1/backup", within_s=2.0)
            except NoAnswer as error:
                world.note("admin", f"no backup from {node}: {error}")
            else:
                if status == 200 and isinstance(told, bytes):
                    CopyReader().feed(told)  # raises where it is damaged; it may be cut off
                    if _is_whole(told):
                        world.note("admin", f"a backup of {len(told)} bytes from {node}")
                        return told
                elif status != 503:
                    world.defect(f"backup at {node}: {status} {told}")
            await asyncio.sleep(0.1)

    def _left_on(self, node: str) -> bytes:
        """As `outlast recover`."""
        world = self._world
        disk = world.disks[node]
        disk.room = None
        disk.fail_at.clear()
        config: Any = NodeConfig(
            cluster="sim", node=node, data=Path("/nowhere"), nodes=world.peers, secret="s" * 16, timing=world.timing
        )
        ledger = Ledger("sim")
        journal = RaftJournal(
            disk, DurableJournal(disk, world.journal_settings, new_id=lambda: node.encode().ljust(16)), InstantPump
        )
        try:
            log = committed_of(journal, ledger)
        except CannotStart as error:
            world.defect(f"what is left of {node} cannot be read: {error}")
            raise
        remains = choose([Remains(config=config, ledger=ledger, log=log)], len(NODES))
        world.note("admin", remains.describe())
        _, parts = copy_of(remains, now_ms=world.machines["admin"].wall_ms())
        return b"".join(parts)

    async def _anew(self) -> None:
        world = self._world
        world.note("world", f"begins anew, from a copy of {len(self._copy)} bytes")
        # Whatever the old nodes have said and was not heard by now never will be: their machines are gone.
        world.tcp.sever(NODES)
        world.wire.forget()
        world.generation += 1
        copy = _ledger_of(self._copy)
        for checker in world.checkers:
            checker.anew(world, copy)
        for name in NODES:
            world.disks[name].replaced()
            world.disks[name].was_lost = False
            world.start(name)
        while not any(  # noqa: ASYNC110 - virtual time costs nothing
            node.driver.leading for node in world.nodes.values()
        ):
            await asyncio.sleep(_LOOK_S)
        world.is_down = False
        world.net.count(f"disasters after which {'one disk was' if self._disaster.survivor else 'a backup was'} left")
        await world.as_admin(self._restore(copy))
        while not any(  # noqa: ASYNC110
            node.driver.leading and node.ledger.epoch_base and node.ledger.lost is None for node in world.nodes.values()
        ):
            await asyncio.sleep(_LOOK_S)
        world.recovering = False
        world.note("world", "all is found out that can be")

    async def _restore(self, copy: Ledger) -> None:
        """As `outlast restore`."""
        world = self._world
        await world.register()
        while True:
            node = world.rng.choice(NODES)
            try:
                address = world.machines[node].address
                status, told = await call(address, API_PORT, "POST", "/v1/restore", body=self._copy, within_s=4.0)
            except NoAnswer as error:
                world.note("admin", f"restore at {node}: {error}")
            else:
                world.note("admin", f"restore at {node}: {status} {told.get('code', '')}")
                if status == 200 or told["code"] == "not_empty":
                    return
                if status != 503:
                    world.defect(f"restore at {node}: {status} {told}")
            await asyncio.sleep(0.1)


def _is_whole(copy: bytes) -> bool:
    reader = CopyReader()
    reader.feed(copy)
    return reader.trailer is not None


def _ledger_of(copy: bytes) -> Ledger:
    ledger = Ledger("sim")
    ledger.restore(iter(CopyReader().feed(copy)))()
    return ledger
