"""What an application's own transaction must do with every database that can be enlisted: tests to inherit.

A subclass provides the fixture `bank`, a `Bank` on a real server, and is called `Test...`. The nodes and the
participant's server run in this process, unless a test says otherwise.
"""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from coordinator.client import Client
from coordinator.protocol.messages import Prepare
from participants.server import Participant, start
from participants.settings import ServerSettings
from tests.support.nodes import RunningNode
from tests.support.waiting import eventually

DEADLINE_S = 5.0
"""Of applications that die: long enough to reach the moment at which they are killed, on a busy machine too."""


class Bank:
    """Accounts ann, bob and cy of 100 each in one database, and its participant's manager.

    kind: of `tests.support.application_process`. late_prepare_fails: what the marker raises where a tombstone is.
    """

    kind: str
    dsn: str
    late_prepare_fails: type[Exception]

    def new_manager(self) -> Any:
        raise NotImplementedError

    def pool(self) -> Any:
        """A context that gives a pool of the application."""
        raise NotImplementedError

    def source(self, pool: Any) -> Any:
        """The `Enlistable` that `enlist` makes of it."""
        raise NotImplementedError

    async def take(self, connection: Any, account: str, amount: int) -> None:
        """The application's work."""
        raise NotImplementedError

    async def balance(self, account: str) -> int:
        """As others see it."""
        raise NotImplementedError

    async def prepared(self) -> list[str]:
        """Names of what is prepared."""
        raise NotImplementedError

    async def is_free(self, account: str) -> bool:
        """Whether nobody holds the account's lock."""
        raise NotImplementedError

    async def is_over(self) -> bool:
        """Nothing is prepared, and nothing is locked."""
        return not await self.prepared() and all([await self.is_free(account) for account in ("ann", "bob", "cy")])

    async def over(self) -> None:
        """Return once it is over."""
        await eventually(self.is_over, "nothing is prepared, and nothing locked", within_s=30.0, pause_s=0.05)


class Gate:
    """A manager whose prepares wait: `asked` says that one does, `let` lets them through."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.asked, self.let = asyncio.Event(), asyncio.Event()
        self.let.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def handle(self, batch: Any) -> Any:
        if any(isinstance(envelope.message, Prepare) for envelope in batch):
            self.asked.set()
            await self.let.wait()
        return await self._manager.handle(batch)


@pytest.fixture
async def gate(bank: Bank) -> Gate:
    return Gate(bank.new_manager())


@pytest.fixture
async def served(gate: Gate, node: RunningNode) -> AsyncIterator[Participant]:
    """The participant's server, registered at a node."""
    participant = await start(gate, settings=ServerSettings(coordinators=(node.url,), in_doubt_after_s=0.2))
    await node.register("bank", participant.url)
    yield participant
    await participant.stop()


@pytest.fixture
async def client(served: Participant, node: RunningNode) -> AsyncIterator[Client]:
    async with Client([node.url]) as client:
        yield client


