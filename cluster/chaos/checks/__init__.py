"""What must hold of a recorded run, one property in each file.

A check is a function of the history that returns complaints, in words; none when the property holds. It believes
nothing that the history does not say: where a run recorded nothing to judge by, that is a complaint as well.
"""

from collections.abc import Callable, Mapping
from typing import Final

from cluster.chaos.checks.acknowledged import acknowledged
from cluster.chaos.checks.answered import answered
from cluster.chaos.checks.atomicity import atomicity
from cluster.chaos.checks.doubt import doubt
from cluster.chaos.checks.fired import fired
from cluster.chaos.checks.keys import keys
from cluster.chaos.checks.leaders import leaders
from cluster.chaos.checks.locks import locks
from cluster.chaos.checks.outcomes import outcomes
from cluster.chaos.checks.sums import sums
from cluster.chaos.history import History

Check = Callable[[History], list[str]]

CHECKS: Final[Mapping[str, tuple[str, Check]]] = {
    "atomicity": ("a transaction is in all databases or in none, as was said of it", atomicity),
    "outcomes": ("an outcome once told never changes, on no node", outcomes),
    "acknowledged": ("what was acknowledged is kept, on every node and in every database", acknowledged),
    "sums": ("money and stock add up at rest", sums),
    "doubt": ("no branch is prepared for longer than the bound while a majority is up", doubt),
    "keys": ("idempotency keys are linearizable", keys),
    "leaders": ("no epoch has two leaders", leaders),
    "locks": ("no lock outlives its transaction", locks),
    "answered": ("every request has a definite answer in the end", answered),
    "fired": ("every fault that was planned did happen", fired),
}
"""By name: what it says, and the check."""

__all__ = ["CHECKS", "Check"]
