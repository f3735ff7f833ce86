"""`outlast demo`: the show, and an exit status that says whether it kept its promise."""

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from cluster.cli import FAILED, OK, complain, print_json
from cluster.commands.local import interruptible
from cluster.databases.server import server_folder
from cluster.demo.crash import NotCaught
from cluster.demo.databases import PARTICIPANTS, Databases
from cluster.demo.show import Options, run
from cluster.demo.view import LiveView, PlainView, View
from cluster.process import ProcessTrouble


def demo(arguments: argparse.Namespace) -> int:
    """Run it."""
    return interruptible(lambda: _demo(arguments))


async def _demo(arguments: argparse.Namespace) -> int:
    options = Options(seconds=arguments.seconds, per_s=arguments.rate, contrast=not arguments.no_contrast)
    if not PARTICIPANTS[arguments.participants]:
        folder = Path(tempfile.mkdtemp(prefix="outlast-demo-"))
    else:
        # Servers that root starts run as somebody else, who must get through; what else is here stays closed.
        folder = server_folder("outlast-demo-")
        folder.chmod(0o711)
        for part in ("three", "one"):
            (folder / part).mkdir(mode=0o700)
    keep = False
    try:
        databases = Databases(folder, arguments.participants)
        # Whatever goes wrong from here on, somebody will want to look at the logs; an interruption is nothing wrong.
        keep = True
        failures = await _play(arguments, folder, databases, options)
        keep = bool(failures) or arguments.keep
    except asyncio.CancelledError:
        keep = arguments.keep
        raise
    finally:
        if keep:
            print(f"data and logs are in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    return complain(f"the demo failed: {'; '.join(failures)}", FAILED) if failures else OK


async def _play(arguments: argparse.Namespace, folder: Path, databases: Databases, options: Options) -> list[str]:
    """What went wrong."""
    try:
        with _view(arguments) as view:
            verdict, contrast = await run(folder, databases, options, view)
    except (ProcessTrouble, NotCaught) as error:
        return [str(error)]
    view.verdict(verdict, contrast)
    failures = [*verdict.failures(), *(contrast.failures() if contrast is not None else ())]
    if arguments.json:
        parts = {"replicated": verdict.to_plain(), "alone": None if contrast is None else contrast.to_plain()}
        print_json({"ok": not failures, **parts})
    return failures


def _view(arguments: argparse.Namespace) -> View:
    # With --json, stdout belongs to the verdict.
    if arguments.json:
        return PlainView(sys.stderr)
    return LiveView() if sys.stdout.isatty() else PlainView(sys.stdout)
