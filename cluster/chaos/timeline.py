"""A run in time, as SVG: commits per second, branches in doubt, who leads, and every fault, a lane for each kind.

Colours are classes and not written into shapes, so that the page that holds the picture may be light or dark. All times
are those of the history: seconds since the command began.
"""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from cluster.chaos.history import SHOP, Event, History
from cluster.chaos.plan import KINDS

WIDTH: Final = 1280
_LEFT: Final = 150
_RIGHT: Final = 24
_PLOT: Final = 120
_GAP: Final = 34
_ROW: Final = 18
_CHARACTER: Final = 6.0
"""Width of one, at the size of labels; rather too much, so that none is cut off."""

_STEPS_S: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)
_TICKS: Final = 16

STYLE: Final = """
svg text { font: 11.5px system-ui, sans-serif; fill: var(--text) }
svg .unit, svg .tick { fill: var(--faint); font-size: 11px }
svg .name { font-weight: 600 }
svg .grid { stroke: var(--grid); stroke-width: 1 }
svg .floor { stroke: var(--faint); stroke-width: 1 }
svg .shop { fill: var(--shop) } svg .application { fill: var(--application) } svg .doubt { fill: var(--doubt) }
svg .node0 { fill: var(--node0) } svg .node1 { fill: var(--node1) } svg .node2 { fill: var(--node2) }
svg .service { fill: var(--service) } svg .database { fill: var(--database) } svg .client { fill: var(--client) }
svg .none { fill: none; stroke: var(--doubt); stroke-dasharray: 3 2 }
svg text.inside { fill: #fff; font-size: 10.5px; pointer-events: none }
svg .lane { fill: var(--lane) }
"""
"""For the page; it has to define the variables."""


class _Bar(NamedTuple):
    event: Event
    until_s: float
    row: int


