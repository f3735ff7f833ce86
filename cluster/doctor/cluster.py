"""The cluster, as its nodes tell it: who leads, what is in flight and why it has not ended, what an operator owes."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from cluster.answers import NODE, PAGE, PARTICIPANTS, TRANSACTION, Shape, fits
from cluster.calls import Answer, Caller, Unreachable
from cluster.commands.tx import awaited
from cluster.doctor.findings import Finding, InFlight, Report, Restart, Severity, Unseen, lasting, seconds_of
from cluster.doctor.standing import Kind, Standing
from coordinator.levels import OLDEST

_PATIENCE_S: Final = 5.0
_PAGE: Final = 500
_PAGES_MAX: Final = 20
_UNFINISHED: Final = ("active", "preparing", "committing", "aborting")
_LOOK_UPS_AT_ONCE: Final = 16
_LOOK_UPS_S: Final = 15.0
"""For all questions about gids together."""


@dataclass(slots=True, kw_only=True)
class NodeFacts:
    """One node: what it says of the cluster, or why it says nothing."""

    url: str
    says: dict[str, Any] | None = None
    trouble: str | None = None


@dataclass(slots=True, kw_only=True)
class ClusterFacts:
    """Lists are None where nobody could tell: only a leader can."""

    nodes: list[NodeFacts] = field(default_factory=list)
    participants: list[dict[str, Any]] | None = None
    unfinished: list[dict[str, Any]] | None = None
    more: bool = False
    heuristics: list[dict[str, Any]] | None = None
    trouble: str | None = None
    now: float = 0.0

    @property
    def name(self) -> str | None:
        """The cluster's name."""
        return next((str(node.says["cluster"]) for node in self.nodes if node.says is not None), None)

    @property
    def leader(self) -> str | None:
        """Whom a node that is ready takes for the leader."""
        return next((node.says["leader"] for node in self.nodes if node.says and node.says["ready"]), None)


class _Silent(Exception):
    """Nobody could tell."""


async def look(caller: Caller) -> ClusterFacts:
    """Ask every node, those included that only the others name. Raises nothing: what cannot be had is said so."""
    facts = ClusterFacts(now=time.time())
    asked: set[str] = set()
    fresh = list(caller.urls)
    while fresh:
        url = fresh.pop(0)
        if url in asked:
            continue
        asked.add(url)
        node = NodeFacts(url=url)
        try:
            answer = await caller.once("GET", f"{url}/v1/cluster", within_s=_PATIENCE_S)
        except Unreachable as error:
            node.trouble = str(error)
        else:
            if answer.status == 200 and fits(answer.body, NODE):
                node.says = answer.body
                fresh += [str(row["url"]).rstrip("/") for row in answer.body["nodes"]]
            else:
                node.trouble = answer.trouble if answer.status != 200 else "what answers there is not a node"
        facts.nodes.append(node)
    try:
        facts.participants = (await _get(caller, facts, "/v1/participants", PARTICIPANTS))["participants"]
        facts.unfinished = []
        for state in _UNFINISHED:
            rows, more = await _pages(caller, facts, f"state={state}")
            facts.unfinished += rows
            facts.more |= more
        facts.heuristics, _ = await _pages(caller, facts, "heuristic=true")
    except _Silent as error:
        facts.trouble = str(error)
    return facts


async def _get(caller: Caller, facts: ClusterFacts, path: str, shape: Shape) -> dict[str, Any]:
    last = "no node answers"
    for node in facts.nodes:
        if node.says is None:
            continue
        try:
            answer = await caller.once("GET", node.url + path, within_s=_PATIENCE_S)
        except Unreachable as error:
            last = str(error)
            continue
        if answer.status == 200 and fits(answer.body, shape):
            found: dict[str, Any] = answer.body
            return found
        last = answer.trouble if answer.status != 200 else f"{path} is answered with something else"
    raise _Silent(last)


async def _pages(caller: Caller, facts: ClusterFacts, query: str) -> tuple[list[dict[str, Any]], bool]:
    rows: list[dict[str, Any]] = []
    after: str | None = None
    for _ in range(_PAGES_MAX):
        more = f"&after={quote(after)}" if after is not None else ""
        body = await _get(caller, facts, f"/v1/transactions?{query}&limit={_PAGE}{more}", PAGE)
        rows += body["transactions"]
        after = body.get("next")
        if after is None:
            return rows, False
    return rows, True


