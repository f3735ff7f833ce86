"""What the databases hold against what customers were told: the demo's last word.

`Evidence` is all that was measured while the show ran. `judge` adds what the three databases say when they are read
afterwards, and checks one against the other. It believes no counter of the coordinator.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.demo.crash import Crash, Outage
from cluster.demo.load import Told
from participants.shop.audit import Report, audit, order_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One run, as measured.

    begun: customers who were served. turned_away: who came while too many waited.
    repeated: requests made again because a node did not answer. tried_again: orders tried again because of a lock.
    longest_prepared_s: the longest time that any branch was prepared, as seen on the wire.
    outages: of database servers.
    """

    nodes: int
    seconds: float
    begun: int
    turned_away: int
    repeated: int
    tried_again: int
    told: tuple[Told, ...]
    crashes: tuple[Crash, ...]
    longest_prepared_s: float
    outages: tuple[Outage, ...] = ()

    def count(self, outcome: str) -> int:
        """Customers who were told so."""
        return sum(told.outcome == outcome for told in self.told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must hold, and the numbers that it was judged by."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The evidence, the audit, and every check."""

    evidence: Evidence
    report: Report
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def failures(self) -> Iterator[str]:
        """What does not hold, one sentence each."""
        return (f"{check.name}: {check.detail}" for check in self.checks if not check.ok)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        evidence = self.evidence
        latencies = sorted(told.latency_s for told in evidence.told)
        return {
            "ok": self.ok,
            "nodes": evidence.nodes,
            "seconds": round(evidence.seconds, 3),
            "checkouts": evidence.begun,
            "committed": evidence.count("committed"),
            "refused": evidence.count("refused"),
            "refused_because": dict(Counter(told.reason for told in evidence.told if told.outcome == "refused")),
            "client_errors": evidence.count("error"),
            "turned_away": evidence.turned_away,
            "requests_repeated": evidence.repeated,
            "tried_again_after_a_lock": evidence.tried_again,
            "latency_ms": {
                name: round(latencies[min(len(latencies) - 1, int(share * len(latencies)))] * 1000, 1)
                for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
                if latencies
            },
            "in_doubt": self.report.in_doubt,
            "longest_prepared_s": round(evidence.longest_prepared_s, 3),
            "crashes": [
                {
                    "killed": crash.node,
                    "blocked": list(crash.blocked),
                    "decided": list(crash.decided),
                    "new_leader": None if crash.leader is None else crash.leader.node,
                    "leader_after_s": _rounded(crash.leader_after_s),
                    "finished_after_s": _rounded(crash.finished_after_s),
                }
                for crash in evidence.crashes
            ],
            "outages": [
                {
                    "killed": outage.server,
                    "blocked": list(outage.blocked),
                    "decided": list(outage.decided),
                    "back_after_s": _rounded(outage.back_after_s),
                    "finished_after_s": _rounded(outage.finished_after_s),
                }
                for outage in evidence.outages
            ],
            "audit": self.report.to_plain(),
            "checks": [asdict(check) for check in self.checks],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def judge(evidence: Evidence, shop: Path) -> Verdict:
    """Read the databases in `shop`, of services that have stopped, and judge. Raises what `audit` raises."""
    report, placed = audit(shop), order_ids(shop)
    return Verdict(evidence=evidence, report=report, checks=tuple(_checks(evidence, report, placed)))


def _checks(evidence: Evidence, report: Report, placed: dict[str, str]) -> Iterator[Check]:
    told = {one.order: one for one in evidence.told}
    committed = {one.order: one.gid for one in evidence.told if one.outcome == "committed"}
    refused = {one.order for one in evidence.told if one.outcome == "refused"}
    errors = [f"{one.order}: {one.reason}" for one in evidence.told if one.outcome == "error"]
    yield Check(
        name="every customer got an answer",
        ok=len(told) == len(evidence.told) == evidence.begun and not errors and bool(committed),
        detail=_few(errors) or f"{len(told)} of {evidence.begun}, {len(committed)} of them committed",
    )
    lost = sorted(order for order, gid in committed.items() if placed.get(order) != gid)
    yield Check(
        name="what was told committed is there, once",
        ok=not lost,
        detail=_few(lost) or f"{len(committed)} orders",
    )
    ghosts = sorted(placed.keys() - committed.keys())
    yield Check(
        name="nothing else is there",
        ok=not ghosts,
        detail=_few(ghosts) or f"{len(refused)} refused, none of them placed",
    )
    yield Check(name="no branch is in doubt", ok=report.in_doubt == 0, detail=f"{report.in_doubt} in doubt")
    sums = f"{report.sold} pieces sold, {report.charged_cents / 100:.2f} charged, for {report.orders} orders"
    yield Check(name="money and stock add up", ok=report.ok, detail=_few(list(report.discrepancies)) or sums)
    gids = set(placed.values())
    for crash in evidence.crashes:
        missing = _missing(crash, gids)
        if crash.leader is None:
            missing.append("nobody leads again")
        yield Check(
            name=f"what {crash.node} had decided was carried out",
            ok=not missing,
            detail="; ".join(missing)
            or f"{len(crash.decided)} commits; all {len(crash.blocked)} blocked transactions are finished",
        )
    for outage in evidence.outages:
        missing = _missing(outage, gids)
        yield Check(
            name=f"what was decided while {outage.server} was dead was carried out",
            ok=not missing,
            detail="; ".join(missing)
            or f"all {len(outage.blocked)} transactions that were prepared at the kill are finished",
        )


def _missing(kill: Crash | Outage, placed: Collection[str]) -> list[str]:
    """What did not come of a kill that should have; `placed`: gids of the orders that are there."""
    missing = []
    if not kill.decided:
        missing.append("no decision was on its way, so nothing is proven")
    if undone := [gid for gid in kill.decided if gid not in placed]:
        missing.append(f"decided, and not carried out: {_few(undone)}")
    if kill.finished_after_s is None:
        missing.append(f"of the {len(kill.blocked)} transactions that were prepared at the kill some are not finished")
    return missing


def _few(names: list[str]) -> str:
    """The first of them, and how many more there are; empty when there are none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more
