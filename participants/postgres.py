"""A PostgreSQL database as a resource manager: named operations, prepared by the database itself.

    operations = Operations()

    @operations.operation("reserve")
    async def reserve(branch: PostgresBranch, sku: str, quantity: int) -> None:
        tag = await branch.execute(
            "UPDATE stock SET available = available - $2 WHERE sku = $1 AND available >= $2", sku, quantity
        )
        if tag != "UPDATE 1":
            raise Refuse("out_of_stock")

    manager = PostgresManager("postgresql://shop@db/shop", operations)

The parts: `prepared` has the rules that all such databases share; `postgres_database` the statements;
`postgres_checks` what is looked at before anything begins; `postgres_names` how a branch is called, also for
applications that prepare branches by themselves. docs/POSTGRESQL.md tells the rest.

What an operation may count on, and what not:
- It sees what is committed, and its own changes. A row that another branch has changed and not yet finished makes it
  wait, up to `lock_within_s`; then it is refused as `locked`, retryable.
- The isolation level is the database's default, or what it sets first (`SET TRANSACTION ISOLATION LEVEL ...`).
- It must not end its transaction, nor use what cannot be prepared: temporary tables, LISTEN, NOTIFY, cursors WITH HOLD.
"""

from typing import Final

from participants.operations import Operations
from participants.postgres_branch import PostgresBranch
from participants.prepared import PreparedDatabase, PreparedManager, PreparedSettings, Unfit

DRIVER_MISSING: Final = "PostgreSQL needs its driver: pip install 'outlast[postgres]'"


class PostgresManager(PreparedManager):
    """The resource manager. Raises `Unfit` when the driver is not installed; `open` raises `Unfit`, `Unavailable`.

    dsn: as libpq and asyncpg read it; what it lacks comes from the environment and from ~/.pgpass.
    schema: where the two tables of branches are, or are created.
    accept_unsafe: serve a server with fsync off too, which may forget what it promised.
    """

    def __init__(
        self,
        dsn: str,
        operations: Operations,
        *,
        schema: str = "public",
        settings: PreparedSettings | None = None,
        accept_unsafe: bool = False,
    ) -> None:
        settings = settings or PreparedSettings()
        super().__init__(_database(dsn, operations, schema, settings, accept_unsafe=accept_unsafe), settings)


def _database(
    dsn: str, operations: Operations, schema: str, settings: PreparedSettings, *, accept_unsafe: bool
) -> PreparedDatabase:
    try:
        from participants.postgres_database import PostgresDatabase
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise Unfit(DRIVER_MISSING) from None
    return PostgresDatabase(dsn, operations, schema=schema, settings=settings, accept_unsafe=accept_unsafe)


__all__ = ["DRIVER_MISSING", "PostgresBranch", "PostgresManager", "PreparedSettings", "Unfit"]
