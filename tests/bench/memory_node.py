"""One node on the log in memory: the same code without replication and without a disk, to measure the rest by."""

import argparse
import asyncio
import logging
import signal
from pathlib import Path

import uvloop

from cluster.replication.clock import SystemClock
from cluster.replication.memory import MemoryLog
from coordinator.config import NodeConfig, Peer
from coordinator.node import Node


async def _serve(port: int) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    me = Peer(id="n1", api=f"127.0.0.1:{port}", raft=f"127.0.0.1:{port - 1}")
    config = NodeConfig(cluster="memory", node="n1", data=Path(), nodes=(me,), secret="of no use on one node")
    node = Node(config, MemoryLog(), SystemClock())
    await node.start()
    await over.wait()
    await node.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    logging.basicConfig(level=logging.WARNING)
    uvloop.run(_serve(parser.parse_args().port))
