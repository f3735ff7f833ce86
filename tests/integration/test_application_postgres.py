"""An application's own transaction, on PostgreSQL; and on a cluster of real processes whose leaders are killed."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cluster.local import LocalCluster
from coordinator.client import Client, TransactionAborted
from coordinator.protocol.messages import ENLISTED_PAYLOAD, Commit, Prepare, Stamp
from participants.manager import Envelope
from participants.operations import Operations
from participants.postgres import PostgresManager
from participants.postgres_application import Postgres
from participants.postgres_names import transaction_name
from participants.server import start
from participants.settings import ServerSettings
from tests.integration.application_contract import (
    ApplicationContract,
    Bank,
    Gate,
    client,
    gate,
    killed_at,
    served,
)

pytest_plugins = ["tests.support.postgres"]

DOCUMENT = Path(__file__).parents[2] / "docs/API.md"

__all__ = ["client", "gate", "served"]


class PostgresBank(Bank):
    kind = "postgres"
    late_prepare_fails = asyncpg.UniqueViolationError

    def __init__(self, dsn: str, other: Any) -> None:
        self.dsn, self.other = dsn, other

    def new_manager(self) -> PostgresManager:
        return PostgresManager(self.dsn, Operations())

    @asynccontextmanager
    async def pool(self) -> AsyncIterator[Any]:
        async with asyncpg.create_pool(self.dsn, min_size=0, max_size=2) as pool:
            yield pool

    def source(self, pool: Any) -> Postgres:
        return Postgres(pool)

    async def take(self, connection: Any, account: str, amount: int) -> None:
        await connection.execute("UPDATE account SET balance = balance - $2 WHERE name = $1", account, amount)

    async def balance(self, account: str) -> int:
        found: int = await self.other.fetchval("SELECT balance FROM account WHERE name = $1", account)
        return found

    async def prepared(self) -> list[str]:
        rows = await self.other.fetch("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        return [row["gid"] for row in rows]

    async def is_free(self, account: str) -> bool:
        found = await self.other.fetch("SELECT FROM account WHERE name = $1 FOR UPDATE SKIP LOCKED", account)
        return bool(found)


@pytest.fixture
async def bank(dsn: str) -> AsyncIterator[PostgresBank]:
    other = await asyncpg.connect(dsn)
    await other.execute(
        "CREATE TABLE account(name text PRIMARY KEY, balance int NOT NULL);"
        "INSERT INTO account VALUES ('ann', 100), ('bob', 100), ('cy', 100);"
        "CREATE TABLE book(name text REFERENCES account DEFERRABLE INITIALLY DEFERRED)"
    )
    bank = PostgresBank(dsn, other)
    yield bank
    assert await bank.prepared() == []
    await other.close()


class TestPostgres(ApplicationContract):
    async def test_a_branch_that_cannot_be_prepared_aborts_the_other(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool:
            with pytest.raises(TransactionAborted) as caught:
                async with client.transaction() as tx:
                    async with tx.enlist("bank", pool, branch="good") as connection:
                        await bank.take(connection, "ann", 10)
                    async with tx.enlist("bank", pool, branch="bad") as connection:
                        await connection.execute("INSERT INTO book VALUES ('nobody')")
            assert isinstance(caught.value.__cause__, asyncpg.ForeignKeyViolationError)
            assert (await client.get(tx.gid, wait="ended")).aborted
        assert await bank.balance("ann") == 100
        await bank.over()

    async def test_savepoints_are_the_applications(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool, client.transaction() as tx, tx.enlist("bank", pool) as connection:
            await bank.take(connection, "ann", 10)
            with pytest.raises(asyncpg.DivisionByZeroError):
                async with connection.transaction():
                    await bank.take(connection, "bob", 10)
                    await connection.execute("SELECT 1 / 0")
        assert (await client.get(tx.gid, wait="ended")).committed
        assert (await bank.balance("ann"), await bank.balance("bob")) == (90, 100)

    @pytest.mark.parametrize(
        ("statement", "kind"),
        [("SELECT 1 / 0", asyncpg.InFailedSQLTransactionError), ("COMMIT", asyncpg.InterfaceError)],
    )
    async def test_a_transaction_that_failed_or_was_ended_is_not_prepared(
        self, bank: Bank, client: Client, statement: str, kind: type[Exception]
    ) -> None:
        async with bank.pool() as pool:
            with pytest.raises(TransactionAborted) as caught:
                async with client.transaction() as tx, tx.enlist("bank", pool) as connection:
                    with suppress(asyncpg.DivisionByZeroError):
                        await connection.execute(statement)
            assert isinstance(caught.value.__cause__, kind)
            assert (await client.get(tx.gid, wait="ended")).aborted
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT 1") == 1
        await bank.over()

    async def test_a_connection_in_a_transaction_is_refused(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool, pool.acquire() as connection, connection.transaction():
            with pytest.raises(ValueError, match="in a transaction already"):
                async with client.transaction() as tx, tx.enlist("bank", connection):
                    pass
            assert tx.result.aborted

    async def test_a_connection_that_breaks_aborts(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool:
            with pytest.raises(TransactionAborted):
                async with client.transaction() as tx, tx.enlist("bank", pool) as connection:
                    await bank.take(connection, "ann", 10)
                    connection.terminate()
            assert (await client.get(tx.gid, wait="ended")).aborted
        assert await bank.balance("ann") == 100

    async def test_without_its_marker_a_late_branch_would_outlive_its_abort(
        self, bank: PostgresBank, client: Client
    ) -> None:
        """Known bad: what the contract's late branch is about happens when an application leaves no marker."""
        async with bank.pool() as pool, pool.acquire() as connection:
            gid = (await client.begin(timeout_s=30)).gid
            await client.enlist(gid, "bank")
            await connection.execute("BEGIN")
            await bank.take(connection, "ann", 10)
            await client.abort(gid)
            assert (await client.get(gid, wait="ended")).ended
            name = transaction_name(gid, "bank")
            await connection.execute(f"PREPARE TRANSACTION '{name}'")
            assert not await bank.is_over()
            await connection.execute(f"ROLLBACK PREPARED '{name}'")

    async def test_the_statements_in_the_document_are_what_the_participant_looks_for(self, bank: PostgresBank) -> None:
        """For other languages: docs/API.md, with the gid and the branch that stand there."""
        (sql,) = re.findall(r"^```sql\n(BEGIN;.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
        manager = bank.new_manager()
        await manager.open()
        try:
            await bank.other.execute("CREATE TABLE orders(id int, state text)")
            for statement in re.sub(r"--.*", "", sql).split(";"):
                if statement.strip():
                    await bank.other.execute(statement)
            messages = [
                Prepare(gid="local-2-7", branch="orders", payload=ENLISTED_PAYLOAD),
                Commit(gid="local-2-7", branch="orders"),
            ]
            for message in messages:
                (answer,) = await manager.handle([Envelope(message, Stamp(epoch=2))])
                assert type(answer).__name__ in ("Prepared", "Acked")
            assert await bank.other.fetchval("SELECT state FROM outlast_branches") == "committed"
        finally:
            await manager.close()

    @pytest.mark.processes
    async def test_leaders_die_under_it(self, bank: Bank, gate: Gate, tmp_path: Any) -> None:
        """A leader is killed while the application works, and the next one between the seal and the decision."""
        async with LocalCluster(tmp_path / "c") as cluster, bank.pool() as pool:
            settings = ServerSettings(coordinators=cluster.urls, coordinator_token=cluster.token)
            participant = await start(gate, settings=settings)
            try:
                async with Client(cluster.urls, token=cluster.token) as client:
                    await client.register("bank", participant.url)
                    async with client.transaction(timeout_s=60) as tx:
                        async with tx.enlist("bank", pool) as connection:
                            await bank.take(connection, "ann", 10)
                            first = await cluster.kill_leader()
                        async with tx.enlist("bank", pool, branch="more") as connection:
                            await bank.take(connection, "bob", 20)
                        await cluster.start_node(first)
                        gate.let.clear()
                        killing = asyncio.create_task(_kill_when_asked(cluster, gate))
                    assert tx.result.committed
                    await cluster.start_node(await killing)
                    assert (await client.get(tx.gid, wait="ended", patience_s=30)).ended
                    # An application that has died meanwhile is aborted by a leader that never heard from it.
                    async with killed_at(bank, ",".join(cluster.urls), "prepared", "cy", timeout_s=6) as gid:
                        pass
                    await cluster.kill_leader()
                    await bank.over()
                    assert (await client.get(gid)).aborted
            finally:
                await participant.stop()
        assert (await bank.balance("ann"), await bank.balance("bob")) == (90, 80)


async def _kill_when_asked(cluster: LocalCluster, gate: Gate) -> str:
    await gate.asked.wait()
    killed = await cluster.kill_leader()
    gate.let.set()
    return killed
