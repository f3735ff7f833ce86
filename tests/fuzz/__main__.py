"""`python -m tests.fuzz --minutes 10`: all of it, in rounds, each with more examples, and other ones.

Chance is not seeded: Hypothesis keeps nothing of what a seed has found. What failed is kept, and that is how it is done
again.

A round is as large as the time allows: one that is cut off has tried the first targets and not the last. What it has
found by then counts all the same, though it could not be made small any more.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.fuzz import FOUND

HERE: Final = Path(__file__).parent
_FIRST, _MOST = 100, 20_000
_STATISTICS: Final = re.compile(r"^=+ Hypothesis Statistics =+$.*?(?=^=)", re.DOTALL | re.MULTILINE)
_TARGET: Final = re.compile(r"^tests/fuzz/(\w+)\.py::(\w+):$")
_TRIED: Final = re.compile(r"^ +- (\d+) passing,")


def main(words: Sequence[str] | None = None) -> int:
    """Rounds until the time is over, or one of them fails; its output says how to do it again.

    0 says that at least one round was finished, and that nothing was found in any, nor in the one that was cut off.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="outlast-fuzz-") as folder:
        return _rounds(arguments.minutes * 60, Path(folder) / "found")


def _rounds(seconds: float, found: Path) -> int:
    end_s = time.monotonic() + seconds
    examples, finished = _FIRST, 0
    tried: Counter[str] = Counter()
    while (left_s := end_s - time.monotonic()) > 0:
        print(f"{examples} examples of each; {left_s / 60:.1f} min left", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout=0"]
        command += ["--hypothesis-show-statistics", str(HERE)]
        again = f"again: OUTLAST_FUZZ_EXAMPLES={examples} {' '.join(command)}"
        environment = {**os.environ, "OUTLAST_FUZZ_EXAMPLES": str(examples), FOUND: str(found)}
        begun_s = time.monotonic()
        try:
            done = subprocess.run(
                command,
                env=environment,
                cwd=HERE.parents[1],
                timeout=left_s,
                check=False,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired:
            if found.exists():
                print(f"failed: {', '.join(sorted(set(found.read_text().splitlines())))}")
                print(f"the time was over before it could be made small; it is kept, and tried first. {again}")
                return 1
            break  # the time is over in the middle of a round, and nothing was found in it
        if done.returncode:
            print(_STATISTICS.sub("", done.stdout))
            print(f"failed; {again}")
            return done.returncode
        finished += 1
        tried += _counted(done.stdout)
        now_s = time.monotonic()
        fits = int(examples * 0.9 * (end_s - now_s) / (now_s - begun_s))
        if fits < _FIRST:
            break
        examples = min(2 * examples, fits, _MOST)
    if not finished:
        print("failed: not a single round was finished, so nothing is said; give it more --minutes")
        return 1
    for target, count in sorted(tried.items()):
        print(f"{count:>9,}  {target}")
    print(f"nothing was found in {tried.total():,} examples")
    return 0


def _counted(output: str) -> Counter[str]:
    """Examples by target, as Hypothesis counts them; those that were tried again because they once failed not."""
    found: Counter[str] = Counter()
    target = ""
    for line in output.splitlines():
        if (named := _TARGET.match(line)) is not None:
            target = f"{named[1].removeprefix('test_')}: {named[2].removeprefix('test_').replace('_', ' ')}"
        elif (tried := _TRIED.match(line)) is not None:
            found[target] += int(tried[1])
    return found


if __name__ == "__main__":
    sys.exit(main())
