"""A MariaDB database as a resource manager: named operations, prepared by the database itself as XA transactions.

    operations = Operations()

    @operations.operation("reserve")
    async def reserve(branch: MariaDbBranch, sku: str, quantity: int) -> None:
        changed = await branch.execute(
            "UPDATE stock SET available = available - %s WHERE sku = %s AND available >= %s", (quantity, sku, quantity)
        )
        if not changed:
            raise Refuse("out_of_stock")

    manager = MariaDbManager("mariadb://shop:password@db/shop", operations)

The parts: `prepared` has the rules that all such databases share; `mariadb_database` the statements, and whose a
prepared branch is; `mariadb_checks` what is looked at before anything begins; `mariadb_names` how a branch is called,
also for applications that prepare branches by themselves. docs/MARIADB.md tells the rest.

What an operation may count on, and what not:
- It sees what is committed, and its own changes: the isolation level is READ COMMITTED. A row that another branch has
  changed and not yet finished makes it wait, up to `lock_within_s`; then it is refused as `locked`, retryable.
- To decide by a row, it changes the row, or reads it with `FOR UPDATE` and changes something else: a branch that does
  nothing but plain SELECT votes read_only, and keeps nothing as it was.
- Statements read and change rows, one at a time, with parameters. Sessions, transactions and the schema are not its
  business. The first error of a statement refuses the branch, even if the operation catches it.
- All tables are InnoDB's. What a table of another engine was told cannot be taken back.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from participants.mariadb_branch import MariaDbBranch
from participants.operations import Operations
from participants.prepared import PreparedDatabase, PreparedManager, PreparedSettings, Unfit

DRIVER_MISSING: Final = "MariaDB needs its driver: pip install 'outlast[mariadb]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class MariaDbSettings(PreparedSettings):
    """Limits of one database. Times in seconds.

    pinned_connections: prepared branches that keep the connection that has prepared them; beyond it the oldest are let
        go of, which costs their commit a tenth of a second. With `work_connections` and `finish_connections` and two
        more it must stay below the server's max_connections.
    tables_every_s: between two looks at whether all tables can be rolled back, and the server still syncs its log.
    """

    pinned_connections: int = 64
    tables_every_s: float = 30.0

    @property
    def connections(self) -> int:
        """As many as may be open together."""
        return self.work_connections + self.finish_connections + self.pinned_connections + 2


class MariaDbManager(PreparedManager):
    """The resource manager. Raises `Unfit` when the driver is not installed; `open` raises `Unfit`, `Unavailable`.

    dsn: mariadb://user:password@host:3306/database, perhaps with ?socket=PATH or ?ssl-ca=FILE.
    left_alone: tables that no operation changes, and that may therefore be of other engines than InnoDB.
    accept_unsafe: serve a server too that may forget in a crash what it promised (innodb_flush_log_at_trx_commit).
    """

    def __init__(
        self,
        dsn: str,
        operations: Operations,
        *,
        settings: MariaDbSettings | None = None,
        left_alone: Collection[str] = (),
        accept_unsafe: bool = False,
    ) -> None:
        settings = settings or MariaDbSettings()
        database = _database(dsn, operations, settings, frozenset(left_alone), accept_unsafe=accept_unsafe)
        super().__init__(database, settings)


def _database(
    dsn: str, operations: Operations, settings: MariaDbSettings, left_alone: frozenset[str], *, accept_unsafe: bool
) -> PreparedDatabase:
    try:
        from participants.mariadb_database import MariaDbDatabase
        from participants.mariadb_session import Address
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "asyncmy":
            raise
        raise Unfit(DRIVER_MISSING) from None
    return MariaDbDatabase(
        Address.parse(dsn), operations, settings=settings, left_alone=left_alone, accept_unsafe=accept_unsafe
    )


__all__ = ["DRIVER_MISSING", "MariaDbBranch", "MariaDbManager", "MariaDbSettings", "Unfit"]
