"""`python -m participants`: serves a participant from the command line."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from participants.arguments import (
    add_mariadb_arguments,
    add_postgres_arguments,
    add_server_arguments,
    read_dsn,
    serve_or_explain,
    server_settings,
)
from participants.manager import ResourceManager
from participants.mariadb import MariaDbManager
from participants.null import NullManager
from participants.operations import Operations
from participants.postgres import PostgresManager
from participants.prepared import Unfit
from participants.settings import SettingsError
from participants.sqlite import SqliteManager

__all__ = ["add_server_arguments", "load_operations", "main", "server_settings"]


def load_operations(reference: str) -> Operations:
    """The `Operations` that `module:attribute` names. Raises `SettingsError`, and what importing the module raises."""
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise SettingsError(f"operations are named as module:attribute, not {reference!r}")
    found = getattr(importlib.import_module(module_name), attribute, None)
    if not isinstance(found, Operations):
        raise SettingsError(f"{reference} is no participants.operations.Operations")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m participants", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    null = kinds.add_parser("null", help="holds nothing, votes prepared, acks; for benchmarks")
    add_server_arguments(null)
    sqlite = kinds.add_parser("sqlite", help="runs your named operations against an SQLite database")
    sqlite.add_argument("database", type=Path)
    sqlite.add_argument("--operations", required=True, metavar="MODULE:NAME", help="where your Operations are")
    sqlite.add_argument("--schema", type=Path, help="an SQL script that runs at every start")
    add_server_arguments(sqlite)
    postgres = kinds.add_parser("postgres", help="runs your named operations against a PostgreSQL database")
    postgres.add_argument("--operations", required=True, metavar="MODULE:NAME", help="where your Operations are")
    add_postgres_arguments(postgres)
    add_server_arguments(postgres)
    mariadb = kinds.add_parser("mariadb", help="runs your named operations against a MariaDB database")
    mariadb.add_argument("--operations", required=True, metavar="MODULE:NAME", help="where your Operations are")
    add_mariadb_arguments(mariadb)
    add_server_arguments(mariadb)
    arguments = parser.parse_args(argv)
    manager: ResourceManager
    if arguments.kind == "null":
        manager = NullManager()
    elif arguments.kind in ("postgres", "mariadb"):
        try:
            manager = _database(arguments)
        except (SettingsError, Unfit, OSError) as error:
            parser.error(str(error))
    else:
        try:
            schema = "" if arguments.schema is None else arguments.schema.read_text()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"{arguments.schema} cannot be read: {error}")
        manager = SqliteManager(arguments.database, load_operations(arguments.operations), schema=schema)
    return serve_or_explain(manager, arguments)


def _database(arguments: argparse.Namespace) -> ResourceManager:
    dsn, operations = read_dsn(arguments.dsn, arguments.dsn_file), load_operations(arguments.operations)
    unsafe = arguments.accept_unsafe
    if arguments.kind == "mariadb":
        return MariaDbManager(dsn, operations, left_alone=arguments.leave_alone, accept_unsafe=unsafe)
    return PostgresManager(dsn, operations, schema=arguments.db_schema, accept_unsafe=unsafe)


if __name__ == "__main__":
    raise SystemExit(main())
