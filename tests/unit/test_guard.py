"""The guard between the wire and pysyncobj: one test per reason it exists for, and properties over any logs."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replication.guard import Guard, LogDiverged, Message, Verdict

Entry = tuple[bytes, int, int]


@dataclass
class View:
    """A follower's log. Index 1 is the entry that every log begins with."""

    terms: list[int] = field(default_factory=list)
    term: int = 9
    commit_index: int = 1

    @property
    def last_index(self) -> int:
        return 1 + len(self.terms)

    def term_at(self, index: int) -> int | None:
        if index == 1:
            return 0
        return self.terms[index - 2] if 2 <= index <= self.last_index else None


def entries(first: int, *terms: int) -> tuple[Entry, ...]:
    return tuple((b"\0", first + offset, term) for offset, term in enumerate(terms))


def append(
    previous: int, previous_term: int, new: tuple[Entry, ...] = (), *, commit_index: int = 1, term: int = 9
) -> Message:
    return {
        "type": "append_entries",
        "term": term,
        "commit_index": commit_index,
        "prevLogIdx": previous,
        "prevLogTerm": previous_term,
        "entries": new,
    }


def test_new_entries_pass_as_they_are() -> None:
    message = append(2, 3, entries(3, 3, 4))
    assert Guard().append(message, View([3])) == Verdict(message=message)


def test_a_repeated_prefix_truncates_nothing() -> None:
    """The follower holds 2 to 5; a message repeats 2 and 3. As it stands, pysyncobj would delete 4 and 5."""
    verdict = Guard().append(append(1, 0, entries(2, 3, 3), commit_index=5), View([3, 3, 3, 3]))
    assert verdict.confirmed_index == 3
    assert verdict.message == {"type": "append_entries", "term": 9, "commit_index": 3}


def test_a_heartbeat_truncates_nothing_and_confirms_only_what_was_compared() -> None:
    verdict = Guard().append(append(2, 3, commit_index=9), View([3, 3, 3]))
    assert verdict.confirmed_index == 2
    assert verdict.message == {"type": "append_entries", "term": 9, "commit_index": 2}


def test_what_is_held_is_taken_out_of_a_message_that_goes_on() -> None:
    verdict = Guard().append(append(1, 0, entries(2, 3, 3, 4, 4)), View([3, 3]))
    assert verdict.confirmed_index is None
    assert verdict.message["prevLogIdx"] == 3
    assert verdict.message["prevLogTerm"] == 3
    assert verdict.message["entries"] == entries(4, 4, 4)


def test_a_conflict_truncates_from_where_it_begins() -> None:
    verdict = Guard().append(append(1, 0, entries(2, 3, 5, 5)), View([3, 4, 4, 4]))
    assert verdict.message["prevLogIdx"] == 2
    assert verdict.message["entries"] == entries(3, 5, 5)


def test_a_conflict_with_committed_entries_stops_the_node() -> None:
    view = View([3, 4], commit_index=3)
    with pytest.raises(LogDiverged, match="entry 3"):
        Guard().append(append(2, 3, entries(3, 5)), view)
    with pytest.raises(LogDiverged, match="entry 3"):
        Guard().append(append(3, 5), view)


def test_the_word_of_a_former_leader_is_not_answered() -> None:
    message = append(1, 0, entries(2, 3), term=8)
    assert Guard().append(message, View([3, 3])) == Verdict(message=message)


def test_a_log_that_is_too_short_says_so_itself() -> None:
    message = append(7, 3)
    assert Guard().append(message, View([3])) == Verdict(message=message)


def test_a_denial_goes_back_by_a_whole_term_but_not_into_what_is_committed() -> None:
    view = View([3, 4, 4, 4, 4])
    assert Guard().append(append(6, 5), view).wanted_index == 3
    view.commit_index = 4
    verdict = Guard().append(append(6, 5, commit_index=6), view)
    assert verdict.wanted_index == 5
    assert verdict.confirmed_index is None
    assert verdict.message == {"type": "append_entries", "term": 9, "commit_index": 4}


