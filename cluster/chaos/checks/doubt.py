"""No branch is prepared for longer than the bound while a majority is up, and its participant with it.

A time is *calm* for a participant when it is well and reachable, and a majority of the nodes is well and can hear each
other. What is paused, killed, cut off or out of disk is not well; a slow link and a clock that was set are nothing that
could excuse a delay.
"""

from collections.abc import Collection, Iterable
from itertools import combinations

from cluster.chaos.history import Event, History


def doubt(history: History) -> list[str]:
    """Follows every prepared branch from look to look."""
    bound_s = history.run["bound_s"]
    nodes, participants = history.nodes, history.participants
    active: dict[int, Event] = {}
    calm_since: dict[str, float] = dict.fromkeys(participants, 0.0)
    since: dict[tuple[str, str], float] = {}
    complained: set[tuple[str, str]] = set()
    looked: dict[str, list[str] | None] = {}
    complaints = []
    for event in history.events:
        match event["type"]:
            case "began" | "ended":
                active.setdefault(event["fault"], event)
                for name in participants:
                    # What ends now has impaired it until now.
                    if not _calm(name, nodes, active.values()):
                        calm_since[name] = event["at"]
                if event["type"] == "ended":
                    del active[event["fault"]]
            case "prepared":
                name, gids = event["participant"], event["gids"]
                looked[name] = gids
                if gids is None:
                    continue
                for key in [key for key in since if key[0] == name and key[1] not in gids]:
                    del since[key]
                for gid in gids:
                    key = (name, gid)
                    began_s = since.setdefault(key, event["at"])
                    waited_s = event["at"] - max(began_s, calm_since[name])
                    if waited_s > bound_s and _calm(name, nodes, active.values()) and key not in complained:
                        complained.add(key)
                        complaints.append(
                            f"{gid} is prepared at {name} since {began_s:.2f} s at least; at {event['at']:.2f} s all "
                            f"has been well for {waited_s:.1f} s"
                        )
    for name in participants:
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
