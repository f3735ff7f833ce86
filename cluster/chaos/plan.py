"""Which faults happen, when, to whom and for how long: all of it from a seed, before anything runs.

First every kind that was asked for comes once, in a random order, then whatever comes. A few at a time may overlap, so
that now and then there is no majority; nobody is hit twice at once. Targets are roles (`leader`, `follower`) or names;
who leads is known when the time has come.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

KINDS: Final = ("kill", "lose", "pause", "cut", "slow", "disk", "clock")

MAX_AT_ONCE: Final = 3
FIRST_S: Final = 2.0
"""Of load before the first fault."""

_LASTS_S: Final = {
    "kill": (0.3, 5.0),
    "lose": (0.3, 3.0),
    "pause": (0.3, 6.0),
    "cut": (0.5, 7.0),
    "slow": (2.0, 8.0),
    "disk": (2.0, 6.0),
    "clock": (2.0, 8.0),
}
_GAP_S: Final = (0.5, 4.0)
_DELAYS_S: Final = (0.02, 0.3)
STEPS_S: Final = (30.0, 6 * 3600.0)
"""Less than nodes remember transactions for (see `stage.RETENTION_S`), so that none of a run is forgotten early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One of them.

    target: who; `leader` and `follower` are known at `due_s`. other: the other end of a link; `all`: of a node the
    other nodes and all services, of anyone else all nodes.
    amount: of slow links the delay each way, of clocks how far they are set, both in seconds.
    one_way: whether only what `target` sends is lost.
    """

    number: int
    kind: str
    target: str
    due_s: float
    for_s: float
    other: str | None = None
    amount: float = 0.0
    one_way: bool = False

    def __str__(self) -> str:
        words = [self.kind, self.target]
        if self.other is not None:
            words.append(f"{'->' if self.one_way else '-'} {self.other}")
        if self.amount:
            words.append(f"{self.amount:+.0f} s" if self.kind == "clock" else f"{self.amount * 1000:.0f} ms")
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Who may be hit besides the nodes.

    participants: services. servers: of databases, which can be killed. stores: disks of databases. applications:
    processes that do transactions of their own. clients: what all who reach nodes from outside are called.
    """

    participants: Sequence[str]
    servers: Sequence[str] = ()
    stores: Sequence[str] = ()
    applications: Sequence[str] = ()
    clients: str = "clients"


def make_plan(seed: int, *, seconds: float, kinds: Sequence[str], cast: Cast) -> list[Fault]:
    """All faults of `seconds` of load, in order of time."""
    rng = random.Random(f"plan {seed}")
    faults: list[Fault] = []
    due_s = FIRST_S
    waiting = list(kinds)
    rng.shuffle(waiting)
    while kinds:
        kind = waiting.pop() if waiting else rng.choice(kinds)
        for_s = min(rng.uniform(*_LASTS_S[kind]), seconds / 6)
        going = sorted(each.due_s + each.for_s for each in faults if each.due_s + each.for_s > due_s)
        if len(going) >= MAX_AT_ONCE:
            due_s = max(due_s, going[-MAX_AT_ONCE])
        if due_s + for_s > seconds:
            break
        faults.append(_fault(rng, len(faults) + 1, kind, due_s, for_s, cast))
        due_s += min(rng.uniform(*_GAP_S), (seconds - FIRST_S) / (2 * len(kinds)))  # all kinds, in short runs too
    return faults


def _fault(rng: random.Random, number: int, kind: str, due_s: float, for_s: float, cast: Cast) -> Fault:
    participant = rng.choice(cast.participants)
    target = rng.choices(["leader", "follower", participant], weights=[5, 3, 3])[0]
    other: str | None = None
    amount, one_way = 0.0, False
    match kind:
        case "kill" if cast.servers and rng.random() < 0.15:
            target = rng.choice(cast.servers)
        case "kill" | "pause" if cast.applications and rng.random() < 0.15:
            target = rng.choice(cast.applications)
        case "cut" | "slow":
            target, other = _link(rng, target, participant, cast)
            if kind == "slow":
                amount = rng.uniform(*_DELAYS_S)
            else:
                one_way = rng.random() < 0.3
        case "lose":
            target = rng.choice(["leader", "follower"])
        case "disk":
            target = rng.choice(["leader", "leader", "follower", *cast.stores])
        case "clock":
            # A follower asks nobody what day it is. Small steps and large ones.
            target = "leader"
            amount = rng.choice([-1, 1]) * math.exp(rng.uniform(*map(math.log, STEPS_S)))
    return Fault(
        number=number, kind=kind, target=target, other=other, due_s=due_s, for_s=for_s, amount=amount, one_way=one_way
    )


def _link(rng: random.Random, target: str, participant: str, cast: Cast) -> tuple[str, str]:
    """Both ends: of nodes, of a node and a service, of clients and a node; or one of them and all that it talks to."""
    what = rng.random()
    if what < 0.15:
        return cast.clients, rng.choice(["leader", "leader", "follower", "all"])
    if target in cast.participants:
        return target, rng.choice(["leader", "follower", "all"])
    if what < 0.35:
        return target, participant
    return target, rng.choice(["follower", "follower", "all"])
