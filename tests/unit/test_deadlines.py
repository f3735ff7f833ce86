"""Deadlines: one timer for all, however many there are."""

import asyncio
import random

from coordinator.deadlines import Deadlines
from tests.support.clocks import FakeClock
from tests.support.waiting import eventually, turns


class Due:
    """A clock, deadlines, and what came due, in batches."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.batches: list[list[str]] = []
        self.deadlines = Deadlines(self.clock, self.batches.append)

    @property
    def keys(self) -> list[str]:
        return [key for batch in self.batches for key in batch]

    def at(self, key: str, in_s: float) -> None:
        self.deadlines.set(key, self.clock.monotonic_s() + in_s)


async def test_they_come_in_order_and_once() -> None:
    due = Due()
    for key, in_s in (("c", 0.03), ("a", 0.01), ("b", 0.02)):
        due.at(key, in_s)
    await eventually(lambda: len(due.keys) == 3)
    assert due.keys == ["a", "b", "c"]
    assert len(due.deadlines) == 0
    await turns()
    assert due.keys == ["a", "b", "c"]


async def test_what_is_due_together_comes_together() -> None:
    due = Due()
    for number in range(100):
        due.at(str(number), -1.0)
    await eventually(lambda: due.batches)
    assert len(due.batches) == 1
    assert len(due.keys) == 100


async def test_an_earlier_one_is_not_held_up_by_a_later_one() -> None:
    due = Due()
    due.at("late", 3600)
    due.at("soon", 0.001)
    await eventually(lambda: due.keys)
    assert due.keys == ["soon"]
    assert len(due.deadlines) == 1
    due.deadlines.clear()


async def test_cancelled_and_cleared_ones_never_come() -> None:
    due = Due()
    due.at("cancelled", 0.001)
    due.at("kept", 0.002)
    due.deadlines.cancel("cancelled")
    due.deadlines.cancel("never set")
    await eventually(lambda: due.keys)
    assert due.keys == ["kept"]
    due.at("cleared", 0.001)
    due.deadlines.clear()
    assert due.deadlines._timer is None
    due.at("after", 0.002)
    await eventually(lambda: "after" in due.keys)
    assert due.keys == ["kept", "after"]


async def test_the_last_deadline_of_a_key_counts() -> None:
    due = Due()
    due.at("key", 3600)
    due.at("key", 0.001)
    await eventually(lambda: due.keys)
    due.at("key", 0.001)
    due.at("key", 3600)
    due.at("other", 0.002)
    await eventually(lambda: "other" in due.keys)
    assert due.keys == ["key", "other"]
    due.deadlines.clear()


async def test_a_deadline_may_be_set_while_others_are_told() -> None:
    clock = FakeClock()
    told: list[str] = []

    def hear(keys: list[str]) -> None:
        told.extend(keys)
        if len(told) < 3:
            deadlines.set(f"next {len(told)}", clock.monotonic_s())

    deadlines = Deadlines(clock, hear)
    deadlines.set("first", clock.monotonic_s())
    await eventually(lambda: len(told) == 3)
    assert told == ["first", "next 1", "next 2"]
    assert deadlines._timer is None


async def test_cancelled_ones_take_no_memory() -> None:
    due = Due()
    for number in range(10_000):
        due.at(str(number), 3600)
        due.deadlines.cancel(str(number))
    assert len(due.deadlines._heap) <= 130
    for number in range(500):
        due.at(str(number), 3600)
    for number in range(400):
        due.deadlines.cancel(str(number))
    assert len(due.deadlines._heap) <= 2 * len(due.deadlines) + 1
    due.deadlines.clear()


async def test_however_many_there_are_there_is_one_timer() -> None:
    due = Due()
    rng = random.Random(1)
    timers = []
    loop = asyncio.get_running_loop()
    for number in range(100):
        due.at(str(number), rng.uniform(100, 200))
        timers.append(due.deadlines._timer)
    armed = [timer for timer in timers if timer is not None and not timer.cancelled()]
    assert {id(timer) for timer in armed} == {id(due.deadlines._timer)}
    assert due.deadlines._timer is not None
    assert due.deadlines._timer.when() >= loop.time()
    due.deadlines.clear()
