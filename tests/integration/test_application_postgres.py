"""An application's own transaction, on PostgreSQL."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest

from coordinator.client import Client, TransactionAborted
from participants.operations import Operations
from participants.postgres import PostgresManager
from participants.postgres_application import Postgres
from tests.integration.application_contract import ApplicationContract, Bank, client, gate, served

pytest_plugins = ["tests.support.postgres"]

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
        assert await bank.is_over()

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
        assert await bank.is_over()

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
