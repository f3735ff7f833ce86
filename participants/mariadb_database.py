"""One MariaDB database: the statements of `participants.prepared`, and whose a prepared branch is.

The messages of a branch that goes well, besides the operation's own statements:

    XA START <xid>                                            one round trip
    INSERT <marker>; XA END <xid>; XA PREPARE <xid>           one round trip, one sync
    XA COMMIT <xid>                                           one round trip, one sync

all on one connection, which is *pinned* in between: it keeps the branch, and can do nothing else. There is room for
some of them only. Beyond it the oldest is let go of: its connection is closed, and its branch finished like one of a
process that was killed, by whoever proves first that its owner is gone (`mariadb_owners`). The name of the branch tells
who the owner was. The marker has the last word: done is what shows its marker.

Every error of a statement means a vote no: after most of them MariaDB would prepare the part of the work that was done.

A branch of nothing but plain SELECT, after which the session's counters of written rows stand where they stood, is
rolled back, and leaves a read-only row.
"""

import asyncio
import inspect
import logging
import time
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import asyncmy.errors

from coordinator.codec import json_bytes
from coordinator.protocol.messages import Gid, Prepare, Prepared, ReadOnly, Refused, Vote
from participants.attempts import Attempts
from participants.manager import BranchId, InDoubt, KnownBranch, Unavailable
from participants.mariadb_branch import MariaDbBranch, Parameters
from participants.mariadb_checks import check, forgets_in_a_crash, unfit_tables
from participants.mariadb_errors import (
    CHECK_FAILED,
    DUPLICATE_KEY,
    LOCK_TIMEOUT,
    LOST,
    NO_SUCH_THREAD,
    NO_SUCH_XID,
    NOT_NULL,
    ROLLED_BACK,
    STATEMENT_TIMEOUT,
    WRONG_STATE,
    code_of,
    is_loss,
    refusal,
    said,
)
from participants.mariadb_names import Xid, marker_insert, named, pattern, text, unfit, xid_of
from participants.mariadb_owners import Owners
from participants.mariadb_session import Address, Busy, Pool, Session, connect
from participants.operations import Operations, Refuse, refusal_of
from participants.prepared import NUMBER_LIMIT, PreparedDatabase
from participants.resource import FORGOTTEN_REASON, Branch, Horizon, State

if TYPE_CHECKING:
    from participants.mariadb import MariaDbSettings

_log = logging.getLogger(__name__)

_WROTE: Final = (
    "SELECT SUM(variable_value) FROM information_schema.session_status"
    " WHERE variable_name IN ('HANDLER_WRITE', 'HANDLER_UPDATE', 'HANDLER_DELETE')"
)
_GONE_WITHIN_S: Final = 5.0
_GRACE_S: Final = 1.0
"""An application that has prepared a branch has so long to disconnect by itself."""

_POLL_S: Final = 0.02
_DELETES_AT_ONCE: Final = 100


class _KeyTaken(Exception):
    """The marker met a row of its branch."""


class _Pin(NamedTuple):
    """A prepared branch, and the connection that it belongs to."""

    session: Session
    xid: Xid


class _Held(NamedTuple):
    """A prepared branch that XA RECOVER lists."""

    key: BranchId
    xid: Xid
    owner: int


