"""`python -m tests.simulation`: many runs of the whole cluster, or one of them again.

    --seeds 1000 --start 0 --jobs 2    that many runs; failing seeds are named, exit status 1
    --seeds 1000 --kept                and those that have found something once
    --seeds 1000 --struck              with a disaster in every run
    --seed 17 --trace                  one run, readably; --fine shows every message and every call of a disk
    --seed 17 --shrink                 the shortest plan of faults that was found to fail, and its trace
    --variant "no guard"               with known-bad code; --variants: all of it, each until it is caught
    --json                             for programs; failing seeds are in it, and the exit status is 0

A seed is one run on every machine: hashes are fixed, if need be by starting again.
"""

import argparse
import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any

from tests.simulation.faults import Plan, draw
from tests.simulation.processes import EndedBadly, leave, outputs_of
from tests.simulation.shrink import shrink
from tests.simulation.variants import VARIANTS, Variant
from tests.simulation.world import Classes, Report, simulate

KEPT = {
    40: "what an application did was over since the copy was made, and was called aborted after it was committed",
    693: "an alarm about a branch that had ended: its ack was lost, and then its cluster",
    308374: "aiohttp's own traceback, as an answer was ready when the node that stops had given up waiting for it",
    14528: "a request that was passed on as the node stopped ended in a traceback",
    100836: "an alarm of a leader that was deposed without knowing it, about the epoch of its own successor",
    100620: "a traceback of asyncio's about an answer for somebody who was gone, as the node stopped",
}
"""Seeds that have shown what was wrong with the program, and do so again if it is undone."""

KEPT_STRUCK = {
    2027: "an application prepared what was lost when all had been found out, and nobody could say what became of it",
    2140: "a leader that was deposed without knowing it denied that a branch had been enlisted",
}
"""The same, each with a disaster: `--seed 2027 --struck`."""

STRUCK = Variant(classes=Classes(), caught_by=(), disaster=True)
"""Nothing is wrong, and every run has a disaster."""

VARIANT_SEEDS = 200
"""A known-bad variant must be caught within so many."""


def one(seed: int, variant: Variant | None, *, plan: Plan | None = None, tracing: bool = False) -> Report:
    """The run of this seed."""
    plan = plan or draw(seed)
    if variant is None:
        return simulate(seed, plan, tracing=tracing)
    return simulate(seed, variant.plan(plan), variant.classes, tracing=tracing)


def many(seeds: Iterable[tuple[int, Variant | None]]) -> dict[str, Any]:
    """Sums over these runs, and what was found."""
    found: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    total = {"seeds": 0, "virtual_s": 0.0, "transactions": 0, "committed": 0, "leaders": 0, "cpu_s": 0.0}
    began_s = time.process_time()
    for seed, variant in seeds:
        report = one(seed, variant)
        gc.collect()
        total["seeds"] += 1
        for name in ("virtual_s", "transactions", "committed", "leaders"):
            total[name] += getattr(report, name)
        for what, count in report.counts.items():
            counts[what] = counts.get(what, 0) + count
        if report.complaints:
            # As `--seed` takes it.
            again = f"{seed} --struck" if variant is STRUCK else str(seed)
            found[again] = report.complaints
            print(f"seed {again}: {report.complaints[0]}", file=sys.stderr, flush=True)
    total["cpu_s"] = time.process_time() - began_s
    return {**total, "counts": counts, "found": found}


