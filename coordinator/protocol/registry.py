"""Protocols by the name that clients use."""

from collections.abc import Mapping
from typing import Final

from coordinator.protocol.base import CommitProtocol
from coordinator.protocol.two_phase import TwoPhaseCommit

DEFAULT_PROTOCOL: Final = "2pc"

PROTOCOLS: Final[Mapping[str, CommitProtocol]] = {protocol.name: protocol for protocol in (TwoPhaseCommit(),)}
"""Every protocol that this version knows. A log that names another one was written by a newer version."""
