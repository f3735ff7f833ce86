"""Bytes that nobody meant to send: what is valid, damaged in ways that its own structure suggests.

In the suite these run a few fixed examples each. `make fuzz MINUTES=10` runs them in rounds, each with many more and
other ones, and keeps what failed in `.hypothesis`, so that the next run begins with it.
"""

import os
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

FOUND: Final = "OUTLAST_FUZZ_FOUND"
"""The variable that names a file, in which the tests that have failed are noted at once; without it they are not."""

EXAMPLES: Final = int(os.environ.get("OUTLAST_FUZZ_EXAMPLES", "0"))
"""Of each test; 0: as few as the suite has time for."""

_CHECKS = list(HealthCheck)


class Kept(DirectoryBasedExampleDatabase):
    """Keeps what failed. Hypothesis says so at once; that the test has failed it says after minutes of shrinking."""

    def save(self, key: bytes, value: bytes) -> None:
        """Keep one that failed, again if it has failed before."""
        super().save(key, value)
        if (found := os.environ.get(FOUND)) is not None:
            with Path(found).open("a") as file:
                file.write(f"{os.environ.get('PYTEST_CURRENT_TEST', 'a test').removesuffix(' (call)')}\n")


def examples(count: int) -> settings:
    """`count` fixed examples in the suite, `EXAMPLES` new ones in a long run."""
    if EXAMPLES:
        kept = Kept(Path(".hypothesis") / "fuzz")
        return settings(
            max_examples=EXAMPLES, derandomize=False, deadline=None, database=kept, suppress_health_check=_CHECKS
        )
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=_CHECKS)


HUNT: Final = settings(
    max_examples=3000,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=_CHECKS,
    report_multiple_bugs=False,
)
"""For a variant that is known to be bad: it has to be found by then."""
