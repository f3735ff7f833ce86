"""`outlast recover`: a majority of the disks is lost, and a cluster is made anew from what is left."""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from cluster.calls import Unreachable
from cluster.cli import FAILED, OK, UNKNOWN, complain, print_json
from cluster.commands.copies import found_out, put_back, read_copy, status_lines
from cluster.local import LocalCluster
from cluster.process import ProcessTrouble
from cluster.recovery import Remains, choose, copy_name, examine, note_generation, save_copy, set_aside
from coordinator.config import NodeConfig
from coordinator.copies import CopyHeader

_MAY_BE_LOST = (
    "what came after that is not known here; the participants will be asked. A commit that nobody has carried out yet "
    "may become an abort, although a client was told of it; transactions that are over everywhere are forgotten, and "
    "so are their idempotency keys (docs/RECOVERY.md)"
)


def recover(arguments: argparse.Namespace) -> int:
    """Say what is left, or go on from it."""
    if arguments.config is not None:
        return _recover_one(arguments)
    return asyncio.run(_recover_local(arguments))


def _say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.json:
        print(line, flush=True)


def _report(remains: list[Remains], chosen: Remains) -> dict[str, Any]:
    return {
        "cluster": chosen.config.cluster,
        "from": chosen.config.node,
        "nodes": {
            each.config.node: {
                "trouble": each.trouble,
                "committed": None if each.log is None else each.log.committed,
                "last": None if each.log is None else each.log.last,
                "epoch": None if each.ledger is None else each.ledger.epoch,
                "transactions": None if each.ledger is None else len(each.ledger),
                "undecided": each.undecided,
            }
            for each in remains
        },
    }


def _tell(arguments: argparse.Namespace, remains: list[Remains], chosen: Remains) -> None:
    for each in remains:
        _say(arguments, each.describe())
    _say(arguments, f"to go on from: {chosen.config.node}. {_MAY_BE_LOST[0].upper()}{_MAY_BE_LOST[1:]}")


def _only_said(arguments: argparse.Namespace, report: dict[str, Any]) -> int:
    if arguments.json:
        print_json(report)
    return complain("nothing was changed; with --force a new cluster is made of it", FAILED)


# ------------------------------------------------------------------------------------------------ on this machine


async def _recover_local(arguments: argparse.Namespace) -> int:
    cluster = LocalCluster.open(arguments.data)
    if cluster.running:
        raise ProcessTrouble(
            f"{', '.join(cluster.running)} runs; recovering is for a cluster that is down: `outlast kill` them, or, if "
            "they are a majority, let the others come back with --rejoin"
        )
    configs = cluster.configs
    if len(configs) == 1:
        raise ProcessTrouble("one node alone has nobody to be recovered from; start it, or restore a backup")
    remains = [examine(config) for config in configs]
    chosen = choose(remains, len(configs))
    _tell(arguments, remains, chosen)
    report = _report(remains, chosen)
    if not arguments.force:
        return _only_said(arguments, report)
    now_ms = time.time_ns() // 1_000_000
    file = copy_name(arguments.data, now_ms)
    save_copy(chosen, file, now_ms=now_ms)
    header, size = read_copy(file)
    _say(arguments, f"kept in {file}: {header.transactions} transactions, {header.undecided} undecided")
    generation = max(config.generation for config in configs) + 1
    for config in configs:
        note_generation(arguments.data / config.node / "node.toml", generation)
    for config in configs:
        aside = set_aside(config)
        if aside is not None:
            _say(arguments, f"{config.node}: {config.data} is {aside.name} now")
    leader = await cluster.start_rest()
    _say(arguments, f"generation {generation} of {cluster.name} runs; {leader.node} leads")
    report |= {"copy": str(file), "generation": generation}
    return await _restore(arguments, cluster, file, header, size, report)


async def _restore(
    arguments: argparse.Namespace,
    cluster: LocalCluster,
    file: Path,
    header: CopyHeader,
    size: int,
    report: dict[str, Any],
) -> int:
    again = f"the cluster runs empty; `outlast restore {file} --data {arguments.data}` does the rest"
    async with cluster.caller() as caller:
        try:
            answer = await put_back(caller, file, size)
        except Unreachable as error:
            return complain(f"the copy may not have got in ({error}); {again}", UNKNOWN)
        if answer.status != 200:
            return complain(f"{answer.trouble}; {again}", FAILED)
        _say(arguments, f"restored {header.transactions} transactions; asking the participants what was lost ...")
        found = await found_out(caller, arguments.wait)
    if arguments.json:
        print_json({**report, "reconciliation": found})
    for line in status_lines(found):
        _say(arguments, line)
    if found["open"]:
        names = ", ".join(found["waiting_for"]) or "its participants"
        return complain(
            f"the cluster works, and not all is found out yet: {names} must answer. It goes on by itself; look with "
            f"`outlast restore --status --data {arguments.data}`",
            UNKNOWN,
        )
    return OK


# ------------------------------------------------------------------------------------------------ by hand


def _recover_one(arguments: argparse.Namespace) -> int:
    """The node of one TOML file, on its machine; what is to be done on the others is said."""
    config = NodeConfig.load(arguments.config)
    remains = examine(config)
    chosen = choose([remains], len(config.nodes))
    _tell(arguments, [remains], chosen)
    report = _report([remains], chosen)
    if not arguments.force:
        return _only_said(arguments, report)
    now_ms = time.time_ns() // 1_000_000
    file = copy_name(config.data.absolute().parent, now_ms)
    save_copy(chosen, file, now_ms=now_ms)
    header, _size = read_copy(file)
    aside = set_aside(config)
    generation = config.generation + 1
    nodes = ", ".join(peer.id for peer in config.nodes)
    steps = [
        f"In the TOML files of all nodes ({nodes}) say: generation = {generation}",
        "On every other machine: stop the node, and rename its data folder, if there still is one; delete nothing",
        "Start every node, with an empty data folder; a new cluster begins when all are there",
        f"outlast restore {file} --url {config.me.url}",
    ]
    if arguments.json:
        print_json({**report, "copy": str(file), "generation": generation, "aside": str(aside), "steps": steps})
        return OK
    print(f"kept in {file}: {header.transactions} transactions, {header.undecided} undecided")
    print(f"{config.data} is {aside.name if aside else 'gone'} now. What is left to do:")
    for number, step in enumerate(steps, start=1):
        print(f"  {number}. {step}")
    return OK
