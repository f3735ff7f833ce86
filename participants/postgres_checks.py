"""Is this PostgreSQL fit to hold branches? Asked once, at the start; each complaint names what to change."""

import logging
from collections.abc import Mapping
from typing import Any, Final

import asyncpg

from participants.postgres_names import identifier, tables
from participants.prepared import PreparedSettings, Unfit

_log = logging.getLogger(__name__)

OLDEST_VERSION: Final = 14
"""pg_terminate_backend waits for the end, and clients that are gone are noticed, from this one on."""

_CHECK_CLIENT: Final = "100ms"
"""How often a busy backend looks whether its client is still there."""

PLAIN_SESSION: Final[Mapping[str, str]] = {"application_name": "outlast"}

_TABLES: Final = ("outlast_branches", "outlast_horizons")
_RIGHTS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")


async def check(connection: Any, settings: PreparedSettings, *, accept_unsafe: bool) -> dict[str, str]:
    """What every session is to set, once the server is found fit. Raises `Unfit`."""
    version = connection.get_server_version().major
    if version < OLDEST_VERSION:
        raise Unfit(f"PostgreSQL {version} is too old: {OLDEST_VERSION} or newer is needed")
    names = (
        *("max_prepared_transactions", "fsync", "full_page_writes", "synchronous_commit", "transaction_read_only"),
        *("server_encoding", "max_connections", "superuser_reserved_connections", "client_connection_check_interval"),
    )
    shown = {name: str(await connection.fetchval("SELECT current_setting($1)", name)) for name in names}
    slots = int(shown["max_prepared_transactions"])
    if slots == 0:
        raise Unfit(
            "max_prepared_transactions is 0, so nothing can be prepared: as a superuser run "
            "ALTER SYSTEM SET max_prepared_transactions = 200; and restart PostgreSQL"
        )
    if slots < settings.work_connections:
        _log.warning(
            "max_prepared_transactions is %d, below the %d branches that may work at once: more are refused",
            slots,
            settings.work_connections,
        )
    room = int(shown["max_connections"]) - int(shown["superuser_reserved_connections"])
    connections = settings.work_connections + settings.finish_connections
    if room < connections:
        # Commits would wait for what the branches that wait for them hold.
        raise Unfit(
            f"max_connections is {shown['max_connections']}, and this participant may open {connections}: as a "
            f"superuser run ALTER SYSTEM SET max_connections = {2 * connections}; and restart PostgreSQL, or give it "
            "fewer (work_connections)"
        )
    if shown["transaction_read_only"] == "on":
        raise Unfit("this PostgreSQL only reads: it is a standby, or default_transaction_read_only is on")
    if shown["server_encoding"] != "UTF8":
        raise Unfit(f"the database's encoding is {shown['server_encoding']}; create it with ENCODING 'UTF8'")
    if shown["fsync"] == "off":
        text = "fsync is off: a crash of the machine can lose branches that voted prepared; ALTER SYSTEM SET fsync = on"
        if not accept_unsafe:
            raise Unfit(text)
        _log.warning("%s", text)
    if shown["full_page_writes"] == "off":
        _log.warning(
            "full_page_writes is off: safe only on a file system that never tears a page; else ALTER SYSTEM SET it on"
        )
    session = {
        **PLAIN_SESSION,
        "lock_timeout": f"{int(settings.lock_within_s * 1000)}ms",
        "statement_timeout": f"{int(settings.statement_within_s * 1000)}ms",
        # A participant that stands still must not hold locks: what it works on was not voted for yet.
        "idle_in_transaction_session_timeout": f"{int(settings.work_within_s * 1000)}ms",
        "standard_conforming_strings": "on",
    }
    if shown["synchronous_commit"] == "off":
        _log.warning("synchronous_commit is off by default here; sessions of this participant set it on")
        session["synchronous_commit"] = "on"
    if shown["client_connection_check_interval"] == "0":
        try:
            await connection.execute(f"SET client_connection_check_interval TO '{_CHECK_CLIENT}'")
        except asyncpg.PostgresError as error:
            # Not on every platform; then a zombie is ended by whoever aborts its branch.
            _log.info("client_connection_check_interval cannot be set: %s", error)
        else:
            session["client_connection_check_interval"] = _CHECK_CLIENT
    return session


async def create_tables(connection: Any, schema: str) -> None:
    """Creates what is missing. Raises `Unfit` for what this user may not do."""
    there = await connection.fetchval(
        "SELECT count(*) FROM pg_tables WHERE schemaname = $1 AND tablename = ANY($2)", schema, list(_TABLES)
    )
    user = await connection.fetchval("SELECT current_user")
    if there < len(_TABLES):
        if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", identifier(schema)):
            raise Unfit(f"there is no schema {schema}: CREATE SCHEMA {identifier(schema)} AUTHORIZATION {user}")
        try:
            async with connection.transaction():
                # Two that start at once: one after the other.
                await connection.execute("SELECT pg_advisory_xact_lock(hashtext('outlast_branches'))")
                await connection.execute(tables(schema))
        except asyncpg.InsufficientPrivilegeError:
            raise Unfit(
                f"user {user} may not create tables in schema {schema}: as its owner run GRANT USAGE, CREATE ON SCHEMA "
                f"{identifier(schema)} TO {user}; or create the two tables of docs/POSTGRESQL.md for it"
            ) from None
    for table in _TABLES:
        where = f"{identifier(schema)}.{table}"
        for right in _RIGHTS:
            if not await connection.fetchval("SELECT has_table_privilege($1, $2)", where, right):
                raise Unfit(f"user {user} lacks rights: GRANT {', '.join(_RIGHTS)} ON {where} TO {user}")
