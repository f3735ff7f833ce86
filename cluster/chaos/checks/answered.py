"""Nothing ends silently: whoever keeps asking under its key has a definite answer in the end."""

from cluster.chaos.history import History

_DEFINITE = frozenset({"committed", "aborted", "reused"})


def answered(history: History) -> list[str]:
    """Looks whether each key got one, and whether the run came to rest at all."""
    complaints = [] if history.rested else ["the run did not come to rest"]
    clear: dict[tuple[str, str], bool] = {}
    for asked, answer in history.requests():
        request = (asked["key"], asked["body"])
        definite = answer is not None and answer["outcome"] in _DEFINITE
        clear[request] = clear.get(request, False) or definite
    complaints += [
        f"{key} ({body}) never got a definite answer" for (key, body), definite in clear.items() if not definite
    ]
    complaints += [
        f"request {event['op']} was answered with what no client should see: {event['detail']}"
        for event in history.of("answered")
        if event["outcome"] == "surprise"
    ]
    return complaints
