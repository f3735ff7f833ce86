"""`outlast node` and `outlast participant`: one server process each, until SIGTERM."""

import argparse

from coordinator.config import NodeConfig


def node(arguments: argparse.Namespace) -> int:
    """Run one node."""
    from coordinator.__main__ import run

    return run(NodeConfig.load(arguments.config))
