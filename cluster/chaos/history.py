"""What happened in a run: one JSON object a line, in the order in which it was noticed.

Every line has `at`, seconds since the run began, and `type`:

| type | fields | meaning |
|---|---|---|
| `run` | seed, nodes, participants, books, bound_s, retention_s | the first line; `books`: participants, by sort |
| `planned` | fault, kind, target, for_s | a fault that shall happen at `due` |
| `began`, `ended` | fault, kind, target, parts, links, fired, detail | it did; who is impaired, and which pairs |
| `calendar` | fault, seen | whether the node whose clock was set has looked at it meanwhile |
| `asked` | op, client, key, body, node, of | a request is sent; `body` is a short name of what it asks for |
| `answered` | op, outcome, gid, detail | committed, aborted, undecided, reused (422), unknown |
| `read` | node, gid, outcome | somebody looked: committed, aborted, undecided, missing, forgotten |
| `prepared` | participant, gids | its branches that are in doubt now; `gids` null: it does not answer |
| `leader` | node, epoch | who leads, of several the one in the newest epoch; node null: nobody says so |
| `leads` | node, epoch | a node says of itself that it leads; noted of each node once in each epoch |
| `rest` | | every fault has ended, and so has the load |
| `final` | node, gid, outcome | like `read`, at rest, for every transaction at every node |
| `marks` | participant, orders, of | order id to gid, as the database has it, at rest |
| `sums` | participant, initial, left, moved | at rest |
| `locks` | participant, count | locks that its database holds for branches, at rest |
| `audit` | discrepancies | what the databases say against each other, at rest |
| `probe` | what, outcome | an order for goods and of an account that were used, at rest |
| `rejoined` | fault, node, after_s | a node that had lost its disk counts again |
| `lived` | life | the application was started |
| `note` | text | for people |

There are two sorts of transactions, named by `of`: those of the `shop`, which need not say so, and those that the
`application` does by itself. Each leaves its mark at every participant that `books` names for its sort.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

Event = dict[str, Any]

SHOP: Final = "shop"
"""The sort of transaction that a request is about when it does not say."""

MAX_EVENTS: Final = 5_000_000
"""Of one run; half an hour makes a tenth of it. A run that goes beyond fails."""


class Recorder:
    """Writes a history as it happens, and keeps it. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.events: list[Event] = []
        self._path = path
        self._file: TextIO | None = None
        self._began_s = time.monotonic()

    def __enter__(self) -> "Recorder":
        self._file = self._path.open("w")
        self._began_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def now_s(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began_s

    def note(self, type_: str, **fields: Any) -> None:
        """Write one event down."""
        assert self._file is not None, "the history is open"
        assert len(self.events) < MAX_EVENTS, "a run is bounded"
        event = {"at": round(self.now_s, 4), "type": type_, **fields}
        self.events.append(event)
        self._file.write(json.dumps(event) + "\n")

    def history(self) -> "History":
        """All of it so far."""
        return History(self.events)


class History:
    """A recorded run, for the checks."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events

    @staticmethod
    def load(path: Path) -> "History":
        """Read one back. Raises `OSError`, and `ValueError` for what is none."""
        with path.open() as file:
            return History([json.loads(line) for line in file])

    def of(self, *types: str) -> Iterator[Event]:
        """The events of these types, in order."""
        return (event for event in self.events if event["type"] in types)

    @property
    def run(self) -> Event:
        """The first line. Raises `ValueError` when it is missing."""
        for event in self.of("run"):
            return event
        raise ValueError("the history does not say of which run it is")

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ids of all nodes."""
        return tuple(self.run["nodes"])

    @property
    def participants(self) -> tuple[str, ...]:
        """Names of all participants."""
        return tuple(self.run["participants"])

    @property
    def rested(self) -> bool:
        """Whether it came to rest: what is checked at rest was looked at."""
        return any(True for _ in self.of("rest"))

    def requests(self) -> Iterator[tuple[Event, Event | None]]:
        """Every request with its answer; None: there was none."""
        answers = {event["op"]: event for event in self.of("answered")}
        for asked in self.of("asked"):
            yield asked, answers.get(asked["op"])

    def sightings(self) -> Iterator[tuple[str, str, Event]]:
        """Whenever somebody was told what became of a transaction: gid, committed or aborted, the event."""
        for event in self.of("answered", "read", "final"):
            if event.get("gid") is not None and event["outcome"] in ("committed", "aborted"):
                yield event["gid"], event["outcome"], event

    @property
    def books(self) -> dict[str, list[str]]:
        """By sort of transaction: at which participants one leaves a mark."""
        found: dict[str, list[str]] = self.run.get("books") or {SHOP: list(self.participants)}
        return found

    def marks(self) -> dict[str, dict[str, dict[str, str]]]:
        """By sort of transaction, of every participant: order id to gid, at rest."""
        found: dict[str, dict[str, dict[str, str]]] = {sort: {} for sort in self.books}
        for event in self.of("marks"):
            found.setdefault(event.get("of", SHOP), {})[event["participant"]] = event["orders"]
        return found


def few(complaints: Iterable[str], most: int = 5) -> list[str]:
    """The first of them, and a last line that says how many more there are."""
    found = list(complaints)
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]
