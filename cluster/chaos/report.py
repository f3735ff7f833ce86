"""A run on one page: the verdict, figures, a picture of it in time, every check and every fault.

HTML that needs nothing but itself: no script, no font, no network. Light or dark, as the reader's system is.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cluster.chaos.checks import CHECKS
from cluster.chaos.history import History
from cluster.chaos.timeline import STYLE, lasting, timeline

_STYLE: Final = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --text: #1f2328; --faint: #6b7280; --grid: #e9e9e6; --lane: #f3f3f0; --edge: #dededa;
  --ok: #15803d; --failed: #b91c1c; --shop: #2f9e6e; --application: #8bcf5f; --doubt: #d1495b;
  --node0: #2563a8; --node1: #c2700a; --node2: #8a4fa8; --service: #0f8a8a; --database: #7a5c3e; --client: #6b7280 }
@media (prefers-color-scheme: dark) { :root {
  --page: #15171a; --card: #1d2024; --text: #e6e7e9; --faint: #9aa1ab; --grid: #2d3137; --lane: #23272c;
  --edge: #343940;
  --ok: #4ade80; --failed: #f87171; --shop: #3fb984; --application: #b5e48c; --doubt: #ef6f7f;
  --node0: #3f7fc9; --node1: #c98220; --node2: #a76cc6; --service: #1d9a9a; --database: #957251; --client: #7d8590 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1360px; margin: 0 auto; padding: 1.5rem 1.25rem 3rem;
  background: var(--page); color: var(--text) }
header { display: flex; align-items: baseline; flex-wrap: wrap; gap: .25rem 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
.verdict { font-weight: 700; font-size: 1.05rem; color: #fff; padding: .1rem .8rem; border-radius: 999px }
.verdict.ok { background: #15803d; color: #fff } .verdict.failed { background: #b91c1c; color: #fff }
.faint { color: var(--faint) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; margin: 1.1rem 0 }
.card, .picture, .complaints { background: var(--card); border: 1px solid var(--edge); border-radius: 8px }
.card { padding: .6rem .9rem } .card b { display: block; font-size: 1.35rem; line-height: 1.3 }
.card span { color: var(--faint); font-size: .85rem }
.complaints { border-color: var(--failed); padding: .4rem 1rem .8rem; margin: 1rem 0 }
.complaints ul { margin: .1rem 0 0 }
.complaints p { margin: .45rem 0 0 } .complaints strong { color: var(--failed) }
.picture { padding: .5rem; overflow-x: auto }
.picture svg { display: block; width: 100%; min-width: 900px; height: auto }
table { border-collapse: collapse; width: 100% }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid) }
th { color: var(--faint); font-weight: 600; font-size: .85rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td ul { margin: .1rem 0 .3rem; padding-left: 1.1rem } .ok { color: var(--ok) } .failed { color: var(--failed) }
td.mark { font-weight: 700; white-space: nowrap } td.name { font-weight: 600; white-space: nowrap }
details { margin-top: 2rem } summary { cursor: pointer; margin-bottom: .5rem } summary h2 { display: inline }
"""


def write_report(path: Path, history: History, verdict: Mapping[str, Any]) -> None:
    """Write the page."""
    path.write_text("\n".join(_page(history, verdict)) + "\n")


def _page(history: History, verdict: Mapping[str, Any]) -> Iterator[str]:
    word = "ok" if verdict["ok"] else "failed"
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>outlast chaos: {word}, seed {verdict['seed']}</title><style>{_STYLE}{STYLE}</style></head><body>"
    yield "<header><h1>Chaos</h1>"
    yield f"<span class='verdict {word}'>{'every promise was kept' if verdict['ok'] else 'failed'}</span>"
    yield f"<span class='faint'>seed {verdict['seed']}{_length(history)}</span></header>"
    yield from _complaints(verdict)
    yield from _cards(verdict["counts"])
    if any(True for _ in history.of("run")):
        yield f"<div class='picture'>{timeline(history)}</div>"
    for what, why in verdict["impossible"].items():
        yield f"<p class='faint'>Not possible on this machine: {html.escape(what)} ({html.escape(why)}).</p>"
    yield from _checks(verdict["complaints"])
    yield from _faults(history)
    yield "</body></html>"


def _length(history: History) -> str:
    run = next(history.of("run"), None)
    return "" if run is None or "seconds" not in run else f", {run['seconds']:g} s of load"


def _complaints(verdict: Mapping[str, Any]) -> Iterator[str]:
    if verdict["ok"]:
        return
    yield "<div class='complaints'>"
    if verdict["trouble"]:
        yield f"<p><strong>The run did not get to its end:</strong> {html.escape(verdict['trouble'])}</p>"
    for name, found in verdict["complaints"].items():
        yield f"<p><strong>{html.escape(name)}</strong></p>{_list(found)}"
    yield "<p class='faint'>Logs, journals and databases are in <code>evidence</code>, beside this page.</p></div>"


def _cards(counts: Mapping[str, Any]) -> Iterator[str]:
    faults = sum(counts["faults"].values())
    rows: list[tuple[object, str]] = [
        (counts["orders"], f"orders: {counts['committed']} committed, {counts['aborted']} aborted"),
        (faults, "faults, of " + _several(len(counts["faults"]), "kind")),
        (counts["changes_of_leader"], "changes of leader"),
        (_seconds(counts["longest_in_doubt_s"]), "longest in doubt while a majority and the participant were well"),
    ]
    if counts.get("moves"):
        text = f"of the application's own: {counts['moves_committed']} committed, {counts['moves_aborted']} aborted; "
        rows.insert(1, (counts["moves"], text + f"it died {_several(counts['application_deaths'], 'time')}"))
    if counts.get("longest_rejoin_s") is not None:
        rows.append(
            (_seconds(counts["longest_rejoin_s"]), "at most, until a node that had lost its disk counted again")
        )
    yield "<div class='cards'>"
    for number, text in rows:
        yield f"<div class='card'><b>{html.escape(str(number))}</b><span>{html.escape(text)}</span></div>"
    yield "</div>"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} s"


def _checks(complaints: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield "<h2>Checked</h2><table>"
    says = {name: text for name, (text, _) in CHECKS.items()}
    if "logs" in complaints:
        says["logs"] = "no process wrote a traceback or an alarm"
    for name, text in says.items():
        found = complaints.get(name, ())
        mark = "<td class='mark failed'>✗ failed</td>" if found else "<td class='mark ok'>✓ ok</td>"
        yield f"<tr>{mark}<td class='name'>{name}</td><td>{html.escape(text)}{_list(found)}</td></tr>"
    yield "</table>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _faults(history: History) -> Iterator[str]:
    yield "<details open><summary><h2>Faults</h2></summary><table>"
    yield "<tr><th class='number'>at, s<th class='number'>for, s<th>kind<th>who<th>what was done</tr>"
    for event, until_s in lasting(history):
        yield (
            f"<tr><td class='number'>{event['at']:.2f}<td class='number'>{until_s - event['at']:.2f}"
            f"<td>{event['kind']}<td>{html.escape(event['target'])}<td>{html.escape(str(event['detail']))}</tr>"
        )
    yield "</table></details>"
