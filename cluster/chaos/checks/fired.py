"""Every fault that was planned did happen, and did what it should: a run without its disasters proves little."""

from cluster.chaos.history import History


def fired(history: History) -> list[str]:
    """Compares the plan with what was done."""
    began = {event["fault"]: event for event in history.of("began")}
    ended = {event["fault"] for event in history.of("ended")}
    complaints = []
    for event in history.of("planned"):
        number, what = event["fault"], f"fault {event['fault']} ({event['kind']} {event['target']})"
        if number not in began:
            complaints.append(f"{what} never happened")
        elif not began[number]["fired"]:
            complaints.append(f"{what} had no effect: {began[number].get('detail')}")
        elif number not in ended:
            complaints.append(f"{what} never ended")
    looks = [event["seen"] for event in history.of("calendar")]
    if looks and not any(looks):
        complaints.append("no node whose clock was set has ever looked at it")
    return complaints
