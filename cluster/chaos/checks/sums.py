"""Money is neither made nor lost, nor are goods: what was there is what is left and what was moved."""

from cluster.chaos.history import History


def sums(history: History) -> list[str]:
    """Adds up what the databases have at rest."""
    audits = list(history.of("audit"))
    complaints = [] if audits else ["the databases were not compared with each other"]
    complaints += [each for audit in audits for each in audit["discrepancies"]]
    counted = list(history.of("sums"))
    if not counted:
        complaints.append("nothing was counted")
    for event in counted:
        if event["left"] + event["moved"] != event["initial"]:
            complaints.append(
                f"{event['participant']} began with {event['initial']}; {event['left']} left and {event['moved']} "
                f"moved make {event['left'] + event['moved']}"
            )
    return complaints
