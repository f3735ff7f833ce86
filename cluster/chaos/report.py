"""A run on one page: a picture of it in time, its faults, and the verdict. HTML that needs nothing but itself."""

import html
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cluster.chaos.checks import CHECKS
from cluster.chaos.history import Event, History

_WIDTH: Final = 1100
_LEFT: Final = 130
_ROW: Final = 26
_PLOT: Final = 110
_COLOURS: Final = {
    "kill": "#c0392b",
    "pause": "#8e44ad",
    "cut": "#d35400",
    "slow": "#f1c40f",
    "disk": "#16a085",
    "clock": "#2980b9",
}
_NODES: Final = ("#34495e", "#7f8c8d", "#95a5a6", "#5d6d7e", "#aab7b8")

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
.ok { color: #1e8449 } .failed { color: #c0392b } svg { width: 100%; height: auto } svg text { font-size: 12px }
li { margin: .1rem 0 }
"""


def write_report(path: Path, history: History, verdict: Mapping[str, Any]) -> None:
    """Write the page."""
    path.write_text(_page(history, verdict))


def _page(history: History, verdict: Mapping[str, Any]) -> str:
    word = "ok" if verdict["ok"] else "failed"
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>outlast chaos: {word}, seed {verdict['seed']}</title><style>{_STYLE}</style>",
        f"<h1>Chaos, seed {verdict['seed']}: <span class='{word}'>{word}</span></h1>",
    ]
    if verdict["trouble"]:
        parts.append(f"<p class='failed'>The run did not get to its end: {html.escape(verdict['trouble'])}</p>")
    counts = verdict["counts"]
    parts.append(
        f"<p>{counts['orders']} orders in {counts['requests']} requests: {counts['committed']} committed, "
        f"{counts['aborted']} aborted. {sum(counts['faults'].values())} faults, {counts['changes_of_leader']} changes "
        "of leader. Where a majority and the participant were well, no branch was in doubt for longer than "
        f"{counts['longest_in_doubt_s']} s.</p>"
    )
    for what, why in verdict["impossible"].items():
        parts.append(f"<p>Not possible on this machine: {html.escape(what)} ({html.escape(why)}).</p>")
    parts.append(timeline(history))
    parts.append("<h2>Checked</h2><table>")
    for name, (says, _) in CHECKS.items():
        found = verdict["complaints"].get(name, ())
        mark = "<td class='failed'>failed</td>" if found else "<td class='ok'>ok</td>"
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in found)
        parts.append(f"<tr>{mark}<td>{name}</td><td>{html.escape(says)}<ul>{lines}</ul></td></tr>")
    if logs := verdict["complaints"].get("logs"):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in logs)
        parts.append(f"<tr><td class='failed'>failed</td><td>logs</td><td><ul>{lines}</ul></td></tr>")
    parts.append("</table><h2>Faults</h2><table><tr><th>at<th>for<th>fault<th>target<th></tr>")
    for began, lasted_s in _faults(history):
        parts.append(
            f"<tr><td>{began['at']:.2f} s<td>{lasted_s:.2f} s<td>{began['kind']}<td>{html.escape(began['target'])}"
            f"<td>{html.escape(str(began['detail']))}</tr>"
        )
    parts.append("</table></html>\n")
    return "\n".join(parts)


def _faults(history: History) -> list[tuple[Event, float]]:
    """Every fault and how long it lasted, in seconds."""
    ended = {event["fault"]: event["at"] for event in history.of("ended")}
    over = history.events[-1]["at"] if history.events else 0.0
    return [(event, ended.get(event["fault"], over) - event["at"]) for event in history.of("began")]


def timeline(history: History) -> str:
    """The picture, as SVG: orders per second, branches in doubt, who leads, and every fault."""
    over = next((event["at"] for event in history.of("rest")), history.events[-1]["at"] if history.events else 0.0)
    end_s = max(over, 1.0) + 1.0
    begin_s = min((event["at"] for event in history.of("run")), default=0.0)

    def x(at_s: float) -> float:
        return _LEFT + (min(max(at_s, begin_s), end_s) - begin_s) / (end_s - begin_s) * (_WIDTH - _LEFT - 10)

    faults = _faults(history)
    lanes = sorted({event["target"] for event, _ in faults})
    top_faults = 2 * _PLOT + 2 * _ROW + 20
    height = top_faults + _ROW * (len(lanes) + 1) + 20
    shapes = [f"<svg viewBox='0 0 {_WIDTH} {height}' role='img' aria-label='the run in time'>"]
    told = Counter(int(event["at"]) for event in history.of("answered") if event["outcome"] == "committed")
    shapes += _plot(told, 0, "#1e8449", "commits told, per s", x, int(begin_s), int(end_s))
    doubt: Counter[int] = Counter()
    latest: dict[str, int] = {}
    for event in history.of("prepared"):
        latest[event["participant"]] = len(event["gids"] or ())
        doubt[int(event["at"])] = max(doubt[int(event["at"])], sum(latest.values()))
    shapes += _plot(doubt, _PLOT, "#c0392b", "branches in doubt", x, int(begin_s), int(end_s))
    shapes += _leaders(history, 2 * _PLOT + 10, x, end_s)
    for lane, name in enumerate(lanes):
        y = top_faults + lane * _ROW
        shapes.append(f"<text x='4' y='{y + 16}'>{html.escape(name)}</text>")
        shapes.append(f"<line x1='{_LEFT}' x2='{_WIDTH - 10}' y1='{y + 12}' y2='{y + 12}' stroke='#ddd'/>")
    for event, lasted_s in faults:
        y = top_faults + lanes.index(event["target"]) * _ROW + 4
        wide = max(2.0, x(event["at"] + lasted_s) - x(event["at"]))
        colour = _COLOURS.get(event["kind"], "#000")
        title = html.escape(
            f"{event['at']:.2f} s, for {lasted_s:.2f} s: {event['kind']}, {event['detail']}", quote=True
        )
        shapes.append(
            f"<rect x='{x(event['at']):.1f}' y='{y}' width='{wide:.1f}' height='16' fill='{colour}' fill-opacity='.8'>"
            f"<title>{title}</title></rect>"
        )
    y = height - 14
    for step in range(11):
        at_s = begin_s + (end_s - begin_s) * step / 10
        shapes.append(f"<text x='{x(at_s):.1f}' y='{y}' text-anchor='middle'>{at_s:.0f} s</text>")
    place = float(_LEFT)
    for kind, colour in _COLOURS.items():
        shapes.append(f"<rect x='{place}' y='{top_faults - 16}' width='10' height='10' fill='{colour}'/>")
        shapes.append(f"<text x='{place + 14}' y='{top_faults - 7}'>{kind}</text>")
        place += 70
    shapes.append("</svg>")
    return "\n".join(shapes)


def _plot(counted: Counter[int], top: int, colour: str, name: str, x: Any, begin: int, end: int) -> list[str]:
    """Bars, one a second."""
    most = max(counted.values(), default=0) or 1
    floor = top + _PLOT - 6
    shapes = [
        f"<text x='4' y='{top + 24}'>{name}</text><text x='4' y='{top + 40}'>at most {most}</text>",
        f"<line x1='{_LEFT}' x2='{_WIDTH - 10}' y1='{floor}' y2='{floor}' stroke='#999'/>",
    ]
    for second in range(begin, end):
        tall = counted[second] / most * (_PLOT - 30)
        if tall:
            wide = max(0.5, x(second + 1) - x(second) - 0.3)
            shapes.append(
                f"<rect x='{x(second):.1f}' y='{floor - tall:.1f}' width='{wide:.1f}' height='{tall:.1f}' "
                f"fill='{colour}'><title>{second} s: {counted[second]}</title></rect>"
            )
    return shapes


def _leaders(history: History, top: int, x: Any, end_s: float) -> list[str]:
    """Who leads, as a band; where there is none, a gap."""
    shapes = [f"<text x='4' y='{top + 16}'>leader</text>"]
    changes = [*history.of("leader")]
    for index, event in enumerate(changes):
        if event["node"] is None:
            continue
        until_s = changes[index + 1]["at"] if index + 1 < len(changes) else end_s
        colour = _NODES[history.nodes.index(event["node"]) % len(_NODES)]
        wide = max(1.0, x(until_s) - x(event["at"]))
        shapes.append(
            f"<rect x='{x(event['at']):.1f}' y='{top + 2}' width='{wide:.1f}' height='18' fill='{colour}'>"
            f"<title>{event['node']}, epoch {event['epoch']}</title></rect>"
        )
        if wide > 24:
            shapes.append(f"<text x='{x(event['at']) + 4:.1f}' y='{top + 15}' fill='#fff'>{event['node']}</text>")
    return shapes
