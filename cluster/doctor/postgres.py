"""One PostgreSQL server: what is prepared there, the locks it holds, who waits behind it, and dangerous settings.

PostgreSQL hides the holder: the locks of a prepared transaction have no pid, `pg_blocking_pids` answers 0 for it, and
`pg_stat_activity` does not know it. But its locks are in `pg_locks` under the virtual transaction of the one that is on
its own transaction id, and `pg_prepared_xacts` knows that id. Locks of rows are not in `pg_locks` at all: whoever wants
such a row waits for the holder's transaction id, or, behind others, for the tuple.
"""

import asyncio
import importlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cluster.doctor.findings import Finding, Report, Severity, Unseen
from cluster.doctor.standing import PreparedBranch, Standing, standing_of
from cluster.doctor.standing import judge as judge_branch
from participants.postgres_names import branch_of

_PATIENCE_S: Final = 5.0
_SLOTS_NEARLY_FULL: Final = 0.8
_SHOWN: Final = 10
_OLD_XID: Final = 200_000_000
"""Transaction ids that a prepared transaction keeps from being frozen, from where on it is worth a word; PostgreSQL
begins to force vacuums there (autovacuum_freeze_max_age)."""

_SETTINGS: Final = (
    *("max_prepared_transactions", "fsync", "full_page_writes", "synchronous_commit", "transaction_read_only"),
    *("client_connection_check_interval", "server_version"),
)

_CONFLICTS: Final[Mapping[str, frozenset[str]]] = {
    "AccessShareLock": frozenset({"AccessExclusiveLock"}),
    "RowShareLock": frozenset({"ExclusiveLock", "AccessExclusiveLock"}),
    "RowExclusiveLock": frozenset({"ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"}),
    "ShareUpdateExclusiveLock": frozenset(
        {
            *("ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"),
        }
    ),
    "ShareLock": frozenset(
        {
            *("RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareRowExclusiveLock", "ExclusiveLock"),
            "AccessExclusiveLock",
        }
    ),
    "ShareRowExclusiveLock": frozenset(
        {
            *("RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock", "ExclusiveLock"),
            "AccessExclusiveLock",
        }
    ),
    "ExclusiveLock": frozenset(
        {
            *("RowShareLock", "RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock"),
            *("ExclusiveLock", "AccessExclusiveLock"),
        }
    ),
    "AccessExclusiveLock": frozenset(
        {
            *("AccessShareLock", "RowShareLock", "RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock"),
            *("ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"),
        }
    ),
}
"""Which modes of locks exclude which (the manual's table 13.2)."""

_PREPARED_SQL: Final = """
SELECT gid, transaction::text AS xid, extract(epoch FROM clock_timestamp() - prepared)::float8 AS age_s,
       owner::text, database::text, age(transaction)::int8 AS xids FROM pg_prepared_xacts ORDER BY prepared
"""
_HELD_SQL: Final = """
SELECT p.transaction::text AS xid, l.locktype, l.mode,
       concat_ws('/', l.database, l.relation, l.page, l.tuple, l.classid, l.objid, l.objsubid) AS object,
       CASE WHEN l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) OR l.database = 0
            THEN l.relation::regclass::text ELSE l.relation::text END AS relation
  FROM pg_prepared_xacts AS p
  JOIN pg_locks AS own ON own.locktype = 'transactionid' AND own.transactionid = p.transaction AND own.pid IS NULL
  JOIN pg_locks AS l ON l.virtualtransaction = own.virtualtransaction AND l.pid IS NULL AND l.granted
"""
_WAITERS_SQL: Final = """
SELECT l.pid, l.locktype, l.mode, l.transactionid::text AS xid,
       concat_ws('/', l.database, l.relation, l.page, l.tuple, l.classid, l.objid, l.objsubid) AS object,
       extract(epoch FROM clock_timestamp() - coalesce(l.waitstart, a.query_start))::float8 AS age_s,
       pg_blocking_pids(l.pid) AS behind, a.usename::text, a.datname::text, a.application_name,
       left(a.query, 200) AS query
  FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) WHERE NOT l.granted
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One row of pg_prepared_xacts. xids: how many transactions have begun since."""

    gid: str
    xid: str
    age_s: float
    owner: str
    database: str
    xids: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A lock that a prepared transaction holds. `object` tells what it is on, as numbers; `relation` is for people."""

    xid: str
    locktype: str
    mode: str
    object: str
    relation: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A backend that waits. behind: by whom it is blocked; 0 is a prepared transaction."""

    pid: int
    locktype: str
    mode: str
    xid: str | None
    object: str
    age_s: float
    behind: tuple[int, ...]
    usename: str | None = None
    datname: str | None = None
    application_name: str | None = None
    query: str | None = None


