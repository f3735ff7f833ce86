"""Makes a failing plan short: faults are taken out as long as the same checker still complains (delta debugging).

A run with fewer faults is another run from the first missing one on, so this finds a short plan, not the shortest.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from tests.simulation.faults import Plan
from tests.simulation.world import Report

_LESS: Final[tuple[dict[str, Any], ...]] = (
    {"left_out": ""},
    {"disaster": None},
    {"old": (), "stays_old": ""},
    {"stays_old": ""},
)
"""What a plan has beside faults, and can be without."""


def kinds(report: Report) -> set[str]:
    """Who complains."""
    return {complaint.partition(":")[0] for complaint in report.complaints}


def shrink(plan: Plan, run: Callable[[Plan], Report], *, runs_max: int = 200) -> tuple[Plan, Report]:
    """A plan with less in it on which one of those who complained still does, and its report."""
    report = run(plan)
    wanted = kinds(report)
    runs = 1
    for less in _LESS:
        simpler = replace(plan, **less)
        if simpler == plan:
            continue
        tried, runs = run(simpler), runs + 1
        if kinds(tried) & wanted:
            plan, report = simpler, tried
    size = max(1, len(plan.faults) // 2)
    while runs < runs_max:
        at, shorter = 0, False
        while at < len(plan.faults) and runs < runs_max:
            without = replace(plan, faults=plan.faults[:at] + plan.faults[at + size :])
            tried, runs = run(without), runs + 1
            if kinds(tried) & wanted:
                plan, report, shorter = without, tried, True
            else:
                at += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return plan, report
