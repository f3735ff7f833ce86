"""One MariaDB server: what is prepared there, who waits behind it, and dangerous settings.

`XA RECOVER` lists names and nothing else: no time, no owner, no lock. InnoDB's tables list transactions, their locks
and who waits for whom, and no names. What joins the two: the name of a branch of ours says which connection has
prepared it, and while that one is open, its transaction bears the connection's id. Once it has gone, it bears 0.
With one such transaction and one such name they are each other's; with more, only the set of names is known, and that
is what is said.

The age is the transaction's: since its start, or since the server's last start, which found it prepared.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.doctor.findings import Finding, Report, Severity, Unseen, lasting, since_now
from cluster.doctor.standing import Kind, PreparedBranch, Standing, standing_of
from cluster.doctor.standing import judge as judge_branch
from participants.mariadb import DRIVER_MISSING, MariaDbSettings
from participants.mariadb_names import Xid, read_name

_COPY_OLD_S: Final = 0.15
"""InnoDB's tables are a copy that is made anew when nobody has looked for a tenth of a second."""

_SETTINGS: Final = (
    *("innodb_flush_log_at_trx_commit", "log_bin", "sync_binlog", "innodb_doublewrite", "read_only"),
    *("wsrep_on", "legacy_xa_rollback_at_disconnect", "version"),
)
_TRANSACTIONS_SQL: Final = """
SELECT trx_id, trx_mysql_thread_id, TIMESTAMPDIFF(MICROSECOND, trx_started, NOW(6)) / 1e6, trx_rows_locked,
       LEFT(trx_query, 200) FROM information_schema.INNODB_TRX
"""
_WAITS_SQL: Final = "SELECT requesting_trx_id, blocking_trx_id FROM information_schema.INNODB_LOCK_WAITS"
_LOCKS_SQL: Final = "SELECT lock_trx_id, lock_table, lock_mode, lock_type FROM information_schema.INNODB_LOCKS"
_METADATA_SQL: Final = """
SELECT id, time, LEFT(info, 200) FROM information_schema.PROCESSLIST WHERE state LIKE 'Waiting for table metadata lock%'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """One of InnoDB's. connection: 0 once the connection that has prepared it is gone."""

    id: int
    connection: int
    age_s: float
    rows: int = 0
    query: str | None = None


@dataclass(slots=True, kw_only=True)
class MariaDbFacts:
    """One server. waits: who waits, and for whom, by transaction. locks: transaction to what others want of it.

    metadata: connections that wait for a table's definition; MariaDB does not say behind whom.
    """

    where: str
    settings: Mapping[str, str] = field(default_factory=dict)
    prepared: Sequence[Xid] = ()
    transactions: Sequence[Transaction] = ()
    waits: Sequence[tuple[int, int]] = ()
    locks: Sequence[tuple[int, str]] = ()
    metadata: Sequence[tuple[int, float, str]] = ()
    trouble: str | None = None
    now: float = field(default_factory=time.time)


async def look(where: str, dsn: str) -> MariaDbFacts:
    """Connect, read, and go. Raises nothing: what cannot be had is said so, without what the DSN holds."""
    facts = MariaDbFacts(where=where)
    try:
        import asyncmy.errors

        from participants.manager import Unavailable
        from participants.mariadb_errors import ACCESS_DENIED, LOST, code_of, said
        from participants.mariadb_session import Address, connect
        from participants.prepared import Unfit
    except ModuleNotFoundError:
        facts.trouble = DRIVER_MISSING
        return facts
    try:
        session = await connect(Address.parse(dsn), MariaDbSettings(), first=True)
    except (Unfit, Unavailable, OSError, ValueError) as error:
        facts.trouble = str(error)
        return facts
    try:
        rows = await session.rows(
            "SELECT LOWER(variable_name), variable_value FROM information_schema.global_variables"
            " WHERE LOWER(variable_name) IN %s",
            (_SETTINGS,),
        )
        facts.settings = {str(name): str(value) for name, value in rows}
        # Participants look there, too, and would be shown an old copy if somebody else did at the same time.
        await session.run("SELECT GET_LOCK('outlast_owners', 3)")
        await asyncio.sleep(_COPY_OLD_S)
        found = [
            Transaction(
                id=int(row[0]), connection=int(row[1] or 0), age_s=float(row[2]), rows=int(row[3]), query=row[4]
            )
            for row in await session.rows(_TRANSACTIONS_SQL)
        ]
        facts.transactions = [each for each in found if each.connection != session.id]
        facts.waits = [(int(waits), int(holds)) for waits, holds in await session.rows(_WAITS_SQL)]
        facts.locks = [
            (int(row[0]), f"{str(row[1]).replace('`', '')} ({row[2]} {str(row[3]).lower()})")
            for row in await session.rows(_LOCKS_SQL)
        ]
        facts.metadata = [
            (int(row[0]), float(row[1] or 0), str(row[2] or "")) for row in await session.rows(_METADATA_SQL)
        ]
        facts.prepared = [
            Xid(data[: int(gtrid)], data[int(gtrid) : int(gtrid) + int(bqual)])
            for _, gtrid, bqual, raw in await session.rows("XA RECOVER")
            for data in [raw if isinstance(raw, bytes) else str(raw).encode()]
        ]
    except (asyncmy.errors.MySQLError, *LOST) as error:
        rights = "; the user needs GRANT PROCESS ON *.*" if code_of(error) in ACCESS_DENIED else ""
        facts.trouble = f"{said(error)}{rights}"
    finally:
        await session.quit()
    return facts


