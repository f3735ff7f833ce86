"""Connections to one MariaDB database: where it is, how a connection is set up, and how connections are lent out.

A connection is never reset (COM_RESET_CONNECTION): on the owner of a prepared branch that breaks the branch off from
its name, so that a later XA COMMIT is acknowledged and commits nothing. Operations cannot change a session's settings,
so there is nothing to reset either.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncmy
import asyncmy.errors
from asyncmy.constants import CLIENT

from participants.manager import Unavailable
from participants.mariadb_branch import Parameters
from participants.mariadb_errors import ACCESS_DENIED, code_of, is_loss, said
from participants.mariadb_names import Xid
from participants.prepared import PreparedSettings, Unfit

_log = logging.getLogger(__name__)

GRACE_S: Final = 1.0
"""Beyond what the server allows a statement, before a connection is given up."""

_OPTIONS: Final = ("socket", "ssl-ca")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a database is, and as whom to go there. `ssl_ca`: who issued the server's certificate; None: no TLS."""

    database: str
    user: str = "root"
    password: str = field(default="", repr=False)
    host: str = "127.0.0.1"
    port: int = 3306
    socket: str | None = None
    ssl_ca: Path | None = None

    @classmethod
    def parse(cls, url: str) -> "Address":
        """From `mariadb://user:password@host:3306/database`, perhaps with ?socket=PATH or ?ssl-ca=FILE. Raises `Unfit`.

        Percent signs and what would divide its parts are written as %25, %40 and so on.
        """
        shape = "it looks like mariadb://user:password@host:3306/database, perhaps with ?socket=PATH or ?ssl-ca=FILE"
        try:
            parts = urlsplit(url)
            options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
            port = parts.port or 3306
        except ValueError:
            raise Unfit(f"the DSN cannot be used; {shape}") from None
        database = unquote(parts.path.removeprefix("/"))
        if parts.scheme not in ("mariadb", "mysql") or not database or "/" in database or set(options) - set(_OPTIONS):
            raise Unfit(f"the DSN cannot be used; {shape}")
        ca = options.get("ssl-ca")
        return cls(
            database=database,
            user=unquote(parts.username or "root"),
            password=unquote(parts.password or ""),
            host=parts.hostname or "127.0.0.1",
            port=port,
            socket=options.get("socket"),
            ssl_ca=None if ca is None else Path(ca),
        )

    def __str__(self) -> str:
        return f"database {self.database} at {self.socket or f'{self.host}:{self.port}'}"