@asynccontextmanager
async def killed_at(
    bank: Bank, nodes: str, moment: str, account: str, *, timeout_s: float = DEADLINE_S
) -> AsyncIterator[str]:
    """The gid of an application that takes 10 from `account`, has come to `moment`, and is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.support.application_process", bank.kind, nodes, bank.dsn, moment, account, str(timeout_s)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        word, _, gid = line.decode().strip().partition(" ")
        assert word == "here"
        yield gid
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


class ApplicationContract:
    """See the top of the module."""

    async def test_leaving_the_block_commits_in_the_database(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool:
            for _ in range(3):  # the connections are good for more than one
                async with client.transaction() as tx:
                    async with tx.enlist("bank", pool, branch="one") as connection:
                        await bank.take(connection, "ann", 10)
                    async with tx.enlist("bank", pool, branch="two") as connection:
                        await bank.take(connection, "bob", 20)
                assert tx.result.committed
                assert (await client.get(tx.gid, wait="ended")).ended
        assert (await bank.balance("ann"), await bank.balance("bob")) == (70, 40)
        await bank.over()

    async def test_one_connection_will_do(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool, pool.acquire() as connection:
            async with client.transaction() as tx, tx.enlist("bank", connection) as same:
                await bank.take(same, "ann", 10)
            assert (await client.get(tx.gid, wait="ended")).committed
        assert await bank.balance("ann") == 90

    async def test_an_exception_leaves_nothing(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool:
            with pytest.raises(KeyError):
                async with client.transaction() as tx:
                    async with tx.enlist("bank", pool) as connection:
                        await bank.take(connection, "ann", 10)
                    raise KeyError("mine")
            assert (await client.get(tx.gid, wait="ended")).aborted
        assert await bank.balance("ann") == 100
        await bank.over()

    async def test_a_branch_prepared_after_the_abort_does_not_come_to_be(self, bank: Bank, client: Client) -> None:
        """An application that was stopped for longer than its deadline, and goes on."""
        async with bank.pool() as pool:
            gid = (await client.begin(timeout_s=30)).gid
            await client.enlist(gid, "bank")
            work = await bank.source(pool).outlast_begin(gid, "bank")
            await bank.take(work.connection, "ann", 10)
            await client.abort(gid)
            assert (await client.get(gid, wait="ended")).ended  # although the application holds its locks
            with pytest.raises(bank.late_prepare_fails):
                await work.prepare()
            await work.close()
        await bank.over()
        assert await bank.balance("ann") == 100

    async def test_a_branch_prepared_as_the_votes_are_asked_for_is_found_or_fenced(
        self, bank: Bank, client: Client
    ) -> None:
        """An application that asks for the commit before it has prepared: it is the database that is believed."""
        async with bank.pool() as pool:
            gid = (await client.begin(timeout_s=30)).gid
            await client.enlist(gid, "bank")
            work = await bank.source(pool).outlast_begin(gid, "bank")
            await bank.take(work.connection, "ann", 10)
            txn = await client.commit(gid, ["bank"], wait="ended")
            assert (txn.aborted, txn.reason) == (True, "bank refused: not_enlisted")
            with pytest.raises(bank.late_prepare_fails):
                await work.prepare()
            await work.close()
        assert await bank.balance("ann") == 100
        await bank.over()

    async def test_a_participant_that_is_down_does_its_part_later(
        self, bank: Bank, client: Client, served: Participant, node: RunningNode
    ) -> None:
        async def pay() -> Any:
            async with bank.pool() as pool, client.transaction(timeout_s=60) as tx:
                async with tx.enlist("bank", pool) as connection:
                    await bank.take(connection, "ann", 10)
                await served.stop()
            return tx.result

        paying = asyncio.create_task(pay())
        unfinished = node.node.ledger.unfinished
        await eventually(lambda: any(txn.state == "preparing" for txn in unfinished.values()))
        assert len(await bank.prepared()) == 1
        again = await start(bank.new_manager(), settings=ServerSettings(coordinators=(node.url,)))
        try:
            await node.register("bank", again.url)
            assert (await paying).committed
            await eventually(lambda: not node.node.ledger.unfinished)
        finally:
            await again.stop()
        assert await bank.balance("ann") == 90
        await bank.over()

    @pytest.mark.processes
    async def test_applications_that_are_killed_leave_nothing(
        self, bank: Bank, client: Client, node: RunningNode
    ) -> None:
        """With its work done, before it prepares, and with its branch prepared: all at once, to be quick."""
        async with AsyncExitStack() as stack:
            moments = (("working", "ann"), ("unprepared", "bob"), ("prepared", "cy"))
            waiting = [killed_at(bank, node.url, moment, account) for moment, account in moments]
            gids = await asyncio.gather(*(stack.enter_async_context(each) for each in waiting))
            assert {(await client.get(gid)).state for gid in gids} == {"active"}
            assert len(await bank.prepared()) == 1
            assert not any([await bank.is_free(account) for _moment, account in moments])
        await bank.over()
        for gid in gids:
            txn = await client.get(gid, wait="ended")
            assert txn.aborted
            assert txn.reason == "timeout: the application did not ask for the commit in time"
        assert [await bank.balance(account) for _moment, account in moments] == [100, 100, 100]