def gids(facts: MariaDbFacts) -> Iterable[str]:
    """Of the branches that are prepared there, in whatever database."""
    return (its.key.gid for xid in facts.prepared if (its := read_name(xid)) is not None)


# ------------------------------------------------------------------------------------------------ judging


def holders(facts: MariaDbFacts) -> list[tuple[Transaction, tuple[Xid, ...]]]:
    """Transactions of what is prepared, and the names that each may have: one, where that is certain."""
    by_connection = {each.connection: each for each in facts.transactions if each.connection}
    nobodys = [each for each in facts.transactions if not each.connection]
    certain: list[tuple[Transaction, tuple[Xid, ...]]] = []
    left: list[Xid] = []
    strange: list[Xid] = []
    for xid in facts.prepared:
        its = read_name(xid)
        if its is None:
            strange.append(xid)
        elif its.owner in by_connection:
            certain.append((by_connection[its.owner], (xid,)))
        else:
            left.append(xid)
    # As many transactions as names of ours that have lost their connection: then the strangers have theirs still.
    names = tuple(left) if len(nobodys) == len(left) else (*left, *strange)
    return certain + [(each, names) for each in nobodys]


def behind(facts: MariaDbFacts, holder: Transaction) -> list[Transaction]:
    """Who waits for what it holds, and who waits behind those, the longest first."""
    by_id = {each.id: each for each in facts.transactions}
    found: dict[int, Transaction] = {}
    fresh = [holder.id]
    for blocking in fresh:
        for waits, holds in facts.waits:
            if holds == blocking and waits in by_id and waits not in found and waits != holder.id:
                found[waits] = by_id[waits]
                fresh.append(waits)
    return sorted(found.values(), key=lambda each: -each.age_s)


def judge(
    facts: MariaDbFacts, report: Report, *, cluster: str | None, known: Mapping[str, Standing], limit_s: float
) -> None:
    """Add what follows from the facts."""
    if facts.trouble is not None:
        report.unseen.append(Unseen(where=facts.where, why=facts.trouble))
        return
    report.seen.append(facts.where)
    held = holders(facts)
    certain = {names[0]: holder for holder, names in held if len(names) == 1}
    for xid in facts.prepared:
        its = read_name(xid)
        standing = Standing(kind=Kind.FOREIGN) if its is None else standing_of(its.key.gid, cluster, known)
        found = judge_branch(_branch(facts, xid, certain.get(xid)), standing, limit_s=limit_s)
        if found is not None:
            report.findings.append(found)
    for holder, names in held:
        if len(names) > 1 and holder.age_s > limit_s:
            report.findings.append(_one_of(facts, holder, names, cluster, known))
    for connection, age_s, query in facts.metadata:
        if age_s > limit_s:
            report.findings.append(
                Finding(
                    severity=Severity.WARNING,
                    code="waits_for_table",
                    where=facts.where,
                    what=f"connection {connection} waits for a table's definition for {lasting(age_s)}: {query}",
                    todo="a prepared branch that uses the table is in its way until it has ended; MariaDB hides which",
                    since=since_now(age_s),
                    about=(str(connection),),
                )
            )
    report.findings += _settings(facts)


