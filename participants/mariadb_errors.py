"""What MariaDB's errors mean for a vote, mapped once, here."""

import re
from typing import Any, Final

import asyncmy.errors

from participants.operations import Refuse

LOST: Final = (OSError, EOFError, TimeoutError, asyncmy.errors.InterfaceError)
"""The connection is of no use any more; a driver's error may say the same: see `is_loss`."""

DUPLICATE_KEY: Final = 1062
NOT_NULL: Final = 1048
CHECK_FAILED: Final = 4025
LOCK_TIMEOUT: Final = 1205
STATEMENT_TIMEOUT: Final = 1969
NO_SUCH_THREAD: Final = 1094
NO_SUCH_XID: Final = 1397
WRONG_STATE: Final = 1399
ROLLED_BACK: Final = 1402
ACCESS_DENIED: Final = frozenset({1044, 1045, 1049, 1142, 1227, 1698})

_LOSSES: Final = frozenset({1040, 1053, 1152, 1158, 1159, 1160, 1161, 1184, 1927, 2002, 2003, 2006, 2013, 2014, 2055})

_RETRYABLE: Final = {
    LOCK_TIMEOUT: "locked",
    1213: "deadlock",
    1614: "deadlock",
    1613: "locked",
    1020: "conflict",
    ROLLED_BACK: "not_prepared",
    1401: "not_prepared",
    1317: "too_slow",
    STATEMENT_TIMEOUT: "too_slow",
    1021: "storage_full",
    1114: "storage_full",
    1290: "read_only_server",
    1836: "read_only_server",
    1637: "too_many_transactions",
}
_CONSTRAINTS: Final = {
    DUPLICATE_KEY: "duplicate key",
    1586: "duplicate key",
    NOT_NULL: "a column cannot be null",
    1364: "a column needs a value",
    1216: "a foreign key has no parent",
    1452: "a foreign key has no parent",
    1217: "a foreign key still refers to it",
    1451: "a foreign key still refers to it",
    CHECK_FAILED: "a check failed",
    1264: "a value is out of range",
    1406: "a value is too long",
    1366: "a value does not fit its column",
}
_NOT_ALLOWED: Final = {
    WRONG_STATE: "an operation cannot end its transaction, nor change the schema",
    1400: "an operation cannot begin another transaction",
    1142: "the participant's user lacks a privilege",
    1143: "the participant's user lacks a privilege",
}


def code_of(error: BaseException) -> int:
    """The server's or driver's number of an error; 0 when it has none."""
    first = error.args[0] if isinstance(error, asyncmy.errors.MySQLError) and error.args else 0
    return first if isinstance(first, int) else 0


def is_loss(error: BaseException) -> bool:
    """Is the connection gone with it? What the last statement did is unknown then."""
    return isinstance(error, LOST) or code_of(error) in _LOSSES


def refusal(error: BaseException) -> Refuse | None:
    """The vote no that an error in a branch's work stands for; None for a defect of the operation.

    Any error will do: after most of them MariaDB would go on, and prepare what was done so far.
    """
    code = code_of(error)
    if code in _RETRYABLE:
        return Refuse(_RETRYABLE[code], retryable=True)
    if code in _CONSTRAINTS:
        key = re.search(r"for key '([^']*)'", said(error)) or re.search(r"CONSTRAINT `([^`]*)`", said(error))
        return Refuse(f"constraint: {_CONSTRAINTS[code]}{f' ({key[1]})' if key else ''}")
    if code in _NOT_ALLOWED:
        return Refuse(f"not_allowed: {_NOT_ALLOWED[code]}")
    return None


def said(error: Any) -> str:
    """An error in one line."""
    if isinstance(error, asyncmy.errors.MySQLError) and len(error.args) > 1:
        return f"{error.args[1]} ({error.args[0]})"
    return str(error) or type(error).__name__