class MariaDbDatabase(PreparedDatabase):
    """See the top of the module."""

    def __init__(
        self,
        address: Address,
        operations: Operations,
        *,
        settings: "MariaDbSettings",
        left_alone: frozenset[str],
        accept_unsafe: bool,
    ) -> None:
        self._address, self._operations, self._settings = address, operations, settings
        self._left_alone, self._accept_unsafe = left_alone, accept_unsafe
        self._attempts = Attempts(self._dial)
        dial = self._attempts.connect
        self._workers = Pool(
            settings.work_connections, dial, spare=lambda: settings.pinned_connections - len(self._pins)
        )
        self._finishers = Pool(settings.finish_connections, dial)
        self._owners = Owners(dial)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._pins: dict[BranchId, _Pin] = {}
        self._seen_at: dict[BranchId, float] = {}
        """When a branch became prepared, or was first listed: MariaDB does not tell."""
        self._unfit: str | None = None
        """Why all branches are refused."""
        self._look_due_s = 0.0

    # --------------------------------------------------------------------------------------------- life

    async def open(self) -> None:
        """Connects, checks the settings, creates what is missing. Raises `Unfit`, `Unavailable`."""
        session = await connect(self._address, self._settings, first=True)
        try:
            await check(
                session,
                connections=self._settings.connections,
                left_alone=self._left_alone,
                accept_unsafe=self._accept_unsafe,
            )
        finally:
            await session.quit()
        self._look_due_s = time.monotonic() + self._settings.tables_every_s

    async def close(self) -> None:
        """Gives all connections up. Prepared branches stay, for whoever comes next."""
        pins, self._pins = self._pins, {}
        for pin in pins.values():
            await pin.session.quit()
        await self._workers.close()
        await self._finishers.close()

    async def _dial(self) -> Session:
        session = await connect(self._address, self._settings)
        self._sessions.add(session)
        return session

    def unfit(self, gid: Gid, branch: str) -> str | None:
        """Why no branch of this name can be prepared here."""
        return unfit(gid, branch)

    @asynccontextmanager
    async def _finisher(self, what: str) -> AsyncIterator[Session]:
        """A connection for some short statements. Raises `Unavailable` for whatever ends the connection."""
        try:
            session = await self._finishers.acquire(self._settings.acquire_within_s)
        except Busy:
            raise Unavailable(f"no connection was free within {self._settings.acquire_within_s:g} s") from None
        try:
            yield session
        except (asyncmy.errors.MySQLError, *LOST) as error:
            if is_loss(error):
                session.close()
                raise Unavailable(f"{what}: the connection was lost: {said(error)}") from error
            raise
        except BaseException:
            session.close()
            raise
        finally:
            self._finishers.release(session)

    @asynccontextmanager
    async def _plainly(self, what: str) -> AsyncIterator[Session]:
        """Like `_finisher`, where every error means that nothing is known."""
        try:
            async with self._finisher(what) as session:
                yield session
        except asyncmy.errors.MySQLError as error:
            raise Unavailable(f"{what}: {said(error)}") from error

    # --------------------------------------------------------------------------------------------- work

    async def work(self, message: Prepare, gid: Gid, within_s: float) -> Vote | None:
        """Runs the operation. See `PreparedDatabase.work`."""
        try:
            session = await self._workers.acquire(min(within_s, self._settings.acquire_within_s))
        except Busy:
            return Refused(gid=message.gid, branch=message.branch, reason="busy", retryable=True)
        key = BranchId(message.gid, message.branch)
        try:
            xid = await self._begin(session, message)
        except _Stale:
            # It was closed while it was idle, such as by a server that was started again.
            session.close()
            try:
                session = await self._attempts.connect()
                xid = await self._begin(session, message)
            except _Stale as error:
                self._workers.leave()
                raise Unavailable(f"MariaDB closes connections at once: {error}") from error
            except BaseException:
                self._workers.leave()
                raise
        except BaseException:
            self._workers.release(session)
            raise
        pinned = False
        try:
            vote = await self._work(session, xid, message, gid, within_s)
            pinned = isinstance(vote, Prepared)
            return vote
        except Refuse as refuse:
            await self._roll_back_work(session, xid)
            return Refused(gid=message.gid, branch=message.branch, reason=refuse.reason, retryable=refuse.retryable)
        except _KeyTaken:
            await self._roll_back_work(session, xid)
            return None
        except BaseException:
            session.close()
            raise
        finally:
            if pinned:
                self._workers.leave()
                await self._pin(key, _Pin(session, xid))
            else:
                self._workers.release(session)
                if session.closed:
                    await self._end_session(session.id)

    async def _begin(self, session: Session, message: Prepare) -> Xid:
        """Raises `_Stale` when the connection was lost: nothing was begun then."""
        xid = xid_of(message.gid, message.branch, database=self._address.database, connection=session.id)
        try:
            if time.monotonic() >= self._look_due_s:
                await self._look_at_server(session)
            session.holds = xid
            await session.script(f"XA START {xid.sql}")
        except (asyncmy.errors.MySQLError, *LOST) as error:
            session.close()
            if is_loss(error):
                raise _Stale(said(error)) from error
            raise Unavailable(f"a branch could not be begun: {said(error)}") from error
        return xid

    async def _look_at_server(self, session: Session) -> None:
        self._look_due_s = time.monotonic() + self._settings.tables_every_s
        tables = await unfit_tables(session, self._left_alone)
        lazy = None if self._accept_unsafe else await forgets_in_a_crash(session)
        for wrong in (tables, lazy):
            if wrong is not None and self._unfit is None:
                _log.error("ALARM: all branches are refused until this is changed: %s", wrong)
        self._unfit = None
        if lazy is not None:
            self._unfit = "unfit_server: a crash could make it forget what it promised"
        if tables is not None:
            self._unfit = "unfit_tables: there are some that cannot be rolled back"

    async def _work(self, session: Session, xid: Xid, message: Prepare, gid: Gid, within_s: float) -> Vote:
        if self._unfit is not None:
            self._look_due_s = 0.0
            raise Refuse(self._unfit)
        result, wrote = await self._operate(session, message, within_s)
        shown = None if result is None else result.decode()
        if not wrote:
            await self._keep_read_only(session, xid, gid, message.branch, shown)
            return ReadOnly(gid=message.gid, branch=message.branch, result=result)
        marker = marker_insert(xid, gid, message.branch, shown)
        try:
            await session.script(marker, f"XA END {xid.sql}", f"XA PREPARE {xid.sql}")
        except (asyncmy.errors.MySQLError, *LOST) as error:
            if is_loss(error):
                # Perhaps it was done, perhaps it will be: only a look can tell.
                raise Unavailable(f"the connection was lost while the branch was prepared: {said(error)}") from error
            raise self._why_not_prepared(error, session.failed_at, message) from error
        except BaseException:
            session.close()
            raise
        return Prepared(gid=message.gid, branch=message.branch, result=result)

    async def _operate(self, session: Session, message: Prepare, within_s: float) -> tuple[bytes | None, bool]:
        """Its result, and whether it may have changed anything. Raises `Refuse`: nothing is prepared yet."""
        runs = _Counted(session)
        branch = MariaDbBranch(message.gid, message.branch, runs)
        about = f"branch {message.branch} of {message.gid}"
        try:
            async with asyncio.timeout(within_s):
                value = self._operations.run(branch, message.payload)
                if inspect.isawaitable(value):
                    value = await value
            result = None if value is None else json_bytes(value)
            branch.end()
            if branch.failure is not None:
                raise self._operation_failed(branch.failure, about)
            if session.closed:
                raise Refuse("connection_lost", retryable=True)
            wrote = not branch.only_reads or await runs.wrote()
        except Refuse:
            raise
        except TimeoutError as error:
            session.close()
            raise Refuse("too_slow", retryable=True) from error
        except (Exception, SystemExit) as error:  # whatever an operation does, it only loses its vote
            # What a statement failed with says more than what the operation made of it.
            raise self._operation_failed(branch.failure or error, about) from error
        finally:
            branch.end()
        if result is not None and len(result) > self._settings.result_limit_bytes:
            raise Refuse(f"result_too_large: {len(result)} bytes, at most {self._settings.result_limit_bytes}")
        return result, wrote

    def _operation_failed(self, error: BaseException, about: str) -> Refuse:
        if isinstance(error, Refuse):
            return error
        if is_loss(error):
            return Refuse("connection_lost", retryable=True)
        found = refusal(error)
        if found is not None:
            return found
        reason, retryable = refusal_of(error, about)
        return Refuse(reason, retryable=retryable)

    def _why_not_prepared(self, error: BaseException, failed_at: int, message: Prepare) -> Exception:
        code = code_of(error)
        if failed_at == 0:
            if code in (DUPLICATE_KEY, LOCK_TIMEOUT, STATEMENT_TIMEOUT):
                return _KeyTaken()
            if code in (NOT_NULL, CHECK_FAILED):
                return Refuse(FORGOTTEN_REASON)
        return self._operation_failed(error, f"branch {message.branch} of {message.gid}")

    async def _keep_read_only(self, session: Session, xid: Xid, gid: Gid, branch: str, result: str | None) -> None:
        """Raises `_KeyTaken`, `Unavailable`."""
        statement = (
            "INSERT INTO outlast_branches(cluster, number, branch, state, result) VALUES (%s, %s, %s, 'read_only', %s)"
        )
        try:
            await session.script(f"XA END {xid.sql}", f"XA ROLLBACK {xid.sql}")
            session.holds = None
            await session.run(statement, (gid.cluster, gid.number, branch, result))
        except (asyncmy.errors.MySQLError, *LOST) as error:
            code = code_of(error)
            if code in (DUPLICATE_KEY, LOCK_TIMEOUT, STATEMENT_TIMEOUT):
                raise _KeyTaken from error
            session.close()
            raise Unavailable(f"a read-only branch was not recorded: {said(error)}") from error

    async def _roll_back_work(self, session: Session, xid: Xid) -> None:
        """Undoes what was not prepared; a connection on which that is not certain is closed."""
        if session.closed:
            return
        try:
            try:
                await session.script(f"XA END {xid.sql}")
            except asyncmy.errors.MySQLError as error:
                if code_of(error) != WRONG_STATE:
                    raise
                # A deadlock has rolled it back already, or it was ended before its prepare failed.
            try:
                await session.script(f"XA ROLLBACK {xid.sql}")
            except asyncmy.errors.MySQLError as error:
                if code_of(error) != NO_SUCH_XID:
                    raise
                # A prepare that fails has forgotten it.
            session.holds = None
        except (asyncmy.errors.MySQLError, *LOST) as error:
            _log.info("a connection is given up, for a refused branch was not rolled back: %s", said(error))
            session.close()

    async def _end_session(self, number: int) -> None:
        """Nobody waits for what this connection does any more; it is not to hold locks until the server finds out."""
        try:
            await self._kill(number)
        except Unavailable as error:
            _log.info("connection %d was not told to end: %s", number, error)

    async def _kill(self, number: int) -> None:
        try:
            async with self._finisher("a connection was not ended") as session:
                await session.run(f"KILL {number}")
        except asyncmy.errors.MySQLError as error:
            if code_of(error) != NO_SUCH_THREAD:
                raise Unavailable(
                    f"connection {number} was not ended: {said(error)}; the participant's user needs CONNECTION ADMIN"
                    " to end those of others"
                ) from error

    # --------------------------------------------------------------------------------------------- decisions

    async def _pin(self, key: BranchId, pin: _Pin) -> None:
        self._pins[key] = pin
        self._seen_at[key] = time.time()
        if len(self._pins) > self._settings.pinned_connections:
            # The oldest has waited longest, so its decision is the least likely to come soon.
            oldest = self._pins.pop(next(iter(self._pins)))
            await oldest.session.quit()

    async def commit(self, gid: Gid, branch: str) -> bool:
        """XA COMMIT. False: there is none of this name."""
        return await self._finish("XA COMMIT", gid, branch)

    async def roll_back(self, gid: Gid, branch: str) -> bool:
        """XA ROLLBACK. False: there is none of this name."""
        return await self._finish("XA ROLLBACK", gid, branch)

    async def _finish(self, verb: str, gid: Gid, branch: str) -> bool:
        key = BranchId(str(gid), branch)
        pin = self._pins.pop(key, None)
        if pin is not None and await self._finish_pinned(verb, key, pin):
            self._seen_at.pop(key, None)
            return True
        # Others' branches, those of a process that was killed, and those whose connection was lost or given up.
        for held in await self._listed():
            if held.key == key:
                await self._finish_orphan(verb, gid, held)
                self._seen_at.pop(key, None)
                return True
        return False

    async def _finish_pinned(self, verb: str, key: BranchId, pin: _Pin) -> bool:
        """False: the connection was lost, and nothing is known."""
        if pin.session.closed:
            pin.session.close()
            return False
        try:
            await pin.session.script(f"{verb} {pin.xid.sql}")
        except (asyncmy.errors.MySQLError, *LOST) as error:
            if is_loss(error):
                return False
            if code_of(error) in (NO_SUCH_XID, ROLLED_BACK, WRONG_STATE):
                # It is not what it should be: a look tells what it is.
                pin.session.close()
                return False
            # Such as during a backup, which lets nobody commit: it stays prepared, and the connection its own.
            self._pins[key] = pin
            raise Unavailable(f"{verb} {pin.xid.sql}: {said(error)}; it stays prepared") from error
        except BaseException:
            pin.session.close()
            raise
        pin.session.holds = None
        self._workers.give(pin.session)
        return True

    async def _finish_orphan(self, verb: str, gid: Gid, held: _Held) -> None:
        await self._owner_gone(held)
        what = f"{verb} {held.xid.sql}"
        async with self._plainly(what) as session:
            await session.script(what)
            if verb == "XA COMMIT":
                await self._show_marker(session, gid, held, what)

    async def _show_marker(self, session: Session, gid: Gid, held: _Held, what: str) -> None:
        """Nothing but the marker proves that it was committed. One that its application left out is made up for."""
        try:
            await session.run(
                "INSERT INTO outlast_branches(cluster, number, branch, state) VALUES (%s, %s, %s, 'committed')"
                " ON DUPLICATE KEY UPDATE state = state",
                (gid.cluster, gid.number, held.key.branch),
            )
        except asyncmy.errors.MySQLError as error:
            if code_of(error) not in (LOCK_TIMEOUT, STATEMENT_TIMEOUT):
                raise
            raise Unavailable(
                f"ALARM: MariaDB has acknowledged {what}, and still holds the branch's locks: it has lost its name; "
                "restart MariaDB, which will then list it as prepared again, and it will be committed"
            ) from error

    async def _owner_gone(self, held: _Held) -> None:
        """Returns once InnoDB shows that the connection that has prepared the branch has let go of it."""
        began_s = time.monotonic()
        told = False
        while held.owner in await self._owners.now():
            if any(
                session.id == held.owner and session.holds != held.xid and not session.closed
                for session in self._sessions
            ):
                # A server that was started again counts its connections anew: this one is ours, and never had it.
                return
            waited_s = time.monotonic() - began_s
            if waited_s > _GONE_WITHIN_S:
                raise Unavailable(f"{held.xid.sql} still belongs to connection {held.owner}, which does not end")
            if not told and await self._may_end(held.owner, patient=waited_s < _GRACE_S):
                await self._kill(held.owner)
                told = True

    async def _may_end(self, owner: int, *, patient: bool) -> bool:
        """Is it a connection of a participant, or one that an application should have closed long ago?"""
        async with self._plainly("the owner of a branch was not found out") as session:
            rows = await session.rows(
                "SELECT user = SUBSTRING_INDEX(USER(), '@', 1), command = 'Sleep' AND db <=> DATABASE()"
                " FROM information_schema.processlist WHERE id = %s",
                (owner,),
            )
        return any(ours or (idle and not patient) for ours, idle in rows)

    async def bury(self, gid: Gid, branch: str, record: Branch) -> bool:
        """Stores a tombstone. See `PreparedDatabase.bury`."""
        statement = (
            "INSERT INTO outlast_branches(cluster, number, branch, state, reason, retryable)"
            " VALUES (%s, %s, %s, 'aborted', %s, %s) ON DUPLICATE KEY UPDATE"
            " result = IF(state = 'read_only', NULL, result), reason = IF(state = 'read_only', VALUES(reason), reason),"
            " retryable = IF(state = 'read_only', VALUES(retryable), retryable),"
            " state = IF(state = 'read_only', 'aborted', state)"
        )
        reason = None if record.reason is None else record.reason.encode(errors="replace").decode()
        try:
            async with self._finisher("a tombstone was not stored") as session:
                changed, _, _ = await session.run(
                    statement, (gid.cluster, gid.number, branch, reason, int(record.retryable))
                )
        except asyncmy.errors.MySQLError as error:
            if code_of(error) in (LOCK_TIMEOUT, STATEMENT_TIMEOUT):
                return False
            raise Unavailable(f"a tombstone was not stored: {said(error)}") from error
        return changed > 0

    async def fence(self, gid: Gid, branch: str) -> None:
        """Ends the connections that run a statement which may make the branch prepared."""
        wanted = pattern(str(gid), branch, database=self._address.database)
        find = (
            "SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID() AND info LIKE %s ESCAPE '!'"
            " AND (info LIKE 'INSERT /*%%' OR info LIKE 'XA PREPARE %%' OR info LIKE 'XA END %%')"
        )
        deadline_s = time.monotonic() + _GRACE_S
        told: set[int] = set()
        while True:
            async with self._plainly("a branch was not fenced") as session:
                found = {int(row[0]) for row in await session.rows(find, (wanted,))}
            for number in found - told:
                _log.warning(
                    "connection %d still worked on branch %s of %s, for nobody: it is ended", number, branch, gid
                )
                await self._kill(number)
            told |= found
            if not found or time.monotonic() > deadline_s:
                return
            await asyncio.sleep(_POLL_S)

    # --------------------------------------------------------------------------------------------- what is there

    async def look(self, gid: Gid, branch: str) -> Branch:
        """The prepared branches first, the row next. See `PreparedDatabase.look`."""
        key = BranchId(str(gid), branch)
        held = any(each.key == key for each in await self._listed())
        async with self._plainly("a branch was not looked up") as session:
            rows = await session.rows(
                "SELECT state, result, reason, retryable FROM outlast_branches"
                " WHERE cluster = %s AND number = %s AND branch = %s",
                (gid.cluster, gid.number, branch),
            )
        for state, result, reason, retryable in rows:
            if held and state != State.COMMITTED.value:
                _log.warning("branch %s was prepared without its marker after it was %s: rolled back", key, state)
                await self.roll_back(gid, branch)
            raw = None if result is None else str(result).encode()
            return Branch(state=State(state), result=raw, reason=reason, retryable=bool(retryable))
        return Branch(state=State.PREPARED) if held else Branch()

    async def _listed(self) -> Sequence[_Held]:
        """What XA RECOVER lists of this database's branches; it lists those of all databases, and of strangers."""
        async with self._plainly("what is prepared was not listed") as session:
            rows = await session.rows("XA RECOVER")
        found = []
        for _, gtrid_bytes, bqual_bytes, data in rows:
            raw = data if isinstance(data, bytes) else str(data).encode()
            xid = Xid(raw[: int(gtrid_bytes)], raw[int(gtrid_bytes) : int(gtrid_bytes) + int(bqual_bytes)])
            its = named(xid, database=self._address.database)
            if its is not None:
                found.append(_Held(its.key, xid, its.owner))
        return found

    async def prepared(self) -> Sequence[InDoubt]:
        """Of this database, and under our names."""
        keys = {each.key for each in await self._listed()}
        now = time.time()
        self._seen_at = {key: at for key, at in self._seen_at.items() if key in keys or key in self._pins}
        found = [
            InDoubt(gid=key.gid, branch=key.branch, prepared_at=self._seen_at.setdefault(key, now)) for key in keys
        ]
        return sorted(found, key=lambda each: (each.prepared_at, each.gid, each.branch))

    async def known(self, gids: Sequence[Gid]) -> Sequence[KnownBranch]:
        """The prepared branches first, the rows next."""
        wanted = {str(gid): gid for gid in gids}
        states = {each.key: State.PREPARED.value for each in await self._listed()}
        find = "SELECT branch, state FROM outlast_branches WHERE cluster = %s AND number = %s"
        async with self._plainly("records were not read") as session:
            for gid in wanted.values():
                for branch, state in await session.rows(find, (gid.cluster, gid.number)):
                    states[BranchId(str(gid), str(branch))] = str(state)
        return [
            KnownBranch(gid=key.gid, branch=key.branch, state=state)
            for key, state in sorted(states.items())
            if key.gid in wanted
        ]

    async def load(self) -> tuple[Mapping[str, Horizon], Mapping[str, int]]:
        """The horizons, and the highest number per cluster."""
        async with self._plainly("the horizons were not read") as session:
            saved = await session.rows("SELECT cluster, epoch, floor FROM outlast_horizons")
            rows = await session.rows("SELECT cluster, MAX(number) FROM outlast_branches GROUP BY cluster")
        highest = {str(cluster): int(number) for cluster, number in rows}
        for each in await self._listed():
            gid = Gid.parse(each.key.gid)
            assert gid is not None, "named() checks it"
            highest[gid.cluster] = max(gid.number, highest.get(gid.cluster, 0))
        return {str(name): Horizon(epoch=int(epoch), floor=int(floor)) for name, epoch, floor in saved}, highest

    async def save(self, horizons: Mapping[str, Horizon]) -> None:
        """Stores horizons; what is stored only rises."""
        statement = (
            "INSERT INTO outlast_horizons(cluster, epoch, floor) VALUES (%s, %s, %s) ON DUPLICATE KEY UPDATE"
            " epoch = GREATEST(epoch, VALUES(epoch)), floor = GREATEST(floor, VALUES(floor))"
        )
        for cluster, horizon in sorted(horizons.items()):
            values = (cluster, horizon.epoch, min(horizon.floor, NUMBER_LIMIT - 1))
            try:
                async with self._finisher("the horizon was not saved") as session:
                    await session.run(statement, values)
            except asyncmy.errors.MySQLError as error:
                if code_of(error) != LOCK_TIMEOUT:
                    raise Unavailable(f"the horizon was not saved: {said(error)}") from error
                await self._save_by_force(statement, values)

    async def _save_by_force(self, statement: str, values: tuple[object, ...]) -> None:
        """Saves a horizon that applications keep locked.

        Under REPEATABLE READ a marker locks the horizon that it reads, until its branch is prepared. An application
        that has stopped in between must not keep a new leader from being heard. It has not voted, so it may be ended.
        """
        async with self._plainly("the horizon was not saved") as session:
            saving = asyncio.create_task(session.run(statement, values))
            try:
                for holder in await self._owners.blocking(session.id):
                    _log.warning(
                        "connection %d keeps a horizon locked, and is ended: its branch is not prepared", holder
                    )
                    await self._kill(holder)
            finally:
                await asyncio.wait([saving])
            await saving

    async def prune(self, cluster: str, above: int, below: int, at_most: int) -> int:
        """Deletes rows, each by its whole key: a DELETE over a range would wait for the first row beyond it as well."""
        find = (
            "SELECT number, branch FROM outlast_branches WHERE cluster = %s AND number >= %s AND number < %s"
            " ORDER BY number LIMIT %s"
        )
        async with self._plainly("records were not pruned") as session:
            rows = await session.rows(find, (cluster, above, min(below, NUMBER_LIMIT - 1), at_most))
            for start in range(0, len(rows), _DELETES_AT_ONCE):
                deletes = [
                    f"DELETE FROM outlast_branches WHERE cluster = {text(cluster)}"  # noqa: S608  # our own words
                    f" AND number = {int(number)} AND branch = {text(str(branch))}"
                    for number, branch in rows[start : start + _DELETES_AT_ONCE]
                ]
                try:
                    await session.script("START TRANSACTION", *deletes, "COMMIT")
                except asyncmy.errors.MySQLError:
                    session.close()  # and with it whatever was begun
                    raise
        return len(rows)


class _Stale(Exception):
    """The connection was lost before anything was begun on it."""


class _Counted:
    """Runs an operation's statements; counts the rows that the session has written, where it may matter."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._before: float | None = None
        self._first = True

    async def run(self, sql: str, parameters: Parameters = ()) -> tuple[int, int, Sequence[tuple[object, ...]] | None]:
        """See `Runs`."""
        if self._first and sql.lstrip()[:6].upper() == "SELECT":
            # Perhaps there will be nothing but queries; a function in one of them may write.
            self._before = await self._written()
        self._first = False
        return await self._session.run(sql, parameters)

    async def wrote(self) -> bool:
        """Has anything been written since the first statement? Also when nobody knows."""
        if self._first:
            return False
        return self._before is None or await self._written() != self._before

    async def _written(self) -> float:
        return float((await self._session.rows(_WROTE))[0][0])