def _branch(facts: MariaDbFacts, xid: Xid, holder: Transaction | None) -> PreparedBranch:
    its = read_name(xid)
    first = ""
    if holder is not None and holder.connection:
        first = (
            f" (first KILL {holder.connection}, and wait until INNODB_TRX shows that connection no more: before that, "
            "MariaDB acknowledges what it does not do)"
        )
    waiters = [] if holder is None else behind(facts, holder)
    return PreparedBranch(
        where=facts.where,
        name=xid.sql,
        gid=xid.sql if its is None else its.key.gid,
        branch="" if its is None else its.key.branch,
        age_s=None if holder is None else holder.age_s,
        ending={"commit": f"XA COMMIT {xid.sql};{first}", "abort": f"XA ROLLBACK {xid.sql};{first}"},
        holds="" if holder is None else _holds(facts, holder),
        waiters=tuple(map(_told, waiters)),
    )


def _holds(facts: MariaDbFacts, holder: Transaction) -> str:
    wanted = sorted({what for transaction, what in facts.locks if transaction == holder.id})
    return f"{holder.rows} rows" + (f", and others want {', '.join(wanted)}" if wanted else "")


def _told(waiter: Transaction) -> str:
    query = " ".join((waiter.query or "").split())
    return f"connection {waiter.connection} (for at most {waiter.age_s:.0f} s): {query}"


def _one_of(
    facts: MariaDbFacts,
    holder: Transaction,
    names: Sequence[Xid],
    cluster: str | None,
    known: Mapping[str, Standing],
) -> Finding:
    waiters = [_told(each) for each in behind(facts, holder)]
    told = []
    for xid in names[:10]:
        its = read_name(xid)
        standing = Standing(kind=Kind.FOREIGN) if its is None else standing_of(its.key.gid, cluster, known)
        told.append(f"{xid.sql} ({standing.decision or standing.kind.value})")
    waits = f"; {len(waiters)} wait behind it: {'; '.join(waiters[:5])}" if waiters else ""
    return Finding(
        severity=Severity.CRITICAL if waiters else Severity.WARNING,
        code="one_prepared_too_long",
        where=facts.where,
        what=(
            f"one of {len(names)} prepared branches is prepared for {lasting(holder.age_s)}, MariaDB hides which: "
            f"{', '.join(told)}; it holds {_holds(facts, holder)}{waits}"
        ),
        todo="see that the participants' servers run: they end what is decided, or was never begun, by themselves",
        since=since_now(holder.age_s),
        about=(*(xid.sql for xid in names), *waiters),
    )


def _settings(facts: MariaDbFacts) -> Iterable[Finding]:
    shown = facts.settings

    def finding(severity: Severity, code: str, what: str, todo: str) -> Finding:
        return Finding(severity=severity, code=code, where=facts.where, what=what, todo=todo)

    forever = "and set it in the server's option file"
    if shown.get("innodb_flush_log_at_trx_commit") not in ("1", "3"):
        yield finding(
            Severity.CRITICAL,
            "flush_off",
            "innodb_flush_log_at_trx_commit is not 1: a crash can lose branches that voted prepared",
            f"SET GLOBAL innodb_flush_log_at_trx_commit = 1; {forever}",
        )
    if shown.get("log_bin") == "ON" and shown.get("sync_binlog") != "1":
        yield finding(
            Severity.CRITICAL,
            "binlog_not_synced",
            "sync_binlog is not 1: a crash can lose what was committed from the binary log",
            f"SET GLOBAL sync_binlog = 1; {forever}",
        )
    if shown.get("legacy_xa_rollback_at_disconnect", "OFF") == "ON":
        yield finding(
            Severity.CRITICAL,
            "lost_at_disconnect",
            "legacy_xa_rollback_at_disconnect is ON: a lost connection loses its votes",
            f"SET GLOBAL legacy_xa_rollback_at_disconnect = OFF; {forever}",
        )
    if shown.get("wsrep_on", "OFF") == "ON":
        yield finding(
            Severity.CRITICAL,
            "galera",
            "this is a Galera cluster, which knows no XA transactions",
            "use another server",
        )
    if shown.get("innodb_doublewrite") == "OFF":
        yield finding(
            Severity.WARNING,
            "torn_pages",
            "innodb_doublewrite is OFF: safe only on a file system that never tears a page",
            "set innodb_doublewrite = ON in the server's option file, and restart it",
        )
    if shown.get("read_only", "OFF") != "OFF" and facts.prepared:
        yield finding(
            Severity.WARNING,
            "read_only",
            "this server only reads: what is prepared here cannot be ended here",
            "look at the primary",
        )