class Session:
    """One connection. Methods raise the driver's errors, and close it when nobody can know what it would say next."""

    def __init__(self, connection: Any, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self.id = int(connection.thread_id())
        self.holds: Xid | None = None
        """The branch that was begun on it and has not ended, as far as is known here."""
        self.failed_at = 0
        """Which statement of the last `script` has failed."""

    @property
    def closed(self) -> bool:
        """Whether it is of no more use, as far as that shows without asking: the server may have ended it, too."""
        return not self._connection.connected or bool(self._connection._stream_broken)  # noqa: SLF001  # as its own pool

    async def run(self, sql: str, parameters: Parameters = ()) -> tuple[int, int, Sequence[tuple[Any, ...]] | None]:
        """Runs one statement: rows changed, last id given out, and rows, None for a statement that has none."""
        try:
            async with asyncio.timeout(self._timeout_s):
                cursor = self._connection.cursor()
                changed = await cursor.execute(sql, parameters or None)
                rows = await cursor.fetchall() if cursor.description is not None else None
                last_id = cursor.lastrowid
                if await cursor.nextset():
                    # A procedure has results of its own, and at the end a status.
                    while await cursor.nextset():
                        pass
        except BaseException as error:
            if not isinstance(error, asyncmy.errors.MySQLError) or is_loss(error):
                self.close()
            raise
        return changed, int(last_id or 0), rows

    async def script(self, *statements: str) -> None:
        """Runs our own statements in one round trip; the first that fails is the last, and `failed_at` tells which."""
        self.failed_at = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                cursor = self._connection.cursor()
                await cursor.execute("; ".join(statements))
                self.failed_at = 1
                while await cursor.nextset():
                    self.failed_at += 1
        except BaseException as error:
            if not isinstance(error, asyncmy.errors.MySQLError) or is_loss(error):
                self.close()
            raise

    async def rows(self, sql: str, parameters: Parameters = ()) -> Sequence[tuple[Any, ...]]:
        """The rows of a query."""
        return (await self.run(sql, parameters))[2] or ()

    def close(self) -> None:
        """Cut the connection. A branch that it has prepared stays, and is nobody's once the server has noticed."""
        self._connection.close()

    async def quit(self) -> None:
        """Tell the server, too."""
        try:
            async with asyncio.timeout(GRACE_S):
                await self._connection.ensure_closed()
        except (OSError, TimeoutError, asyncmy.errors.MySQLError) as error:
            _log.debug("a connection was gone before it was closed: %s", said(error))
            self.close()


async def connect(address: Address, settings: PreparedSettings, *, first: bool = False) -> Session:
    """A connection that is set up. Raises `Unavailable`; the `first` one `Unfit` for what repeating cannot help."""
    where: dict[str, Any] = {"unix_socket": address.socket} if address.socket else {}
    if not address.socket:
        where = {"host": address.host, "port": address.port}
    if address.ssl_ca is not None:
        where["ssl"] = ssl.create_default_context(cafile=address.ssl_ca)
    lock_s = max(1, int(settings.lock_within_s))
    setup = (
        "SET SESSION sql_mode = CONCAT_WS(',', @@sql_mode, 'STRICT_ALL_TABLES'), tx_isolation = 'READ-COMMITTED',"
        f" innodb_lock_wait_timeout = {lock_s}, lock_wait_timeout = {lock_s},"
        f" max_statement_time = {settings.statement_within_s}, idle_transaction_timeout = 0, net_read_timeout = 60"
    )
    try:
        async with asyncio.timeout(settings.connect_within_s):
            connection = await asyncmy.connect(
                **where,
                user=address.user,
                password=address.password,
                database=address.database,
                charset="utf8mb4",
                autocommit=True,
                client_flag=CLIENT.MULTI_STATEMENTS,
                init_command=setup,
                program_name="outlast",
                connect_timeout=max(1, int(settings.connect_within_s)),
            )
    except TimeoutError as error:
        raise Unavailable(f"MariaDB did not answer within {settings.connect_within_s:g} s") from error
    except (OSError, EOFError, asyncmy.errors.MySQLError) as error:
        if first and code_of(error) in ACCESS_DENIED:
            raise Unfit(f"MariaDB takes no connection with {address}: {said(error)}") from None
        raise Unavailable(f"MariaDB cannot be reached: {said(error)}") from error
    return Session(connection, settings.statement_within_s + GRACE_S)


class Busy(Exception):
    """No connection was free in time."""


class Pool:
    """At most `size` connections are lent out together. What is lent may be kept; it then makes room for another.

    spare: how many more than `size`, less those that are lent, may lie here unused.
    """

    def __init__(
        self, size: int, dial: Callable[[], Awaitable[Session]], *, spare: Callable[[], int] = lambda: 0
    ) -> None:
        self._dial = dial
        self._spare = spare
        self._unlent = size
        self._free: list[Session] = []
        self._room = asyncio.Semaphore(size)
        self._closed = False

    async def acquire(self, within_s: float) -> Session:
        """A connection outside of any transaction. Raises `Busy`, `Unavailable`."""
        try:
            async with asyncio.timeout(within_s):
                await self._room.acquire()
        except TimeoutError:
            raise Busy from None
        self._unlent -= 1
        try:
            if self._closed:
                raise Unavailable("the connections are closed")
            while self._free:
                session = self._free.pop()
                if not session.closed:
                    return session
                session.close()
            return await self._dial()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Whoever has acquired a connection keeps it, or has closed it: another one may be lent."""
        self._unlent += 1
        self._room.release()

    def release(self, session: Session) -> None:
        """Give back what was acquired."""
        self.leave()
        self.give(session)

    def give(self, session: Session) -> None:
        """A connection that nobody needs any more, not necessarily one of this pool's."""
        if self._closed or session.closed or len(self._free) >= self._unlent + self._spare():
            session.close()
        else:
            self._free.append(session)

    async def close(self) -> None:
        """Close those that are free, and later those that come back."""
        self._closed = True
        free, self._free = self._free, []
        for session in free:
            await session.quit()
