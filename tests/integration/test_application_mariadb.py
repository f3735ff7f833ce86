"""An application's own transaction, on MariaDB."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncmy
import asyncmy.errors
import pytest

from cluster.databases.mariadb import MariaDbServer
from coordinator.client import Client, TransactionAborted
from coordinator.protocol.messages import ENLISTED_PAYLOAD, Commit, Prepare, Stamp
from participants.manager import Envelope
from participants.mariadb import MariaDbManager
from participants.mariadb_application import MariaDb
from participants.mariadb_names import xid_of
from participants.operations import Operations
from tests.integration.application_contract import ApplicationContract, Bank, client, gate, served
from tests.support.mariadb import connect

pytest_plugins = ["tests.support.mariadb_fixtures"]

DOCUMENT = Path(__file__).parents[2] / "docs/API.md"

__all__ = ["client", "gate", "served"]


class MariaDbBank(Bank):
    kind = "mariadb"
    late_prepare_fails = asyncmy.errors.IntegrityError

    def __init__(self, server: MariaDbServer, database: str, other: Any) -> None:
        self.server, self.database, self.other = server, database, other
        self.dsn = server.dsn(database)

    def new_manager(self) -> MariaDbManager:
        return MariaDbManager(self.dsn, Operations())

    @asynccontextmanager
    async def pool(self, **options: Any) -> AsyncIterator[Any]:
        async with asyncmy.create_pool(
            minsize=0, maxsize=3, unix_socket=str(self.server.socket), user="root", database=self.database, **options
        ) as pool:
            yield pool

    def source(self, pool: Any) -> MariaDb:
        return MariaDb(pool)

    async def take(self, connection: Any, account: str, amount: int) -> None:
        async with connection.cursor() as cursor:
            await cursor.execute("UPDATE account SET balance = balance - %s WHERE name = %s", (amount, account))

    async def balance(self, account: str) -> int:
        found: int = (await self.other.run(f"SELECT balance FROM account WHERE name = '{account}'"))[0][0]
        return found

    async def prepared(self) -> list[str]:
        return [str(row[3]) for row in await self.other.run("XA RECOVER")]

    async def is_free(self, account: str) -> bool:
        found = await self.other.run(f"SELECT 1 FROM account WHERE name = '{account}' FOR UPDATE SKIP LOCKED")
        return bool(found)


@pytest.fixture
async def bank(mariadb: MariaDbServer, mariadb_database: str) -> AsyncIterator[MariaDbBank]:
    other = await connect(mariadb, mariadb_database)
    await other.run(
        "CREATE TABLE account(name varchar(20) PRIMARY KEY, balance int NOT NULL) ENGINE=InnoDB",
        "INSERT INTO account VALUES ('ann', 100), ('bob', 100), ('cy', 100)",
    )
    bank = MariaDbBank(mariadb, mariadb_database, other)
    yield bank
    assert await bank.prepared() == []
    await other.close()


class TestMariaDb(ApplicationContract):
    async def test_what_ends_the_transaction_is_refused_by_the_server(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool:
            with pytest.raises(asyncmy.errors.MySQLError):
                async with client.transaction() as tx, tx.enlist("bank", pool) as connection:
                    await bank.take(connection, "ann", 10)
                    await connection.commit()
            assert (await client.get(tx.gid, wait="ended")).aborted
        assert await bank.balance("ann") == 100
        await bank.over()

    async def test_the_statements_in_the_document_are_what_the_participant_looks_for(self, bank: MariaDbBank) -> None:
        """For other languages: docs/API.md, with the names that stand there put into ours."""
        (sql,) = re.findall(r"^```sql\n(SELECT DATABASE.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
        manager = bank.new_manager()
        await manager.open()
        try:
            await bank.other.run("CREATE TABLE stock(sku varchar(20) PRIMARY KEY, available int) ENGINE=InnoDB")
            application = await connect(bank.server, bank.database)
            # The gtrid that stands there is that of connection 42 with database shop.
            theirs = xid_of("local-2-7", "stock", database="shop", connection=42).sql
            ours = xid_of("local-2-7", "stock", database=bank.database, connection=application.id).sql
            assert theirs in sql
            for statement in sql.replace(theirs, ours).split(";"):
                if statement.strip():
                    await application.run(statement)
            await application.close()
            messages = [
                Prepare(gid="local-2-7", branch="stock", payload=ENLISTED_PAYLOAD),
                Commit(gid="local-2-7", branch="stock"),
            ]
            for message in messages:
                (answer,) = await manager.handle([Envelope(message, Stamp(epoch=2))])
                assert type(answer).__name__ in ("Prepared", "Acked")
            assert await bank.other.run("SELECT state FROM outlast_branches") == [("committed",)]
        finally:
            await manager.close()

    async def test_a_branch_cannot_be_serializable(self, bank: MariaDbBank, client: Client) -> None:
        async with bank.pool(init_command="SET SESSION tx_isolation = 'SERIALIZABLE'") as pool:
            with pytest.raises(ValueError, match="SERIALIZABLE"):
                async with client.transaction() as tx, tx.enlist("bank", pool):
                    pass
            assert tx.result.aborted

    async def test_a_connection_in_a_transaction_is_refused(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool, pool.acquire() as connection:
            await bank.take(connection, "ann", 10)
            with pytest.raises(ValueError, match="in a transaction already"):
                async with client.transaction() as tx, tx.enlist("bank", connection):
                    pass
            assert tx.result.aborted
            await connection.rollback()

    async def test_a_connection_that_breaks_aborts(self, bank: Bank, client: Client) -> None:
        async with bank.pool() as pool:
            with pytest.raises(TransactionAborted):
                async with client.transaction() as tx, tx.enlist("bank", pool) as connection:
                    await bank.take(connection, "ann", 10)
                    connection.close()
            assert (await client.get(tx.gid, wait="ended")).aborted
        assert await bank.balance("ann") == 100
