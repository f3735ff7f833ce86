"""The `outlast` command: what it understands, and what its exit statuses mean.

Each subcommand lives in `cluster/commands/` as a function of the parsed arguments that returns the exit status. Modules
are imported when their command runs: a node does not load the demo, and `--help` loads nothing.

Exit statuses: 0 success; 1 it did not succeed, and one line on stderr says why and what to do; 2 wrong usage or a wrong
configuration; 3 it is not known (yet) whether it succeeded; 130 interrupted before it was done. `outlast doctor` has
its own, for monitoring.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from cluster.process import ProcessTrouble
from coordinator.config import ConfigError

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNKNOWN: Final = 3
INTERRUPTED: Final = 130

DEFAULT_DATA: Final = ".outlast"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Wrong arguments raise `SystemExit`, as argparse has it."""
    arguments = parser().parse_args(argv)
    module, _, function = arguments.run.partition(":")
    run: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f"cluster.commands.{module}"), function)
    try:
        return run(arguments)
    except ConfigError as error:
        return complain(error, USAGE)
    except ProcessTrouble as error:
        return complain(error, FAILED)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def complain(why: object, status: int) -> int:
    """Say on stderr why it did not succeed; `status`."""
    print(f"outlast: {why}", file=sys.stderr)
    return status


def print_json(value: Any) -> None:
    """For programs: one JSON value on stdout."""
    print(json.dumps(value, indent=1), flush=True)


# ------------------------------------------------------------------------------------------------ the command line


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' line breaks, and does not wrap at 24 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def parser() -> argparse.ArgumentParser:
    """Everything that `outlast` understands."""
    root = argparse.ArgumentParser(
        prog="outlast",
        description="Distributed transactions that outlast the coordinator that started them.",
        epilog="Begin with `outlast demo`, or with `outlast up --shop` and the example that it prints.",
        formatter_class=_Formatter,
    )
    root.add_argument("--version", action="version", version=f"outlast {version('outlast')}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    _add_cluster_commands(commands)
    _add_serving_commands(commands)
    _add_tx_commands(commands)
    _add_doctor_command(commands)
    _add_copy_commands(commands)
    _add_certs_command(commands)
    _add_demo_command(commands)
    _add_chaos_command(commands)
    return root


_Commands = argparse._SubParsersAction  # noqa: SLF001  # argparse gives this type no public name


def _command(
    commands: "_Commands[argparse.ArgumentParser]", name: str, run: str, text: str, *examples: str
) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None
    command = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog, formatter_class=_Formatter
    )
    command.set_defaults(run=run)
    return command


def _data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", type=Path, default=Path(DEFAULT_DATA), metavar="DIR", help="the local cluster's folder (%(default)s)"
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="answer for programs: JSON on stdout")


def _add_cluster_commands(commands: "_Commands[argparse.ArgumentParser]") -> None:
    up = _command(
        commands,
        "up",
        "local:up",
        "start a local cluster, and stay until Ctrl-C",
        "outlast up --shop                   three nodes and the example services",
        "outlast up --detach --port 7400     return once there is a leader; `outlast down` ends it",
    )
    _data(up)
    up.add_argument("--nodes", type=_odd, metavar="N", help="how many; odd (3; 1 has no replication)")
    up.add_argument("--port", type=_port, metavar="BASE", help="ports from BASE on, instead of free ones")
    up.add_argument("--detach", action="store_true", help="return once there is a leader, and leave it running")
    up.add_argument(
        "--tls", action="store_true", help="with an authority, certificates and a token of its own, in DIR/tls"
    )
    up.add_argument("--shop", action="store_true", help="also start and register inventory, payments and orders")
    _json(up)

    status = _command(
        commands,
        "status",
        "local:status",
        "show who runs and who leads; exit status 0 when there is a leader",
        "outlast status",
        "outlast status --json | jq .leader",
    )
    status.add_argument(
        "--wait", type=_seconds, default=2.0, metavar="S", help="seconds to wait for a leader (%(default)g)"
    )
    _data(status)
    _json(status)

    kill = _command(
        commands,
        "kill",
        "local:kill",
        "kill -9 one process of the local cluster",
        "outlast kill leader",
        "outlast kill n2",
        "outlast kill inventory              a service that `outlast up --shop` started",
    )
    kill.add_argument("name", metavar="leader|NAME", help="the node that leads, or a node or service by name")
    _data(kill)
    _json(kill)

    start = _command(
        commands,
        "start",
        "local:start",
        "start a killed process again, on its data; returns once it listens",
        "outlast start n2",
        "outlast start n2 --rejoin    its data is lost",
    )
    start.add_argument("name", metavar="NAME", help="a node or service")
    _rejoin(start)
    _data(start)
    _json(start)

    down = _command(commands, "down", "local:down", "stop the local cluster; its data stays", "outlast down")
    _data(down)
    _json(down)


