"""`python -m coordinator --config FILE`: runs one node. The one place that names concrete classes."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import uvloop

from cluster.replication.clock import Clock, SystemClock
from cluster.replication.log import CannotStart, OnFatal, ReplicatedLog
from cluster.replication.raft_journal import file_journal
from cluster.replication.raft_log import RaftLog
from cluster.replication.settings import RaftSettings
from cluster.replication.solo import SoloLog
from cluster.replication.transport import SocketTransport
from coordinator.config import ConfigError, NodeConfig, split_address
from coordinator.descriptors import make_room
from coordinator.generation import claim, identity
from coordinator.node import Node
from coordinator.tls import Tls, identifier

_log = logging.getLogger("coordinator")

_GARBAGE: Final = 20_000
"""Objects more than before, that the garbage collector looks for cycles among; 700, as it comes, are a few transactions
in flight, and hardly anything here is a cycle."""


def run(config: NodeConfig, *, rejoin: bool = False, clock: Clock | None = None) -> int:
    """Run the node until SIGTERM or SIGINT. Exit status: 0 after a graceful stop, 1 when it could not go on.

    rejoin: its disk is lost, and it comes back empty. clock: None: the system's. Raises `ConfigError` when a
    certificate or key will not do. SIGHUP reads them anew.
    """
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    gc.set_threshold(_GARBAGE)
    limits = replace(config.limits, max_connections=make_room(config.limits.max_connections))
    config = replace(config, limits=limits)
    return uvloop.run(_serve(config, Tls.load(config), clock or SystemClock(), rejoin=rejoin))


async def _serve(config: NodeConfig, tls: Tls, clock: Clock, *, rejoin: bool) -> int:
    over = asyncio.Event()
    fatal: list[BaseException] = []

    def stop(error: BaseException | None = None) -> None:
        if error is not None:
            fatal.append(error)
        over.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if config.tls is not None or tls.participants is not None:
        loop.add_signal_handler(signal.SIGHUP, _reload, tls)
    if rejoin and len(config.nodes) == 1:
        _log.critical("node %s cannot start: --rejoin is for one of several, and there is no other", config.node)
        return 1
    try:
        config.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        _log.critical("node %s cannot start: %s cannot be made: %s", config.node, config.data, error.strerror)
        return 1
    node = Node(config, _make_log(config, stop, tls, rejoin=rejoin), clock, tls=tls)
    try:
        claim(config)
        await node.start()
    except (OSError, CannotStart) as error:
        await node.abandon()
        _log.critical("node %s cannot start: %s", config.node, error)
        return 1
    await over.wait()
    if fatal:
        # What this node holds in memory cannot be trusted any more; the others take over from what is on disk.
        _log.critical("node %s stops: %s", config.node, fatal[0])
        return 1
    _log.info("node %s is stopping", config.node)
    await node.stop()
    return 0


def _reload(tls: Tls) -> None:
    """Certificates have been replaced. A wrong file changes nothing: what was good is still shown."""
    try:
        tls.reload()
    except ConfigError as error:
        _log.error("the certificates stay as they were: %s", error)  # the text says it all
    else:
        _log.info("certificates and keys are read anew")


def _make_log(config: NodeConfig, on_fatal: OnFatal, tls: Tls, *, rejoin: bool) -> ReplicatedLog:
    """Raft among several nodes; one node alone has a durable log and nobody to take over from it."""
    folder = config.data / "log"
    if len(config.nodes) == 1:
        return SoloLog(
            folder,
            config.node,
            max_command_bytes=2 * config.limits.max_command_bytes,
            on_fatal=on_fatal,
            understands=config.compatibility.announced,
        )
    transport = SocketTransport(
        node=config.node,
        addresses={peer.id: split_address(peer.raft, "raft") for peer in config.nodes},
        cluster=identity(config),
        secret=config.secret.encode(),
        ssl_server=tls.raft_server,
        ssl_client=tls.raft_client,
        identify=None if tls.raft_server is None else identifier(config.cluster),
    )
    return RaftLog(
        node=config.node,
        peers=[peer.id for peer in config.nodes if peer.id != config.node],
        transport=transport,
        journal=file_journal(folder),
        settings=RaftSettings(
            proposal_timeout_s=config.timing.proposal_timeout_s,
            # A command is filled up to max_command_bytes, counted in round figures; one entry alone may reach that.
            max_command_bytes=2 * config.limits.max_command_bytes,
            snapshot_log_bytes=config.limits.compact_log_bytes,
        ),
        on_fatal=on_fatal,
        understands=config.compatibility.announced,
        rejoin=rejoin,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python -m coordinator`."""
    parser = argparse.ArgumentParser(prog="python -m coordinator", description="Run one node of an Outlast cluster.")
    parser.add_argument("--config", type=Path, required=True, help="the node's TOML file")
    parser.add_argument("--rejoin", action="store_true", help="its disk is lost: come back empty, and join again")
    parsed = parser.parse_args(arguments)
    try:
        return run(NodeConfig.load(parsed.config), rejoin=parsed.rejoin)
    except ConfigError as error:
        print(f"outlast: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