async def look_up(caller: Caller, facts: ClusterFacts, gids: Iterable[str]) -> dict[str, Standing]:
    """What the cluster knows of these; those that nobody could tell of in time are missing.

    Not by `/v1/outcomes`: that question settles what nobody has heard of, and a diagnosis changes nothing.
    """
    known: dict[str, Standing] = {}
    gate = asyncio.Semaphore(_LOOK_UPS_AT_ONCE)

    async def ask(gid: str) -> None:
        async with gate:
            for node in facts.nodes:
                if node.says is None:
                    continue
                try:
                    answer = await caller.once("GET", f"{node.url}/v1/transactions/{quote(gid)}", within_s=_PATIENCE_S)
                except Unreachable:
                    continue  # the next node may answer; if none does, it is missing
                standing = _standing(answer)
                if standing is not None:
                    known[gid] = standing
                    return

    tasks = [asyncio.create_task(ask(gid)) for gid in sorted(set(gids))]
    if tasks:
        # Without a leader each one that is not decided takes its three seconds: not all of them can have that.
        _, late = await asyncio.wait(tasks, timeout=_LOOK_UPS_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
    return known


def _standing(answer: Answer) -> Standing | None:
    if answer.status == 200:
        if not fits(answer.body, TRANSACTION):
            return None
        txn = answer.body
        resolved = {row["branch"]: row["resolved"]["outcome"] for row in txn["branches"] if "resolved" in row}
        kind = Kind.IN_FLIGHT if txn["decision"] is None else Kind.DECIDED
        return Standing(kind=kind, decision=txn["decision"], resolved=resolved)
    return {404: Standing(kind=Kind.UNKNOWN), 410: Standing(kind=Kind.FORGOTTEN)}.get(answer.status)


# ------------------------------------------------------------------------------------------------ judging


def judge(facts: ClusterFacts, report: Report, *, limit_s: float) -> None:
    """Add what follows from the facts. A node that is down is a finding: what it knows, the others know."""
    report.seen += [f"node {node.says['node']}" for node in facts.nodes if node.says is not None]
    if not report.seen:
        # Perhaps nothing is wrong but the way from here.
        why = "; ".join(f"{node.url}: {node.trouble}" for node in facts.nodes)
        report.unseen.append(Unseen(where="cluster", why=f"no node answers: {why}"))
        return
    if facts.participants is None or facts.unfinished is None or facts.heuristics is None:
        report.unseen.append(Unseen(where="transactions and participants", why=facts.trouble or "no leader"))
    report.findings += _nodes(facts)
    report.findings += _participants(facts, limit_s)
    for txn in facts.unfinished or ():
        flight = in_flight(txn, facts.now)
        report.in_flight.append(flight)
        if flight.age_s > limit_s and "heuristic" not in txn:
            report.findings.append(_stuck(txn, flight))
    report.more_in_flight = facts.more
    # Older software does not know what was asked for, and shows others too.
    report.findings += [_heuristic(txn) for txn in facts.heuristics or () if "heuristic" in txn]
    report.restart = restart(facts)


def _nodes(facts: ClusterFacts) -> Sequence[Finding]:
    found = []
    said = [node.says for node in facts.nodes if node.says is not None]
    size = max((len(says["nodes"]) for says in said), default=len(facts.nodes))
    majority = size // 2 + 1
    if facts.leader is None:
        found.append(
            Finding(
                severity=Severity.CRITICAL,
                code="no_leader",
                where="cluster",
                what=f"nobody leads: {len(said)} of {size} nodes answer, and {majority} are needed; nothing is decided",
                todo="start the nodes that are down (outlast start, or your supervisor), or mend their network",
            )
        )
    for node in facts.nodes:
        if node.says is None:
            found.append(
                Finding(
                    severity=Severity.WARNING,
                    code="node_down",
                    where=f"node {node.url}",
                    what=f"it does not answer: {node.trouble}; the cluster stands as long as {majority} of {size} do",
                    todo="start it again on its data; if its disk is lost: outlast start NAME --rejoin",
                )
            )
            continue
        says = node.says
        if says.get("trouble"):
            found.append(
                Finding(
                    severity=Severity.CRITICAL,
                    code="node_trouble",
                    where=f"node {says['node']}",
                    what=f"it takes no part: {says['trouble']}",
                    todo="docs/DISKS.md says what helps; it goes on by itself when there is room",
                )
            )
        if says["role"] == "joining":
            found.append(
                Finding(
                    severity=Severity.WARNING,
                    code="node_joining",
                    where=f"node {says['node']}",
                    what="it came without a log, and counts for nothing until it is caught up",
                    todo="wait; its log says how far it is",
                )
            )
    levels = {row["id"]: row["understands"] for says in said for row in says["nodes"] if row.get("understands")}
    # Software that knows no levels says nothing of them.
    levels |= {says["node"]: OLDEST for says in said if "level" not in says}
    level = max((says.get("level", OLDEST) for says in said), default=OLDEST)
    for name, understands in sorted(levels.items()):
        if understands < level:
            found.append(
                Finding(
                    severity=Severity.WARNING,
                    code="node_behind",
                    where=f"node {name}",
                    what=f"it understands level {understands}, and the cluster works at level {level}",
                    todo="install the software that the other nodes run (docs/UPGRADES.md)",
                )
            )
    if any(says.get("reconciling") for says in said):
        found.append(
            Finding(
                severity=Severity.WARNING,
                code="reconciling",
                where="cluster",
                what="after a restore, what the copy does not know is being found out from the participants",
                todo="see whom it waits for: outlast restore --status (docs/RECOVERY.md)",
            )
        )
    return found


def _participants(facts: ClusterFacts, limit_s: float) -> Iterable[Finding]:
    for each in facts.participants or ():
        if each["reachable"]:
            continue
        since = seconds_of(each.get("down_since"))
        long = since is not None and facts.now - since > limit_s
        yield Finding(
            severity=Severity.CRITICAL if long and each["owed"] else Severity.WARNING,
            code="participant_down",
            where=f"participant {each['name']}",
            what=f"the leader does not reach it at {each['url']}: {each['trouble']}; {each['owed']} messages wait",
            todo="start it, or say where it is now (PUT /v1/participants); what is owed to it goes there at once",
            since=since,
        )


def in_flight(txn: Mapping[str, Any], now: float) -> InFlight:
    """One that has not ended, and why."""
    started = seconds_of(txn["started_at"]) or now
    why = [awaited(each) for each in txn.get("waiting_for") or ()]
    if not why:
        why = ["the log: the next entry is on its way"]
    return InFlight(
        gid=txn["gid"],
        state=txn["state"],
        started_at=txn["started_at"],
        age_s=max(0.0, round(now - started, 3)),
        why=tuple(f"waits for {each}" for each in why),
    )


def _stuck(txn: Mapping[str, Any], flight: InFlight) -> Finding:
    decided = txn["decision"] is not None
    return Finding(
        severity=Severity.WARNING,
        code="transaction_stuck",
        where=f"transaction {txn['gid']}",
        what=f"{txn['state']} for {lasting(flight.age_s)}: {'; '.join(flight.why)}",
        todo=(
            "let the participant be reached again: it is told until it acknowledges. If it never comes back: "
            f"outlast tx resolve {txn['gid']} --branch NAME --{txn['decision']}"
            if decided
            else f"its timeout ends it; to end it now: outlast tx abort {txn['gid']}"
        ),
        since=seconds_of(txn["started_at"]),
        about=(txn["gid"],),
    )


def _heuristic(txn: Mapping[str, Any]) -> Finding:
    gid = txn["gid"]
    if txn["heuristic"] == "contradicted":
        rows = [row for row in txn["branches"] if "heuristic" in row and "resolved" not in row]
        names = ", ".join(f"{row['branch']} is {row['heuristic']}" for row in rows)
        branch = rows[0]["branch"] if rows else "NAME"
        return Finding(
            severity=Severity.CRITICAL,
            code="contradicted",
            where=f"transaction {gid}",
            what=f"the decision is to {txn['decision']}, and a participant cannot follow: {names}",
            todo=(
                "put the books right by hand, then record how the branch ended: "
                f"outlast tx resolve {gid} --branch {branch} --commit|--abort --note '...'"
            ),
            since=seconds_of(txn["decided_at"]),
            about=(gid, *(row["branch"] for row in rows)),
        )
    rows = [row for row in txn["branches"] if "resolved" in row]
    names = ", ".join(f"{row['branch']} {row['resolved']['outcome']}" for row in rows)
    return Finding(
        severity=Severity.WARNING,
        code="resolved_by_hand",
        where=f"transaction {gid}",
        what=(
            f"an operator ended branches by hand ({names}), "
            + ("against the decision" if txn["heuristic"] == "mixed" else "as the decision wants")
            + f" to {txn['decision']}"
        ),
        todo=f"once the databases and the books are as they should be: outlast tx acknowledge {gid}",
        since=min((at for row in rows if (at := seconds_of(row["resolved"]["at"])) is not None), default=None),
        about=(gid, *(row["branch"] for row in rows)),
    )


def restart(facts: ClusterFacts) -> Restart:
    """Whether to restart a coordinator would change anything. Nearly always not: there is no second way to recover."""
    answering = [node for node in facts.nodes if node.says is not None]
    if facts.leader is None:
        if len(answering) < len(facts.nodes):
            down = ", ".join(node.url for node in facts.nodes if node.says is None)
            return Restart(
                helps=True, why=f"nobody leads: start what is down ({down}); to restart the others is no help"
            )
        return Restart(helps=False, why="nobody leads although all nodes answer: they do not reach each other")
    if facts.unfinished is None:
        return Restart(helps=False, why=f"there is a leader; it could not be asked for more: {facts.trouble}")
    if not facts.unfinished:
        return Restart(helps=False, why="nothing is in flight")
    decided = [txn for txn in facts.unfinished if txn["decision"] is not None]
    told = [each for txn in facts.unfinished for each in txn.get("waiting_for") or ()]
    waits = [each for each in told if each["participant"] is not None]
    dead = sorted({each["participant"] for each in waits if each["down_since"] is not None})
    mad = sorted({each["participant"] for each in waits if each["for"] == "operator"})
    parts = []
    if decided:
        parts.append(f"{len(decided)} of {len(facts.unfinished)} in flight are decided, and no restart undecides them")
    if dead:
        parts.append(f"{', '.join(dead)} would not answer a new leader either")
    if mad:
        parts.append(f"{', '.join(mad)} would contradict a new leader, too")
    if len(decided) < len(facts.unfinished):
        parts.append("what is undecided is decided by its votes or its timeout, whoever leads")
    return Restart(helps=False, why="; ".join(parts))
