"""State machine safety: all nodes apply the same entries, and each of them does the same everywhere."""

import zlib
from typing import Any

from tests.simulation.checkers.base import Checker


class SameHistory(Checker):
    name = "same history"

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[int, int, str]] = {}

    def anew(self, world: Any, copy: Any) -> None:
        self._known.clear()

    def applied_index(self, node: str, index: int, term: int, command: bytes, results: Any) -> None:
        did = ",".join(result.verdict.name for result in results) if isinstance(results, list) else "-"
        here = (term, zlib.crc32(command), did)
        known = self._known.setdefault(index, here)
        if known != here:
            self.complain(f"{node} has applied entry {index} as {here}, another node as {known}")

    def at_rest(self, world: Any) -> None:
        states = {name: b"".join(node.ledger.snapshot()()) for name, node in sorted(world.nodes.items())}
        if len(set(states.values())) > 1:
            self.complain(f"ledgers differ at rest: { {name: zlib.crc32(state) for name, state in states.items()} }")
