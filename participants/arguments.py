"""What every command that serves a participant takes from its command line."""

import argparse
import logging
import sys
from pathlib import Path

import apsw

from participants.manager import ResourceManager
from participants.record_file import AlreadyOpen
from participants.server import run
from participants.settings import ServerSettings, SettingsError
from participants.sqlite import SchemaUnfit


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


def serve_or_explain(manager: ResourceManager, arguments: argparse.Namespace) -> int:
    """Serves `manager` as `arguments` say until SIGTERM; the exit status.

    What its owner can put right is explained in one line; anything else is a defect, and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run(manager, host=arguments.host, port=arguments.port, settings=server_settings(arguments))
    except (AlreadyOpen, SchemaUnfit, SettingsError, OSError, apsw.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
