"""An application's own transaction: it works on its own connections, and hands the rest to Outlast (the XA style).

    async with client.transaction(timeout_s=30) as tx:
        async with tx.enlist("orders", pool) as conn:
            await conn.execute("UPDATE orders SET state = 'paid' WHERE id = $1", 1700)
        async with tx.enlist("stock", other_pool) as conn:
            await conn.execute("UPDATE stock SET left_over = left_over - 1 WHERE sku = $1", "tea")

`enlist` tells the cluster first, so that an abort will reach that database whatever becomes of the application, and
then gives a connection with an open database transaction. Leaving the block prepares all branches, at once, and asks
for the commit; from there on the participant servers of those databases do the rest, also when this process dies. An
exception that leaves the block, or an `enlist`, aborts everything.

When what is true:

| left by | locally | the cluster | raised |
|---|---|---|---|
| its end | all prepared | asked for the commit, decides it | nothing; `tx.result` |
| its end | all prepared | decides to abort: the deadline, or somebody's request | `TransactionAborted` |
| the deadline | cancelled, rolled back | asked for the abort | `TransactionAborted`, caused by a `TimeoutError` |
| its end | one cannot be prepared | asked for the abort | `TransactionAborted`, caused by the database's error |
| its end | all prepared | cannot say whether it has decided | `OutcomeUnknown`, with the gid: `client.get(gid)` |
| an exception, a cancellation | rolled back | asked for the abort | that exception |
| a cancellation, while the commit is asked for | all prepared | either; asked for the abort | it; `tx.result` |

The abort need not arrive: nothing commits without having been asked for, and at its deadline the cluster aborts by
itself. The deadline is `timeout_s` after the beginning. It is not extended, and includes the votes. A block that is
still at work then is cancelled, as by `asyncio.timeout`: what it holds would only keep others waiting.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar, runtime_checkable

from coordinator.client_adapters import source_of
from coordinator.client_results import (
    ClientError,
    Conflict,
    Definite,
    OutcomeUnknown,
    TransactionAborted,
    TransactionResult,
)
from coordinator.protocol.transaction import State

if TYPE_CHECKING:
    from coordinator.client import Client

_log = logging.getLogger(__name__)

CLOSE_WITHIN_S: Final = 10.0
"""How long a connection may take to be given up; what hangs longer is left to its driver."""

ABORT_PATIENCE_S: Final = 5.0
"""How long an abort is asked for. It is a courtesy: the deadline brings it anyway."""

_T = TypeVar("_T")


class OpenBranch(Protocol):
    """A branch that its application works in: an open transaction of a database, on a connection."""

    @property
    def connection(self) -> Any:
        """What the application works on."""
        ...

    async def prepare(self) -> None:
        """Makes the work durable, under the name by which the participant's server will look for it.

        Raises what the database raises; whether the branch is prepared is then not known, and not counted on.
        """
        ...

    async def close(self) -> None:
        """Gives the connection up, however it is. What is not prepared is rolled back; what is prepared stays."""
        ...


@runtime_checkable
class Enlistable(Protocol):
    """What `enlist` takes besides the pools and connections that it knows: a source of branches of your own."""

    async def outlast_begin(self, gid: str, branch: str) -> OpenBranch:
        """Opens a database transaction for this branch. Leaves nothing behind when it raises."""
        ...


class ApplicationTransaction:
    """Made by `Client.transaction`, and used once, as an async context manager; see the module's text.

    gid: its name, from the beginning of the block on.
    result: as the cluster showed it last; after the block with its decision.
    """

    def __init__(
        self, client: "Client", *, timeout_s: float, key: str | None, protocol: str | None, patience_s: float
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._key = key
        self._protocol = protocol
        self._patience_s = patience_s
        self._known: TransactionResult | None = None
        self._expires_s = 0.0
        self._branches: dict[str, OpenBranch | None] = {}
        """By name; None while it is on its way."""
        self._working = 0
        """Blocks of `enlist` that are entered."""
        self._failure: BaseException | None = None
        """The first exception that left one."""
        self._left = False
        self._deadline: asyncio.Timeout | None = None

    @property
    def gid(self) -> str:
        """The transaction's name. Raises `RuntimeError` before the block has begun."""
        return self.result.gid

    @property
    def result(self) -> TransactionResult:
        """What is known of it. Raises `RuntimeError` before the block has begun."""
        if self._known is None:
            raise RuntimeError("the transaction begins with its block: async with client.transaction() as tx")
        return self._known

    # -------------------------------------------------------------------------------------------- the block

    async def __aenter__(self) -> Self:
        if self._known is not None:
            raise RuntimeError(f"{self.gid} was used already; make another one with client.transaction()")
        # Counted from before the request left: never later than the cluster counts.
        self._expires_s = asyncio.get_running_loop().time() + self._timeout_s
        self._known = await self._client.begin(timeout_s=self._timeout_s, key=self._key, protocol=self._protocol)
        if self._known.aborted:
            raise TransactionAborted(self._known)
        if self._known.state is not State.ACTIVE:
            raise Conflict(f"{self.gid}, which this key names, is {self._known.state} already", code="not_active")
        self._deadline = asyncio.timeout_at(self._expires_s)
        await self._deadline.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        assert self._deadline is not None, "the block was entered"
        try:
            await self._deadline.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise await self._aborted(self._too_late) from late
        if error is not None:
            told = await _to_its_end(self._give_up())
            if not told:
                error.add_note(f"{self.gid} could not be told to abort; the cluster aborts it at its deadline")
            return
        if self._working:
            await _to_its_end(self._give_up())
            raise RuntimeError(f"{self.gid} was left while work in a branch went on, and is aborted")
        if self._failure is not None:
            raise await self._aborted(f"a branch failed: {self._failure!r:.200}") from self._failure
        await self._commit()

    @asynccontextmanager
    async def enlist(self, participant: str, source: Any, *, branch: str | None = None) -> AsyncIterator[Any]:
        """A connection of `source` in an open database transaction that is a branch of this transaction.

        participant: the registered name of the server that looks after that database.
        source: a pool or a connection of asyncpg or asyncmy, or an `Enlistable`. A connection must not be in a
            transaction; do not begin, commit or roll back in it, but savepoints are yours.
        branch: tells branches at one participant apart; the participant's name when left out.

        The database transaction stays open until the transaction's block is left. Raises `TransactionAborted` when the
        transaction is aborted already; as `Client.enlist`; what the driver raises; TypeError for an unknown source.
        """
        name = participant if branch is None else branch
        if self._known is None or self._left:
            raise RuntimeError("branches are enlisted within the transaction's block")
        if name in self._branches:
            raise ValueError(f"branch {name} is enlisted already; give this one another name: branch=...")
        self._branches[name] = None
        self._working += 1
        try:
            opened = await self._open(name, participant, source)
            self._branches[name] = opened
            yield opened.connection
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            self._working -= 1

    async def _open(self, name: str, participant: str, source: Any) -> OpenBranch:
        try:
            self._known = await self._client.enlist(self.gid, participant, branch=name)
        except Conflict as error:
            if error.code != "not_active":
                raise
            self._known = await self._client.get(self.gid)
            raise (TransactionAborted(self._known) if self._known.aborted else error) from None
        # A try whose answer was lost may have enlisted it long ago.
        self._known.raise_for_abort()
        known: Enlistable = source if isinstance(source, Enlistable) else source_of(source)
        opened = await known.outlast_begin(self.gid, name)
        if self._left:
            await opened.close()
            raise RuntimeError(f"{self.gid} was left while branch {name} was being opened")
        return opened

    # -------------------------------------------------------------------------------------------- its end

    @property
    def _too_late(self) -> str:
        return f"timeout: not done within {self._timeout_s:g} s"

    async def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() >= self._expires_s:
            raise await self._aborted(self._too_late)
        try:
            await self._prepare()
        except Exception as error:
            raise await self._aborted(f"a branch could not be prepared: {error!r:.200}") from error
        except BaseException:
            await _to_its_end(self._give_up())
            raise
        # What is prepared needs its connection no more; both go on together.
        closing = loop.create_task(self._close())
        try:
            left_s = max(0.0, self._expires_s - loop.time())
            self._known = await self._client.commit(
                self.gid, list(self._branches), patience_s=left_s + self._patience_s
            )
        except Definite as error:
            aborted = await self._aborted(f"the commit could not be asked for: {error}")
            if not self.result.committed:
                raise aborted from error
        except OutcomeUnknown:
            raise
        except BaseException:
            await _to_its_end(self._give_up())
            raise
        finally:
            await _to_its_end(closing)
        if self.result.decision is None:
            raise OutcomeUnknown(f"{self.gid} is still {self.result.state}; look again", gid=self.gid)
        self.result.raise_for_abort()

    async def _prepare(self) -> None:
        """Prepares all, at once, and waits for all. Raises the first error; TimeoutError at the deadline."""
        loop = asyncio.get_running_loop()
        tasks = {name: loop.create_task(branch.prepare()) for name, branch in self._opened().items()}
        if not tasks:
            return
        try:
            await asyncio.wait(tasks.values(), timeout=max(0.0, self._expires_s - loop.time()))
        finally:
            late = {task for task in tasks.values() if not task.done()}
            for task in late:
                task.cancel()
            if late:
                await _to_its_end(_ended(late))
        for task in tasks.values():
            if task in late:
                raise TimeoutError(self._too_late)
            task.result()

    async def _aborted(self, reason: str) -> TransactionAborted:
        """Gives up, and says so. The commit was never asked for, so the decision can only be that."""
        told = await _to_its_end(self._give_up())
        if not told:
            self._known = replace(self.result, reason=reason, retryable=True)
        elif self.result.aborted:
            self._known = replace(self.result, reason=reason)
        return TransactionAborted(self.result)

    async def _give_up(self) -> bool:
        """Rolls everything back here, and asks for the abort. True once the cluster has said how it is decided."""
        await self._close()
        try:
            self._known = await self._client.abort(self.gid, patience_s=ABORT_PATIENCE_S)
        except ClientError as error:
            _log.warning("%s could not be told to abort, and is aborted at its deadline: %s", self.gid, error)
            return False
        return self._known.decision is not None

    async def _close(self) -> None:
        opened = self._opened()
        for name in opened:
            self._branches[name] = None
        done = await asyncio.gather(
            *(asyncio.wait_for(branch.close(), CLOSE_WITHIN_S) for branch in opened.values()), return_exceptions=True
        )
        for name, error in zip(opened, done, strict=True):
            if isinstance(error, BaseException):
                _log.warning("the connection of branch %s of %s was not given up in order: %r", name, self.gid, error)

    def _opened(self) -> Mapping[str, OpenBranch]:
        return {name: branch for name, branch in self._branches.items() if branch is not None}


async def _ended(tasks: Collection[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


async def _to_its_end(work: "Coroutine[Any, Any, _T] | asyncio.Task[_T]") -> _T:
    """What `work` returns. Whoever cancels this meanwhile waits for its end, and is obeyed then."""
    task = work if isinstance(work, asyncio.Task) else asyncio.get_running_loop().create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        failed = None if task.cancelled() else task.exception()
        raise cancelled from failed
    return task.result()
