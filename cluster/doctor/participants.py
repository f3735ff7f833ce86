"""The servers of the registered participants: whether they answer, and which branches they hold prepared."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from cluster.answers import Shape, fits, printable
from cluster.calls import Answer, Caller, Unreachable, Unverified
from cluster.doctor.findings import Finding, Report, Severity, Unseen
from cluster.doctor.standing import PreparedBranch, Standing, standing_of
from cluster.doctor.standing import judge as judge_branch

_PATIENCE_S: Final = 5.0
_SHOWN: Final = 200
_LAST_S: Final = 253_402_300_799
"""The end of the year 9999."""


@dataclass(slots=True, kw_only=True)
class ParticipantFacts:
    """One. branches: None when it was not told. silent: no answer at all, and not only one that was refused."""

    name: str
    url: str
    branches: list[dict[str, Any]] | None = None
    total: int = 0
    trouble: str | None = None
    silent: bool = False
    now: float = field(default_factory=time.time)


async def look(
    registered: Sequence[Mapping[str, Any]], *, token: str | None, ca: Path | None
) -> list[ParticipantFacts]:
    """Ask all of them at once."""
    async with Caller(token=token, ca=ca) as caller:
        return list(await asyncio.gather(*(_look(caller, str(each["name"]), str(each["url"])) for each in registered)))


async def _look(caller: Caller, name: str, url: str) -> ParticipantFacts:
    facts = ParticipantFacts(name=name, url=url)
    try:
        answer: Answer = await caller.once("GET", f"{url}/branches", within_s=_PATIENCE_S)
    except Unreachable as error:
        # One that could not be verified is perhaps well: it was not asked in the right way.
        facts.trouble, facts.silent = str(error), not isinstance(error, Unverified)
        return facts
    body = answer.body
    if answer.status != 200 or not isinstance(body, dict) or not isinstance(body.get("branches"), list):
        facts.trouble = answer.trouble
        return facts
    rows, total = body["branches"], body.get("total", len(body["branches"]))
    if not all(fits(row, _ROW) for row in rows) or type(total) is not int:
        facts.trouble = "GET /branches was answered with something else among the branches"
        return facts
    facts.branches, facts.total = rows, total
    return facts


def _is_age(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= cast("float", value) <= _LAST_S)


_ROW: Final[Shape] = {"gid": printable, "branch": printable, "prepared_at?": _is_age}


def judge(
    facts: ParticipantFacts, report: Report, *, cluster: str | None, known: Mapping[str, Standing], limit_s: float
) -> None:
    """Add what follows from the facts."""
    where = f"participant {facts.name}"
    if facts.branches is None:
        report.unseen.append(Unseen(where=where, why=facts.trouble or "no answer"))
        if facts.silent and not any(each.where == where for each in report.findings):
            report.findings.append(
                Finding(
                    severity=Severity.WARNING,
                    code="participant_silent",
                    where=where,
                    what="it does not answer from here",
                    todo="start it; while it is away, what it has prepared keeps its locks",
                )
            )
        return
    report.seen.append(where)
    for row in facts.branches[:_SHOWN]:
        at = row.get("prepared_at")
        gid, name = str(row["gid"]), str(row["branch"])
        branch = PreparedBranch(
            where=where,
            name=f"branch {name} of {gid}",
            gid=gid,
            branch=name,
            age_s=None if at is None else facts.now - at,
            ending={},
        )
        found = judge_branch(branch, standing_of(gid, cluster, known), limit_s=limit_s)
        if found is not None:
            report.findings.append(found)
    if facts.total > _SHOWN:
        report.findings.append(
            Finding(
                severity=Severity.WARNING,
                code="many_prepared",
                where=where,
                what=f"{facts.total} branches are prepared; {_SHOWN} were looked at, the oldest first",
                todo="see why they are not told their outcome",
            )
        )