@dataclass(slots=True, kw_only=True)
class PostgresFacts:
    """One server, seen from one of its databases. `trouble`: why it was not seen."""

    where: str
    settings: Mapping[str, str] = field(default_factory=dict)
    prepared: Sequence[Prepared] = ()
    locks: Sequence[Lock] = ()
    waiters: Sequence[Waiter] = ()
    trouble: str | None = None
    now: float = field(default_factory=time.time)


async def look(where: str, dsn: str) -> PostgresFacts:
    """Connect, read, and go. Raises nothing: what cannot be had is said so, without what the DSN holds."""
    facts = PostgresFacts(where=where)
    try:
        asyncpg: Any = importlib.import_module("asyncpg")
    except ImportError:
        facts.trouble = "the driver is not installed: pip install 'outlast[postgres]'"
        return facts
    try:
        async with asyncio.timeout(2 * _PATIENCE_S):
            connection = await asyncpg.connect(
                dsn,
                timeout=_PATIENCE_S,
                server_settings={"application_name": "outlast doctor", "statement_timeout": f"{_PATIENCE_S:g}s"},
            )
            try:
                await _read(connection, facts)
            finally:
                connection.terminate()
    except (ValueError, asyncpg.InterfaceError):
        # Whatever it says may quote the DSN, and with it a password.
        facts.trouble = "the DSN cannot be used; it looks like postgresql://user:password@host:5432/database"
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        facts.trouble = str(error) or type(error).__name__
    return facts


async def _read(connection: Any, facts: PostgresFacts) -> None:
    facts.settings = {
        name: str(await connection.fetchval("SELECT current_setting($1, true)", name)) for name in _SETTINGS
    }
    # In one transaction: what they show is of nearly the same moment. Nothing is written.
    async with connection.transaction(readonly=True):
        facts.prepared = [Prepared(**row) for row in await connection.fetch(_PREPARED_SQL)]
        facts.locks = [Lock(**row) for row in await connection.fetch(_HELD_SQL)]
        facts.waiters = [
            Waiter(**{**row, "behind": tuple(row["behind"])}) for row in await connection.fetch(_WAITERS_SQL)
        ]


def gids(facts: PostgresFacts) -> Iterable[str]:
    """Of the branches that are prepared there."""
    return (branch.gid for each in facts.prepared if (branch := branch_of(each.gid)) is not None)


# ------------------------------------------------------------------------------------------------ judging


def waiters_behind(facts: PostgresFacts, held: Prepared) -> list[Waiter]:
    """Who waits for what `held` holds, and who waits behind those, the longest first."""
    locks = [lock for lock in facts.locks if lock.xid == held.xid]
    found = {waiter.pid: waiter for waiter in facts.waiters if 0 in waiter.behind and _wants(waiter, held, locks)}
    fresh = list(found)
    for pid in fresh:
        for waiter in facts.waiters:
            if pid in waiter.behind and waiter.pid not in found:
                found[waiter.pid] = waiter
                fresh.append(waiter.pid)
    return sorted(found.values(), key=lambda waiter: -waiter.age_s)


def _wants(waiter: Waiter, held: Prepared, locks: Sequence[Lock]) -> bool:
    if waiter.locktype == "transactionid":
        return waiter.xid == held.xid
    return any(
        lock.locktype == waiter.locktype
        and lock.object == waiter.object
        and lock.mode in _CONFLICTS.get(waiter.mode, frozenset())
        for lock in locks
    )


