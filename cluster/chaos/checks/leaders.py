"""Every epoch has one leader at the most: it is Raft's term, and in a term no two are elected.

Two nodes that lead at the same time are nothing wrong if their epochs differ: one that is cut off or paused does not
know that it was deposed, and nothing that it begins is committed.
"""

from cluster.chaos.history import History


def leaders(history: History) -> list[str]:
    """Compares what all nodes have ever said of themselves, however long after each other."""
    said: dict[int, dict[str, float]] = {}
    for event in history.of("leads"):
        said.setdefault(event["epoch"], {}).setdefault(event["node"], event["at"])
    complaints = [] if said else ["no node was ever seen to lead"]
    for epoch, nodes in sorted(said.items()):
        if len(nodes) > 1:
            who = ", ".join(f"{node} (at {at_s:.2f} s)" for node, at_s in nodes.items())
            complaints.append(f"epoch {epoch} has {len(nodes)} leaders: {who}")
    return complaints
