"""What goes wrong in a run, as data: drawn up front from the seed, so that a run can be repeated with less of it."""

import random
from dataclasses import dataclass, replace
from enum import Enum

NODES = ("n1", "n2", "n3")
BANKS = ("oak", "elm", "fir")
APPLICATIONS = ("a1",)
CLIENTS = ("c1", "c2", "c3", *APPLICATIONS)
LEADER = "leader"
"""Whoever leads at that moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """At `at_s`, `kind` befalls `who` (and `other`), for `for_s`; what `size` means depends on the kind."""

    at_s: float
    kind: str
    who: str = ""
    other: str = ""
    for_s: float = 0.0
    size: float = 0.0

    def __str__(self) -> str:
        words = [f"{self.at_s:.3f}", self.kind, self.who]
        words += [self.other] if self.other else []
        words += [f"for {self.for_s:.3f} s"] if self.for_s else []
        words += [f"size {self.size:.4g}"] if self.size else []
        return " ".join(word for word in words if word)


class Miss(Enum):
    """Why a fault hit nobody, or a disaster did not come."""

    NOBODY = "nobody is there to be hit"
    NO_CLUSTER = "there is no cluster"
    NO_LEADER = "nobody leads"
    NOT_STARTED = "it has not started yet"
    STOPS = "it stops already"
    GONE = "it was gone already"
    DIED_BEFORE = "it died before that"
    HEALED = "all was healed before that"
    NO_BACKUP = "no backup was made"
    NO_TIME = "the backup took too long"


def _node(rng: random.Random) -> str:
    return LEADER if rng.random() < 0.5 else rng.choice(NODES)


def _machine(rng: random.Random) -> str:
    return _node(rng) if rng.random() < 0.6 else rng.choice(BANKS)


def _pair(rng: random.Random) -> tuple[str, str]:
    one, other = rng.sample([*NODES, rng.choice(BANKS)], 2)
    return one, other


def drawn(rng: random.Random, kind: str, at_s: float) -> Fault:
    """One fault of this kind."""
    for_s = rng.choice((0.05, 0.3, 1.0, 2.0)) * rng.uniform(0.5, 2.0)
    who = other = ""
    size = 0.0
    match kind:
        case "kill" | "power cut":
            who = _machine(rng)
        case "crash while writing":
            who, size = _node(rng), float(rng.randrange(1, 12))
        case "power cut while writing":
            who, size = _node(rng), float(rng.randrange(1, 12))
        case "blackout":
            who, for_s = rng.choice(("nodes", "all")), min(for_s, 1.0)
        case "pause":
            who = _machine(rng)
        case "cut":
            who, other = _pair(rng)
        case "one-way cut":
            who, other = _pair(rng)
        case "isolate":
            who = _machine(rng)
        case "deposed":
            who = LEADER
        case "lossy network":
            size = rng.choice((0.02, 0.1, 0.3))
        case "unruly network":
            size = rng.choice((0.05, 0.2))
        case "slow network":
            size = rng.choice((0.02, 0.1, 0.3))
        case "lost disk":
            who = _node(rng)
        case "slow disk":
            who, size = rng.choice((_machine(rng), "nodes")), rng.choice((0.05, 0.2, 0.8))
        case "full disk":
            who, size = _node(rng), float(rng.randrange(0, 20))
        case "failing disk":
            who, for_s, size = _machine(rng), 0.0, float(rng.randrange(1, 6))
        case "clock jump":
            who, for_s = _machine(rng), 0.0
            size = rng.choice((-1, 1)) * rng.choice((0.2, 3.0, 60.0, 1_200.0))
        case "clock drift":
            who, size, for_s = _machine(rng), rng.uniform(0.9, 1.1), 0.0
        case "transfer leadership":
            who, for_s = LEADER, 0.0
        case "restart":
            who = _node(rng)
        case "snapshot":
            who, for_s = _node(rng), 0.0
        case "refuses" | "mute" | "forgets work":
            who, size = rng.choice(BANKS), rng.uniform(0.2, 0.9)
        case "client vanishes":
            who = rng.choice(CLIENTS)
        case _:
            raise ValueError(kind)
    return Fault(at_s=round(at_s, 3), kind=kind, who=who, other=other, for_s=round(for_s, 3), size=size)


KINDS: dict[str, int] = {
    "kill": 8,
    "power cut": 5,
    "crash while writing": 4,
    "power cut while writing": 5,
    "blackout": 2,
    "pause": 6,
    "cut": 5,
    "one-way cut": 4,
    "isolate": 6,
    "deposed": 5,
    "lossy network": 3,
    "unruly network": 4,
    "slow network": 3,
    "lost disk": 2,
    "slow disk": 4,
    "full disk": 3,
    "failing disk": 2,
    "clock jump": 3,
    "clock drift": 2,
    "transfer leadership": 3,
    "restart": 2,
    "snapshot": 3,
    "refuses": 2,
    "mute": 2,
    "forgets work": 2,
    "client vanishes": 2,
}
"""Every kind, and how often it is drawn."""


def blackout_on_slow_disks(rng: random.Random, at_s: float) -> list[Fault]:
    """Much is acknowledged, or nearly, when the power goes."""
    slow = Fault(at_s=at_s, kind="slow disk", who="nodes", for_s=1.5, size=rng.choice((0.1, 0.3)))
    dark = Fault(at_s=at_s + rng.uniform(0.2, 1.4), kind="blackout", who="nodes", for_s=rng.uniform(0.05, 0.5))
    return [slow, dark]


def blackout_in_an_election(rng: random.Random, at_s: float) -> list[Fault]:
    """Who has just voted loses power, and votes again."""
    slow = Fault(at_s=at_s, kind="slow disk", who="nodes", for_s=3.0, size=0.4)
    dead = Fault(at_s=at_s + 0.1, kind="kill", who=LEADER, for_s=3.0)
    again_s = at_s + 0.15
    dark = []
    for _ in range(rng.randrange(1, 4)):
        again_s += rng.uniform(0.1, 0.5)
        who = rng.choice((LEADER, *NODES))
        dark.append(Fault(at_s=again_s, kind="power cut", who=who, for_s=rng.uniform(0.005, 0.1)))
    return [slow, dead, *dark]


def deposed_again_and_again(rng: random.Random, at_s: float) -> list[Fault]:
    """Who led leads again soon."""
    times = [at_s + step * rng.uniform(0.3, 0.8) for step in range(rng.randrange(2, 5))]
    return [
        Fault(at_s=each, kind=rng.choice(("deposed", "transfer leadership")), who=LEADER, for_s=0.6) for each in times
    ]


def deposed_on_slow_disks(rng: random.Random, at_s: float) -> list[Fault]:
    """Much is wished, and little of it in the log, when the leader is cut off."""
    slow = Fault(at_s=at_s, kind="slow disk", who="nodes", for_s=1.5, size=rng.choice((0.2, 0.5)))
    return [slow, Fault(at_s=at_s + rng.uniform(0.3, 1.0), kind="deposed", who=LEADER, for_s=1.5)]


def bank_dies_on_a_slow_disk(rng: random.Random, at_s: float) -> list[Fault]:
    """Votes wait for the disk when their participant dies."""
    who = rng.choice(BANKS)
    slow = Fault(at_s=at_s, kind="slow disk", who=who, for_s=1.5, size=0.4)
    return [slow, Fault(at_s=at_s + rng.uniform(0.2, 1.2), kind="kill", who=who, for_s=0.3)]


def leader_forgets_alone(rng: random.Random, at_s: float) -> list[Fault]:
    """What a slow leader and one follower hold; the leader forgets it, and comes back to the other one."""
    one, other = rng.sample(NODES[1:], 2)
    again_s = at_s + rng.uniform(0.4, 0.8)
    return [
        Fault(at_s=at_s, kind="slow disk", who="n1", for_s=2.0, size=0.8),
        Fault(at_s=at_s, kind="isolate", who=one, for_s=again_s - at_s),
        Fault(at_s=again_s, kind="power cut", who="n1", for_s=0.02),
        Fault(at_s=again_s, kind="isolate", who=other, for_s=1.5),
    ]


def late_messages(rng: random.Random, at_s: float) -> list[Fault]:
    """What was sent arrives when nobody reckons with it any more."""
    slow = Fault(at_s=at_s, kind="slow network", for_s=2.5, size=rng.choice((0.3, 0.8)))
    lossy = Fault(at_s=at_s, kind="lossy network", for_s=2.5, size=0.3)
    return [slow, lossy, Fault(at_s=at_s + rng.uniform(0.3, 1.5), kind="kill", who=LEADER, for_s=0.5)]


def refused_while_late(rng: random.Random, at_s: float) -> list[Fault]:
    """One votes no at once, and the abort overtakes what asks another for its vote."""
    slow = Fault(at_s=at_s, kind="slow network", for_s=2.5, size=rng.choice((0.3, 0.8)))
    lossy = Fault(at_s=at_s, kind="lossy network", for_s=2.5, size=0.3)
    return [slow, lossy, *[Fault(at_s=at_s, kind="refuses", who=bank, for_s=2.5, size=0.4) for bank in BANKS]]


COMBINED = (
    leader_forgets_alone,
    late_messages,
    deposed_on_slow_disks,
    bank_dies_on_a_slow_disk,
    blackout_on_slow_disks,
    blackout_in_an_election,
    deposed_again_and_again,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaster:
    """All nodes are lost, but for a copy: the cluster is made anew from it, as its next generation.

    survivor: the node whose disk is left, which is what the copy is made of; "": a backup was made before.
    backup_s: when that was. down_s: until the new nodes start.
    """

    at_s: float
    down_s: float
    survivor: str = ""
    backup_s: float = 0.0

    def __str__(self) -> str:
        source = f"the disk of {self.survivor}" if self.survivor else f"a backup of {self.backup_s:.3f}"
        return f"{self.at_s:.3f} disaster: all is lost but {source}; anew after {self.down_s:.3f} s"


def drawn_disaster(rng: random.Random, heal_s: float) -> Disaster:
    """At any moment that leaves time for what follows."""
    at_s, down_s = rng.uniform(1.5, heal_s - 2.0), rng.uniform(0.3, 1.5)
    survivor = rng.choice(("", *NODES))
    backup_s = 0.0 if survivor else max(0.5, at_s - rng.choice((0.1, 0.5, 1.5, 4.0)) * rng.uniform(0.5, 1.0))
    return Disaster(at_s=round(at_s, 3), down_s=round(down_s, 3), survivor=survivor, backup_s=round(backup_s, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, but for its chances: what goes wrong, when that ends, and who is not healed."""

    faults: tuple[Fault, ...]
    heal_s: float
    left_out: str = ""
    """A node that stays away for good; a majority is enough."""
    old: tuple[str, ...] = ()
    """Nodes that begin with software of the oldest level, and are upgraded on the way, or when all is healed ..."""
    stays_old: str = ""
    """... but for this one, which is not."""
    disaster: Disaster | None = None


