"""Leader completeness: what is committed is in the log of every later leader."""

from typing import Any

from tests.simulation.checkers.base import Checker


class LeaderCompleteness(Checker):
    name = "leader completeness"

    def __init__(self) -> None:
        super().__init__()
        self._committed: dict[int, int] = {}
        """The term of each entry that somebody has applied."""
        self._last = 0
        self._era: dict[int, int] = {}
        """The highest term that anybody led when it was first applied: it may have been committed no sooner."""
        self._highest = 0

    def anew(self, world: Any, copy: Any) -> None:
        self._committed.clear()
        self._last = self._highest = 0
        self._era.clear()

    def applied_index(self, node: str, index: int, term: int, command: bytes, results: Any) -> None:
        self._committed[index] = term
        self._era.setdefault(index, self._highest)
        self._last = max(self._last, index)

    def leads(self, node: str, life: int, term: int, journal: Any) -> None:
        self._highest = max(self._highest, term)
        for index in range(max(journal.first_index, 2), self._last + 1):
            wanted = self._committed.get(index)
            if wanted is not None and term > self._era[index] and journal.term_at(index) != wanted:
                self.complain(
                    f"{node} leads term {term} with entry {index} of term {journal.term_at(index)}; "
                    f"it is committed in term {wanted}"
                )
                return
