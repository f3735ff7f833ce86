"""A snapshot handed over, message by message."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from cluster.replication.catch_up import CatchUp
from cluster.replication.guard import Message
from cluster.replication.snapshot import Snapshot, Snapshots
from tests.simulation.disk import SimulatedDisk
from tests.simulation.virtual import VirtualLoop, run

PIECES = [bytes([number]) * 100 for number in range(20)]


class End:
    """One end, and what it was told and has said."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.disk = SimulatedDisk(random.Random(1))
        self.snapshots = Snapshots(self.disk)
        self.said: list[Message] = []
        self.state: list[bytes] = []
        self.caught: list[tuple[str, int]] = []
        self.errors: list[BaseException] = []
        self.catch_up = CatchUp(
            snapshots=self.snapshots,
            owner=self,
            send=lambda _peer, message: self.said.append(message),
            clock=loop,
            piece_bytes=300,
            repeat_s=1.0,
        )

    def decode(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        found = list(pieces)
        return lambda: self.state.extend(found)

    def install(self, snapshot: Snapshot, put: Callable[[], object]) -> object:
        return put()

    def caught_up(self, peer: str, index: int) -> None:
        self.caught.append((peer, index))

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)

    async def next(self) -> Message:
        """What it says next."""
        await asyncio.sleep(0.01)
        (message,), self.said = self.said, []
        return message

    async def nothing(self) -> None:
        await asyncio.sleep(0.01)
        assert not self.said


def both(scenario: Callable[[End, End], Coroutine[Any, Any, None]]) -> None:
    async def main(loop: VirtualLoop, rng: random.Random) -> None:
        leader, follower = End(loop), End(loop)
        leader.snapshots.write(7, 2, PIECES)
        await scenario(leader, follower)
        await leader.catch_up.stop()
        await follower.catch_up.stop()
        assert not leader.errors
        assert not follower.errors

    run(1, main)


async def finish(leader: End, follower: End, piece: Message) -> None:
    while True:
        follower.catch_up.piece("n1", piece)
        got = await follower.next()
        leader.catch_up.got("n2", piece["term"], got)
        if got["done"]:
            break
        piece = await leader.next()
    assert follower.state == PIECES
    assert follower.snapshots.indices() == [7]
    assert leader.caught == [("n2", 7)]


def test_piece_by_piece() -> None:
    async def scenario(leader: End, follower: End) -> None:
        leader.catch_up.needed("n2", 3)
        await finish(leader, follower, await leader.next())

    both(scenario)


def test_what_comes_twice_sets_off_no_second_train() -> None:
    async def scenario(leader: End, follower: End) -> None:
        leader.catch_up.needed("n2", 3)
        piece = await leader.next()
        follower.catch_up.piece("n1", piece)
        got = await follower.next()
        for _ in range(3):
            leader.catch_up.got("n2", 3, got)
        second = await leader.next()
        leader.catch_up.got("n2", 3, got | {"offset": 0})
        await leader.nothing()
        follower.catch_up.piece("n1", piece)
        leader.catch_up.got("n2", 3, await follower.next())
        await leader.nothing()
        await finish(leader, follower, second)

    both(scenario)


def test_what_is_lost_is_said_again() -> None:
    async def scenario(leader: End, follower: End) -> None:
        leader.catch_up.needed("n2", 3)
        piece = await leader.next()
        leader.catch_up.needed("n2", 3)
        await leader.nothing()
        await asyncio.sleep(1.0)
        leader.catch_up.needed("n2", 3)
        assert await leader.next() == piece
        await finish(leader, follower, piece)

    both(scenario)


def test_a_follower_that_has_forgotten_gets_it_from_the_start() -> None:
    async def scenario(leader: End, follower: End) -> None:
        leader.catch_up.needed("n2", 3)
        follower.catch_up.piece("n1", await leader.next())
        leader.catch_up.got("n2", 3, await follower.next())
        second = await leader.next()
        follower.catch_up._drop_incoming()
        follower.catch_up.piece("n1", second)
        leader.catch_up.got("n2", 3, await follower.next())
        await leader.nothing()
        await asyncio.sleep(1.0)
        leader.catch_up.needed("n2", 3)
        follower.catch_up.piece("n1", await leader.next())
        leader.catch_up.got("n2", 3, await follower.next())
        await finish(leader, follower, await leader.next())

    both(scenario)


def test_a_new_leader_goes_on_where_nothing_fits_from_the_start() -> None:
    async def scenario(leader: End, follower: End) -> None:
        leader.catch_up.needed("n2", 3)
        follower.catch_up.piece("n1", await leader.next())
        await follower.next()
        leader.catch_up.forget("n2")
        leader.catch_up.needed("n2", 4)
        piece = await leader.next()
        assert (piece["term"], piece["offset"]) == (4, 0)
        await finish(leader, follower, piece)

    both(scenario)


def test_what_was_damaged_on_the_way_is_not_kept() -> None:
    async def scenario(leader: End, follower: End) -> None:
        leader.catch_up.needed("n2", 3)
        piece = await leader.next()
        damaged = piece | {"data": piece["data"][:-1] + bytes([piece["data"][-1] ^ 1])}
        while True:
            follower.catch_up.piece("n1", damaged)
            await asyncio.sleep(0.01)
            if not follower.said:
                break
            leader.catch_up.got("n2", 3, await follower.next())
            damaged = await leader.next()
        assert follower.state == []
        assert follower.snapshots.indices() == []
        await asyncio.sleep(1.0)
        leader.catch_up.needed("n2", 3)
        follower.catch_up.piece("n1", await leader.next())
        leader.catch_up.got("n2", 3, await follower.next())
        await finish(leader, follower, await leader.next())

    both(scenario)


def test_no_room_is_survived() -> None:
    async def scenario(leader: End, follower: End) -> None:
        follower.disk.room = 0
        leader.catch_up.needed("n2", 3)
        piece = await leader.next()
        follower.catch_up.piece("n1", piece)
        await follower.nothing()
        follower.disk.room = None
        await finish(leader, follower, piece)

    both(scenario)
