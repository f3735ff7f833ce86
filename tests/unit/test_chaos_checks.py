"""Every check of a recorded run lets a good history through, and rejects the bad ones that it is there for."""

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from cluster.chaos import disks
from cluster.chaos.checks import CHECKS
from cluster.chaos.history import Event, History, Recorder, few
from cluster.chaos.plan import KINDS, MAX_AT_ONCE, STEPS_S, Cast, make_plan
from cluster.chaos.run import RETENTION_S, _bad_lines
from cluster.cli import main

NODES = ("n1", "n2", "n3")
SHOP = ("inventory", "payments", "orders")
BOOKS = ("payments", "ledger")
ALL = (*SHOP, "ledger")


def good() -> list[Event]:
    """A short run without fault, but with all that checks look at."""
    events: list[Event] = []
    clock = iter(range(1, 1000))

    def note(type_: str, **fields: Any) -> None:
        events.append({"at": next(clock) / 10, "type": type_, **fields})

    books = {"shop": [*SHOP], "application": [*BOOKS]}
    known = {"nodes": [*NODES], "participants": dict.fromkeys(ALL), "books": books}
    note("run", seed=1, seconds=9, **known, bound_s=2.0, retention_s=600.0)
    note("planned", fault=1, kind="kill", target="leader", due=1.0, for_s=1.0)
    note("leads", node="n1", epoch=2)
    note("leader", node="n1", epoch=2)
    note("asked", op=1, client=0, key="order-1", body="order", node="n1")
    note("lived", life=1)
    for name in ALL:
        note("prepared", participant=name, gids=["c-2-1"])
    note("answered", op=1, outcome="undecided", gid="c-2-1", detail=None)
    note("began", fault=1, kind="kill", target="n1", parts=["n1"], links=[], fired=True, detail="kill -9")
    note("leads", node="n2", epoch=3)
    note("leader", node="n2", epoch=3)
    note("asked", op=2, client=0, key="order-1", body="order", node="n2")
    note("answered", op=2, outcome="committed", gid="c-2-1", detail=None)
    note("asked", op=3, client=0, key="order-1", body="another", node="n2")
    note("answered", op=3, outcome="reused", gid=None, detail=None)
    note("asked", op=4, client=1, key="order-2", body="order", node="n3")
    note("answered", op=4, outcome="aborted", gid="c-3-1", detail="out_of_stock")
    note("read", client=0, node="n3", gid="c-2-1", outcome="committed")
    note("asked", op=5, client="application", key="move-1", body="move", node="any", of="application")
    note("answered", op=5, outcome="unknown", gid=None, detail="the application has died")
    note("lived", life=2)
    note("asked", op=6, client="application", key="move-1", body="move", node="n1", of="application")
    note("answered", op=6, outcome="committed", gid="c-3-2", detail=None)
    note("ended", fault=1, kind="kill", target="n1")
    note("rest")
    for name in ALL:
        note("prepared", participant=name, gids=[])
    note("probe", what="sku-1 by account-1", outcome="committed", detail=None)
    for node in NODES:
        note("final", node=node, gid="c-2-1", outcome="committed")
        note("final", node=node, gid="c-3-1", outcome="aborted")
        note("final", node=node, gid="c-3-2", outcome="committed")
    for name in SHOP:
        note("marks", participant=name, orders={"order-1": "c-2-1"})
    for name in BOOKS:
        note("marks", participant=name, orders={"move-1": "c-3-2"}, of="application")
    for name in ALL:
        note("locks", participant=name, count=0)
    note("sums", participant="inventory", initial=10, left=8, moved=2)
    note("audit", discrepancies=[])
    return events


def complaints(events: list[Event]) -> dict[str, list[str]]:
    history = History(events)
    return {name: found for name, (_, check) in CHECKS.items() if (found := check(history))}


def the(events: list[Event], type_: str, **fields: Any) -> Event:
    """The first event like this."""
    return next(
        event for event in events if event["type"] == type_ and all(event[name] == fields[name] for name in fields)
    )


def test_a_good_history_is_let_through():
    assert complaints(good()) == {}


Change = Callable[[list[Event]], object]


def without(type_: str, **fields: Any) -> Change:
    return lambda events: events.remove(the(events, type_, **fields))


