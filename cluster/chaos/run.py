"""One run from beginning to end: load and faults, then rest, then every look and every check."""

import asyncio
import json
import re
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cluster.chaos import disks
from cluster.chaos.applications import Applications
from cluster.chaos.checks import CHECKS, Check
from cluster.chaos.checks.doubt import waits
from cluster.chaos.faults import Nemesis
from cluster.chaos.history import History, Recorder, few
from cluster.chaos.load import Load, balances_cents, stock
from cluster.chaos.plan import KINDS, STEPS_S, Cast, make_plan
from cluster.chaos.report import write_report
from cluster.chaos.stage import (
    APPLICATION,
    CLIENTS,
    LEDGER,
    ON_SERVER,
    SERVER,
    SHOP,
    Stage,
    has_postgres,
)
from cluster.chaos.stage import RETENTION_S as REMEMBERED_S
from cluster.chaos.watch import Watch
from cluster.process import ProcessTrouble

BOUND_S: Final = 30.0
"""A branch may be prepared for so long while all is well: a timeout, an election, a start, on a busy machine."""

MAX_MINUTES: Final = 30.0
"""A run is bounded. For more, take another seed."""

RETENTION_S: Final = REMEMBERED_S - STEPS_S[1]
"""For so long at least nothing is forgotten: nodes go by their calendars, which are set."""

_REST_S: Final = 90.0
_LEADER_S: Final = 60.0
_BAD_LINE: Final = re.compile(
    r"^Traceback \(most recent call last\)|^Fatal Python error"
    r"|\bALARM: (?!(?:COMMIT|ROLLBACK) PREPARED .*: No space left on device)"
)
"""An alarm is for what no fault here explains, such as a prepared branch that no node knows. But one is explained:
PostgreSQL on a full disk may refuse to finish a branch, and its participant calls for help, as it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be chosen. kinds: of faults. per_s: orders begun, at the most. modules: see `Stage`."""

    minutes: float = 2.0
    seed: int = 1
    kinds: Sequence[str] = KINDS
    per_s: float = 20.0
    bound_s: float = BOUND_S
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a run came to.

    complaints: by check, those that failed only. trouble: what kept the run from its end; None: nothing did.
    impossible: faults that could not be tried on this machine, and why. counts: figures for people.
    """

    seed: int
    ok: bool
    complaints: Mapping[str, Sequence[str]]
    trouble: str | None
    impossible: Mapping[str, str]
    counts: Mapping[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def possible(kinds: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Of `kinds`: what this machine can do, and why it cannot do the rest."""
    why: dict[str, str] = {}
    if "disk" in kinds and (reason := disks.why_not()) is not None:
        why["disk"] = reason
    return [kind for kind in kinds if kind not in why], why


