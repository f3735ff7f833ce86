"""One PostgreSQL database: the statements of `participants.prepared`, and how an operation runs in its branch.

The messages of a branch that goes well, besides the operation's own statements:

    RESET ALL; BEGIN; SET LOCAL application_name TO '<branch>'                      one round trip
    RESET ROLE; EXECUTE outlast_mark(...); PREPARE TRANSACTION '<branch>'           one round trip, one sync
    COMMIT PREPARED '<branch>'                                                      one round trip, one sync

The session bears the branch's name exactly as long as its transaction lasts. That names the zombies, should the client
die; and as PostgreSQL reports every change of an application_name, it also tells, for nothing, whether the operation
has ended the transaction that it was given.

PostgreSQL lets only the user finish a branch who was current when it was prepared, so an operation's SET ROLE ends
before the marker.

A branch that changed nothing has no transaction id. It is not prepared, which would cost two syncs, but rolled back,
and with it what is no change and would be heard of all the same (NOTIFY); its read-only row is a transaction of its
own, which waits for no sync. Under SERIALIZABLE what was read is only true once it was committed, so there the row is
the only change of the same transaction, which is committed.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import asyncpg

from coordinator.codec import json_bytes
from coordinator.protocol.messages import Gid, Prepare, Prepared, ReadOnly, Refused, Vote
from participants.attempts import Attempts
from participants.manager import BranchId, InDoubt, KnownBranch, Unavailable
from participants.operations import Operations, Refuse, refusal_of
from participants.postgres_branch import PostgresBranch
from participants.postgres_checks import PLAIN_SESSION, check, create_tables
from participants.postgres_errors import (
    BUSY_OR_OFF,
    LOCK_TIMEOUT,
    NO_SUCH_NAME,
    NO_SUCH_STATEMENT,
    NOT_NULL_VIOLATION,
    STATEMENT_TIMEOUT,
    TABLE,
    UNIQUE_VIOLATION,
    is_loss,
    refusal,
)
from participants.postgres_names import (
    PREFIX,
    branch_of,
    identifier,
    literal,
    marker_insert,
    session_name,
    transaction_name,
    unfit,
)
from participants.postgres_pool import LOST, Busy, Pool
from participants.prepared import NUMBER_LIMIT, PreparedDatabase, PreparedSettings, Unfit
from participants.resource import FORGOTTEN_REASON, Branch, Horizon, State

_log = logging.getLogger(__name__)

_GRACE_S: Final = 1.0
"""Beyond what the server allows a statement, before a connection is given up."""

_OWN_USER: Final = "RESET SESSION AUTHORIZATION; RESET ROLE"

_WHAT_IT_WAS: Final = (
    "SELECT pg_current_xact_id_if_assigned() IS NOT NULL, current_setting('transaction_isolation') = 'serializable'"
)

_BUSY_TRIES: Final = 6
_BUSY_PAUSE_S: Final = 0.01
_END_WITHIN_MS: Final = 1000
"""How long the server waits for a backend that it was told to end."""


class PostgresDatabase(PreparedDatabase):
    """See the top of the module."""

    def __init__(
        self, dsn: str, operations: Operations, *, schema: str, settings: PreparedSettings, accept_unsafe: bool
    ) -> None:
        self._dsn, self._operations, self._settings = dsn, operations, settings
        self._schema, self._accept_unsafe = schema, accept_unsafe
        self._session: dict[str, str] = {}
        attempts = Attempts(self._connect)
        self._workers = Pool(settings.work_connections, attempts.connect)
        self._finishers = Pool(settings.finish_connections, attempts.connect)
        where = identifier(schema)
        self._branches, self._horizons = f"{where}.outlast_branches", f"{where}.outlast_horizons"
        marker = marker_insert(schema, "$1::text, $2::bigint, $3::text, $4::text")
        self._statements = (
            f"PREPARE outlast_mark AS {marker}; PREPARE outlast_keep(text, bigint, text, text) AS"  # noqa: S608
            f" INSERT INTO {self._branches}(cluster, number, branch, state, result)"
            " VALUES ($1, $2, $3, 'read_only', $4)"
        )

    # --------------------------------------------------------------------------------------------- life

    async def open(self) -> None:
        """Connects, checks the settings, creates what is missing. Raises `Unfit`, `Unavailable`."""
        connection = await self._dial(PLAIN_SESSION, first=True)
        try:
            self._session = await check(connection, self._settings, accept_unsafe=self._accept_unsafe)
            await create_tables(connection, self._schema)
        except LOST as error:
            raise Unavailable(f"the connection was lost during the checks: {_text(error)}") from error
        finally:
            connection.terminate()
        async with self._finisher():
            pass  # the statements can be prepared, so the tables are what they should be

    async def close(self) -> None:
        """Gives all connections up."""
        await self._workers.close()
        await self._finishers.close()

    async def _connect(self) -> Any:
        connection = await self._dial(self._session)
        try:
            await connection.execute(self._statements, timeout=self._timeout_s)
        except (asyncpg.PostgresError, *LOST) as error:
            connection.terminate()
            raise Unavailable(f"a connection could not be set up: {_text(error)}") from error
        return connection

    async def _dial(self, session: Mapping[str, str], *, first: bool = False) -> Any:
        """A bare connection. Raises `Unavailable`; of the `first`, `Unfit` for what repeating cannot help."""
        within_s = self._settings.connect_within_s
        try:
            return await asyncpg.connect(self._dsn, timeout=within_s, server_settings=dict(session))
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
            if first:
                raise Unfit(f"PostgreSQL takes no connection: {error}") from None
            raise Unavailable(f"PostgreSQL takes no connection: {error}") from error
        except TimeoutError as error:
            raise Unavailable(f"PostgreSQL did not answer within {within_s:g} s") from error
        except (asyncpg.PostgresError, OSError) as error:
            raise Unavailable(f"PostgreSQL cannot be reached: {_text(error)}") from error
        except (ValueError, asyncpg.InterfaceError):
            # Whatever it says may quote the DSN, and with it a password.
            text = "the DSN cannot be used; it looks like postgresql://user:password@host:5432/database"
            raise Unfit(text) from None

    def unfit(self, gid: Gid, branch: str) -> str | None:
        """Why no branch of this name can be prepared here."""
        return unfit(gid, branch)

    @asynccontextmanager
    async def _finisher(self) -> AsyncIterator[Any]:
        """A connection for one short statement. Raises `Unavailable` for whatever ends the connection."""
        try:
            connection = await self._finishers.acquire(self._settings.acquire_within_s, 2 * self._timeout_s)
        except Busy:
            raise Unavailable(f"no connection was free within {self._settings.acquire_within_s:g} s") from None
        try:
            yield connection
        except LOST as error:
            self._finishers.drop(connection)
            raise Unavailable(f"the connection was lost: {_text(error)}") from error
        except asyncpg.PostgresError as error:
            if is_loss(error):
                self._finishers.drop(connection)
                raise Unavailable(f"PostgreSQL ended the connection: {_text(error)}") from error
            self._finishers.release(connection)
            raise
        except BaseException:
            self._finishers.drop(connection)
            raise
        else:
            self._finishers.release(connection)

    @asynccontextmanager
    async def _plainly(self, what: str) -> AsyncIterator[Any]:
        """Like `_finisher`, where every error means that nothing is known."""
        try:
            async with self._finisher() as connection:
                yield connection
        except asyncpg.PostgresError as error:
            raise Unavailable(f"{what}: {_text(error)}") from error

    @property
    def _timeout_s(self) -> float:
        return self._settings.statement_within_s + _GRACE_S

    # --------------------------------------------------------------------------------------------- work

    async def work(self, message: Prepare, gid: Gid, within_s: float) -> Vote | None:
        """Runs the operation. See `PreparedDatabase.work`."""
        try:
            connection = await self._workers.acquire(
                min(within_s, self._settings.acquire_within_s), within_s + 3 * self._timeout_s
            )
        except Busy:
            return Refused(gid=message.gid, branch=message.branch, reason="busy", retryable=True)
        pid = connection.get_server_pid()
        try:
            return await self._work(connection, message, gid, within_s)
        except Refuse as refuse:
            reason, retryable = refuse.reason, refuse.retryable
            await self._roll_back_work(connection)
            return Refused(gid=message.gid, branch=message.branch, reason=reason, retryable=retryable)
        except _KeyTaken:
            await self._roll_back_work(connection)
            return None
        finally:
            cut_off = connection.is_closed() or connection.is_in_transaction()
            self._workers.release(connection)
            if cut_off:
                await self._end_backend(pid)

    async def _work(self, connection: Any, message: Prepare, gid: Gid, within_s: float) -> Vote:
        name, session = transaction_name(*_key(message)), session_name(*_key(message))
        begin = f"RESET ALL; BEGIN; SET LOCAL application_name TO {literal(session)}"
        if within_s < self._settings.lock_within_s:
            begin += f"; SET LOCAL lock_timeout TO {max(1, int(within_s * 1000))}"
        branch = PostgresBranch(message.gid, message.branch, connection)
        result, wrote, serializable = await self._operate(connection, branch, begin, message, within_s)
        values = f"{literal(gid.cluster)}, {gid.number}, {literal(message.branch)}, {literal(result)}"
        if wrote:
            last = f"{_OWN_USER}; EXECUTE outlast_mark({values}); PREPARE TRANSACTION '{name}'"
            wanted = "PREPARE TRANSACTION"
        else:
            last = _OWN_USER if serializable else f"ROLLBACK; {begin}"
            last += f"; SET LOCAL synchronous_commit TO off; EXECUTE outlast_keep({values}); COMMIT"
            wanted = "COMMIT"
        try:
            tag = await connection.execute(last)
        except LOST as error:
            # Perhaps it was done, perhaps it will be: only a look can tell.
            connection.terminate()
            raise Unavailable(f"the connection was lost while the branch was prepared: {_text(error)}") from error
        except asyncpg.PostgresError as error:
            if error.sqlstate == NO_SUCH_STATEMENT:
                connection.terminate()  # it lacks them from now on
                raise Refuse("not_allowed: the operation deallocated statements that are not its own") from error
            raise self._why_not_prepared(error, message) from error
        if tag != wanted:
            # "Succeeds" with the tag ROLLBACK where there was nothing to prepare.
            raise Refuse("failed_transaction: the operation went on after an error in its transaction")
        raw = None if result is None else result.encode()
        vote = Prepared if wrote else ReadOnly
        return vote(gid=message.gid, branch=message.branch, result=raw)

    async def _operate(
        self, connection: Any, branch: PostgresBranch, begin: str, message: Prepare, within_s: float
    ) -> tuple[str | None, bool, bool]:
        """The operation's result, whether it changed anything, and whether it must be committed to have been true.

        Raises `Refuse`: nothing is prepared yet.
        """
        about = f"branch {message.branch} of {message.gid}"
        try:
            await connection.execute(begin)
            session = connection.get_settings().application_name
            async with asyncio.timeout(within_s):
                value = self._operations.run(branch, message.payload)
                if inspect.isawaitable(value):
                    value = await value
            result = None if value is None else json_bytes(value).decode()
            branch.end()
            if await self._has_ended(connection, session, about):
                raise Refuse("transaction_ended: the operation ended the transaction that it was given")
            wrote, serializable = (True, False) if branch.wrote else await connection.fetchrow(_WHAT_IT_WAS)
        except asyncpg.PostgresError as error:
            if is_loss(error):
                connection.terminate()
                raise Refuse("connection_lost", retryable=True) from error
            if isinstance(error, asyncpg.InvalidCachedStatementError):
                connection.terminate()  # it has more of them
                raise Refuse("schema_changed", retryable=True) from error
            raise self._operation_failed(error, about) from error
        except TimeoutError as error:
            connection.terminate()
            raise Refuse("too_slow", retryable=True) from error
        except LOST as error:
            connection.terminate()
            raise Refuse("connection_lost", retryable=True) from error
        except Refuse:
            await self._has_ended(connection, session_name(branch.gid, branch.branch), about)
            raise
        except (Exception, SystemExit) as error:  # whatever an operation does, it only loses its vote
            await self._has_ended(connection, session_name(branch.gid, branch.branch), about)
            reason, retryable = refusal_of(error, about)
            raise Refuse(reason, retryable=retryable) from error
        finally:
            branch.end()
        if result is not None and len(result) > self._settings.result_limit_bytes:
            raise Refuse(f"result_too_large: {len(result)} bytes, at most {self._settings.result_limit_bytes}")
        return result, wrote, serializable

    async def _has_ended(self, connection: Any, session: str, about: str) -> bool:
        """Has the operation ended its branch's transaction? Then part of it may be committed, for good."""
        if connection.is_closed():
            return True
        if connection.is_in_transaction():
            if connection.get_settings().application_name == session:
                return False
            try:
                await connection.execute("SELECT 1")
            except asyncpg.InFailedSQLTransactionError:
                return False  # an error takes back what was set, too; nothing can be committed any more
            except (*LOST, asyncpg.PostgresError) as error:
                _log.info("a connection was lost with the operation of %s: %s", about, _text(error))
                connection.terminate()
                return True
        connection.terminate()
        _log.error(
            "ALARM: the operation of %s ended the transaction that it was given; what it did before may be committed, "
            "whatever the decision: take COMMIT, ROLLBACK and PREPARE TRANSACTION out of it",
            about,
        )
        return True

    def _operation_failed(self, error: Any, about: str) -> Refuse:
        found = refusal(error)
        if found is not None:
            return found
        reason, retryable = refusal_of(error, about)
        return Refuse(reason, retryable=retryable)

    def _why_not_prepared(self, error: Any, message: Prepare) -> Exception:
        """What an error of the last message means: the database has undone the branch, and says so."""
        if is_loss(error):
            return Unavailable(f"the connection was lost while the branch was prepared: {_text(error)}")
        if error.table_name == TABLE and error.sqlstate == UNIQUE_VIOLATION:
            return _KeyTaken()
        if error.table_name == TABLE and error.sqlstate == NOT_NULL_VIOLATION:
            return Refuse(FORGOTTEN_REASON)
        return self._operation_failed(error, f"branch {message.branch} of {message.gid}")

    async def _roll_back_work(self, connection: Any) -> None:
        if connection.is_closed() or not connection.is_in_transaction():
            return
        try:
            await connection.execute("ROLLBACK")
        except (*LOST, asyncpg.PostgresError) as error:
            _log.info("a connection was lost while a refused branch was rolled back: %s", _text(error))
            connection.terminate()

    async def _end_backend(self, pid: int) -> None:
        """Nobody waits for what this backend does any more; it is not to hold locks until it finds out."""
        try:
            async with self._plainly("ending a backend") as connection:
                await connection.fetchval("SELECT pg_terminate_backend($1, $2)", pid, _END_WITHIN_MS)
        except Unavailable as error:
            _log.info("backend %d was not told to end: %s", pid, error)

    # --------------------------------------------------------------------------------------------- decisions

    async def commit(self, gid: Gid, branch: str) -> bool:
        """COMMIT PREPARED. False: there is none of this name."""
        return await self._finish("COMMIT PREPARED", gid, branch)

    async def roll_back(self, gid: Gid, branch: str) -> bool:
        """ROLLBACK PREPARED. False: there is none of this name."""
        return await self._finish("ROLLBACK PREPARED", gid, branch)

    async def _finish(self, verb: str, gid: Gid, branch: str) -> bool:
        name = transaction_name(str(gid), branch)
        pause_s = _BUSY_PAUSE_S
        for _ in range(_BUSY_TRIES):
            try:
                tag = await self._finish_once(f"{verb} '{name}'")
                if tag != verb:
                    raise Unavailable(f"{verb} {name} was answered with {tag}")
                return True
            except asyncpg.PostgresError as error:
                if error.sqlstate == NO_SUCH_NAME:
                    return False
                if error.sqlstate != BUSY_OR_OFF:
                    # Another user's, another database's, or nothing that was foreseen.
                    raise Unavailable(f"ALARM: {verb} {name}: {_text(error)}; it stays prepared") from error
            # Somebody else is finishing it at this moment.
            await asyncio.sleep(pause_s)
            pause_s *= 2
        raise Unavailable(f"{verb} {name}: somebody else is finishing it, and does not end")

    async def _finish_once(self, statement: str) -> str:
        """What `_finisher` does, without its detours: every branch comes this way."""
        try:
            connection = await self._finishers.acquire(self._settings.acquire_within_s, 2 * self._timeout_s)
        except Busy:
            raise Unavailable(f"no connection was free within {self._settings.acquire_within_s:g} s") from None
        try:
            tag = str(await connection.execute(statement))
        except LOST as error:
            connection.terminate()
            raise Unavailable(f"the connection was lost: {_text(error)}") from error
        except asyncpg.PostgresError as error:
            if is_loss(error):
                connection.terminate()
                raise Unavailable(f"PostgreSQL ended the connection: {_text(error)}") from error
            raise
        except BaseException:
            connection.terminate()  # it is still at it
            raise
        finally:
            self._finishers.release(connection)
        return tag

    async def bury(self, gid: Gid, branch: str, record: Branch) -> bool:
        """Stores a tombstone. See `PreparedDatabase.bury`."""
        statement = (
            f"INSERT INTO {self._branches} AS b(cluster, number, branch, state, reason, retryable)"  # noqa: S608
            " VALUES ($1, $2, $3, 'aborted', $4, $5) ON CONFLICT (cluster, number, branch) DO UPDATE"
            " SET state = 'aborted', result = NULL, reason = excluded.reason, retryable = excluded.retryable"
            " WHERE b.state = 'read_only'"
        )
        reason = None if record.reason is None else _storable(record.reason)
        try:
            async with self._finisher() as connection:
                tag = await connection.execute(statement, gid.cluster, gid.number, branch, reason, record.retryable)
        except asyncpg.PostgresError as error:
            if error.sqlstate in (LOCK_TIMEOUT, STATEMENT_TIMEOUT):
                return False
            raise Unavailable(f"a tombstone was not stored: {_text(error)}") from error
        return cast("str", tag) == "INSERT 0 1"

    async def fence(self, gid: Gid, branch: str) -> None:
        """Ends the connections that bear the branch's name."""
        statement = (
            "SELECT pid, pg_terminate_backend(pid, $2) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = $1 AND pid <> pg_backend_pid()"
        )
        async with self._plainly("a branch was not fenced") as connection:
            name = session_name(str(gid), branch)
            for pid, gone in await connection.fetch(statement, name, _END_WITHIN_MS):
                _log.warning(
                    "backend %d still worked on branch %s of %s, for nobody: %s",
                    pid,
                    branch,
                    gid,
                    "it was ended" if gone else "it was told to end, and is still there",
                )

    # --------------------------------------------------------------------------------------------- what is there

    async def look(self, gid: Gid, branch: str) -> Branch:
        """The prepared transactions first, the row next. See `PreparedDatabase.look`."""
        name = transaction_name(str(gid), branch)
        async with self._plainly("a branch was not looked up") as connection:
            held = await connection.fetchrow(
                "SELECT owner = current_user AS ours, owner FROM pg_prepared_xacts"
                " WHERE gid = $1 AND database = current_database()",
                name,
            )
            row = await connection.fetchrow(
                f"SELECT state, result, reason, retryable FROM {self._branches}"  # noqa: S608  # our own name
                " WHERE cluster = $1 AND number = $2 AND branch = $3",
                gid.cluster,
                gid.number,
                branch,
            )
        if row is not None:
            if held is not None and held["ours"] and row["state"] != State.COMMITTED.value:
                _log.warning("%s was prepared without its marker after it was %s: rolled back", name, row["state"])
                await self.roll_back(gid, branch)
            result = None if row["result"] is None else row["result"].encode()
            return Branch(
                state=State(row["state"]), result=result, reason=row["reason"], retryable=bool(row["retryable"])
            )
        if held is None:
            return Branch()
        if not held["ours"]:
            raise Unavailable(f"ALARM: {name} was prepared by user {held['owner']}, and only that user can finish it")
        return Branch(state=State.PREPARED)

    async def prepared(self) -> Sequence[InDoubt]:
        """Of this database and this user, and under our names."""
        async with self._plainly("what is prepared was not listed") as connection:
            rows = await connection.fetch(
                "SELECT gid, extract(epoch FROM prepared)::float8 AS at FROM pg_prepared_xacts"
                " WHERE database = current_database() AND owner = current_user AND starts_with(gid, $1)"
                " ORDER BY prepared",
                PREFIX,
            )
        found = []
        for row in rows:
            key = branch_of(row["gid"])
            if key is not None:
                found.append(InDoubt(gid=key.gid, branch=key.branch, prepared_at=row["at"]))
        return found

    async def known(self, gids: Sequence[Gid]) -> Sequence[KnownBranch]:
        """The prepared transactions first, the rows next."""
        wanted = {str(gid): gid for gid in gids}
        states = {BranchId(each.gid, each.branch): State.PREPARED.value for each in await self.prepared()}
        async with self._plainly("records were not read") as connection:
            for gid in wanted.values():
                rows = await connection.fetch(
                    f"SELECT branch, state FROM {self._branches} WHERE cluster = $1 AND number = $2",  # noqa: S608
                    gid.cluster,
                    gid.number,
                )
                states.update({BranchId(str(gid), row["branch"]): row["state"] for row in rows})
        return [
            KnownBranch(gid=key.gid, branch=key.branch, state=state)
            for key, state in sorted(states.items())
            if key.gid in wanted
        ]

    async def load(self) -> tuple[Mapping[str, Horizon], Mapping[str, int]]:
        """The horizons, and the highest number per cluster."""
        async with self._plainly("the horizons were not read") as connection:
            saved = await connection.fetch(f"SELECT cluster, epoch, floor FROM {self._horizons}")  # noqa: S608
            rows = await connection.fetch(
                f"SELECT cluster, max(number) AS number FROM {self._branches} GROUP BY cluster"  # noqa: S608
            )
        highest = {row["cluster"]: int(row["number"]) for row in rows}
        for each in await self.prepared():
            gid = Gid.parse(each.gid)
            assert gid is not None, "branch_of checks it"
            highest[gid.cluster] = max(gid.number, highest.get(gid.cluster, 0))
        return {row["cluster"]: Horizon(epoch=row["epoch"], floor=row["floor"]) for row in saved}, highest

    async def save(self, horizons: Mapping[str, Horizon]) -> None:
        """Stores horizons; what is stored only rises."""
        statement = (
            f"INSERT INTO {self._horizons} AS h VALUES ($1, $2, $3) ON CONFLICT (cluster) DO UPDATE"  # noqa: S608
            " SET epoch = greatest(h.epoch, excluded.epoch), floor = greatest(h.floor, excluded.floor)"
        )
        async with self._plainly("the horizon was not saved") as connection:
            for cluster, horizon in horizons.items():
                floor = min(horizon.floor, NUMBER_LIMIT - 1)
                await connection.execute(statement, cluster, horizon.epoch, floor)

    async def prune(self, cluster: str, above: int, below: int, at_most: int) -> int:
        """Deletes rows. Not synced: the horizon before it is, and a crash brings rows back, never a floor down."""
        statement = (
            f"DELETE FROM {self._branches} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {self._branches}"  # noqa: S608
            " WHERE cluster = $1 AND number >= $2 AND number < $3 ORDER BY number LIMIT $4))"
        )
        below = min(below, NUMBER_LIMIT - 1)
        async with self._plainly("records were not pruned") as connection, connection.transaction():
            await connection.execute("SET LOCAL synchronous_commit TO off")
            tag = await connection.execute(statement, cluster, above, below, at_most)
        return int(tag.split()[1])


class _KeyTaken(Exception):
    """The marker met a row of its branch."""


def _key(message: Prepare) -> BranchId:
    return BranchId(message.gid, message.branch)


def _text(error: BaseException) -> str:
    code = getattr(error, "sqlstate", None)
    text = str(error) or type(error).__name__
    return f"{text} ({code})" if code else text


def _storable(text: str) -> str:
    """PostgreSQL stores no NUL, and no lone surrogate."""
    return text.replace("\0", "").encode(errors="replace").decode()
