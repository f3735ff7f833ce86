"""The log in memory: commands by index, with their terms; lean, and quick to forget at both ends.

A list of (command, index, term) costs three objects per entry beside the command, and forgetting its first hundred
thousand elements moves all others. So commands are kept in chunks of one size, from whose front whole chunks are
dropped; an index is where a command stands; and terms are runs, since a term lasts for thousands of entries.

`Log` adds what else a journal remembers. Its methods are the meaning of a journal's records, for live use and for
replay alike.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

_SHIFT = 10
_CHUNK = 1 << _SHIFT
_MASK = _CHUNK - 1

Entry = tuple[bytes, int, int]
"""Command, index, term."""


class Entries:
    """Entries `first` to `last`, without gaps; none if `last == first - 1`. Indices are checked by the caller."""

    def __init__(self, first: int = 1) -> None:
        self._chunks: list[list[bytes]] = []
        self._skipped = 0
        """How many places of the first chunk lie before `first`: forgotten, or never filled."""
        self._run_starts: list[int] = []
        self._run_terms: list[int] = []
        self.first = first
        self.last = first - 1

    def append(self, command: bytes, term: int) -> None:
        """Add the entry after `last`."""
        chunks = self._chunks
        if not chunks or len(chunks[-1]) == _CHUNK:
            chunks.append([])
        chunks[-1].append(command)
        self.last += 1
        if not self._run_terms or self._run_terms[-1] != term:
            self._run_starts.append(self.last)
            self._run_terms.append(term)

    def command(self, index: int) -> bytes:
        """The command at `index`, between `first` and `last`."""
        place = index - self.first + self._skipped
        return self._chunks[place >> _SHIFT][place & _MASK]

    def term(self, index: int) -> int:
        """The term at `index`, between `first` and `last`."""
        if index >= self._run_starts[-1]:
            return self._run_terms[-1]
        return self._run_terms[bisect_right(self._run_starts, index) - 1]

    def span(self, first: int, end: int) -> list[Entry]:
        """Entries from `first` up to but not including `end`, all of which must be held."""
        found: list[Entry] = []
        while first < end:
            place = first - self.first + self._skipped
            at = place & _MASK
            until = min(end, first + _CHUNK - at)
            run = bisect_right(self._run_starts, first)
            if run < len(self._run_starts):
                until = min(until, self._run_starts[run])
            commands, term = self._chunks[place >> _SHIFT][at : at + until - first], self._run_terms[run - 1]
            found += [(command, index, term) for index, command in enumerate(commands, first)]
            first = until
        return found

    def truncate(self, index: int) -> None:
        """Forget `index` and all after it."""
        if index > self.last:
            return
        if index <= self.first:
            self.restart(index)
            return
        count = index - self.first + self._skipped
        chunk, rest = count >> _SHIFT, count & _MASK
        del self._chunks[chunk + 1 :]
        del self._chunks[chunk][rest:]
        if not rest:
            del self._chunks[chunk]
        self.last = index - 1
        while self._run_starts[-1] >= index:
            del self._run_starts[-1], self._run_terms[-1]

    def restart(self, first: int) -> None:
        """Forget everything; the next entry will be `first`."""
        self._chunks = []
        self._skipped = 0
        self._run_starts = []
        self._run_terms = []
        self.first = first
        self.last = first - 1

    def drop_before(self, index: int) -> list[list[bytes]]:
        """Forget what is before `index` (at most `last`). Whoever lets go of what is returned frees the memory.

        The start of a chunk that is still needed stays in memory.
        """
        if index <= self.first:
            return []
        place = index - self.first + self._skipped
        whole = place >> _SHIFT
        dropped = self._chunks[:whole]
        del self._chunks[:whole]
        self._skipped = place & _MASK
        self.first = index
        run = bisect_right(self._run_starts, index) - 1
        if run > 0:
            del self._run_starts[:run], self._run_terms[:run]
        return dropped


class OutOfTurn(Exception):
    """This does not follow what the log holds."""


class State(NamedTuple):
    """What a journal remembers beside its entries. The log is empty if `last < base`.

    (A named tuple, because one is made for every batch that is written.)
    """

    base: int = 1
    """The first entry of the log."""
    last: int = 0
    """The last one."""
    term: int = 0
    vote: str | None = None
    commit: int = 0
    """Up to here entries were known to be committed, and are in the journal. A hint: more may be."""


class Log:
    """Entries, the base from which on they are the log, and the node's term and vote."""

    def __init__(self, state: State) -> None:
        self.entries = Entries(state.last + 1)
        self.base = state.base
        self.term = state.term
        self.vote = state.vote
        self.commit = state.commit

    @property
    def last(self) -> int:
        """The last entry's index; one less than `base` if there are none."""
        return self.entries.last

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`, None where the log has none."""
        return self.entries.term(index) if self.base <= index <= self.entries.last else None

    def state(self) -> State:
        """All but the entries."""
        last = self.entries.last
        return State(self.base, last, self.term, self.vote, min(self.commit, last))

    def append(self, command: bytes, index: int, term: int) -> None:
        """One more entry: the next, or any if the log is empty. Raises `OutOfTurn`."""
        entries = self.entries
        if entries.last < self.base:
            if index != entries.last + 1:
                entries.restart(index)
            self.base = index
        elif index != entries.last + 1:
            raise OutOfTurn(f"entry {index} after entry {entries.last}")
        entries.append(command, term)

    def truncate(self, index: int) -> None:
        """Forget `index` and all after it. Raises `OutOfTurn`."""
        if not self.base <= index <= self.last:
            raise OutOfTurn(f"entries {self.base} to {self.last} truncated at {index}")
        self.entries.truncate(index)

    def move_base(self, index: int) -> None:
        """The log starts at `index` now. What is before it is kept until `forget`. Raises `OutOfTurn`."""
        if not index <= self.last:
            raise OutOfTurn(f"entries {self.base} to {self.last} start at {index}")
        self.base = index

    def reset(self, entries: Sequence[Entry]) -> None:
        """These entries are the log. Raises `OutOfTurn`: there is a gap in them."""
        first = entries[0][1] if entries else self.last + 1
        if [index for _command, index, _term in entries] != list(range(first, first + len(entries))):
            raise OutOfTurn("a gap in the entries of a reset")
        self.base = first
        self.entries.restart(first)
        for command, _index, term in entries:
            self.entries.append(command, term)

    def set_vote(self, term: int, vote: str | None) -> None:
        """The node's term, and whom it voted for in it. Raises `OutOfTurn`: terms do not go back."""
        if term < self.term:
            raise OutOfTurn(f"term {term} after term {self.term}")
        self.term = term
        self.vote = vote

    def forget(self) -> list[list[bytes]]:
        """Let go of what is before the base. Whoever lets go of what is returned frees the memory."""
        return self.entries.drop_before(self.base)