async def run(options: Options, report: Path, tell: Callable[[str], None]) -> Verdict:
    """Run, check, and write `report`: the history, a page with a picture, the verdict; the evidence when it fails.

    tell: hears in words what happens. Raises `ProcessTrouble` when `report` holds something already.
    """
    kinds, impossible = possible(options.kinds)
    if not kinds:
        raise ProcessTrouble(f"none of the faults asked for is possible here: {'; '.join(impossible.values())}")
    postgres = has_postgres()
    if postgres is not None:
        impossible["postgres"] = postgres
        impossible["application"] = "its own transactions are in two databases on PostgreSQL"
    _make_empty(report)
    for what, why in impossible.items():
        tell(f"not possible here: {what}: {why}")
    folder = Path(tempfile.mkdtemp(prefix="outlast-chaos-"))
    evidence = report / "evidence"
    trouble: str | None = None
    bad_lines: list[str] = []

    def look_at_logs(error: BaseException | None) -> None:
        # While disks that are about to be unmounted are still there.
        bad_lines.extend(_bad_lines(folder))
        if error is not None or bad_lines or _judge(recorder.history(), bad_lines):
            _keep(folder, evidence)
            for name, server in stage.servers.items():
                if server.log.exists():
                    shutil.copy(server.log, evidence / f"{name}.txt")

    try:
        with Recorder(report / "history.jsonl") as recorder:
            stage = Stage(
                folder,
                seed=options.seed,
                stock=stock(),
                balances_cents=balances_cents(),
                postgres=postgres is None,
                disks="disk" in kinds,
                modules=options.modules,
                on_end=look_at_logs,
            )
            try:
                await _run(stage, recorder, options, kinds, tell)
            except Exception as error:  # noqa: BLE001  # whatever it was, it is judged, and there is something to look at
                trouble = _trouble(error)
                evidence.mkdir(exist_ok=True)
                (evidence / "traceback.txt").write_text("".join(traceback.format_exception(error)))
            complaints = _judge(recorder.history(), bad_lines)
            verdict = Verdict(
                seed=options.seed,
                ok=not complaints and trouble is None,
                complaints={name: few(found) for name, found in complaints.items()},
                trouble=trouble,
                impossible=impossible,
                counts=_counts(recorder.history()),
            )
            write_report(report / "report.html", recorder.history(), verdict.to_plain())
            (report / "verdict.json").write_text(json.dumps(verdict.to_plain(), indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return verdict


async def _run(
    stage: Stage, recorder: Recorder, options: Options, kinds: Sequence[str], tell: Callable[[str], None]
) -> None:
    tell("starting nodes, databases and services")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(stage)
        caller = await stack.enter_async_context(stage.cluster.caller())
        seconds = options.minutes * 60.0
        recorder.note(
            "run",
            seed=options.seed,
            seconds=seconds,
            nodes=list(stage.cluster.nodes),
            participants={
                name: "postgres" if name in (ON_SERVER, LEDGER) and stage.servers else "sqlite"
                for name in stage.participants
            },
            books=stage.books,
            bound_s=options.bound_s,
            retention_s=RETENTION_S,
        )
        cast = Cast(
            participants=stage.participants,
            servers=list(stage.servers),
            stores=[name for name in (SHOP, SERVER) if name in stage.disks],
            applications=[APPLICATION] if stage.application is not None else [],
            clients=CLIENTS,
        )
        plan = make_plan(options.seed, seconds=seconds, kinds=kinds, cast=cast)
        tell(f"seed {options.seed}: {len(plan)} faults in {seconds:g} s")
        watch = Watch(stage, caller, recorder)
        load = Load(caller, stage.client_urls, recorder, options.seed, per_s=options.per_s)
        clients: list[Load | Applications] = [load]
        if stage.application is not None:
            clients.append(Applications(stage.application, caller, stage.client_urls, recorder, options.seed))
        nemesis = Nemesis(stage, recorder, plan, options.seed, tell)
        # A run that nobody looks at proves nothing: whatever ends a look ends all.
        async with asyncio.TaskGroup() as watching:
            looks = [
                watching.create_task(watch.leader()),
                *(watching.create_task(watch.prepared(name)) for name in stage.services),
            ]
            async with asyncio.TaskGroup() as group:
                for each in clients:
                    group.create_task(each.run())
                began_s = recorder.now_s
                await nemesis.run(began_s)
                await asyncio.sleep(max(0.0, began_s + seconds - recorder.now_s))
                tell("all is healed; everyone waits for the last answer")
                for each in clients:
                    each.stop(patience_s=_REST_S)
            leader = await stage.cluster.wait_for_leader(within_s=_LEADER_S)
            recorder.note("rest")
            await watch.until_none_is_prepared(within_s=_REST_S)
            for look in looks:
                look.cancel()
        tell("at rest: every node and every database is asked")
        await watch.probe(load.used, leader.url)
        await watch.final(event["gid"] for event in recorder.events if event.get("gid") is not None)
        await watch.until_none_is_prepared(within_s=_REST_S)
        await watch.databases(stage.shop)


def _make_empty(report: Path) -> None:
    try:
        report.mkdir(parents=True, exist_ok=True)
        full = any(report.iterdir())
    except OSError as error:
        raise ProcessTrouble(f"{report} cannot be used: {error.strerror}; name another folder with --report") from error
    if full:
        raise ProcessTrouble(f"{report} is not empty; name another folder with --report, or remove it")


def _judge(history: History, bad_lines: Sequence[str]) -> dict[str, list[str]]:
    """Complaints by check."""
    if not any(True for _ in history.of("run")):
        return {"answered": ["the run did not begin"]}
    found = {name: _made(check, history) for name, (_, check) in CHECKS.items()}
    if bad_lines:
        found["logs"] = [*bad_lines]
    return {name: complaints for name, complaints in found.items() if complaints}


def _made(check: Check, history: History) -> list[str]:
    """What a check complains of; that it could not be made, where it cannot cope with what was recorded."""
    try:
        return check(history)
    except Exception as error:  # noqa: BLE001  # a defect, and no reason to say nothing of all the others
        return [f"it could not be made: {type(error).__name__}: {error}"]


def _bad_lines(folder: Path) -> list[str]:
    """What no process should ever write, and where it stands."""
    found = []
    for log in sorted(folder.rglob("log.txt")):
        for number, line in enumerate(log.read_text(errors="replace").splitlines(), 1):
            if _BAD_LINE.search(line):
                found.append(f"{log.relative_to(folder)}:{number}: {line}")
    return found


def _keep(folder: Path, evidence: Path) -> None:
    """Logs, databases and journals. What fills disks is left out."""
    shutil.copytree(
        folder, evidence, dirs_exist_ok=True, ignore=shutil.ignore_patterns("ballast"), ignore_dangling_symlinks=True
    )


def _trouble(error: Exception) -> str:
    """In one line."""
    return "; ".join(f"{type(each).__name__}: {each}".partition("\n")[0] for each in _leaves(error))


def _leaves(error: BaseException) -> list[BaseException]:
    """What a group of errors consists of, however deep; an error that is no group is all there is."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for each in error.exceptions for leaf in _leaves(each)]


def _counts(history: History) -> dict[str, Any]:
    """Figures for people: of the shop's orders, of the application's moves, and of what went wrong."""
    keys: dict[str, set[str]] = {}
    outcomes: dict[tuple[str, str], set[str]] = {}
    for asked, answer in history.requests():
        sort = asked.get("of", SHOP)
        keys.setdefault(sort, set()).add(asked["key"])
        if answer is not None:
            outcomes.setdefault((sort, answer["outcome"]), set()).add(asked["key"])

    def count(sort: str, outcome: str) -> int:
        return len(outcomes.get((sort, outcome), ()))

    begun = any(True for _ in history.of("run"))
    leaders = [event for event in history.of("leader") if event["node"] is not None]
    return {
        "orders": len(keys.get(SHOP, ())),
        "requests": sum(1 for _ in history.of("asked")),
        "committed": count(SHOP, "committed"),
        "aborted": count(SHOP, "aborted"),
        "keys_refused": count(SHOP, "reused"),
        "moves": len(keys.get(APPLICATION, ())),
        "moves_committed": count(APPLICATION, "committed"),
        "moves_aborted": count(APPLICATION, "aborted"),
        "application_deaths": max(0, sum(1 for _ in history.of("lived")) - 1),
        "faults": dict(Counter(event["kind"] for event in history.of("began"))),
        "longest_in_doubt_s": round(max((wait.waited_s for wait in waits(history)), default=0.0), 2) if begun else None,
        "longest_rejoin_s": max((event["after_s"] for event in history.of("rejoined")), default=None),
        "changes_of_leader": max(0, len({event["epoch"] for event in leaders}) - 1),
    }