class Scale:
    """From seconds to the picture's own units."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.begin_s, self.end_s = begin_s, max(end_s, begin_s + 1.0)

    def x(self, at_s: float) -> float:
        """Where a moment is; those outside are at the edge."""
        share = (min(max(at_s, self.begin_s), self.end_s) - self.begin_s) / (self.end_s - self.begin_s)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 2)

    def ticks(self) -> list[int]:
        """Round numbers, not too many of them."""
        step = next((s for s in _STEPS_S if (self.end_s - self.begin_s) / s <= _TICKS), _STEPS_S[-1])
        return [at for at in range(0, int(self.end_s) + 1, step) if at >= self.begin_s]


def timeline(history: History) -> str:
    """The picture, of a run that began. It is well-formed XML."""
    last_s = history.events[-1]["at"] if history.events else 0.0
    over_s = next((event["at"] for event in history.of("rest")), last_s)
    scale = Scale(min((event["at"] for event in history.of("run")), default=0.0), over_s + 1.0)
    shapes: list[str] = []
    top = 24
    shapes += _throughput(history, scale, top)
    top += _PLOT + _GAP
    shapes += _doubt(history, scale, top)
    top += _PLOT + _GAP
    shapes += _leaders(history, scale, top)
    top += _ROW + 22
    lanes, top = _lanes(history, scale, top)
    shapes += lanes
    grid = [f"<line class='grid' x1='{scale.x(at)}' x2='{scale.x(at)}' y1='18' y2='{top}'/>" for at in scale.ticks()]
    axis = [
        f"<text class='tick' x='{scale.x(at)}' y='{top + 15}' text-anchor='middle'>{at}</text>" for at in scale.ticks()
    ]
    axis.append(f"<text class='unit' x='{_LEFT - 12}' y='{top + 15}' text-anchor='end'>seconds</text>")
    shapes += _legend(history, top + 38)
    return "\n".join(
        [
            f"<svg viewBox='0 0 {WIDTH} {top + 52}' role='img' aria-label='the run in time'>",
            *grid,
            *shapes,
            *axis,
            "</svg>",
        ]
    )


# ------------------------------------------------------------------------------------------------ plots


def _throughput(history: History, scale: Scale, top: int) -> list[str]:
    """What clients were told to be committed, in each second; the application's on top of the shop's."""
    sorts = {event["op"]: event.get("of", SHOP) for event in history.of("asked")}
    told = {sort: Counter[int]() for sort in (SHOP, "application")}
    for event in history.of("answered"):
        if event["outcome"] == "committed":
            told[sorts.get(event["op"], SHOP)][int(event["at"])] += 1
    return _plot("commits told", "per second", told, scale, top)


def _doubt(history: History, scale: Scale, top: int) -> list[str]:
    """The most branches that were seen prepared at once, in each second."""
    most: Counter[int] = Counter()
    latest: dict[str, int] = {}
    for event in history.of("prepared"):
        # Whoever does not answer still holds what it held.
        if event["gids"] is not None:
            latest[event["participant"]] = len(event["gids"])
        second = int(event["at"])
        most[second] = max(most[second], sum(latest.values()))
    return _plot("in doubt", "branches", {"doubt": most}, scale, top)


def _plot(name: str, unit: str, counted: dict[str, Counter[int]], scale: Scale, top: int) -> list[str]:
    """Bars, one a second, those of several sorts on each other; with an axis."""
    totals: Counter[int] = Counter()
    for each in counted.values():
        totals.update(each)
    inside = [total for second, total in totals.items() if scale.begin_s - 1 < second <= scale.end_s]
    step = _nice(max(inside, default=0) / 4)
    most = max(step, -(-max(inside, default=0) // step) * step)
    floor = top + _PLOT

    def y(value: float) -> float:
        return round(floor - value / most * _PLOT, 2)

    shapes = [
        f"<text class='name' x='12' y='{top + 12}'>{name}</text>",
        f"<text class='unit' x='12' y='{top + 27}'>{unit}</text>",
    ]
    for value in range(0, most + 1, step):
        line = "floor" if value == 0 else "grid"
        shapes.append(f"<line class='{line}' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{y(value)}' y2='{y(value)}'/>")
        shapes.append(f"<text class='tick' x='{_LEFT - 8}' y='{y(value) + 4}' text-anchor='end'>{value}</text>")
    for second in range(int(scale.begin_s), int(scale.end_s) + 1):
        below = 0
        for sort, each in counted.items():
            if count := each[second]:
                left, right = scale.x(second), scale.x(second + 1)
                wide = max(0.4, right - left - (0.6 if right - left > 3 else 0.0))
                high = y(below) - y(below + count)
                shapes.append(
                    f"<rect class='{sort}' x='{left}' y='{y(below + count)}' width='{wide:.2f}' height='{high:.2f}'>"
                    f"<title>{second} s: {totals[second]} {unit}</title></rect>"
                )
                below += count
    return shapes


def _nice(least: float) -> int:
    """1, 2 or 5 times a power of ten, and no less than `least`."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if factor * size >= least:
                return factor * size
        size *= 10


# ------------------------------------------------------------------------------------------------ lanes


def _leaders(history: History, scale: Scale, top: int) -> list[str]:
    """Who leads, as a band; where nobody does, an empty frame."""
    shapes = [f"<text class='name' x='12' y='{top + 13}'>leader</text>"]
    changes = [*history.of("leader")]
    ends_s = [*(event["at"] for event in changes[1:]), scale.end_s]
    for event, until_s in zip(changes, ends_s, strict=False):
        left, wide = scale.x(event["at"]), scale.x(until_s) - scale.x(event["at"])
        if wide <= 0:
            continue
        node = event["node"]
        says = "nobody leads" if node is None else f"{node} leads in epoch {event['epoch']}"
        shapes.append(
            f"<rect class='{'none' if node is None else _sort(history, node)}' x='{left}' y='{top}' "
            f"width='{max(wide, 0.6):.2f}' height='{_ROW}'><title>{event['at']:.2f} s: {says}</title></rect>"
        )
        if node is not None:
            shapes += _inside(node, left, wide, top + 13)
    return shapes


