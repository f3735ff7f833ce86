"""Which followers a leader sends what is new at once, and which a little later.

An entry is committed when a majority holds it. Where each follower gets each entry by itself, those beyond a majority
cost as much as all others (a message, a sync and an answer for each command, at both ends), and a commit seldom waits
for them. So the *vanguard* is sent entries at once, as many followers as make a majority with the leader; the rest
*trail*: each `trail_s` they are sent all that has come, in one message. (In Paxos a *thrifty* proposer asks a
bare majority. Moraru, Andersen and Kaminsky, "There Is More Consensus in Egalitarian Parliaments", SOSP 2013.)

Nothing that Raft relies on is touched: when to send is a leader's own business. What it may cost is time. When one of
the vanguard is slow or silent, a commit waits for those that trail, and that is `trail_s` at most: they are sent all
then, and who has not answered by then loses its place to one that has. A follower that answers twice as fast as one of
the vanguard, on the average, takes its place as well, so the near and quick ones are in it.
"""

import math
from collections.abc import Collection, Iterable
from typing import Final

_WEIGHT: Final = 1 / 16
"""Of the newest time, in the average."""
_HOME: Final = 2
"""How much faster a follower must be to take another's place: changes have no use of their own."""


class Vanguard:
    """Of a leader with these followers; among equals those come first that stand first in `ids`."""

    def __init__(self, ids: Iterable[str], trail_s: float) -> None:
        self._ids = tuple(ids)
        self._trail_s = trail_s
        self._size = (len(self._ids) + 1) // 2
        self.begin()

    def begin(self) -> None:
        """A reign begins: nothing is known of anybody."""
        self._answer_s = dict.fromkeys(self._ids, math.inf)
        self._van = frozenset(self._ids[: self._size])
        self._due_s = -math.inf
        self.trailing_due = False
        """Whether it is time for those that trail. Whoever sends to them sets it back."""

    def __contains__(self, id_: str) -> bool:
        return id_ in self._van

    def answered(self, id_: str, after_s: float) -> None:
        """This follower holds what it was sent so long ago, durably."""
        before_s = self._answer_s[id_]
        self._answer_s[id_] = after_s if before_s == math.inf else before_s + _WEIGHT * (after_s - before_s)

    def is_over(self, now_s: float) -> bool:
        """Whether a period of `trail_s` is over. Then the next one begins, and it is time for those that trail."""
        if now_s < self._due_s:
            return False
        self._due_s = now_s + self._trail_s
        self.trailing_due = True
        return True

    def choose(self, able: Collection[str]) -> None:
        """Anew, from those that are able: who counts, is connected, and holds what is older than a period."""

        def rank(id_: str) -> tuple[bool, float, bool]:
            is_new = id_ not in self._van
            return id_ not in able, self._answer_s[id_] * (_HOME if is_new else 1), is_new

        self._van = frozenset(sorted(self._ids, key=rank)[: self._size])
