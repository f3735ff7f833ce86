"""The page about a run: whole, nothing outside of it, and legible however crowded the run was.

Nobody looks at it here. But where texts stand and how long they are is enough to tell whether they overlap.
"""

import html.parser
import itertools
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.chaos.history import Event, History
from cluster.chaos.plan import KINDS
from cluster.chaos.report import write_report
from cluster.chaos.timeline import STYLE, WIDTH, timeline

NODES = ["n1", "n2", "n3"]
PARTICIPANTS = ["inventory", "payments", "orders", "ledger"]
TARGETS = [*NODES, *PARTICIPANTS, "shop", "postgres", "application", "clients"]
GLYPH = 5.6
"""Width of a character at 11.5 px, on average, in a usual font; browsers draw no wider."""


def crowded(seconds: float, faults: int) -> History:
    """A run in which everything happens."""
    rng = random.Random(5)
    events: list[Event] = []

    def note(at: float, type_: str, **fields: Any) -> None:
        events.append({"at": at, "type": type_, **fields})

    note(3.2, "run", seed=7, seconds=seconds, nodes=NODES, participants=dict.fromkeys(PARTICIPANTS))
    for op in range(int(seconds) * 8):
        at = 3.2 + rng.uniform(0, seconds)
        note(at, "asked", op=op, key=f"k-{op}", **({"of": "application"} if op % 9 == 0 else {}))
        note(at, "answered", op=op, outcome="committed", gid=f"c-1-{op}")
        note(at, "prepared", participant=rng.choice(PARTICIPANTS), gids=[f"c-1-{n}" for n in range(rng.randrange(30))])
    for _ in range(faults // 4):
        note(3.2 + rng.uniform(0, seconds), "leader", node=rng.choice([*NODES, None]), epoch=rng.randrange(99))
        note(3.2 + rng.uniform(0, seconds), "lived", life=1)
    for number in range(faults):
        at = 3.2 + rng.uniform(0, max(1.0, seconds - 8))
        fields = {"fault": number, "kind": rng.choice(KINDS), "target": rng.choice(TARGETS)}
        note(at, "began", **fields, detail='<"what" & why>', fired=True)
        if number:
            note(at + rng.uniform(0.3, 8), "ended", **fields)
    note(3.2 + seconds, "rest")
    return History(sorted(events, key=lambda event: event["at"]))


def verdict(**changes: Any) -> dict[str, Any]:
    counts = {"orders": 2, "committed": 1, "aborted": 1, "faults": {"kill": 1}, "changes_of_leader": 1}
    moves = {"moves": 3, "moves_committed": 1, "moves_aborted": 2, "application_deaths": 1}
    longest = {"longest_in_doubt_s": 0.4, "longest_rejoin_s": 2.5}
    judged = {"seed": 7, "ok": True, "complaints": {}, "trouble": None, "impossible": {}}
    return {**judged, "counts": {**counts, **moves, **longest}, **changes}


class Page(html.parser.HTMLParser):
    """Every element with its attributes, and whether each that must be ended was."""

    LOOSE = frozenset({"html", "meta", "td", "th", "tr", "li"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.LOOSE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.LOOSE:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself_and_says_what_is_wrong(tmp_path: Path) -> None:
    complaints = {"sums": ["inventory began with 10; 7 left and 2 moved make 9"], "logs": ["n1/log.txt:3: Traceback"]}
    bad = verdict(ok=False, complaints=complaints, trouble="<none>", impossible={"disk": "not root"})
    write_report(tmp_path / "report.html", crowded(60, 40), bad)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    for loads in ("http", "@import", "url("):
        assert loads not in text
    for tag, attributes in page.found:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not {"src", "href", "onload"} & set(attributes)
    assert [attributes["class"] for tag, attributes in page.found if "verdict" in str(attributes.get("class"))] == [
        "verdict failed"
    ]
    # What is wrong stands above the picture.
    assert text.index("7 left and 2 moved make 9") < text.index("<svg")
    assert text.index("&lt;none&gt;") < text.index("<svg")
    for says in ("n1/log.txt:3: Traceback", "disk (not root)", "it died 1 time", "2.5 s"):
        assert says in text


def test_every_class_of_the_picture_has_a_style() -> None:
    picture = ET.fromstring(timeline(crowded(60, 40)))
    used = {name for each in picture.iter() for name in each.get("class", "").split()}
    assert {name for name in used if f".{name}" not in STYLE} == set()
    assert {"node0", "node1", "node2", "service", "database", "client", "shop", "application", "doubt"} <= used


class Box(NamedTuple):
    text: str
    left: float
    top: float
    right: float
    bottom: float


def boxes(picture: ET.Element) -> list[Box]:
    found = []
    for text in picture.iter("text"):
        says, x, y = str(text.text), float(text.attrib["x"]), float(text.attrib["y"])
        wide = len(says) * GLYPH
        left = x - {"end": wide, "middle": wide / 2}.get(text.get("text-anchor", ""), 0.0)
        found.append(Box(says, left, y - 9, left + wide, y + 2))
    return found


def overlapping(found: list[Box]) -> list[tuple[str, str]]:
    return [
        (one.text, other.text)
        for one, other in itertools.combinations(found, 2)
        if one.left < other.right and other.left < one.right and one.top < other.bottom and other.top < one.bottom
    ]


@pytest.mark.parametrize(("seconds", "faults"), [(5, 3), (30, 14), (120, 50), (600, 260), (1800, 700)])
def test_nothing_lies_on_anything_else(seconds: int, faults: int) -> None:
    picture = ET.fromstring(timeline(crowded(seconds, faults)))
    high = float(picture.attrib["viewBox"].split()[3])
    found = boxes(picture)
    assert overlapping(found) == []
    for box in found:
        assert box.left >= 0
        assert box.right <= WIDTH
        assert box.top >= 0
        assert box.bottom <= high
    bars = [each for each in picture.iter("rect") if each.get("rx")]
    assert len(bars) == faults
    places = [tuple(float(each.attrib[name]) for name in ("x", "y", "width")) for each in bars]
    least = 1.5  # a short fault is drawn wider than it was, so that it is seen
    for (x, y, wide), (other_x, other_y, _) in itertools.pairwise(sorted(places, key=lambda each: (each[1], each[0]))):
        assert y != other_y or x + wide <= other_x + least + 0.02
    for each in picture.iter("rect"):
        assert float(each.attrib["x"]) + float(each.attrib["width"]) <= WIDTH
        assert float(each.attrib["y"]) + float(each.attrib["height"]) <= high


def test_texts_that_overlap_are_noticed() -> None:
    picture = ET.fromstring("<svg><text x='10' y='20'>seconds</text><text x='30' y='20'>5</text></svg>")
    assert overlapping(boxes(picture)) == [("seconds", "5")]


def test_a_run_that_did_not_begin_has_a_page(tmp_path: Path) -> None:
    counts = {**verdict()["counts"], "longest_in_doubt_s": None, "longest_rejoin_s": None, "moves": 0, "faults": {}}
    write_report(tmp_path / "report.html", History([]), verdict(ok=False, trouble="no port", counts=counts))
    assert "no port" in (tmp_path / "report.html").read_text()