def in_order(faults: list[Fault], heal_s: float) -> tuple[Fault, ...]:
    """As a plan has them; none comes after all is healed."""
    timely = [replace(fault, at_s=round(min(fault.at_s, heal_s - 0.1), 3)) for fault in faults]
    return tuple(sorted(timely, key=lambda fault: fault.at_s))


def draw(seed: int) -> Plan:
    """The plan of this seed."""
    rng = random.Random(f"plan {seed}")
    heal_s = rng.uniform(5.0, 11.0)
    kinds = list(KINDS)
    # A run has a character: a few kinds that come often meet each other more than all of them seldom.
    favourites = rng.sample(kinds, rng.randrange(2, 7)) if rng.random() < 0.6 else kinds
    weights = [KINDS[kind] for kind in favourites]
    count = rng.randrange(3, 15)
    times = sorted(rng.uniform(0.3, heal_s - 0.2) for _ in range(count))
    faults = [drawn(rng, rng.choices(favourites, weights)[0], at_s) for at_s in times]
    if rng.random() < 0.3:
        faults += rng.choice(COMBINED)(rng, rng.uniform(0.5, heal_s - 2.5))
    left_out = rng.choice(NODES) if rng.random() < 0.25 else ""
    lost = [fault for fault in faults if fault.kind == "lost disk"]
    for fault in lost[1:]:
        faults.remove(fault)
    if lost:
        left_out = ""  # whoever has lost its disk counts again only when the two others have helped it
    rng = random.Random(f"levels {seed}")
    old = tuple(sorted(rng.sample(NODES, rng.choice((1, 2, 2, 3))))) if rng.random() < 0.3 else ()
    stays_old = old[0] if old and rng.random() < 0.2 else ""
    for name in old:
        if name != stays_old:
            at_s, for_s = rng.uniform(0.3, heal_s - 0.2), rng.uniform(0.05, 1.0)
            faults.append(
                Fault(at_s=round(at_s, 3), kind="upgrade", who=name, for_s=round(for_s, 3), size=round(rng.random(), 3))
            )
    plan = Plan(
        faults=in_order(faults, heal_s), heal_s=round(heal_s, 3), left_out=left_out, old=old, stays_old=stays_old
    )
    rng = random.Random(f"disaster {seed}")
    return struck(plan, drawn_disaster(rng, heal_s)) if rng.random() < 0.2 else plan


def struck(plan: Plan, disaster: Disaster) -> Plan:
    """The plan with that, and without what does not go with it: a new cluster begins with all of its nodes."""
    faults = tuple(fault for fault in plan.faults if fault.kind not in ("lost disk", "upgrade"))
    return replace(plan, faults=faults, left_out="", old=(), stays_old="", disaster=disaster)