def test_a_message_that_compares_nothing_commits_nothing() -> None:
    message = {"type": "append_entries", "term": 9, "commit_index": 4, "serialized": (b"", True, False)}
    verdict = Guard().append(message, View([3, 3, 3, 3], commit_index=2))
    assert verdict.message == message | {"commit_index": 2}
    assert verdict.confirmed_index is None


@pytest.mark.parametrize(("term", "next_index", "counts"), [(9, 4, True), (8, 4, False), (10, 4, False), (9, 5, False)])
def test_acknowledgements_of_another_term_or_another_log_do_not_count(term: int, next_index: int, counts: bool) -> None:
    message = {"type": "next_node_idx", "next_node_idx": next_index, "reset": False, "success": True}
    assert Guard().counts_acknowledgement(message, term, View([3, 3])) is counts


def test_a_vote_counts_once_per_voter_and_term() -> None:
    guard = Guard()

    def counts(term: int, voter: str) -> bool:
        return guard.counts_vote({"type": "response_vote", "term": term}, voter)

    assert counts(3, "n2")
    assert not counts(3, "n2")
    assert counts(3, "n3")
    assert counts(4, "n2")
    assert not counts(3, "n1")


terms_of_a_log = st.lists(st.integers(1, 4), max_size=8).map(sorted)


@given(terms_of_a_log, terms_of_a_log, st.data())
def test_what_the_guard_passes_leaves_the_log_that_raft_would(
    own: list[int], leaders: list[int], data: st.DataObject
) -> None:
    """Play what pysyncobj does with the verdict, and compare with the rule of the paper."""
    # Two logs of one history agree up to some entry, and never again: the same index and term is the same entry.
    agree = data.draw(st.integers(0, min(len(own), len(leaders))), "agree")
    own = [*leaders[:agree], *(term * 2 for term in own[agree:] if term >= max(leaders[:agree], default=0))]
    leaders = [*leaders[:agree], *(term * 2 + 1 for term in leaders[agree:])]
    previous = data.draw(st.integers(1, 1 + len(leaders)), "previous")
    count = data.draw(st.integers(0, 1 + len(leaders) - previous), "count")
    leader_commit = data.draw(st.integers(1, 1 + len(leaders)), "leader_commit")
    view = View(own, commit_index=data.draw(st.integers(1, 1 + agree), "commit"))
    leader_view = View(leaders)
    previous_term = leader_view.term_at(previous)
    assert previous_term is not None
    new = entries(previous + 1, *leaders[previous - 1 : previous - 1 + count])
    message = append(previous, previous_term, new, commit_index=leader_commit)

    verdict = Guard().append(message, view)
    after, committed, answer = as_pysyncobj(own, view.commit_index, verdict)

    if view.term_at(previous) != previous_term:
        assert after == own
        assert committed == view.commit_index
        assert answer is not None
        success, wanted = answer
        assert not success
        assert view.commit_index < wanted <= previous
        return
    end = previous + count
    conflict = any(view.term_at(index) not in (None, term) for _command, index, term in new)
    if conflict or len(own) + 1 < end:
        assert after == leaders[: end - 1]
    else:
        assert after == own
    assert committed == max(view.commit_index, min(leader_commit, end))
    assert answer == (True, end + 1)


def as_pysyncobj(own: list[int], commit_index: int, verdict: Verdict) -> tuple[list[int], int, tuple[bool, int] | None]:
    """What it makes of a message: its log, its commit index, and its answer (success, next index)."""
    message, log = verdict.message, list(own)
    answer: tuple[bool, int] | None = None
    if "prevLogIdx" in message:
        previous = message["prevLogIdx"]
        term_there = View(log).term_at(previous)
        if term_there is None:
            return log, commit_index, (False, len(log) + 2)
        if term_there != message["prevLogTerm"]:
            return log, commit_index, (False, previous)
        del log[previous - 1 :]
        log += [term for _command, _index, term in message["entries"]]
        answer = (True, previous + 1 + len(message["entries"]))
    if message["commit_index"] > commit_index:
        commit_index = min(message["commit_index"], len(log) + 1)
    if verdict.confirmed_index is not None:
        assert answer is None
        answer = (True, verdict.confirmed_index + 1)
    if verdict.wanted_index is not None:
        assert answer is None
        answer = (False, verdict.wanted_index)
    return log, commit_index, answer
