"""`outlast node` and `outlast participant`: one server process each, until SIGTERM."""

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.calls import Caller, Unreachable
from cluster.cli import FAILED, OK, USAGE, complain
from cluster.process import ProcessTrouble
from cluster.service import register
from coordinator.config import NodeConfig, valid_name

if TYPE_CHECKING:
    from participants.operations import Operations
    from participants.prepared import PreparedManager
    from participants.sqlite import SqliteManager

_PATIENCE_S: Final = 10.0


class _Usage(Exception):
    """The arguments do not add up to a participant."""


def node(arguments: argparse.Namespace) -> int:
    """Run one node."""
    from coordinator.__main__ import run

    return run(NodeConfig.load(arguments.config), rejoin=arguments.rejoin)


def participant(arguments: argparse.Namespace) -> int:
    """Serve one participant."""
    import uvloop

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        _check(arguments)
        return uvloop.run(_participant(arguments))
    except _Usage as error:
        return complain(error, USAGE)


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.register) != bool(arguments.name):
        raise _Usage("--register and --name go together: a participant is registered under a name")
    if arguments.name is not None and not valid_name(arguments.name):
        raise _Usage(f"--name {arguments.name}: a name is lower-case letters, digits and inner hyphens, letter first")
    if arguments.kind == "sqlite" and not (arguments.operations and arguments.file):
        raise _Usage("sqlite needs --operations MODULE:NAME and --file FILE")
    if arguments.kind == "null" and (arguments.operations or arguments.file or arguments.schema):
        raise _Usage("null holds nothing: --operations, --file and --schema are for sqlite")
    served = arguments.kind in ("postgres", "mariadb")
    if not served and (arguments.dsn or arguments.dsn_file or arguments.accept_unsafe):
        raise _Usage("--dsn, --dsn-file and --accept-unsafe are for postgres and mariadb")
    if served and (arguments.file or arguments.schema or not arguments.operations):
        raise _Usage(f"{arguments.kind} needs --operations MODULE:NAME and its DSN; --file and --schema are for sqlite")
    if arguments.kind != "postgres" and arguments.db_schema:
        raise _Usage("--db-schema is for postgres")
    if arguments.kind != "mariadb" and arguments.leave_alone:
        raise _Usage("--leave-alone is for mariadb")


async def _participant(arguments: argparse.Namespace) -> int:
    from participants.arguments import read_tokens
    from participants.manager import ResourceManager
    from participants.null import NullManager
    from participants.server import start
    from participants.settings import ServerSettings, SettingsError

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        tokens, caller_tokens = read_tokens(arguments.token_file), read_tokens(arguments.caller_token_file)
        token = next(iter(tokens), None)
        nodes = arguments.coordinator
        if not nodes and arguments.register:
            nodes = await _nodes_of(arguments.register, token, arguments.ca)
        settings = ServerSettings(
            coordinators=tuple(nodes),
            coordinator_token=token,
            coordinator_ca=arguments.ca,
            caller_token=next(iter(caller_tokens), None),
            older_caller_tokens=tuple(caller_tokens[1:]),
            certificate=arguments.certificate,
            key=arguments.key,
            client_ca=arguments.client_ca,
        )
    except SettingsError as error:
        raise _Usage(str(error)) from error
    except OSError as error:
        raise _Usage(f"{error.filename} cannot be read: {error.strerror}") from error
    manager: ResourceManager
    if arguments.kind == "null":
        manager = NullManager()
    else:
        manager = _sqlite(arguments) if arguments.kind == "sqlite" else _database(arguments)
    try:
        served = await start(manager, host=arguments.host, port=arguments.port, settings=settings)
    except SettingsError as error:
        raise _Usage(str(error)) from error
    except OSError as error:
        return complain(f"port {arguments.port} cannot be listened on: {error.strerror}; choose another --port", FAILED)
    except Exception as error:  # noqa: BLE001  # what a database can be unfit for is the resource manager's to say
        return complain(f"{arguments.file or arguments.kind} cannot be served: {error}", FAILED)
    if arguments.certificate is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, served.reload)
    try:
        print(f"listening on {served.url}", flush=True)
        if arguments.register:
            await register(
                arguments.register,
                arguments.name,
                served.url,
                batch=True,
                within_s=_PATIENCE_S,
                token=token,
                ca=arguments.ca,
            )
            print(f"registered as {arguments.name}", flush=True)
        if not nodes:
            print("nobody is asked about branches in doubt: name the nodes with --coordinator", file=sys.stderr)
        await stop.wait()
    finally:
        await served.stop()
    return OK


async def _nodes_of(urls: Sequence[str], token: str | None, ca: Path | None) -> list[str]:
    """All nodes of the cluster that it is registered with: whoever is trusted to register is trusted with outcomes."""
    async with Caller(urls, token=token, ca=ca) as caller:
        try:
            answer = await caller.anywhere("GET", "/v1/cluster", within_s=_PATIENCE_S)
        except Unreachable as error:
            raise ProcessTrouble(f"{error}; --register names a node of a running cluster") from error
    try:
        return [str(row["url"]) for row in answer.body["nodes"]]
    except (TypeError, KeyError) as error:
        raise ProcessTrouble(f"{urls[0]} does not answer like a node; --register names one") from error


def _sqlite(arguments: argparse.Namespace) -> "SqliteManager":
    from participants.sqlite import SqliteManager

    operations = _operations(arguments.operations)
    try:
        schema = "" if arguments.schema is None else arguments.schema.read_text()
    except OSError as error:
        raise _Usage(f"{arguments.schema} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _Usage(f"{arguments.schema} holds no text: {error}") from error
    file: Path = arguments.file
    if not file.parent.is_dir():
        raise _Usage(f"{file.parent}, where {file.name} would be, is not a folder")
    return SqliteManager(file, operations, schema=schema)


def _database(arguments: argparse.Namespace) -> "PreparedManager":
    from participants.arguments import read_dsn
    from participants.mariadb import MariaDbManager
    from participants.postgres import PostgresManager
    from participants.prepared import Unfit
    from participants.settings import SettingsError

    unsafe = arguments.accept_unsafe
    try:
        dsn, operations = read_dsn(arguments.dsn, arguments.dsn_file), _operations(arguments.operations)
        if arguments.kind == "mariadb":
            return MariaDbManager(dsn, operations, left_alone=arguments.leave_alone, accept_unsafe=unsafe)
        return PostgresManager(dsn, operations, schema=arguments.db_schema or "public", accept_unsafe=unsafe)
    except (SettingsError, Unfit) as error:
        raise _Usage(str(error)) from error
    except OSError as error:
        raise _Usage(f"{error.filename} cannot be read: {error.strerror}") from error


def _operations(where: str) -> "Operations":
    """The registry that the user's module holds. The current folder is searched too, as `python -m` would."""
    from participants.operations import Operations

    module, colon, name = where.partition(":")
    if not module or not colon or not name:
        raise _Usage(f"--operations {where} is not MODULE:NAME, such as mypackage.stock:operations")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise _Usage(
            f"--operations {where}: {error}; it is searched in the current folder and on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise _Usage(f"--operations {where}: {error}") from error
    if not isinstance(found, Operations):
        raise _Usage(f"--operations {where} is a {type(found).__name__}, not participants.operations.Operations")
    return found