def _rejoin(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rejoin",
        action="store_true",
        help="a node whose disk is lost: come back empty, and be caught up",
    )


def _add_serving_commands(commands: "_Commands[argparse.ArgumentParser]") -> None:
    node = _command(
        commands,
        "node",
        "serve:node",
        "run one node until SIGTERM",
        "outlast node --config n1.toml",
        "outlast node --config n1.toml --rejoin    its disk is lost",
    )
    node.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's TOML file")
    _rejoin(node)

    participant = _command(
        commands,
        "participant",
        "serve:participant",
        "serve one participant until SIGTERM",
        "outlast participant sqlite --operations shop.stock:operations --file stock.db --port 7501 \\",
        "    --coordinator http://127.0.0.1:7400 --name stock --register http://127.0.0.1:7400",
        "outlast participant postgres --operations shop.stock:operations --dsn-file stock.dsn --port 7501 \\",
        "    --coordinator http://127.0.0.1:7400 --name stock --register http://127.0.0.1:7400",
        "outlast participant null --port 7502",
    )
    participant.add_argument(
        "kind", choices=("sqlite", "postgres", "mariadb", "null"), help="what holds the data; null holds nothing"
    )
    participant.add_argument(
        "--operations",
        metavar="MODULE:NAME",
        help="all but null: the Operations that payloads may name, such as mypackage.stock:operations",
    )
    participant.add_argument(
        "--dsn-file",
        type=Path,
        metavar="FILE",
        help="holds postgresql://user:password@host/database, or mariadb://...",
    )
    participant.add_argument("--dsn", help="the same, without a password, which everybody would see; or OUTLAST_DSN")
    participant.add_argument("--db-schema", metavar="NAME", help="postgres: where the two tables of branches are")
    participant.add_argument(
        "--accept-unsafe", action="store_true", help="serve a database that may forget in a crash too, for tests"
    )
    participant.add_argument(
        "--leave-alone",
        action="append",
        default=[],
        metavar="TABLE",
        help="mariadb: no operation changes it, so it may be of any engine; once per table",
    )
    participant.add_argument("--file", type=Path, metavar="FILE", help="sqlite: the database")
    participant.add_argument("--schema", type=Path, metavar="FILE", help="sqlite: SQL run when the database is new")
    participant.add_argument(
        "--host", default="127.0.0.1", help="where to listen (%(default)s); beyond loopback with TLS and a token only"
    )
    participant.add_argument("--port", type=_port_or_any, default=0, help="0: a free one")
    participant.add_argument(
        "--coordinator",
        action="append",
        default=[],
        metavar="URL",
        help="a node that is asked about branches in doubt; once per node, and no other node is believed",
    )
    participant.add_argument(
        "--register", action="append", default=[], metavar="URL", help="make it known to the cluster of this node"
    )
    participant.add_argument("--name", help="under which to register it")
    for option, text in (
        ("--token-file", "holds the bearer token to show to nodes"),
        ("--ca", "who issued the nodes' certificates, for https"),
        ("--certificate", "serve https with this certificate"),
        ("--key", "the certificate's private key"),
        ("--client-ca", "nodes with a certificate of this issuer need no token"),
        ("--caller-token-file", "holds the bearer token that nodes must show"),
    ):
        participant.add_argument(option, type=Path, metavar="FILE", help=text)