def _lanes(history: History, scale: Scale, top: int) -> tuple[list[str], int]:
    """Every fault as a bar in the lane of its kind, and below them the application's own deaths; and where they end."""
    shapes = []
    faults = lasting(history)
    kinds = [*KINDS, *sorted({event["kind"] for event, _ in faults} - {*KINDS})]
    for kind in kinds:
        bars = list(_rows([each for each in faults if each[0]["kind"] == kind]))
        if not bars:
            continue
        high = (max(bar.row for bar in bars) + 1) * _ROW
        shapes += _lane(kind, str(len(bars)), top, high)
        for bar in bars:
            left, wide = scale.x(bar.event["at"]), scale.x(bar.until_s) - scale.x(bar.event["at"])
            y = top + bar.row * _ROW + 2
            title = html.escape(
                f"{bar.event['at']:.2f} s, for {bar.until_s - bar.event['at']:.2f} s: {kind}, {bar.event['detail']}",
                quote=True,
            )
            shapes.append(
                f"<rect class='{_sort(history, bar.event['target'])}' x='{left}' y='{y}' width='{max(wide, 1.5):.2f}' "
                f"height='{_ROW - 4}' rx='2'><title>{title}</title></rect>"
            )
            shapes += _inside(str(bar.event["target"]), left, wide, y + 11)
        top += high + 6
    deaths = [event["at"] for event in [*history.of("lived")][1:]]
    if deaths:
        shapes += _lane("application dies", str(len(deaths)), top, _ROW)
        shapes += [
            f"<circle class='client' cx='{scale.x(at)}' cy='{top + _ROW / 2}' r='3'>"
            f"<title>{at:.2f} s: it is started again</title></circle>"
            for at in deaths
        ]
        top += _ROW + 6
    return shapes, top


def _lane(name: str, count: str, top: int, high: int) -> list[str]:
    return [
        f"<rect class='lane' x='{_LEFT}' y='{top}' width='{WIDTH - _LEFT - _RIGHT}' height='{high}'/>",
        f"<text class='name' x='12' y='{top + 13}'>{html.escape(name)}</text>",
        f"<text class='unit' x='{_LEFT - 8}' y='{top + 13}' text-anchor='end'>{count}</text>",
    ]


def _rows(faults: Sequence[tuple[Event, float]]) -> Iterator[_Bar]:
    """So that none lies on another: each in the first row that is free by then."""
    free_s: list[float] = []
    for event, until_s in faults:
        row = next((row for row, at_s in enumerate(free_s) if at_s <= event["at"]), len(free_s))
        free_s[row : row + 1] = [until_s]
        yield _Bar(event, until_s, row)


def _inside(text: str, left: float, wide: float, y: float) -> list[str]:
    """A label within its bar; none where it would not fit."""
    if len(text) * _CHARACTER + 6 > wide:
        return []
    return [f"<text class='inside' x='{left + 4:.2f}' y='{y}'>{html.escape(text)}</text>"]


def lasting(history: History) -> list[tuple[Event, float]]:
    """Every fault that began, and when it ended."""
    ended: dict[int, float] = {event["fault"]: event["at"] for event in history.of("ended")}
    over_s: float = history.events[-1]["at"] if history.events else 0.0
    return [(event, ended.get(event["fault"], over_s)) for event in history.of("began")]


def _sort(history: History, name: str) -> str:
    """What `name` is: which class its shapes have."""
    if name in history.nodes:
        return f"node{history.nodes.index(name) % 3}"
    if name in history.participants:
        return "service"
    return "client" if name in ("clients", "application") else "database"


def _legend(history: History, top: int) -> list[str]:
    shapes, left = [], float(_LEFT)
    entries = [
        *((f"node{number % 3}", node) for number, node in enumerate(history.nodes)),
        ("service", "a service"),
        ("database", "a database"),
        ("client", "clients, application"),
        ("none", "nobody leads"),
        ("shop", "orders"),
        ("application", "the application's moves"),
        ("doubt", "in doubt"),
    ]
    for sort, text in entries:
        shapes.append(f"<rect class='{sort}' x='{left:.1f}' y='{top - 10}' width='12' height='12'/>")
        shapes.append(f"<text x='{left + 17:.1f}' y='{top}'>{html.escape(text)}</text>")
        left += 17 + len(text) * _CHARACTER + 20
    return shapes
