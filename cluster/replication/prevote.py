"""Asking first: would a majority vote for this node, if it campaigned?

A campaign that fails does harm all the same: it begins a new term, and a leader that hears of that steps down. A node
that comes back from a partition or a long pause would so depose a healthy leader. Hence it polls the others before it
campaigns, and nothing changes anywhere until a majority has said yes. Whoever is asked says yes only if it could vote
for the asker (its log is not older, the term would be a new one), and has no leader itself: none that it is connected
to and has heard from within the shortest election timeout. When a leader's process dies, its connections close for
everybody at once, so the poll then costs one exchange of messages.

**A leader is waited for.** A machine that was busy may have kept a healthy leader's heartbeats from being sent, or
read. So a poll is closed when all that are connected have answered, or after `poll_s`; a leader answers with a
heartbeat, which ends it. Only a leader that neither answers nor has lost its connection costs that time: a host that
has fallen silent.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class PreVote:
    """The poll of one node, one at a time. `nodes` is how many the cluster has, this one included."""

    nodes: int
    poll_s: float
    term: int | None = None
    """The term that the asker would begin; None: there is no poll."""
    began_s: float = 0.0
    granted: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)

    def begin(self, term: int, now_s: float) -> None:
        """Ask anew; answers to earlier polls are not counted unless they are about the same term."""
        if term != self.term:
            self.granted = set()
        self.answered = set()
        self.term = term
        self.began_s = now_s

    def cancel(self) -> None:
        """A leader has spoken, or the campaign begins."""
        self.term = None
        self.granted = set()
        self.answered = set()

    def note(self, peer: str, term: int, *, granted: bool) -> None:
        """An answer has come."""
        if term != self.term:
            return
        self.answered.add(peer)
        if granted:
            self.granted.add(peer)
        else:
            self.granted.discard(peer)

    def is_due(self, term: int, now_s: float) -> bool:
        """Whether it is time to ask, or to ask again."""
        return term != self.term or now_s - self.began_s >= self.poll_s

    def is_won(self, term: int, now_s: float, connected: AbstractSet[str]) -> bool:
        """Whether to campaign now."""
        if term != self.term or 2 * (len(self.granted & connected) + 1) <= self.nodes:
            return False
        return connected <= self.answered or now_s - self.began_s >= self.poll_s
