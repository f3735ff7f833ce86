"""What nodes answer, as far as commands go by it: who answers something else is not a node.

The whole of it is in `docs/openapi.json`. Here is what a command reads, so that a URL that leads elsewhere, or a proxy
with a page of its own, ends in one line and not in a traceback.
"""

import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from cluster.calls import Answer, Unreachable

_LONE: Final = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and no terminal takes."""


class NotANode(Unreachable):
    """Something else answers at that URL than a node. Whether it did something with the request is unknown."""


def printable(value: object) -> bool:
    """Fit for a terminal."""
    return isinstance(value, str) and value.isprintable()


def _note(value: object) -> bool:
    """A text of somebody else's, with line breaks and all; or none."""
    return value is None or (isinstance(value, str) and not _LONE.search(value))


def _word(value: object) -> bool:
    return value is None or printable(value)


def _url(value: object) -> bool:
    """One that something can be asked at."""
    try:
        parts = urlsplit(value) if isinstance(value, str) and printable(value) else None
        return parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half a pair of brackets, or a port that is none
        return False


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _flag(value: object) -> bool:
    return type(value) is bool


def _decision(value: object) -> bool:
    return value is None or value in ("commit", "abort")


Shape = Callable[[object], bool] | dict[str, Any] | list[Any]
"""What a value must be: a test, a map with these keys at least (those that end in ? may lack), or a list of such."""

BRANCH: Final[Shape] = {
    "branch": printable,
    "participant": printable,
    "state": printable,
    "reason?": _note,
    "heuristic?": printable,
    "resolved?": {"outcome": printable, "at": _word, "note": _note},
}
WAITING: Final[Shape] = {"for": printable, "branch": _word, "participant": _word, "trouble": _note, "down_since": _word}
TRANSACTION: Final[Shape] = {
    "gid": printable,
    "state": printable,
    "decision": _decision,
    "reason?": _note,
    "epoch": _count,
    "branches": [BRANCH],
    "started_at": printable,
    "decided_at": _word,
    "ended_at": _word,
    "waiting_for?": [WAITING],
    "heuristic?": printable,
    "acknowledged_at?": _word,
}
PAGE: Final[Shape] = {"transactions": [TRANSACTION], "next?": _word}
PARTICIPANT: Final[Shape] = {"name": printable, "url": _url}
RECONCILIATION: Final[Shape] = {"open": _flag, "awaits_copy": _flag, "settled": {}}
OPEN_RECONCILIATION: Final[Shape] = {
    "undecided": _count,
    "prepared": _count,
    "without": [printable],
    "waiting_for": [printable],
    "participants": {},
}
NODE: Final[Shape] = {  # what older software says (docs/UPGRADES.md) lacks what came later
    "cluster": printable,
    "node": printable,
    "role": printable,
    "leader": _word,
    "level?": _count,
    "ready": _flag,
    "nodes": [{"id": printable, "url": _url, "understands?": lambda value: value is None or _count(value)}],
    "trouble?": _note,
    "reconciling?": _flag,
}
PARTICIPANTS: Final[Shape] = {
    "participants": [
        {
            "name": printable,
            "url": _url,
            "reachable": _flag,
            "owed": _count,
            "trouble": _note,
            "down_since?": _word,
        }
    ]
}
_VIEW: Final[Shape] = {"trouble": _note, "can_tell": lambda value: value is None or _flag(value)}


def fits(value: object, shape: Shape) -> bool:
    """Whether `value` is of that shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        return all(
            fits(value[name], inner) if (name := key.removesuffix("?")) in value else key.endswith("?")
            for key, inner in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    return shape(value)


def transaction(answer: Answer) -> dict[str, Any]:
    """A transaction. Raises `NotANode`."""
    return _checked(answer, TRANSACTION, "a transaction")


def page(answer: Answer) -> tuple[list[dict[str, Any]], str | None]:
    """Transactions, and what to ask for next. Raises `NotANode`."""
    found = _checked(answer, PAGE, "a page of transactions")
    return found["transactions"], found.get("next")


def participant(answer: Answer) -> dict[str, Any]:
    """A registration. Raises `NotANode`."""
    return _checked(answer, PARTICIPANT, "a participant")


def reconciliation(answer: Answer) -> dict[str, Any]:
    """How far finding out is. Raises `NotANode`."""
    found = _checked(answer, RECONCILIATION, "how far finding out is")
    if not all(printable(name) and _count(count) for name, count in found["settled"].items()):
        raise NotANode("what answers is not a node: what is settled is no count")
    if found["open"]:
        _checked(answer, OPEN_RECONCILIATION, "how far finding out is")
        if not all(printable(name) and fits(view, _VIEW) for name, view in found["participants"].items()):
            raise NotANode("what answers is not a node: its view of the participants is none")
    return found


def _checked(answer: Answer, shape: Shape, what: str) -> dict[str, Any]:
    if not fits(answer.body, shape):
        raise NotANode(f"what answers is not a node: with status {answer.status} comes something else than {what}")
    found: dict[str, Any] = answer.body
    return found
