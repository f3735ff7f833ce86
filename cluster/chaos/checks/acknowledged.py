"""Acknowledged means kept: what anybody was told of is there at the end, on every node and in every database."""

from typing import Final

from cluster.chaos.history import SHOP, History

_SLACK_S: Final = 60.0


def acknowledged(history: History) -> list[str]:
    """Compares what clients were told with what nodes and databases have at rest."""
    complaints = []
    told: dict[str, tuple[str, str, str, float]] = {}
    for asked, answer in history.requests():
        if answer is not None and answer.get("gid") is not None and answer["outcome"] != "unknown":
            outcome = answer["outcome"]
            if answer["gid"] not in told or outcome != "undecided":
                told[answer["gid"]] = (asked["key"], asked.get("of", SHOP), outcome, answer["at"])
    complaints += [
        f"nothing of {sort} was acknowledged: nothing is proved"
        for sort in history.books
        if not any(outcome == "committed" for _, of, outcome, _ in told.values() if of == sort)
    ]
    said: dict[str, dict[str, str]] = {}
    looked_s = 0.0
    for event in history.of("final"):
        said.setdefault(event["gid"], {})[event["node"]] = event["outcome"]
        looked_s = max(looked_s, event["at"])
    marks = history.marks()
    retention_s = history.run["retention_s"]
    for gid, (key, sort, outcome, at_s) in told.items():
        for node in history.nodes:
            found = said.get(gid, {}).get(node)
            if found == "missing":
                complaints.append(f"{gid} was acknowledged at {at_s:.2f} s, and {node} knows no such transaction")
            if found == "forgotten" and looked_s - at_s < retention_s - _SLACK_S:
                complaints.append(f"{gid} was acknowledged at {at_s:.2f} s, and {node} has forgotten it already")
            if found is None:
                complaints.append(f"{gid} was acknowledged at {at_s:.2f} s, and {node} was not asked about it")
        if outcome == "committed":
            complaints += [
                f"{key} was told to be committed as {gid}; {participant} has it as {orders.get(key)}"
                for participant, orders in marks.get(sort, {}).items()
                if orders.get(key) != gid
            ]
    asked_for = {asked["key"] for asked, _ in history.requests()}
    complaints += [
        f"{participant} has order {order}, which nobody asked for"
        for found_at in marks.values()
        for participant, orders in found_at.items()
        for order in orders
        if order not in asked_for
    ]
    return complaints
