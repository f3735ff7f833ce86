"""No branch is prepared for longer than the bound while a majority is up, and its participant with it.

A time is *calm* for a participant when it is well and reachable, and a majority of the nodes is well and can hear each
other. What is paused, killed, cut off or out of disk is not well; a slow link and a clock that was set are nothing that
could excuse a delay.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from cluster.chaos.history import Event, History


class Wait(NamedTuple):
    """A branch that was seen prepared. waited_s: for how long it has been, and all has been well."""

    participant: str
    gid: str
    began_s: float
    at_s: float
    waited_s: float


def waits(history: History) -> Iterator[Wait]:
    """Every look at a prepared branch while its participant was calm."""
    nodes, participants = history.nodes, history.participants
    active: dict[int, Event] = {}
    calm_since: dict[str, float] = dict.fromkeys(participants, 0.0)
    since: dict[tuple[str, str], float] = {}
    for event in history.of("began", "ended", "prepared"):
        at_s = event["at"]
        if event["type"] != "prepared":
            active.setdefault(event["fault"], event)
            for name in participants:
                # What ends now has impaired it until now.
                if not _calm(name, nodes, active.values()):
                    calm_since[name] = at_s
            if event["type"] == "ended":
                del active[event["fault"]]
        elif event["gids"] is not None:
            name = event["participant"]
            for key in [key for key in since if key[0] == name and key[1] not in event["gids"]]:
                del since[key]
            if event["gids"] and _calm(name, nodes, active.values()):
                for gid in event["gids"]:
                    began_s = since.setdefault((name, gid), at_s)
                    yield Wait(name, gid, began_s, at_s, at_s - max(began_s, calm_since[name]))
            else:
                for gid in event["gids"]:
                    since.setdefault((name, gid), at_s)


def doubt(history: History) -> list[str]:
    """Follows every prepared branch from look to look."""
    bound_s = history.run["bound_s"]
    longest: dict[tuple[str, str], Wait] = {}
    for wait in waits(history):
        if wait.waited_s > bound_s:
            longest[wait.participant, wait.gid] = wait
    complaints = [
        f"{wait.gid} is prepared at {wait.participant} since {wait.began_s:.2f} s at least; at {wait.at_s:.2f} s "
        f"all has been well for {wait.waited_s:.1f} s"
        for wait in longest.values()
    ]
    looked = {event["participant"]: event["gids"] for event in history.of("prepared")}
    for name in history.participants:
        if name not in looked:
            complaints.append(f"{name} was never asked what it has prepared")
        elif looked[name] is None:
            complaints.append(f"{name} did not say at rest what it has prepared")
    complaints += [f"{gid} is prepared at {name} at rest" for name, gids in looked.items() for gid in gids or ()]
    return complaints


def _calm(participant: str, nodes: Collection[str], faults: Iterable[Event]) -> bool:
    impaired: set[str] = set()
    cut: set[frozenset[str]] = set()
    for fault in faults:
        impaired |= set(fault.get("parts", ()))
        cut |= {frozenset(link) for link in fault.get("links", ())}
    well = [node for node in nodes if node not in impaired]
    if participant in impaired or any(frozenset((participant, node)) in cut for node in nodes):
        return False
    needed = len(nodes) // 2 + 1
    return any(
        all(frozenset(pair) not in cut for pair in combinations(group, 2)) for group in combinations(well, needed)
    )
