"""`python -m tests.fuzz --minutes 10`: all of it, in rounds, each with another seed and more examples."""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Rounds until the time is over, or one of them fails; its output says how to do it again."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the first round")
    arguments = parser.parse_args()
    end_s = time.monotonic() + arguments.minutes * 60
    examples, seed = 100, arguments.seed
    while (left_s := end_s - time.monotonic()) > 0:
        print(f"{examples} examples of each, seed {seed}; {left_s / 60:.1f} min left", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", "--timeout=0", str(HERE)]
        environment = {**os.environ, "OUTLAST_FUZZ_EXAMPLES": str(examples)}
        try:
            status = subprocess.run(
                command, env=environment, cwd=HERE.parents[1], timeout=left_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            break  # the time is over in the middle of a round, and nothing was found in it
        if status:
            print(f"failed; again: OUTLAST_FUZZ_EXAMPLES={examples} {' '.join(command)}")
            return status
        examples, seed = min(2 * examples, 20_000), seed + 1
    print("nothing was found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