def _add_tx_commands(commands: "_Commands[argparse.ArgumentParser]") -> None:
    tx = commands.add_parser(
        "tx",
        help="submit, show, list and abort transactions, and resolve branches by hand",
        description="Submit, show, list and abort transactions, and resolve branches by hand.",
    )
    actions = tx.add_subparsers(metavar="ACTION", required=True)

    submit = _command(
        actions,
        "submit",
        "tx:submit",
        "submit a transaction; exit status 0 when it committed",
        """outlast tx submit --branch inventory='{"op":"reserve","sku":"tea","quantity":1}' \\""",
        """    --branch payments='{"op":"charge","account":"ann","amount_cents":450}'""",
        "outlast tx submit --file body.json --wait ended",
    )
    submit.add_argument(
        "--branch",
        action="append",
        default=[],
        metavar="PARTICIPANT=JSON",
        help="a participant and the payload of its branch; once per branch",
    )
    submit.add_argument("--file", metavar="FILE", help="the whole body as JSON; - reads stdin")
    submit.add_argument("--wait", choices=("none", "decided", "ended"), help="how far to wait (decided)")
    submit.add_argument("--timeout", type=_seconds, metavar="S", help="seconds until an undecided one is aborted (10)")
    submit.add_argument("--key", help="idempotency key: the same key never begins a second transaction")
    submit.add_argument("--protocol", help="how to commit (2pc)")

    show = _command(actions, "show", "tx:show", "show one transaction", "outlast tx show local-abcd-2-17")
    show.add_argument("gid")
    show.add_argument("--wait", choices=("none", "decided", "ended"), help="wait until it is that far")

    listing = _command(
        actions,
        "list",
        "tx:listing",
        "list transactions, newest first",
        "outlast tx list --state committing",
    )
    listing.add_argument(
        "--state", choices=("active", "preparing", "committing", "aborting", "committed", "aborted"), help="only those"
    )
    listing.add_argument(
        "--heuristic", action="store_true", help="only those that a participant contradicts, or an operator resolved"
    )
    listing.add_argument("--limit", type=_positive, default=20, help="at most so many (%(default)s)")
    listing.add_argument("--after", metavar="GID", help="go on after this one")

    abort = _command(
        actions,
        "abort",
        "tx:abort",
        "ask for an abort; exit status 0 when it is aborted",
        "outlast tx abort local-abcd-2-17",
    )
    abort.add_argument("gid")

    resolve = _command(
        actions,
        "resolve",
        "tx:resolve",
        "record that a branch of a decided transaction is ended by hand",
        "outlast tx resolve local-abcd-2-17 --branch payments --abort --note 'disk lost, restored from Monday'",
        "outlast tx resolve local-abcd-2-17 --branch payments --commit --tell",
    )
    resolve.add_argument("gid")
    resolve.add_argument("--branch", required=True, metavar="NAME", help="which one")
    how = resolve.add_mutually_exclusive_group(required=True)
    how.add_argument("--commit", dest="outcome", action="store_const", const="commit", help="it is committed")
    how.add_argument("--abort", dest="outcome", action="store_const", const="abort", help="it is rolled back")
    resolve.add_argument("--note", metavar="TEXT", help="why; it stays with the transaction")
    resolve.add_argument("--tell", action="store_true", help="then ask the participant to do it, too")
    resolve.add_argument(
        "--participant-token-file", type=Path, metavar="FILE", help="holds the bearer token to show to the participant"
    )
    resolve.add_argument(
        "--participant-ca", type=Path, metavar="FILE", help="who issued the participant's certificate, for https"
    )
    acknowledge = _command(
        actions,
        "acknowledge",
        "tx:acknowledge",
        "record that what was resolved by hand is seen to: it may be forgotten",
        "outlast tx acknowledge local-abcd-2-17",
    )
    acknowledge.add_argument("gid")
    for command in (submit, show, listing, abort, resolve, acknowledge):
        _nodes(command)


