"""Atomicity: of a transaction's marks all are there or none, and that is what was said of it."""

from cluster.chaos.history import History


def atomicity(history: History) -> list[str]:
    """Compares the databases with each other, and with every outcome that anybody was told."""
    complaints = []
    told = {gid: outcome for gid, outcome, _ in history.sightings()}
    somewhere: set[str] = set()
    for sort, marks in history.marks().items():
        missing = sorted(set(history.books.get(sort, ())) - set(marks))
        if missing:
            complaints.append(f"nobody looked into the database of {', '.join(missing)} for what {sort} has done")
            continue
        where: dict[str, list[str]] = {}
        for participant, orders in marks.items():
            for gid in orders.values():
                where.setdefault(gid, []).append(participant)
        somewhere |= set(where)
        for gid, found in where.items():
            if len(found) != len(marks):
                complaints.append(f"{gid} is at {', '.join(sorted(found))} only")
            if told.get(gid) == "aborted":
                complaints.append(f"{gid} was said to be aborted, and is at {', '.join(sorted(found))}")
    complaints += [
        f"{gid} was said to be committed, and is nowhere"
        for gid, outcome in told.items()
        if outcome == "committed" and gid not in somewhere
    ]
    return complaints
