"""What a cluster says of the transaction that a prepared branch belongs to, and what follows for the branch. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from cluster.doctor.findings import Finding, Severity, lasting, since_now
from coordinator.protocol.messages import Gid


class Kind(Enum):
    """What is known of a gid."""

    DECIDED = "decided"
    IN_FLIGHT = "in flight"
    UNKNOWN = "unknown"
    FORGOTTEN = "forgotten"
    FOREIGN = "foreign"
    NOT_SEEN = "not seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """decision: commit or abort. resolved: branches that an operator has resolved, and how."""

    kind: Kind
    decision: str | None = None
    resolved: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBranch:
    """One, wherever it was seen. ending: by outcome, the statement that ends it by hand; none where there is none."""

    where: str
    name: str
    gid: str
    branch: str
    age_s: float | None
    ending: Mapping[str, str]
    holds: str = ""
    waiters: tuple[str, ...] = ()


def standing_of(gid: str, cluster: str | None, known: Mapping[str, Standing]) -> Standing:
    """What there is to say of a gid: `known` is what the cluster answered."""
    parsed = Gid.parse(gid)
    if cluster is None:
        return Standing(kind=Kind.NOT_SEEN)
    if parsed is None or parsed.cluster != cluster:
        return Standing(kind=Kind.FOREIGN)
    return known.get(gid, Standing(kind=Kind.NOT_SEEN))


def judge(branch: PreparedBranch, standing: Standing, *, limit_s: float) -> Finding | None:
    """What to say of a prepared branch; None while it is younger than the limit and nobody waits."""
    old = branch.age_s is not None and branch.age_s > limit_s
    if standing.kind is Kind.FOREIGN:
        return _foreign(branch)
    forgotten = standing.kind is Kind.FORGOTTEN
    if not (old or forgotten):
        return None
    age = "" if branch.age_s is None else f" for {lasting(branch.age_s)}"
    waits = f"; {len(branch.waiters)} wait behind it: {'; '.join(branch.waiters[:5])}" if branch.waiters else ""
    holds = f"; it holds {branch.holds}" if branch.holds else ""
    return Finding(
        severity=Severity.CRITICAL if branch.waiters or forgotten else Severity.WARNING,
        code="prepared_forgotten" if forgotten else "prepared_too_long",
        where=branch.where,
        what=f"{branch.name} is prepared{age}: {_says(standing)}{holds}{waits}",
        todo=_todo(branch, standing),
        since=None if branch.age_s is None else since_now(branch.age_s),
        about=(branch.gid, branch.branch, *branch.waiters),
    )


def _foreign(branch: PreparedBranch) -> Finding:
    age = "" if branch.age_s is None else f" for {lasting(branch.age_s)}"
    waits = f"; {len(branch.waiters)} wait behind it: {'; '.join(branch.waiters[:5])}" if branch.waiters else ""
    return Finding(
        severity=Severity.INFO,
        code="foreign_prepared",
        where=branch.where,
        what=f"{branch.name} is prepared{age} by somebody else than this cluster{waits}",
        todo="nothing here: ask whoever prepared it; no participant of this cluster touches it",
        since=None if branch.age_s is None else since_now(branch.age_s),
        about=(branch.name, *branch.waiters),
    )


def _says(standing: Standing) -> str:
    match standing.kind:
        case Kind.DECIDED:
            return f"the cluster has decided to {standing.decision}, and the branch has not followed"
        case Kind.IN_FLIGHT:
            return "the cluster has not decided yet"
        case Kind.UNKNOWN:
            return "the cluster has never heard of it, so it is to be rolled back"
        case Kind.FORGOTTEN:
            return "the cluster has forgotten it, and nobody can tell its outcome any more"
        case _:
            return "the cluster could not be asked"


def _todo(branch: PreparedBranch, standing: Standing) -> str:
    match standing.kind:
        case Kind.DECIDED:
            wanted = standing.decision or "abort"
            resolved = (standing.resolved or {}).get(branch.branch)
            if resolved is not None:
                ending = branch.ending.get(resolved)
                return (
                    f"an operator has resolved it by hand ({resolved}), and it is still prepared: "
                    + (f"run {ending}" if ending else "end it in its database")
                    + "; acknowledge it only then"
                )
            ending = branch.ending.get(wanted)
            return (
                "see that its participant's server runs, reaches the nodes and is reached by them: it ends the branch "
                "by itself" + (f". Without it: {ending}" if ending else "")
            )
        case Kind.IN_FLIGHT:
            return f"see what it waits for: outlast tx show {branch.gid}; if need be: outlast tx abort {branch.gid}"
        case Kind.UNKNOWN:
            ending = branch.ending.get("abort")
            return "see that its participant's server runs: it asks, and rolls the branch back" + (
                f". Without it: {ending}" if ending else ""
            )
        case Kind.FORGOTTEN:
            endings = " or ".join(branch.ending.values())
            return "look for its outcome in the other databases, then end it by hand" + (
                f": {endings}" if endings else ""
            )
        case _:
            return "first let the cluster be reached; do not end the branch by hand before you know its outcome"
