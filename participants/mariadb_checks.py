"""Is this MariaDB fit to hold branches? Asked once, at the start; each complaint names what to change."""

import logging
import re
from collections.abc import Sequence
from typing import Any, Final

import asyncmy.errors

from participants.manager import Unavailable
from participants.mariadb_errors import ACCESS_DENIED, LOST, code_of, said
from participants.mariadb_names import TABLES
from participants.mariadb_session import Session
from participants.prepared import Unfit

_log = logging.getLogger(__name__)

OLDEST_VERSION: Final = (10, 5)
"""Before it, a prepared branch died with its connection."""

_SYNCED: Final = ("1", "3")
_NOT_SYNCED: Final = "a crash can lose branches that voted prepared: SET GLOBAL innodb_flush_log_at_trx_commit = 1"

_TABLES: Final = ("outlast_branches", "outlast_horizons")
_SHOWN: Final = 10
_VARIABLES: Final = (
    *("version", "innodb_flush_log_at_trx_commit", "log_bin", "sync_binlog", "binlog_format", "read_only"),
    *("innodb_read_only", "innodb_doublewrite", "max_connections", "wsrep_on", "legacy_xa_rollback_at_disconnect"),
    "innodb_force_recovery",
)


async def check(session: Session, *, connections: int, left_alone: frozenset[str], accept_unsafe: bool) -> None:
    """Raises `Unfit`, and `Unavailable` when the connection is lost.

    connections: as many as the participant may open.
    left_alone: tables that no operation changes, and that may therefore be of another engine.
    """
    try:
        shown = await _variables(session)
        _check_variables(shown, connections, accept_unsafe=accept_unsafe)
        await _check_rights(session)
        await _create_tables(session)
        wrong = await unfit_tables(session, left_alone)
    except asyncmy.errors.MySQLError as error:
        if isinstance(error, LOST) or session.closed:
            raise Unavailable(f"the connection was lost during the checks: {said(error)}") from error
        raise Unfit(f"MariaDB does not let itself be checked: {said(error)}") from error
    except LOST as error:
        raise Unavailable(f"the connection was lost during the checks: {said(error)}") from error
    if wrong is not None:
        raise Unfit(f"{wrong}; or keep operations off them, and say so (left_alone)")


async def _variables(session: Session) -> dict[str, str]:
    rows = await session.rows(
        "SELECT LOWER(variable_name), variable_value FROM information_schema.global_variables"
        " WHERE variable_name IN %s",
        (tuple(name.upper() for name in _VARIABLES),),
    )
    return {str(name): str(value) for name, value in rows}


def _check_variables(shown: dict[str, str], connections: int, *, accept_unsafe: bool) -> None:
    version = re.match(r"(?:5\.5\.5-)?(\d+)\.(\d+)", shown["version"])
    if "mariadb" not in shown["version"].lower() or version is None:
        raise Unfit(f"this is no MariaDB, but {shown['version']}: its XA transactions follow other rules")
    if (int(version[1]), int(version[2])) < OLDEST_VERSION:
        raise Unfit(
            f"MariaDB {shown['version']} is too old: 10.5 or newer keeps a prepared branch without its connection"
        )
    if shown.get("wsrep_on", "OFF") == "ON":
        raise Unfit("this is a Galera cluster, which knows no XA transactions: use a server with wsrep_on = OFF")
    if shown.get("legacy_xa_rollback_at_disconnect", "OFF") == "ON":
        raise Unfit("a lost connection would lose its votes: SET GLOBAL legacy_xa_rollback_at_disconnect = OFF")
    if "ON" in (shown["read_only"], shown["innodb_read_only"]):
        raise Unfit("this MariaDB only reads: it is a replica, or read_only is on")
    if shown["innodb_force_recovery"] != "0":
        raise Unfit("innodb_force_recovery is set: restart MariaDB without it")
    unsafe = []
    if shown["innodb_flush_log_at_trx_commit"] not in _SYNCED:
        unsafe.append(_NOT_SYNCED)
    if shown["log_bin"] == "ON" and shown["sync_binlog"] != "1":
        unsafe.append("a crash can lose what was committed from the binary log: SET GLOBAL sync_binlog = 1")
    if shown["innodb_doublewrite"] == "OFF":
        _log.warning("innodb_doublewrite is OFF: safe only on a file system that never tears a page")
    if unsafe and not accept_unsafe:
        raise Unfit(f"{'; '.join(unsafe)} (and set it in the server's option file)")
    for text in unsafe:
        _log.warning("%s", text)
    if shown["log_bin"] == "ON" and shown["binlog_format"] == "STATEMENT":
        raise Unfit(
            "branches are READ COMMITTED, which binlog_format = STATEMENT cannot log: SET GLOBAL binlog_format = ROW"
        )
    if int(shown["max_connections"]) <= connections:
        raise Unfit(
            f"max_connections is {shown['max_connections']}, and this participant may open {connections}:"
            f" SET GLOBAL max_connections = {2 * connections}, or give it fewer"
        )


async def _check_rights(session: Session) -> None:
    try:
        await session.rows("SELECT 1 FROM information_schema.innodb_trx LIMIT 1")
    except asyncmy.errors.MySQLError as error:
        if code_of(error) not in ACCESS_DENIED:
            raise
        who = (await session.rows("SELECT CURRENT_USER()"))[0][0]
        user, _, host = str(who).rpartition("@")
        raise Unfit(
            "to know whose a prepared branch still is, the participant's user must see transactions:"
            f" GRANT PROCESS ON *.* TO '{user}'@'{host}'"
        ) from None


async def _create_tables(session: Session) -> None:
    for name, statement in zip(_TABLES, TABLES, strict=True):
        there = "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = %s"
        if await session.rows(there, (name,)):
            continue
        try:
            await session.run(statement)
        except asyncmy.errors.MySQLError as error:
            if code_of(error) not in ACCESS_DENIED:
                raise
            text = " ".join(statement.split())
            raise Unfit(
                f"table {name} is missing, and this user may not create it; let another one run: {text}"
            ) from None
    for name in _TABLES:
        await session.rows(f"SELECT 1 FROM {name} LIMIT 1")  # noqa: S608  # our own names


async def forgets_in_a_crash(session: Session) -> str | None:
    """What is to be changed of a setting that anybody may change while the server runs. Raises the driver's errors."""
    ((synced,),) = await session.rows("SELECT @@GLOBAL.innodb_flush_log_at_trx_commit")
    return None if str(synced) in _SYNCED else _NOT_SYNCED


async def unfit_tables(session: Session, left_alone: frozenset[str]) -> str | None:
    """What is to be changed of tables that do not roll back; None when all do. Raises the driver's errors."""
    rows: Sequence[tuple[Any, ...]] = await session.rows(
        "SELECT table_name, engine FROM information_schema.tables WHERE table_schema = DATABASE()"
        " AND table_type = 'BASE TABLE' AND engine <> 'InnoDB' ORDER BY table_name"
    )
    wrong = [(str(name), str(engine)) for name, engine in rows if str(name) not in left_alone]
    if not wrong:
        return None
    fixes = "; ".join(f"ALTER TABLE `{name}` ENGINE = InnoDB" for name, _ in wrong[:_SHOWN])
    more = "" if len(wrong) <= _SHOWN else f"; and {len(wrong) - _SHOWN} more"
    return f"tables of {', '.join(sorted({engine for _, engine in wrong}))} cannot be rolled back: {fixes}{more}"
