"""`outlast doctor`: looks at a cluster, its participants and their databases, and says what is to be done."""

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cluster.calls import Caller
from cluster.cli import complain, print_json
from cluster.commands.tx import Usage, is_base, participant_access, read_token
from cluster.doctor import cluster, mariadb, participants, postgres
from cluster.doctor.findings import Finding, Report, Status, Unseen, date, lasting
from cluster.layout import read_running
from cluster.process import ProcessTrouble
from coordinator.config import ConfigError
from coordinator.protocol.messages import Gid

_SHOWN: Final = 20
_Kind = Any
"""A module that looks into one kind of database: `look`, `gids` and `judge`."""


def doctor(arguments: argparse.Namespace) -> int:
    """Look, judge, say; the exit status is the worst that was found."""
    try:
        report = asyncio.run(_examine(arguments))
    except (Usage, ConfigError, ProcessTrouble) as error:
        # Not the statuses of other commands: monitoring would take them for warnings.
        return complain(error, Status.NOT_SEEN)
    if arguments.json:
        print_json(report.to_json())
    else:
        _show(report)
    return int(report.status)


async def _examine(arguments: argparse.Namespace) -> Report:
    report = Report()
    urls, token_file, ca = _nodes(arguments, report)
    servers: list[tuple[_Kind, str, str]] = [
        (postgres, f"PostgreSQL {name}", _dsn(name)) for name in arguments.postgres
    ]
    servers += [(mariadb, f"MariaDB {name}", _dsn(name)) for name in arguments.mariadb]
    participant_token_file, participant_ca = participant_access(arguments)
    token, participant_token = read_token(token_file), read_token(participant_token_file)
    async with Caller(urls, token=token, ca=ca) as caller:
        facts, databases = await asyncio.gather(
            cluster.look(caller), asyncio.gather(*(kind.look(where, dsn) for kind, where, dsn in servers))
        )
        served = await participants.look(facts.participants or (), token=participant_token, ca=participant_ca)
        looked = [(kind, found) for (kind, _, _), found in zip(servers, databases, strict=True)]
        gids = [gid for kind, found in looked for gid in kind.gids(found)]
        gids += [str(row["gid"]) for each in served for row in each.branches or ()]
        known = await cluster.look_up(caller, facts, (gid for gid in gids if _cluster_of(gid) == facts.name))
    limit_s = arguments.prepared_limit
    if urls:
        cluster.judge(facts, report, limit_s=limit_s)
    for kind, found in looked:
        kind.judge(found, report, cluster=facts.name, known=known, limit_s=limit_s)
    told = len(report.findings)
    for server in served:
        participants.judge(server, report, cluster=facts.name, known=known, limit_s=limit_s)
    # What a database has told of a branch says more than what its participant does.
    branches = {_branch(each) for each in report.findings[:told]} - {None}
    report.findings[told:] = [each for each in report.findings[told:] if _branch(each) not in branches]
    return report


def _cluster_of(text: str) -> str | None:
    gid = Gid.parse(text)
    return None if gid is None else gid.cluster


def _branch(finding: Finding) -> tuple[str, ...] | None:
    return finding.about[:2] if finding.code.startswith("prepared_") else None


def _nodes(arguments: argparse.Namespace, report: Report) -> tuple[Sequence[str], Path | None, Path | None]:
    """All nodes, those that do not run included; none is a part that was not seen. Raises `Usage`."""
    if arguments.url:
        for url in arguments.url:
            if not is_base(url):
                raise Usage(f"--url {url} is not a node's URL, such as http://127.0.0.1:7400")
        return list(arguments.url), arguments.token_file, arguments.ca
    running = read_running(arguments.data)
    if running is None:
        why = f"there is no cluster in {arguments.data}; name its --data, or a node with --url"
        report.unseen.append(Unseen(where="cluster", why=why))
        return (), arguments.token_file, arguments.ca
    token_file = arguments.token_file or (Path(running.token_file) if running.token_file is not None else None)
    ca = arguments.ca or (Path(running.ca) if running.ca is not None else None)
    return [row.url for row in running.nodes], token_file, ca


def _dsn(name: str) -> str:
    """From a file, or a variable of the environment; never from the command line, which everybody can see."""
    if name.startswith("env:"):
        found = os.environ.get(name.removeprefix("env:"))
        if found is None:
            raise Usage(f"{name}: there is no such variable in the environment")
        return found.strip()
    if "://" in name:
        raise Usage(
            "name a file that holds the DSN, or env:VARIABLE: a DSN on the command line can be seen by everybody"
        )
    try:
        return Path(name).read_text().strip()
    except OSError as error:
        raise Usage(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise Usage(f"{name} holds no DSN") from None  # the cause holds what is in the file


# ------------------------------------------------------------------------------------------------ saying it


def _show(report: Report) -> None:
    for finding in report.sorted():
        since = f", since {date(finding.since)}" if finding.since is not None else ""
        print(f"{finding.severity.upper()}  {finding.where}{since}  [{finding.code}]")
        print(f"  {finding.what}")
        print(f"  do: {finding.todo}")
    for unseen in report.unseen:
        print(f"NOT SEEN  {unseen.where}: {unseen.why}")
    if report.in_flight:
        more = "+" if report.more_in_flight else ""
        print(f"in flight: {len(report.in_flight)}{more}")
        for flight in sorted(report.in_flight, key=lambda each: -each.age_s)[:_SHOWN]:
            print(f"  {flight.gid}  {flight.state} for {lasting(flight.age_s)}: {'; '.join(flight.why)}")
        if len(report.in_flight) > _SHOWN:
            print(f"  and {len(report.in_flight) - _SHOWN} younger ones (--json shows all)")
    if report.restart is not None:
        print(f"would a coordinator's restart help? {'yes' if report.restart.helps else 'no'}: {report.restart.why}")
    print(f"seen: {', '.join(report.seen) or 'nothing'}")
    print(f"{report.status.name.lower().replace('_', ' ')} (exit status {int(report.status)})")
