"""`outlast chaos`: a cluster of its own is put through everything that can fail, and judged."""

import argparse
import asyncio
import shutil
import sys
import time
from pathlib import Path

from cluster.chaos.checks import CHECKS
from cluster.chaos.plan import KINDS
from cluster.chaos.run import MAX_MINUTES, Options, Verdict, run
from cluster.cli import FAILED, OK, USAGE, complain, print_json
from cluster.commands.local import interruptible


def chaos(arguments: argparse.Namespace) -> int:
    """Run it."""
    kinds = [word for word in arguments.faults.split(",") if word]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if not kinds:
        return complain(f"--faults: name some of {','.join(KINDS)}", USAGE)
    if unknown:
        return complain(f"--faults {','.join(unknown)}: there are {','.join(KINDS)}", USAGE)
    if arguments.minutes > MAX_MINUTES:
        return complain(f"--minutes {arguments.minutes:g}: at most {MAX_MINUTES:g}; then take another --seed", USAGE)
    return interruptible(lambda: _chaos(arguments, kinds))


async def _chaos(arguments: argparse.Namespace, kinds: list[str]) -> int:
    report: Path = arguments.report or Path(f"outlast-chaos-{arguments.seed}")
    began_s = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began_s:7.2f} s  {text}", file=sys.stderr, flush=True)

    options = Options(minutes=arguments.minutes, seed=arguments.seed, kinds=kinds, per_s=arguments.rate)
    try:
        verdict = await run(options, report, tell)
    except asyncio.CancelledError:
        if arguments.report is None:
            # Nobody asked for it, half a history proves nothing, and the same command shall find its place free.
            shutil.rmtree(report, ignore_errors=True)
        raise
    if arguments.json:
        print_json({**verdict.to_plain(), "report": str(report)})
    else:
        _show(verdict)
    if verdict.ok and arguments.report is None:
        # Nobody asked for it, and there is nothing in it that needs to be looked at.
        shutil.rmtree(report)
        return OK
    print(f"the report is {report / 'report.html'}", file=sys.stderr)
    if not verdict.ok:
        why = verdict.trouble or ", ".join(verdict.complaints)
        return complain(f"it failed ({why}); logs and databases are in {report / 'evidence'}", FAILED)
    return OK


def _show(verdict: Verdict) -> None:
    counts = verdict.counts
    print(f"{counts['orders']} orders in {counts['requests']} requests: {counts['committed']} committed, ", end="")
    print(f"{counts['aborted']} aborted; {counts['changes_of_leader']} changes of leader")
    if counts["moves"]:
        print(
            f"{counts['moves']} transactions of the application's own: {counts['moves_committed']} committed, ", end=""
        )
        print(f"{counts['moves_aborted']} aborted; it died {counts['application_deaths']} times")
    if counts["longest_rejoin_s"] is not None:
        print(f"longest until a node that had lost its disk counted again: {counts['longest_rejoin_s']} s")
    longest_s = counts["longest_in_doubt_s"]
    print(f"longest that a branch was in doubt while a majority and its participant were well: {longest_s} s")
    print("faults: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts["faults"].items())))
    for name, (says, _) in CHECKS.items():
        complaints = verdict.complaints.get(name, ())
        print(f"{'failed' if complaints else 'ok':7}{name}: {says}")
        for complaint in complaints:
            print(f"         {complaint}")
    for complaint in verdict.complaints.get("logs", ()):
        print(f"failed logs: {complaint}")
    if verdict.trouble is not None:
        print(f"failed the run did not get to its end: {verdict.trouble}")
