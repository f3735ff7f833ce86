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
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; loopback only")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--coordinator",
        action="append",
        default=[],
        metavar="URL",
        help="a node that is asked for the outcome of branches in doubt; once per node",
    )
    parser.add_argument("--caller-token-file", type=Path, help="holds the bearer token that callers must show")
    parser.add_argument("--coordinator-token-file", type=Path, help="holds the bearer token shown to coordinators")


def server_settings(arguments: argparse.Namespace) -> ServerSettings:
    """The settings that `add_server_arguments` asked for. Raises `SettingsError`, and `OSError` for a token file."""

    def token(path: Path | None) -> str | None:
        return None if path is None else path.read_text().strip()

    return ServerSettings(
        coordinators=tuple(arguments.coordinator),
        caller_token=token(arguments.caller_token_file),
        coordinator_token=token(arguments.coordinator_token_file),
    )


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
