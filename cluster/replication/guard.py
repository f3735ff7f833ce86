"""What stands between the wire and pysyncobj, so that no acknowledged command is lost.

pysyncobj departs from Raft in a few places. Each is harmless until messages overtake a failure; then commands that a
majority had acknowledged are gone, or commands are applied that nobody committed. A `Guard` looks at every message
first, and gives pysyncobj only what it treats as Raft would.

**A follower truncates where nothing conflicts.** Raft deletes entries only where they differ from the leader's.
pysyncobj deletes all that follows the message's previous entry, and then appends what the message brings. A message
that repeats older entries, or that brings none at all, so shortens the log below what the follower has acknowledged.
When the leader dies before it has sent the rest again, a majority no longer holds what it acknowledged. *So:* entries
that the log holds already, with the same index and term, are taken out of the message, and its previous entry moves
past them. What is left either extends the log, or conflicts and may truncate. If nothing is left, the message keeps
only what a heartbeat says (term, leader, commit index), and the answer is what the follower was asked to confirm:
that it holds the log up to the last entry of the message. Nothing is said about what may follow it: that may be
another leader's.

**A commit index covers what was compared, and no more.** For the same reason such a message commits only up to its
last entry. And a message without a previous entry (a piece of a snapshot) compares nothing, so it commits nothing:
pysyncobj would raise the commit index over a tail that the leader never saw.

**An acknowledgement carries no term.** One that was sent to a leader and arrives when the same node leads a later
term speaks of entries that may have been replaced since. *So:* the envelope of each message says its sender's term,
and an acknowledgement of another term is not counted. Nor is one for entries that the leader does not have.

**Where logs differ, it goes back by one entry per message**, and what was sent meanwhile is denied with an index that
is higher again, so that a long tail of another leader's is never overcome. *So:* the denial names the first entry of
the term that does not match.

**Votes are counted, not collected.** A vote that arrives twice counts twice, and two such nodes lead one term. *So:*
voters are a set, one per term.

One thing a follower is never to do, whoever asks: replace an entry that it knows to be committed. If it is asked to,
logs have diverged, and `LogDiverged` stops the node, because each further step would spread the damage.

Nothing here does I/O or reads a clock, and all that is known of the node comes through `LogView`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]
"""One message of Raft, as pysyncobj spells it: `type`, and the fields of that type."""


class LogDiverged(Exception):
    """A leader asks to replace what this node knows to be committed. The node must stop."""


class LogView(Protocol):
    """What the guard may know of this node."""

    @property
    def term(self) -> int:
        """Its current term."""
        ...

    @property
    def commit_index(self) -> int:
        """The last entry that it knows to be committed."""
        ...

    @property
    def last_index(self) -> int:
        """The last entry of its log."""
        ...

    def term_at(self, index: int) -> int | None:
        """The term of its entry at `index`, None where it has none."""
        ...


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What to do with an `append_entries`. (One is made for each; to freeze it would take most of the time.)"""

    message: Message
    """What pysyncobj is given in its place."""

    confirmed_index: int | None = None
    """Answer success up to here after that: pysyncobj will not answer this message itself."""

    wanted_index: int | None = None
    """Answer after that that the log does not match, and what is wanted begins here. Both None: pysyncobj answers."""


class Guard:
    """All four guards. Keeps only who voted in the current election."""

    def __init__(self) -> None:
        self._election = 0
        self._voters: set[str] = set()

    def append(self, message: Message, view: LogView) -> Verdict:
        """Judge an `append_entries`. Raises `LogDiverged`."""
        if message["term"] < view.term:
            return Verdict(message=message)  # of a leader that was; it is ignored, and must not be answered
        if "prevLogIdx" not in message:
            return Verdict(message=message | {"commit_index": min(message["commit_index"], view.commit_index)})
        previous, previous_term = message["prevLogIdx"], message["prevLogTerm"]
        own_term = view.term_at(previous)
        if own_term != previous_term:
            if own_term is not None and previous <= view.commit_index:
                raise LogDiverged(
                    f"entry {previous} is committed here in term {own_term}, "
                    f"but the leader of term {message['term']} has it in term {previous_term}"
                )
            if own_term is None:
                return Verdict(message=message)  # pysyncobj says where its log ends
            return Verdict(message=_heartbeat(message, view.commit_index), wanted_index=_first_in_doubt(previous, view))
        entries = message["entries"]
        held = 0
        for _command, index, term in entries:
            if view.term_at(index) != term:
                break
            previous, previous_term = index, term
            held += 1
        if held < len(entries):
            if previous < view.commit_index:
                raise LogDiverged(
                    f"the leader of term {message['term']} replaces entry {previous + 1}, "
                    f"but entries up to {view.commit_index} are committed here"
                )
            if not held:
                return Verdict(message=message)
            rest = {"prevLogIdx": previous, "prevLogTerm": previous_term, "entries": entries[held:]}
            return Verdict(message=message | rest)
        return Verdict(message=_heartbeat(message, previous), confirmed_index=previous)

    def counts_acknowledgement(self, message: Message, sender_term: int, view: LogView) -> bool:
        """Whether a `next_node_idx` is about the log that this leader leads now."""
        return sender_term == view.term and message["next_node_idx"] <= view.last_index + 1

    def counts_vote(self, message: Message, voter: str) -> bool:
        """Whether a `response_vote` is the first of that voter in that term."""
        term = message["term"]
        if term != self._election:
            if term < self._election:
                return False
            self._election = term
            self._voters = set()
        if voter in self._voters:
            return False
        self._voters.add(voter)
        return True


def _heartbeat(message: Message, commit_index_max: int) -> Message:
    """What an `append_entries` says apart from its entries. pysyncobj neither changes its log for it nor answers."""
    commit_index = min(message["commit_index"], commit_index_max)
    return {"type": "append_entries", "term": message["term"], "commit_index": commit_index}


def _first_in_doubt(index: int, view: LogView) -> int:
    """Where the run of entries with the term of the one at `index` begins; what is committed is not in doubt."""
    term = view.term_at(index)
    while index - 1 > view.commit_index and view.term_at(index - 1) == term:
        index -= 1
    return index
