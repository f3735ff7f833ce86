"""The demo's last word: when a check fails, it says what is missing."""

from dataclasses import replace

import pytest

from cluster.demo.crash import Crash, Outage
from cluster.demo.load import Told
from cluster.demo.verdict import Check, Evidence, _checks
from cluster.local import Leader
from participants.shop.audit import Report

GIDS = ("local-1-1", "local-1-2", "local-1-3")
CRASH = Crash(
    node="n1",
    blocked=GIDS,
    decided=GIDS[:1],
    killed_s=0.0,
    leader=Leader(node="n2", url="http://127.0.0.1:2", epoch=2),
    leader_after_s=1.0,
    finished_after_s=2.0,
)
OUTAGE = Outage(
    server="PostgreSQL", blocked=GIDS, decided=GIDS[:1], killed_s=0.0, back_after_s=1.0, finished_after_s=2.0
)
UNFINISHED = "of the 3 transactions that were prepared at the kill some are not finished"
TOLD = tuple(
    Told(order=f"o{number}", outcome="committed", gid=gid, reason=None, latency_s=0.1)
    for number, gid in enumerate(GIDS)
)
REPORT = Report(
    orders=3,
    reservations=3,
    charges=3,
    stock_initial=9,
    stock_available=6,
    sold=3,
    balance_initial_cents=900,
    balance_cents=600,
    charged_cents=300,
    in_doubt=0,
    discrepancies=(),
)


def failing(crash: Crash = CRASH, outage: Outage = OUTAGE) -> list[Check]:
    evidence = Evidence(
        nodes=3,
        seconds=1.0,
        begun=3,
        turned_away=0,
        repeated=0,
        tried_again=0,
        told=TOLD,
        crashes=(crash,),
        longest_prepared_s=1.0,
        outages=(outage,),
    )
    placed = {told.order: str(told.gid) for told in TOLD}
    return [check for check in _checks(evidence, REPORT, placed) if not check.ok]


def test_a_run_in_which_all_came_as_it_should() -> None:
    assert failing() == []


@pytest.mark.parametrize(
    ("lacks", "detail"),
    [
        ({"decided": ()}, "no decision was on its way, so nothing is proven"),
        ({"decided": (GIDS[0], "local-9-9")}, "decided, and not carried out: local-9-9"),
        ({"finished_after_s": None}, UNFINISHED),
        (
            {"decided": ("local-9-9",), "finished_after_s": None},
            f"decided, and not carried out: local-9-9; {UNFINISHED}",
        ),
    ],
)
def test_a_kill_after_which_something_is_missing(lacks: dict[str, object], detail: str) -> None:
    (crash,) = failing(crash=replace(CRASH, **lacks))
    assert (crash.name, crash.detail) == ("what n1 had decided was carried out", detail)
    (outage,) = failing(outage=replace(OUTAGE, **lacks))
    assert (outage.name, outage.detail) == ("what was decided while PostgreSQL was dead was carried out", detail)


def test_a_leader_that_nobody_follows() -> None:
    (crash,) = failing(crash=replace(CRASH, leader=None, leader_after_s=None))
    assert crash.detail == "nobody leads again"