def spread(arguments: argparse.Namespace) -> dict[str, Any]:
    """`many`, in several processes."""
    share = -(-arguments.seeds // arguments.jobs)
    commands: list[list[str]] = []
    for start in range(arguments.start, arguments.start + arguments.seeds, share):
        count = min(share, arguments.start + arguments.seeds - start)
        command = [sys.executable, "-m", "tests.simulation", "--json", "--start", str(start), "--seeds", str(count)]
        command += ["--variant", arguments.variant] if arguments.variant else []
        command += ["--struck"] if arguments.struck else []
        command += ["--kept"] if arguments.kept and not commands else []
        commands.append(command)
    signal.signal(signal.SIGTERM, leave)
    return summed([json.loads(output) for output in outputs_of(commands)])


def summed(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What several processes have found."""
    sums: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict):
                kept = sums.setdefault(name, {})
                for key, each in value.items():
                    kept[key] = kept.get(key, 0) + each if name == "counts" else each
            else:
                sums[name] = sums.get(name, 0) + value
    return sums


def catch(variant: Variant) -> dict[str, tuple[int, str]]:
    """Seed and words of the first complaint of each checker that must notice; less, if they do not within the bound."""
    caught: dict[str, tuple[int, str]] = {}
    for seed in (variant.first, *range(VARIANT_SEEDS)):
        for complaint in one(seed, variant).complaints:
            who = complaint.partition(":")[0]
            if who in variant.caught_by and variant.says in complaint:
                caught.setdefault(who, (seed, complaint))
        gc.collect()
        if len(caught) == len(variant.caught_by):
            break
    return caught


def variants(*, as_json: bool) -> int:
    """Each of them must be caught."""
    missed = 0
    for name, variant in VARIANTS.items():
        began_s = time.process_time()
        caught = catch(variant)
        missed += len(caught) < len(variant.caught_by)
        if as_json:
            print(json.dumps({"variant": name, "caught": caught}), flush=True)
            continue
        print(f"{name} ({time.process_time() - began_s:.1f} s)")
        for who in variant.caught_by:
            seed, complaint = caught.get(who, (None, f"{who} DOES NOT NOTICE in {VARIANT_SEEDS} seeds"))
            print(f"    seed {seed}: {complaint[:200]}", flush=True)
    return 1 if missed else 0


def show(seed: int, plan: Plan, report: Report, *, fine: bool) -> None:
    for line in report.trace:
        if fine or line[10:12] != "  ":
            print(line)
    print(f"\nseed {seed}: {report.virtual_s:.1f} s of virtual time, {report.transactions} transactions")
    print("faults:", *[f"  {fault}" for fault in plan.faults], sep="\n")
    print(f"healed at {plan.heal_s} s after the start{f', but for {plan.left_out}' if plan.left_out else ''}")
    if plan.disaster is not None:
        print(plan.disaster)
    if plan.old:
        stays = f"; {plan.stays_old} is never upgraded" if plan.stays_old else ""
        print(f"{', '.join(plan.old)} begin with software of the oldest level{stays}")
    print(*(report.complaints or ["nothing was wrong"]), sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--fine", action="store_true")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--variant", choices=list(VARIANTS))
    parser.add_argument("--struck", action="store_true")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings have another order in every process otherwise.
        command = [sys.executable, "-m", "tests.simulation", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})
    # Coroutines of those who died are let go of wherever they stand.
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    gc.collect()
    gc.freeze()
    gc.disable()
    if arguments.struck and arguments.variant:
        parser.error("--struck is for code that is not known to be bad")
    variant = VARIANTS[arguments.variant] if arguments.variant else STRUCK if arguments.struck else None
    if arguments.variants:
        return variants(as_json=arguments.json)
    if arguments.seed is not None:
        plan = draw(arguments.seed)
        if arguments.shrink:
            whole = variant.plan(plan) if variant else plan
            classes = variant.classes if variant else None
            plan, _ = shrink(whole, lambda each: simulate(arguments.seed, each, classes))
            report = simulate(arguments.seed, plan, classes, tracing=True)
        else:
            report = one(arguments.seed, variant, tracing=arguments.trace or arguments.fine)
            plan = variant.plan(plan) if variant else plan
        show(arguments.seed, plan, report, fine=arguments.fine)
        return 1 if report.complaints else 0
    began_s = time.monotonic()
    seeds = [(seed, variant) for seed in range(arguments.start, arguments.start + arguments.seeds)]
    if arguments.kept:
        seeds += [(seed, None) for seed in KEPT] + [(seed, STRUCK) for seed in KEPT_STRUCK]
    try:
        sums = many(seeds) if arguments.jobs == 1 else spread(arguments)
    except EndedBadly as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(sums))
        return 0
    lasted_s = time.monotonic() - began_s
    print(
        f"{sums['seeds']} seeds, {len(sums['found'])} with violations: {sums['transactions']} transactions, "
        f"{sums['committed']} committed, {sums['leaders']} leaders, "
        f"{sums['virtual_s'] / 3600:.2f} h of virtual time in {lasted_s:.0f} s "
        f"({sums['virtual_s'] / 60 / lasted_s:.2f} h in a real minute), "
        f"{sums['cpu_s'] / sums['seeds']:.2f} s of CPU each"
    )
    for what, count in sorted(sums["counts"].items()):
        print(f"  {count:8} {what}")
    for seed, complaints in sums["found"].items():
        print(f"FAILED: seed {seed}: {complaints[0]}")
    return 1 if sums["found"] else 0


if __name__ == "__main__":
    sys.exit(main())