def changed(type_: str, change: Event, **fields: Any) -> Change:
    return lambda events: the(events, type_, **fields).update(change)


def more(*new: Event) -> Change:
    return lambda events: events.extend(new)


def prepared_for_long(events: list[Event]) -> None:
    """From the first look on, and all is well."""
    rest = events.index(the(events, "rest"))
    late = [
        {"at": 8.0 + tenth / 10, "type": "prepared", "participant": "orders", "gids": ["c-2-1"]} for tenth in range(40)
    ]
    events[rest:rest] = late


def on_majority(kind: str, parts: list[str], links: list[list[str]]) -> Event:
    fields = {"kind": kind, "target": "n1", "parts": parts, "links": links, "fired": True, "detail": ""}
    return {"at": 7.9, "type": "began", "fault": 9, **fields}


BAD = {
    "atomicity": {
        "a mark is missing": changed("marks", {"orders": {}}, participant="payments"),
        "an aborted one left a mark": lambda events: [
            event["orders"].update({"order-2": "c-3-1"}) for event in events if event["type"] == "marks"
        ],
        "a committed one left none": lambda events: [
            event.update(orders={}) for event in events if event["type"] == "marks"
        ],
        "a database was not read": without("marks", participant="orders"),
        "a move was made by half": changed("marks", {"orders": {}}, participant="ledger"),
        "a book was not read": without("marks", participant="ledger"),
    },
    "outcomes": {
        "a node says something else": changed("final", {"outcome": "aborted"}, node="n2", gid="c-2-1"),
        "it changed in between": changed("read", {"outcome": "aborted"}),
        "undecided at rest": changed("final", {"outcome": "undecided"}, node="n3", gid="c-3-1"),
        "a node said nothing": without("final", node="n3", gid="c-3-1"),
        "nobody was asked": lambda events: events.__setitem__(
            slice(None), [event for event in events if event["type"] != "final"]
        ),
    },
    "acknowledged": {
        "a node has lost it": changed("final", {"outcome": "missing"}, node="n1", gid="c-2-1"),
        "a node forgot it early": changed("final", {"outcome": "forgotten"}, node="n1", gid="c-2-1"),
        "it is another one in a database": changed("marks", {"orders": {"order-1": "c-9-9"}}, participant="orders"),
        "an order that nobody placed": lambda events: [
            event["orders"].update({"order-7": "c-7-7"}) for event in events if event["type"] == "marks"
        ],
        "a move that was told is in no book": lambda events: [
            event.update(orders={}) for event in events if event["type"] == "marks" and "of" in event
        ],
        "no move was acknowledged": changed("answered", {"outcome": "unknown", "gid": None}, op=6),
        "nothing was acknowledged": lambda events: [
            event.update(outcome="unknown", gid=None) for event in events if event["type"] == "answered"
        ],
    },
    "sums": {
        "goods were lost": changed("sums", {"left": 7}),
        "goods were made": changed("sums", {"left": 9}),
        "databases differ": changed("audit", {"discrepancies": ["c-2-1: no charge"]}),
        "nothing was counted": without("sums"),
        "nothing was compared": without("audit"),
    },
    "doubt": {
        "for long, and all is well": prepared_for_long,
        "with one node down": lambda events: (
            prepared_for_long(events),
            events.insert(events.index(the(events, "rest")) - 40, on_majority("kill", ["n1"], [])),
        ),
        "with one link cut": lambda events: (
            prepared_for_long(events),
            events.insert(events.index(the(events, "rest")) - 40, on_majority("cut", [], [["n1", "n2"]])),
        ),
        "at rest": lambda events: events.append(
            {"at": 99.0, "type": "prepared", "participant": "orders", "gids": ["c-2-1"]}
        ),
        "no answer at rest": more({"at": 99.0, "type": "prepared", "participant": "orders", "gids": None}),
        "never asked": lambda events: events.__setitem__(
            slice(None),
            [event for event in events if event.get("participant") != "orders" or event["type"] != "prepared"],
        ),
    },
    "keys": {
        "one key, two transactions": changed("answered", {"gid": "c-3-9"}, op=2),
        "two bodies, one transaction": changed("answered", {"outcome": "committed", "gid": "c-2-1"}, op=3),
        "refused, though it is the body that won": changed("answered", {"outcome": "reused", "gid": None}, op=2),
        "refused before anybody else had asked": more(
            {"at": 50.0, "type": "asked", "op": 8, "client": 0, "key": "order-8", "body": "another", "node": "n1"},
            {"at": 50.1, "type": "answered", "op": 8, "outcome": "reused", "gid": None, "detail": None},
            {"at": 50.2, "type": "asked", "op": 9, "client": 0, "key": "order-8", "body": "order", "node": "n1"},
        ),
        "another transaction placed the order": changed(
            "marks", {"orders": {"order-1": "c-3-1"}}, participant="orders"
        ),
        "another transaction made the move": changed("marks", {"orders": {"move-1": "c-9-9"}}, participant="ledger"),
    },
    "leaders": {
        "two at once": more({"at": 5.0, "type": "leads", "node": "n3", "epoch": 3}),
        "one long after the other": more({"at": 99.0, "type": "leads", "node": "n2", "epoch": 2}),
        "nobody looked": lambda events: events.__setitem__(
            slice(None), [event for event in events if event["type"] != "leads"]
        ),
    },
    "locks": {
        "a lock is left": changed("locks", {"count": 1}, participant="payments"),
        "what was used cannot be used": changed("probe", {"outcome": "aborted", "detail": "locked"}),
        "nobody looked": without("locks", participant="orders"),
        "nobody tried": without("probe"),
    },
    "answered": {
        "a request without an answer": without("answered", op=4),
        "nobody found out what became of it": without("answered", op=6),
        "never a definite one": changed("answered", {"outcome": "unknown", "gid": None}, op=4),
        "an answer that should not be": changed("answered", {"outcome": "surprise", "detail": "500"}, op=1),
        "it never came to rest": without("rest"),
    },
    "fired": {
        "it never happened": without("began"),
        "it had no effect": changed("began", {"fired": False}),
        "it never ended": without("ended"),
        "a clock that nobody looks at": more({"at": 9.0, "type": "calendar", "fault": 1, "seen": False}),
    },
}