def _nodes(command: argparse.ArgumentParser) -> None:
    """Whom to ask, and how."""
    command.add_argument("--url", action="append", default=[], help="a node; else those of --data are asked")
    command.add_argument("--token-file", type=Path, metavar="FILE", help="holds the bearer token to show")
    command.add_argument("--ca", type=Path, metavar="FILE", help="who issued the nodes' certificates, for https")
    _data(command)
    _json(command)


def _add_doctor_command(commands: "_Commands[argparse.ArgumentParser]") -> None:
    doctor = _command(
        commands,
        "doctor",
        "doctor:doctor",
        "look at a cluster, its participants and their databases, and say what is to be done",
        "outlast doctor --postgres stock.dsn",
        "outlast doctor --url http://127.0.0.1:7400 --postgres env:STOCK_DSN --prepared-limit 30 --json",
        "exit status: 0 well, 1 warnings, 2 critical, 3 not all of it could be looked at",
    )
    doctor.add_argument(
        "--postgres",
        action="append",
        default=[],
        metavar="FILE",
        help="holds the DSN of a PostgreSQL to look into; or env:VARIABLE; once per server",
    )
    doctor.add_argument("--mariadb", action="append", default=[], metavar="FILE", help="the same of a MariaDB")
    doctor.add_argument(
        "--prepared-limit",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="how long a branch may be prepared, or a transaction take (%(default)g)",
    )
    doctor.add_argument(
        "--participant-token-file", type=Path, metavar="FILE", help="holds the bearer token to show to participants"
    )
    doctor.add_argument(
        "--participant-ca", type=Path, metavar="FILE", help="who issued the participants' certificates, for https"
    )
    _nodes(doctor)


def _add_copy_commands(commands: "_Commands[argparse.ArgumentParser]") -> None:
    backup = _command(
        commands,
        "backup",
        "copies:backup",
        "copy all that a running cluster remembers into one file",
        "outlast backup monday.outlast",
        "outlast backup --verify monday.outlast      whether a copy is whole, and what it is of",
    )
    backup.add_argument("file", type=Path, metavar="FILE", help="must not be there yet")
    recover = _command(
        commands,
        "recover",
        "recover:recover",
        "most disks are lost: say what is left, and make a new cluster of it",
        "outlast recover                     only looks",
        "outlast recover --force",
    )
    recover.add_argument("--force", action="store_true", help="do it; old folders are renamed, nothing is deleted")
    recover.add_argument(
        "--config", type=Path, metavar="FILE", help="one node's TOML file, on its machine, instead of a local cluster"
    )
    recover.add_argument(
        "--wait", type=_seconds, default=60.0, metavar="S", help="seconds to wait until all is found out (%(default)g)"
    )
    _data(recover)
    _json(recover)
    restore = _command(
        commands,
        "restore",
        "copies:restore",
        "put a copy into a new cluster of the same name, and ask participants what was lost",
        "outlast restore monday.outlast",
        "outlast restore --status            how far asking the participants is",
    )
    restore.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a copy that `outlast backup` has made")
    restore.add_argument("--status", action="store_true", help="only say how far asking the participants is")
    restore.add_argument("--without", metavar="NAME", help="a participant that is gone for good: do not wait for it")
    restore.add_argument(
        "--above-epoch", type=_positive, default=0, metavar="N", help="if a participant has heard from epoch N"
    )
    restore.add_argument(
        "--wait", type=_seconds, default=60.0, metavar="S", help="seconds to wait until all is found out (%(default)g)"
    )
    _nodes(restore)
    backup.add_argument("--verify", action="store_true", help="read a copy that is there; no cluster is asked")
    _nodes(backup)


