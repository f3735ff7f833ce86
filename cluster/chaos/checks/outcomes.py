"""An outcome once seen never changes: on no node, to no client; and at rest all nodes know the same."""

from cluster.chaos.history import Event, History


def outcomes(history: History) -> list[str]:
    """Looks at whatever was ever said of a transaction."""
    complaints = []
    first: dict[str, tuple[str, Event]] = {}
    for gid, outcome, event in history.sightings():
        known, before = first.setdefault(gid, (outcome, event))
        if known != outcome:
            complaints.append(
                f"{gid} was {known} at {before['at']:.2f} s ({_who(before)}), and {outcome} at {event['at']:.2f} s "
                f"({_who(event)})"
            )
    final: dict[str, dict[str, str]] = {}
    for event in history.of("final"):
        final.setdefault(event["gid"], {})[event["node"]] = event["outcome"]
    if not final:
        complaints.append("no node was asked at rest")
    for gid, said in final.items():
        silent = sorted(set(history.nodes) - set(said))
        if silent:
            complaints.append(f"{', '.join(silent)} did not say at rest what became of {gid}")
        undecided = sorted(node for node, outcome in said.items() if outcome == "undecided")
        if undecided:
            complaints.append(f"{gid} is undecided at rest, say {', '.join(undecided)}")
    return complaints


def _who(event: Event) -> str:
    return f"{event['type']} by {event['node']}" if "node" in event else f"request {event['op']}"
