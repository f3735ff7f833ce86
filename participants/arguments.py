"""What every command that serves a participant takes from its command line."""

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from typing import Final

import apsw

from participants.manager import ResourceManager, Unavailable
from participants.prepared import Unfit
from participants.record_file import AlreadyOpen
from participants.server import run
from participants.settings import ServerSettings, SettingsError
from participants.sqlite import SchemaUnfit

DSN_VARIABLE: Final = "OUTLAST_DSN"
"""Names the database when no argument does."""

_PASSWORD: Final = re.compile(r"^[^:]*://[^/@]*:[^@]+@|\b(?:ssl)?password=", re.IGNORECASE)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What every served participant may be told; `server_settings` reads it back."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen; beyond loopback with TLS and a token only"
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--coordinator",
        action="append",
        default=[],
        metavar="URL",
        help="a node that is asked for the outcome of branches in doubt; once per node",
    )
    parser.add_argument(
        "--caller-token-file", type=Path, help="holds the bearer token that callers must show; more lines: older ones"
    )
    parser.add_argument("--coordinator-token-file", type=Path, help="holds the bearer token shown to coordinators")
    parser.add_argument("--certificate", type=Path, help="serve https with this certificate")
    parser.add_argument("--key", type=Path, help="the certificate's private key")
    parser.add_argument("--client-ca", type=Path, help="callers with a certificate of this issuer need no token")
    parser.add_argument("--coordinator-ca", type=Path, help="who issues the coordinators' certificates")


def add_postgres_arguments(parser: argparse.ArgumentParser) -> None:
    """Which PostgreSQL database; `read_dsn` reads the first two back."""
    _add_dsn(parser, "postgresql")
    parser.add_argument("--db-schema", default="public", help="where the two tables of branches are")
    parser.add_argument("--accept-unsafe", action="store_true", help="serve a server with fsync off too, for tests")


def add_mariadb_arguments(parser: argparse.ArgumentParser) -> None:
    """Which MariaDB database; `read_dsn` reads the first two back."""
    _add_dsn(parser, "mariadb")
    parser.add_argument(
        "--leave-alone", action="append", default=[], metavar="TABLE", help="no operation changes it: of any engine"
    )
    parser.add_argument(
        "--accept-unsafe", action="store_true", help="serve a server that forgets in a crash, for tests"
    )


def _add_dsn(parser: argparse.ArgumentParser, scheme: str) -> None:
    parser.add_argument("--dsn-file", type=Path, help=f"holds {scheme}://user:password@host/database")
    parser.add_argument("--dsn", help=f"the same, without a password, which everybody would see; or {DSN_VARIABLE}")


def server_settings(arguments: argparse.Namespace) -> ServerSettings:
    """The settings that `add_server_arguments` asked for. Raises `SettingsError`, and `OSError` for a token file."""
    caller_tokens = read_tokens(arguments.caller_token_file)
    coordinator_tokens = read_tokens(arguments.coordinator_token_file)
    return ServerSettings(
        coordinators=tuple(arguments.coordinator),
        caller_token=next(iter(caller_tokens), None),
        older_caller_tokens=tuple(caller_tokens[1:]),
        coordinator_token=next(iter(coordinator_tokens), None),
        certificate=arguments.certificate,
        key=arguments.key,
        client_ca=arguments.client_ca,
        coordinator_ca=arguments.coordinator_ca,
    )


def read_tokens(file: Path | None) -> list[str]:
    """The tokens in a file, one a line, the newest first; none without a file. Raises `SettingsError`, `OSError`."""
    if file is None:
        return []
    if file.stat().st_mode & 0o007:
        raise SettingsError(f"every user of this machine can read {file}; do `chmod 600 {file}`")
    try:
        lines = [line.strip() for line in file.read_text("ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise SettingsError(f"{file} must hold printable ASCII") from None  # the cause holds the text
    if not lines:
        raise SettingsError(f"{file} holds no token")
    return lines


def read_dsn(dsn: str | None, file: Path | None) -> str:
    """Where a database is: from the command line, a file, or the environment. Raises `SettingsError`, `OSError`.

    A password on the command line is refused: every user of the machine can read that.
    """
    if dsn is not None and file is not None:
        raise SettingsError("give --dsn or --dsn-file, not both")
    if dsn is not None:
        if _PASSWORD.search(dsn) is not None:
            raise SettingsError("a password in --dsn can be seen by every user of this machine: use --dsn-file")
        return dsn
    if file is not None:
        if file.stat().st_mode & 0o007:
            raise SettingsError(f"every user of this machine can read {file}; do `chmod 600 {file}`")
        found = file.read_text(errors="replace").strip()
        if not found or len(found.splitlines()) > 1:
            raise SettingsError(f"{file} must hold one line, such as postgresql://user:password@host:5432/database")
        return found
    found = os.environ.get(DSN_VARIABLE, "")
    if not found:
        raise SettingsError(f"which database? Name it with --dsn-file, with --dsn, or in {DSN_VARIABLE}")
    return found


def serve_or_explain(manager: ResourceManager, arguments: argparse.Namespace) -> int:
    """Serves `manager` as `arguments` say until SIGTERM; the exit status.

    What its owner can put right is explained in one line; anything else is a defect, and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run(manager, host=arguments.host, port=arguments.port, settings=server_settings(arguments))
    except (AlreadyOpen, SchemaUnfit, SettingsError, Unavailable, Unfit, OSError, apsw.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
