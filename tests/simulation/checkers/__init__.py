"""What must hold, one property in each file."""

from tests.simulation.checkers.acknowledged import Acknowledged
from tests.simulation.checkers.atomicity import Atomicity
from tests.simulation.checkers.base import Checker
from tests.simulation.checkers.completeness import LeaderCompleteness
from tests.simulation.checkers.doubt import Doubt
from tests.simulation.checkers.elections import ElectionSafety
from tests.simulation.checkers.fired import Fired
from tests.simulation.checkers.floors import FloorsHold
from tests.simulation.checkers.keys import Keys
from tests.simulation.checkers.levels import Levels
from tests.simulation.checkers.locks import Locks
from tests.simulation.checkers.matching import LogMatching
from tests.simulation.checkers.outcomes import Outcomes
from tests.simulation.checkers.replicas import SameHistory
from tests.simulation.checkers.sums import Sums

CHECKERS: tuple[type[Checker], ...] = (
    Atomicity,
    Outcomes,
    Acknowledged,
    Sums,
    LogMatching,
    ElectionSafety,
    LeaderCompleteness,
    SameHistory,
    Doubt,
    Keys,
    Locks,
    FloorsHold,
    Levels,
    Fired,
)

__all__ = ["CHECKERS", "Checker"]
