"""The log in memory does what a list would."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.replication import entries as module
from cluster.replication.entries import Entries, Entry


class LikeAList(RuleBasedStateMachine):
    @initialize(first=st.integers(1, 2**50))
    def begin(self, first: int) -> None:
        self.entries = Entries(first)
        self.first = first
        self.model: list[Entry] = []
        self.term = 1

    @rule(count=st.integers(1, 3000), new_term=st.booleans())
    def append(self, count: int, new_term: bool) -> None:
        self.term += new_term
        for _ in range(count):
            index = self.first + len(self.model)
            command = b"%d" % index
            self.entries.append(command, self.term)
            self.model.append((command, index, self.term))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        kept = data.draw(st.integers(0, len(self.model)))
        self.entries.truncate(self.first + kept)
        del self.model[kept:]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        dropped = data.draw(st.integers(0, len(self.model) - 1))
        self.entries.drop_before(self.first + dropped)
        del self.model[:dropped]
        self.first += dropped

    @rule(gap=st.integers(-5, 1000))
    def restart(self, gap: int) -> None:
        self.first = max(1, self.first + len(self.model) + gap)
        self.entries.restart(self.first)
        self.model = []

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.model) - 1))
        end = data.draw(st.integers(place, len(self.model)))
        index = self.first + place
        assert (self.entries.command(index), index, self.entries.term(index)) == self.model[place]
        assert list(self.entries.span(index, self.first + end)) == self.model[place:end]

    @invariant()
    def same(self) -> None:
        if hasattr(self, "model"):
            assert self.entries.first == self.first
            assert self.entries.last == self.first + len(self.model) - 1
            assert list(self.entries.span(self.first, self.first + len(self.model))) == self.model
            assert len(self.entries._run_starts) <= len(self.model) + 1
            assert sum(map(len, self.entries._chunks)) < len(self.model) + module._CHUNK


TestLikeAList = LikeAList.TestCase
TestLikeAList.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_dropping_moves_nothing_else() -> None:
    entries = Entries()
    for _ in range(100_000):
        entries.append(b"", 1)
    kept = entries._chunks[50:]
    entries.drop_before(50 * module._CHUNK + 1)
    assert all(now is before for now, before in zip(entries._chunks, kept, strict=True))
