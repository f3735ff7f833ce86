"""Log matching: entries with one index and term are the same, and so is all before them."""

import zlib
from typing import Any

from tests.simulation.checkers.base import Checker


class LogMatching(Checker):
    """By induction: the same entry, and an entry of the same term before it."""

    name = "log matching"

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[int, int], tuple[int, int | None]] = {}

    def anew(self, world: Any, copy: Any) -> None:
        self._known.clear()

    def appended(self, node: str, index: int, term: int, previous_term: int | None, command: bytes) -> None:
        here = (zlib.crc32(command), previous_term)
        known = self._known.setdefault((index, term), here)
        if known != here:
            self.complain(f"entry {index} of term {term} differs on {node}: {here}, elsewhere {known}")