@pytest.mark.parametrize(("check", "what"), [(check, what) for check, each in BAD.items() for what in each])
def test_a_bad_history_is_rejected(check: str, what: str) -> None:
    events = copy.deepcopy(good())
    BAD[check][what](events)
    assert check in complaints(events)


def test_every_check_has_a_bad_history():
    assert set(BAD) == set(CHECKS)


@pytest.mark.parametrize(
    ("parts", "links"),
    [
        (["n1", "n2"], []),
        (["orders"], []),
        ([], [["n1", "n2"], ["n1", "n3"], ["n2", "n3"]]),
        (["n3"], [["n1", "n2"]]),
        ([], [["n1", "orders"]]),
    ],
)
def test_what_cannot_be_finished_may_wait(parts: list[str], links: list[list[str]]) -> None:
    events = good()
    prepared_for_long(events)
    rest = events.index(the(events, "rest"))
    fault = on_majority("kill", parts, links)
    events.insert(rest - 40, fault)
    # It ends, and a moment later all is finished.
    events.insert(
        events.index(the(events, "rest")), {"at": 12.0, "type": "ended", "fault": 9, "kind": "kill", "target": "n1"}
    )
    assert complaints(events) == {}
    # When it goes on after that, the time counts from the end of the fault.
    late = [
        {"at": 12.0 + tenth / 10, "type": "prepared", "participant": "orders", "gids": ["c-2-1"]} for tenth in range(40)
    ]
    rest = events.index(the(events, "rest"))
    events[rest:rest] = late
    assert set(complaints(events)) == {"doubt"}


