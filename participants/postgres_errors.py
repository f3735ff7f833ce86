"""What PostgreSQL's errors mean for a branch: a vote no, permanent or not, or nothing that could be known.

The codes are SQLSTATEs (PostgreSQL's manual, appendix A).
"""

from collections.abc import Mapping
from typing import Any, Final

from participants.operations import Refuse

DUPLICATE_NAME: Final = "42710"
NO_SUCH_NAME: Final = "42704"
BUSY_OR_OFF: Final = "55000"
NOT_ALLOWED: Final = "42501"
UNIQUE_VIOLATION: Final = "23505"
NOT_NULL_VIOLATION: Final = "23502"
LOCK_TIMEOUT: Final = "55P03"
STATEMENT_TIMEOUT: Final = "57014"

NO_SUCH_STATEMENT: Final = "26000"

TABLE: Final = "outlast_branches"

_REASONS: Final[Mapping[str, tuple[str, bool]]] = {
    "40001": ("serialization_failure", True),
    "40P01": ("deadlock", True),
    LOCK_TIMEOUT: ("locked", True),
    STATEMENT_TIMEOUT: ("too_slow", True),
    "25P03": ("too_slow", True),
    "53200": ("too_many_prepared", True),
    DUPLICATE_NAME: ("name_in_use", False),
    BUSY_OR_OFF: ("prepared_transactions_are_off: set max_prepared_transactions", False),
    "25P02": ("failed_transaction: the operation went on after an error in its transaction", False),
}


def refusal(error: Any) -> Refuse | None:
    """The vote no that an error of the branch's own work is; None for one that says nothing about the branch.

    error: asyncpg's PostgresError.
    """
    code = str(error.sqlstate or "")
    if code in _REASONS:
        reason, retryable = _REASONS[code]
        return Refuse(reason, retryable=retryable)
    if code.startswith("23"):
        return Refuse(f"constraint: {error.constraint_name or error.column_name or error.table_name or code}")
    if code == "0A000":
        # What a prepared transaction cannot hold: temporary tables, LISTEN, cursors WITH HOLD.
        return Refuse(f"not_supported: {error}")
    if code.startswith("53"):
        return Refuse("out_of_resources", retryable=True)
    return None


def is_loss(error: Any) -> bool:
    """Did the server end the connection, or fail as a whole, so that nobody knows what was done?"""
    code = str(error.sqlstate or "")
    return code.startswith(("08", "57P", "58", "XX"))
