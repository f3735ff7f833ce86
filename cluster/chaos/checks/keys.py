"""Idempotency keys are linearizable: a key is a register that is written once.

Whatever comes first under a key names the transaction that all later ones are told of; another body is refused, and can
only be refused once somebody has asked with the body that won. The databases know it too: an order has its key as id,
so the transaction that placed it is the one that its key names.
"""

from cluster.chaos.history import Event, History


def keys(history: History) -> list[str]:
    """Looks at all requests under each key."""
    by_key: dict[str, list[tuple[Event, Event | None]]] = {}
    for asked, answer in history.requests():
        by_key.setdefault(asked["key"], []).append((asked, answer))
    complaints = [] if by_key else ["no key was ever used"]
    named: dict[str, str] = {}
    for key, requests in by_key.items():
        wins = [(asked, answer) for asked, answer in requests if answer is not None and answer.get("gid") is not None]
        refusals = [
            (asked, answer) for asked, answer in requests if answer is not None and answer["outcome"] == "reused"
        ]
        gids = {answer["gid"] for _, answer in wins}
        bodies = {asked["body"] for asked, _ in wins}
        if len(gids) > 1:
            complaints.append(f"{key} names {', '.join(sorted(gids))}")
        if len(bodies) > 1:
            complaints.append(f"{key} was used with {', '.join(sorted(bodies))}, and all were told of {min(gids)}")
        for asked, refusal in refusals:
            others = [other for other, _ in requests if other["body"] != asked["body"]]
            if asked["body"] in bodies:
                complaints.append(f"{key}: {asked['body']} was refused, and is the body that it names")
            elif not any(other["at"] <= refusal["at"] for other in others):
                complaints.append(f"{key}: {asked['body']} was refused before anybody had asked for anything else")
        if wins:
            named[key] = wins[0][1]["gid"]
    complaints += [
        f"{key} names {named[key]}, and at {participant} {gid} has placed it"
        for marks in history.marks().values()
        for participant, orders in marks.items()
        for key, gid in orders.items()
        if key in named and named[key] != gid
    ]
    return complaints