def test_a_traceback_and_an_alarm_in_any_log_are_complaints(tmp_path):
    unknown = "2026-01-01 12:00:00,000 ERROR participants.resolver: ALARM: branch a of c-1-1 is prepared"
    full = (
        "2026-01-01 12:00:00,000 WARNING participants.server: ALARM: COMMIT PREPARED 'c-1-1': could not extend file "
        '"base/5/1259": No space left on device; it stays prepared'
    )
    for name, text in (
        ("n1", "all is well, FALSEALARM: no\n"),
        ("n2", "INFO x\nTraceback (most recent call last):\n  File ...\n"),
        ("application", "\nFatal Python error: Aborted\n"),
        ("orders", f"INFO x\n{unknown}\n"),
        ("payments", f"{full}\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text(text)
    assert _bad_lines(tmp_path) == [
        "application/log.txt:2: Fatal Python error: Aborted",
        "n2/log.txt:2: Traceback (most recent call last):",
        f"orders/log.txt:2: {unknown}",
    ]


def test_few_says_how_many_more_there_are():
    assert few(["a", "b"]) == ["a", "b"]
    assert few(list("abcdefgh"), most=3) == ["a", "b", "c", "and 5 more"]


# ------------------------------------------------------------------------------------------------ plan and history


def test_a_plan_follows_from_its_seed_and_stays_within_its_bounds():
    for seed in range(1, 60):
        cast = Cast(participants=ALL, servers=["postgres"], stores=["shop", "postgres"], applications=["application"])
        named = {"kinds": KINDS, "cast": cast}
        seconds = random.Random(seed).choice([15.0, 40.0, 120.0, 600.0])
        plan = make_plan(seed, seconds=seconds, **named)
        assert plan == make_plan(seed, seconds=seconds, **named)
        assert {fault.kind for fault in plan} == set(KINDS)
        assert [fault.due_s for fault in plan] == sorted(fault.due_s for fault in plan)
        for fault in plan:
            assert fault.due_s + fault.for_s <= seconds
            going = [each for each in plan if each.due_s <= fault.due_s < each.due_s + each.for_s]
            assert len(going) <= MAX_AT_ONCE
    targets = Counter(fault.target for fault in make_plan(1, seconds=1800.0, **named))
    assert set(targets) == {"leader", "follower", "postgres", "shop", "application", "clients", *ALL}
    links = {
        (fault.target if fault.target in ("clients", "leader", "follower") else "service", fault.other)
        for fault in make_plan(1, seconds=1800.0, **named)
        if fault.kind == "cut"
    }
    # A node and another, a node and one service, clients and a node, and each of them and all.
    assert {("leader", "follower"), ("leader", "all"), ("service", "leader"), ("service", "all")} <= links
    assert {("clients", "leader"), ("clients", "all")} <= links
    assert {other for target, other in links if target == "leader"} & {*ALL}
    steps_s = [abs(fault.amount) for fault in make_plan(1, seconds=1800.0, **named) if fault.kind == "clock"]
    assert min(steps_s) < 300 < 3600 < max(steps_s) <= STEPS_S[1] < RETENTION_S


def test_without_kinds_nothing_happens():
    assert make_plan(1, seconds=60.0, kinds=[], cast=Cast(participants=SHOP)) == []


def test_a_history_is_read_back_as_it_was_written(tmp_path):
    with Recorder(tmp_path / "history.jsonl") as recorder:
        recorder.note("run", seed=3, nodes=["n1"], participants={})
        recorder.note("leader", node=None, epoch=None)
        assert recorder.history().run["seed"] == 3
    assert History.load(tmp_path / "history.jsonl").events == recorder.events
    with pytest.raises(ValueError, match="does not say of which run"):
        _ = History([]).run


# ------------------------------------------------------------------------------------------------ disks, command line


def test_a_disk_is_filled_to_the_last_byte(tmp_path):
    if (why := disks.why_not()) is not None:
        pytest.skip(why)
    disk = disks.Disk(tmp_path / "disk")
    disk.mount()
    try:
        assert disk.fill() > 20 << 20
        assert disk.free_bytes == 0
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "file").write_bytes(bytes(4096))
        disk.clear()
        assert disk.free_bytes > 20 << 20
    finally:
        disk.unmount()
    assert not (disk.folder / "ballast").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--faults", "kill,flood"], "--faults flood: there are kill,lose,pause,cut,slow,disk,clock"),
        (["--faults", ","], "--faults: name some of kill,"),
        (["--minutes", "31"], "at most 30"),
    ],
)
def test_wrong_usage_is_explained(capsys, words, says):
    assert main(["chaos", *words]) == 2
    assert says in capsys.readouterr().err


def test_all_kinds_happen_unless_told_otherwise(capsys):
    with pytest.raises(SystemExit):
        main(["chaos", "--help"])
    assert f"some of {','.join(KINDS)}," in " ".join(capsys.readouterr().out.split())


def test_a_report_is_never_written_over(tmp_path, capsys):
    (tmp_path / "something").touch()
    assert main(["chaos", "--report", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
