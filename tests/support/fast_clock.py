"""`python -m tests.support.fast_clock FACTOR MODULE ARGUMENTS...` runs a module whose calendar is FACTOR times as fast.

What is to be forgotten after a quarter of an hour is forgotten after seconds. Durations, timeouts and elections go by
another clock, which is left alone; so is everything else.
"""

import runpy
import sys
import time


def main() -> None:
    factor, module = int(sys.argv[1]), sys.argv[2]
    real, begin_ns = time.time_ns, time.time_ns()
    time.time_ns = lambda: begin_ns + factor * (real() - begin_ns)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
