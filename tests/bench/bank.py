"""A participant for measurements: accounts in SQLite, and one operation that moves a balance by a row."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from participants.__main__ import add_server_arguments, server_settings
from participants.operations import Operations
from participants.server import run
from participants.sqlite import SqliteBranch, SqliteManager

ACCOUNTS = 1000
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS accounts (id INTEGER PRIMARY KEY, cents INTEGER NOT NULL);
WITH RECURSIVE n(id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM n WHERE id < {ACCOUNTS - 1})
INSERT OR IGNORE INTO accounts SELECT id, 0 FROM n;
"""

operations = Operations()


@operations.operation("add")
def add(branch: SqliteBranch, account: str, cents: int) -> None:
    """Add to one account's balance."""
    branch.execute("UPDATE accounts SET cents = cents + ? WHERE id = ?", (cents, int(account)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    add_server_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.data.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING)
    manager = SqliteManager(arguments.data / "bank.db", operations, schema=SCHEMA)
    run(manager, host=arguments.host, port=arguments.port, settings=server_settings(arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