def judge(
    facts: PostgresFacts, report: Report, *, cluster: str | None, known: Mapping[str, Standing], limit_s: float
) -> None:
    """Add what follows from the facts."""
    if facts.trouble is not None:
        report.unseen.append(Unseen(where=facts.where, why=facts.trouble))
        return
    report.seen.append(facts.where)
    for held in facts.prepared:
        found = judge_branch(_branch(facts, held), _standing(held, cluster, known), limit_s=limit_s)
        if found is not None:
            report.findings.append(found)
        if held.xids > _OLD_XID:
            report.findings.append(
                Finding(
                    severity=Severity.CRITICAL,
                    code="holds_back_vacuum",
                    where=facts.where,
                    what=f"{held.gid} keeps VACUUM from {held.xids} transactions: the server stops before ids run out",
                    todo="end it, as the finding about it says; then let VACUUM run",
                    about=(held.gid,),
                )
            )
    report.findings += _settings(facts)


def _standing(held: Prepared, cluster: str | None, known: Mapping[str, Standing]) -> Standing:
    branch = branch_of(held.gid)
    # What is not spelt like a branch of ours is somebody else's, whatever cluster there is.
    return standing_of(branch.gid if branch is not None else "", cluster or ("" if branch is None else None), known)


def _branch(facts: PostgresFacts, held: Prepared) -> PreparedBranch:
    branch = branch_of(held.gid)
    quoted = "'" + held.gid.replace("'", "''") + "'"
    by = f" (in database {held.database}, as {held.owner})"
    tables = sorted(
        {
            f"{lock.relation} ({lock.mode})"
            for lock in facts.locks
            if lock.xid == held.xid and lock.locktype == "relation" and lock.relation and lock.mode != "AccessShareLock"
        }
    )
    more = f" and {len(tables) - _SHOWN} more" if len(tables) > _SHOWN else ""
    return PreparedBranch(
        where=facts.where,
        name=held.gid,
        gid=branch.gid if branch is not None else held.gid,
        branch=branch.branch if branch is not None else "",
        age_s=held.age_s,
        ending={"commit": f"COMMIT PREPARED {quoted};{by}", "abort": f"ROLLBACK PREPARED {quoted};{by}"},
        holds="locks on " + ", ".join(tables[:_SHOWN]) + more if tables else "",
        waiters=tuple(_told(waiter) for waiter in waiters_behind(facts, held)),
    )


def _told(waiter: Waiter) -> str:
    who = f"{waiter.usename or '?'}@{waiter.datname or '?'}"
    query = " ".join((waiter.query or "").split())
    return f"pid {waiter.pid} ({who}, for {waiter.age_s:.0f} s): {query}"


def _settings(facts: PostgresFacts) -> Iterable[Finding]:
    shown = facts.settings

    def finding(severity: Severity, code: str, what: str, todo: str) -> Finding:
        return Finding(severity=severity, code=code, where=facts.where, what=what, todo=todo)

    slots, used = int(shown["max_prepared_transactions"]), len(facts.prepared)
    restart = "and restart PostgreSQL"
    if slots == 0:
        yield finding(
            Severity.CRITICAL,
            "no_slots",
            "max_prepared_transactions is 0, so nothing can be prepared",
            f"ALTER SYSTEM SET max_prepared_transactions = 200; {restart}",
        )
    elif used >= slots * _SLOTS_NEARLY_FULL:
        yield finding(
            Severity.CRITICAL if used >= slots else Severity.WARNING,
            "slots_full",
            f"{used} of {slots} slots for prepared transactions are in use; beyond that, branches are refused",
            f"end what is prepared for too long, or raise max_prepared_transactions {restart}",
        )
    if shown["fsync"] == "off":
        yield finding(
            Severity.CRITICAL,
            "fsync_off",
            "fsync is off: a crash of the machine can lose branches that voted prepared",
            "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();",
        )
    if shown["full_page_writes"] == "off":
        yield finding(
            Severity.WARNING,
            "torn_pages",
            "full_page_writes is off: safe only on a file system that never tears a page",
            "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf();",
        )
    if shown["synchronous_commit"] == "off":
        yield finding(
            Severity.WARNING,
            "synchronous_commit_off",
            "synchronous_commit is off: participants of this cluster set it on, an application that prepares does not",
            "ALTER SYSTEM SET synchronous_commit = on; SELECT pg_reload_conf();",
        )
    if shown["transaction_read_only"] == "on" and used:
        yield finding(
            Severity.WARNING,
            "read_only",
            "this server only reads: what is prepared here cannot be ended here",
            "look at the primary",
        )
