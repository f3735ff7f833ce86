"""`python -m tests.fuzz --minutes 10`: all of it, in rounds, each with another seed and more examples.

A round is as large as the time allows: one that is cut off has tried the first targets and not the last.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
_FIRST, _MOST = 100, 20_000
_STATISTICS: Final = re.compile(r"^=+ Hypothesis Statistics =+$.*?(?=^=)", re.DOTALL | re.MULTILINE)
_TARGET: Final = re.compile(r"^tests/fuzz/(\w+)\.py::(\w+):$")
_TRIED: Final = re.compile(r"^ +- (\d+) passing,")


def main() -> int:
    """Rounds until the time is over, or one of them fails; its output says how to do it again."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the first round")
    arguments = parser.parse_args()
    end_s = time.monotonic() + arguments.minutes * 60
    examples, seed = _FIRST, arguments.seed
    tried: Counter[str] = Counter()
    while (left_s := end_s - time.monotonic()) > 0:
        print(f"{examples} examples of each, seed {seed}; {left_s / 60:.1f} min left", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", "--timeout=0"]
        command += ["--hypothesis-show-statistics", str(HERE)]
        environment = {**os.environ, "OUTLAST_FUZZ_EXAMPLES": str(examples)}
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
            break  # the time is over in the middle of a round, and nothing was found in it
        if done.returncode:
            print(_STATISTICS.sub("", done.stdout))
            print(f"failed; again: OUTLAST_FUZZ_EXAMPLES={examples} {' '.join(command)}")
            return done.returncode
        tried += _counted(done.stdout)
        now_s = time.monotonic()
        fits = int(examples * 0.9 * (end_s - now_s) / (now_s - begun_s))
        if fits < _FIRST:
            break
        examples, seed = min(2 * examples, fits, _MOST), seed + 1
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