def _add_certs_command(commands: "_Commands[argparse.ArgumentParser]") -> None:
    certs = _command(
        commands,
        "certs",
        "certs:certs",
        "make a cluster's own authority and certificates, and say what to put where",
        "outlast certs tls --cluster shop --node n1=host1,10.0.0.1 --node n2=host2 --node n3=host3",
        "outlast certs tls --add-node n4=host4",
        "outlast certs tls --client ann --participant inventory=stock.example.com",
        "outlast certs tls --node n1=host1,10.0.0.1 --renew      replaces n1.pem and n1.key",
    )
    certs.add_argument("folder", type=Path, metavar="DIR", help="holds the authority, or will; keep it off the nodes")
    certs.add_argument("--cluster", metavar="NAME", help="whose authority; needed to make one")
    for option, metavar, text in (
        ("--node", "ID=HOST,...", "a node, and where it is reached"),
        ("--add-node", "ID=HOST,...", "the same, of an authority that must be there"),
        ("--client", "NAME", "a client that shows it instead of the token"),
        ("--participant", "NAME=HOST,...", "a participant's server, and where it is reached"),
    ):
        certs.add_argument(option, action="append", default=[], metavar=metavar, help=text)
    certs.add_argument("--days", type=_positive, default=825, metavar="N", help="until they expire (%(default)s)")
    certs.add_argument("--renew", action="store_true", help="replace certificates and keys that are there")
    _json(certs)


def _add_demo_command(commands: "_Commands[argparse.ArgumentParser]") -> None:
    demo = _command(
        commands,
        "demo",
        "demo:demo",
        "watch checkouts survive kill -9 of the leader, twice; about 30 s",
        "outlast demo",
        "outlast demo --participants mixed",
        "outlast demo --seconds 10 --no-contrast --json",
    )
    demo.add_argument("--seconds", type=_seconds, default=14.0, help="of checkouts (%(default)g)")
    demo.add_argument("--rate", type=_seconds, default=30.0, metavar="N", help="checkouts per second (%(default)g)")
    demo.add_argument(
        "--participants",
        choices=("sqlite", "postgres", "mariadb", "mixed"),
        default="sqlite",
        help="where the shop's databases are: in files, on a server that is started for it, or one of each",
    )
    demo.add_argument("--no-contrast", action="store_true", help="leave out the same crash without replication")
    demo.add_argument("--keep", action="store_true", help="keep the folder with data and logs, and say where it is")
    _json(demo)


def _add_chaos_command(commands: "_Commands[argparse.ArgumentParser]") -> None:
    chaos = _command(
        commands,
        "chaos",
        "chaos:chaos",
        "put a cluster of its own through everything that can fail, and judge it",
        "outlast chaos --minutes 2 --seed 7",
        "outlast chaos --minutes 10 --faults kill,pause,cut --report monday",
    )
    chaos.add_argument(
        "--minutes", type=_seconds, default=2.0, metavar="N", help="of load and faults, at most 30 (%(default)g)"
    )
    chaos.add_argument(
        "--seed",
        type=_positive,
        default=1,
        metavar="N",
        help="what happens when, and what clients ask for (%(default)s)",
    )
    chaos.add_argument(
        "--faults",
        default="kill,lose,pause,cut,slow,disk,clock",
        metavar="KINDS",
        help="some of %(default)s, which is all of them; docs/CHAOS.md says what they are",
    )
    chaos.add_argument(
        "--rate", type=_seconds, default=20.0, metavar="N", help="orders per second, at the most (%(default)g)"
    )
    chaos.add_argument(
        "--report", type=Path, metavar="DIR", help="an empty or new folder for history and report, to keep"
    )
    _json(chaos)


# ------------------------------------------------------------------------------------------------ words and numbers


def _port(text: str) -> int:
    port = _port_or_any(text)
    if port < 1024:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 1024 to 65535")
    return port


def _port_or_any(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return int(text)


def _odd(text: str) -> int:
    number = _positive(text)
    if number % 2 == 0 or number > 9:
        raise argparse.ArgumentTypeError(f"{text} is not an odd number from 1 to 9")
    return number


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text[:9])


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from error
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
