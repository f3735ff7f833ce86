"""No lock outlives its transaction: at rest nothing is locked, and whatever was used can be used again."""

from cluster.chaos.history import History


def locks(history: History) -> list[str]:
    """Looks at the locks that databases hold at rest, and at orders that need what others had locked."""
    counted = {event["participant"]: event["count"] for event in history.of("locks")}
    complaints = [f"nobody looked for locks at {name}" for name in history.participants if name not in counted]
    complaints += [f"{count} locks are left at {name}" for name, count in counted.items() if count]
    probes = list(history.of("probe"))
    if not probes:
        complaints.append("nobody tried at rest whether anything is locked")
    complaints += [
        f"at rest, an order for {event['what']} was {event['outcome']}: {event.get('detail')}"
        for event in probes
        if event["outcome"] != "committed"
    ]
    return complaints
