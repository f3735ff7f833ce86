"""Breadth first over a world: every state, the shortest way to a bad one, and whether anything is stuck.

Nothing bounds the depth: the walk ends when there is no new state. That nothing is stuck is checked over the finished
graph, backwards: from the states that are settled along helpful steps to those from which they can be reached.
"""

import time
from array import array
from dataclasses import dataclass, replace

from tests.model.world import StateId, World


@dataclass(frozen=True)
class Report:
    """What a walk has met. `trace` is the shortest conversation that ends badly; empty when none does."""

    states: int
    transitions: int
    logs: int
    seconds: float
    settled: int
    trace: tuple[str, ...]
    outlines: frozenset[object] = frozenset()
    """Of all states; when asked for."""

    @property
    def steps(self) -> int:
        """Length of the counterexample: its lines, without those that say what is wrong."""
        return sum(not line.startswith("!!") for line in self.trace)


def explore(world: World, *, limit: int = 5_000_000, outlines: bool = False) -> Report:
    """Walk `world`. Stops at the first bad state; raises `RuntimeError` beyond `limit` states, never silently."""
    with world:
        return _explore(world, limit, outlines)


def _explore(world: World, limit: int, outlines: bool) -> Report:
    started = time.process_time()
    first = world.initial()
    numbers: dict[StateId, int] = {first: 0}
    states = [first]
    parents = array("q", [-1])
    targets, helps, starts = array("q"), bytearray(), array("q", [0])

    def report(bad: int | None, settled: int) -> Report:
        trace = () if bad is None else tuple(world.tell(_path(states, parents, bad)))
        return Report(
            states=len(states),
            transitions=len(targets),
            logs=len(world.logs),
            seconds=time.process_time() - started,
            settled=settled,
            trace=trace,
            outlines=frozenset(world.outline(state) for state in states) if outlines else frozenset(),
        )

    if world.violations(first):
        return report(0, 0)
    for number, state in enumerate(states):
        for after, helpful in world.successors(state):
            if after == state:
                continue
            known = numbers.get(after)
            if known is None:
                known = numbers[after] = len(states)
                states.append(after)
                parents.append(number)
                if world.violations(after):
                    return report(known, 0)
                if known >= limit:
                    raise RuntimeError(f"more than {limit} states")
            targets.append(known)
            helps.append(helpful)
        starts.append(len(targets))
    settled = [number for number, state in enumerate(states) if world.settled(state)]
    stuck = _first_stuck(settled, targets, helps, starts)
    result = report(stuck, len(settled))
    if stuck is not None:
        return replace(result, trace=(*result.trace, "!! from here nothing leads to an end"))
    return result


def _path(states: list[StateId], parents: "array[int]", number: int) -> list[StateId]:
    path = []
    while number >= 0:
        path.append(states[number])
        number = parents[number]
    return path[::-1]


def _first_stuck(settled: list[int], targets: "array[int]", helps: bytearray, starts: "array[int]") -> int | None:
    """The first state, in breadth-first order, from which helpful steps reach no settled one."""
    count = len(starts) - 1
    # The reversed graph, in the same packed form.
    offsets = array("q", bytes(8 * (count + 1)))
    for target, helpful in zip(targets, helps, strict=True):
        offsets[target + 1] += helpful
    for number in range(count):
        offsets[number + 1] += offsets[number]
    sources = array("q", bytes(8 * offsets[count]))
    free = offsets[:]
    for number in range(count):
        for edge in range(starts[number], starts[number + 1]):
            if helps[edge]:
                target = targets[edge]
                sources[free[target]] = number
                free[target] += 1
    reaches = bytearray(count)
    fresh = list(settled)
    for number in fresh:
        reaches[number] = 1
    for number in fresh:
        for edge in range(offsets[number], offsets[number + 1]):
            source = sources[edge]
            if not reaches[source]:
                reaches[source] = 1
                fresh.append(source)
    stuck = reaches.find(0)
    return None if stuck < 0 else stuck
