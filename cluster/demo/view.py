"""What the audience sees: a live table on a terminal, plain lines anywhere else, and a verdict at the end."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.demo.verdict import Verdict

_EVENTS_SHOWN: Final = 9
_PLAIN_EVERY_S: Final = 2.0


@dataclass(slots=True, kw_only=True)
class NodeLine:
    """One process, as the audience sees it. `state`: leader, follower, killed, starting."""

    name: str
    state: str
    detail: str = ""


@dataclass(slots=True, kw_only=True)
class Picture:
    """All that is shown at one moment."""

    title: str = ""
    share: float = 0.0
    nodes: list[NodeLine] = field(default_factory=list)
    committed: int = 0
    refused: int = 0
    errors: int = 0
    waiting: int = 0
    prepared: int = 0
    longest_prepared_s: float = 0.0


class View:
    """Shows nothing. The base of what shows something."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def event(self, text: str) -> None:
        """Something happened."""

    def show(self, picture: Picture) -> None:
        """This is how it is now; called several times per second."""

    def verdict(self, verdict: Verdict, contrast: Verdict | None) -> None:
        """This is how it ended."""


class PlainView(View):
    """Lines, for logs and pipes."""

    def __init__(self, out: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._out = out
        self._clock = clock
        self._shown_s = 0.0

    def _line(self, text: str) -> None:
        print(f"{self._clock() - self._began_s:6.2f} s  {text}", file=self._out, flush=True)

    def event(self, text: str) -> None:
        """A line."""
        self._line(text)

    def show(self, picture: Picture) -> None:
        """A line every two seconds."""
        if self._clock() - self._shown_s >= _PLAIN_EVERY_S:
            self._shown_s = self._clock()
            self._line(
                f"committed {picture.committed}, refused {picture.refused}, errors {picture.errors}, "
                f"waiting {picture.waiting}, branches prepared {picture.prepared}"
            )

    def verdict(self, verdict: Verdict, contrast: Verdict | None) -> None:
        """The table, without colours."""
        console = Console(file=self._out, no_color=True, highlight=False, width=100)
        console.print(_verdict_table(verdict, contrast))


class LiveView(View):
    """A table that changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(file=sys.stdout, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._events: list[tuple[float, str]] = []
        self._picture = Picture()

    def __enter__(self) -> "LiveView":
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def event(self, text: str) -> None:
        """A line below the table."""
        self._events.append((time.monotonic() - self._began_s, text))
        self._draw()

    def show(self, picture: Picture) -> None:
        """The table anew."""
        self._picture = picture
        self._draw()

    def verdict(self, verdict: Verdict, contrast: Verdict | None) -> None:
        """The table of results, below."""
        self._console.print(_verdict_table(verdict, contrast))

    def _draw(self) -> None:
        self._live.update(Panel(Group(*self._parts()), title=self._picture.title or "outlast demo"), refresh=True)

    def _parts(self) -> list[RenderableType]:
        picture = self._picture
        nodes = Table.grid(padding=(0, 2))
        styles = {"leader": "bold green", "follower": "green", "killed": "bold red", "starting": "yellow"}
        for node in picture.nodes:
            nodes.add_row(
                Text(node.name, "bold"), Text(node.state, styles.get(node.state, "")), Text(node.detail, "dim")
            )
        numbers = Table.grid(padding=(0, 3))
        numbers.add_row("committed", "refused", "errors", "waiting", "prepared now", "longest prepared")
        numbers.add_row(
            Text(str(picture.committed), "bold green"),
            Text(str(picture.refused), "yellow"),
            Text(str(picture.errors), "bold red" if picture.errors else "green"),
            str(picture.waiting),
            str(picture.prepared),
            f"{picture.longest_prepared_s:.2f} s",
        )
        events = Text("\n".join(f"{at_s:6.2f} s  {text}" for at_s, text in self._events[-_EVENTS_SHOWN:]))
        return [nodes, Text(), numbers, Text(), ProgressBar(total=1.0, completed=picture.share), Text(), events]


# ------------------------------------------------------------------------------------------------ the verdict


def _verdict_table(verdict: Verdict, contrast: Verdict | None) -> RenderableType:
    columns = [verdict] if contrast is None else [verdict, contrast]
    rows = _ROWS if not any(one.evidence.outages for one in columns) else [*_ROWS[:-1], *_OUTAGE_ROWS, _ROWS[-1]]
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("measured")
    for one in columns:
        table.add_column(_part(one), justify="right")
    for name, value in rows:
        table.add_row(name, *(value(one) for one in columns))
    checks = Table.grid(padding=(0, 1))
    for one in columns:
        checks.add_row("", Text(f"checked, {_part(one)}", "bold"), "")
        for check in one.checks:
            mark = Text("ok  ", "green") if check.ok else Text("FAIL", "bold red")
            checks.add_row(mark, check.name, Text(check.detail, "dim" if check.ok else "red"))
    return Group(Text(), table, Text(), checks)


def _part(one: Verdict) -> str:
    return "three nodes" if one.evidence.nodes > 1 else "one coordinator"


def _each_s(values: Iterable[float | None]) -> str:
    return ", ".join("never" if value is None else f"{value:.2f} s" for value in values)


def _longest_wait_s(one: Verdict) -> float:
    return max((told.latency_s for told in one.evidence.told), default=0.0)


_ROWS: Final[list[tuple[str, Callable[[Verdict], str]]]] = [
    ("checkouts committed", lambda one: str(one.evidence.count("committed"))),
    ("refused: out of stock, or of money", lambda one: str(one.evidence.count("refused"))),
    ("in doubt at the end", lambda one: str(one.report.in_doubt)),
    ("errors that customers saw", lambda one: str(one.evidence.count("error"))),
    ("customers turned away: too many waited", lambda one: str(one.evidence.turned_away)),
    ("longest wait of a customer", lambda one: f"{_longest_wait_s(one):.2f} s"),
    (
        "blocked transactions at each kill -9",
        lambda one: ", ".join(str(len(crash.blocked)) for crash in one.evidence.crashes),
    ),
    ("from the kill to a leader", lambda one: _each_s(crash.leader_after_s for crash in one.evidence.crashes)),
    ("until the blocked were finished", lambda one: _each_s(crash.finished_after_s for crash in one.evidence.crashes)),
    ("longest time a branch held its locks", lambda one: f"{one.evidence.longest_prepared_s:.2f} s"),
]

_OUTAGE_ROWS: Final[list[tuple[str, Callable[[Verdict], str]]]] = [
    (
        "database server killed -9, back after",
        lambda one: _each_s(outage.back_after_s for outage in one.evidence.outages) or "-",
    ),
    (
        "until what it held was finished",
        lambda one: _each_s(outage.finished_after_s for outage in one.evidence.outages) or "-",
    ),
]
