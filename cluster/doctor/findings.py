"""What was found, how bad it is, and what was not seen; the exit status follows from these alone."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad: nothing to do; somebody should look; somebody waits, or the books may be wrong."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


_ORDER = (Severity.CRITICAL, Severity.WARNING, Severity.INFO)


class Status(IntEnum):
    """Exit statuses, for monitoring."""

    WELL = 0
    WARNING = 1
    CRITICAL = 2
    NOT_SEEN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that somebody may have to do something about.

    code: for programs; docs/DOCTOR.md lists them. where: a node, a participant, a database. todo: what to do now.
    since: when it began, as far as that is known, in seconds since 1970.
    """

    severity: Severity
    code: str
    where: str
    what: str
    todo: str
    since: float | None = None
    about: tuple[str, ...] = ()
    """Gids, pids and the like, for programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """A place that could not be looked at: nothing is known of it, least of all that it is well."""

    where: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A transaction that has not ended, and why: a sentence for each thing that it waits for."""

    gid: str
    state: str
    started_at: str
    age_s: float
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Whether a coordinator's restart would change anything, and why."""

    helps: bool
    why: str


@dataclass(slots=True, kw_only=True)
class Report:
    """All of it. `more_in_flight`: there are others, beyond those that were looked at."""

    findings: list[Finding] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    unseen: list[Unseen] = field(default_factory=list)
    in_flight: list[InFlight] = field(default_factory=list)
    more_in_flight: bool = False
    restart: Restart | None = None

    @property
    def status(self) -> Status:
        """Something critical counts for more than something unseen, and that for more than a warning."""
        severities = {finding.severity for finding in self.findings}
        if Severity.CRITICAL in severities:
            return Status.CRITICAL
        if self.unseen or not self.seen:
            return Status.NOT_SEEN
        return Status.WARNING if Severity.WARNING in severities else Status.WELL

    def sorted(self) -> Sequence[Finding]:
        """The worst first, and of these the oldest."""
        return sorted(self.findings, key=lambda f: (_ORDER.index(f.severity), f.since or float("inf"), f.where, f.code))

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "status": self.status.name.lower(),
            "findings": [{**asdict(each), "since": date(each.since)} for each in self.sorted()],
            "seen": self.seen,
            "unseen": [asdict(each) for each in self.unseen],
            "in_flight": [asdict(each) for each in self.in_flight],
            "more_in_flight": self.more_in_flight,
            "restart": None if self.restart is None else asdict(self.restart),
        }


def date(at_s: float | None) -> str | None:
    """Seconds since 1970 as RFC 3339 has it."""
    if at_s is None:
        return None
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def seconds_of(text: object) -> float | None:
    """The inverse of `date`, for dates that nodes show; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def lasting(age_s: float) -> str:
    """How long, for people."""
    if age_s < 120:
        return f"{max(0.0, age_s):.0f} s"
    return f"{age_s / 60:.0f} min" if age_s < 7200 else f"{age_s / 3600:.1f} h"


def since_now(age_s: float) -> float:
    """The moment that is so long ago."""
    return time.time() - age_s
