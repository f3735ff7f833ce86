"""How a node comes to count: its standing is told to its peers, changed when it may be, and stored before it is used.

`standing.py` has the rules, and why they are enough. Here is what they take to be followed: messages (each connection
begins with one), an entry of the log for each node that joins, and a file that must be durable before anything relies
on what it says.
"""

import asyncio
import logging
import math
from dataclasses import replace
from typing import Protocol

from cluster.replication.clock import Clock
from cluster.replication.disk import NO_ROOM
from cluster.replication.guard import Message
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.settings import RaftSettings
from cluster.replication.standing import Marker, Standing, StandingRefused, store

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """Whom a `Membership` works for."""

    def reachable(self) -> frozenset[str]:
        """Ids of the other nodes that this one is connected to."""
        ...

    def say(self, peer: str, message: Message) -> None:
        """Send this message to `peer`; it may be lost."""
        ...

    def abstain(self) -> None:
        """Vote for nobody in this term."""
        ...

    def append_joined(self, node: str, nonce: bytes) -> None:
        """As leader: let the log say that this node was there with that nonce."""
        ...

    def counts_now(self, *, founded: bool) -> None:
        """This node is a voter from now on; founded: of a cluster that begins, and has no leader to wait for."""
        ...

    def failed(self, error: BaseException) -> None:
        """The node must stop."""
        ...


class Membership:
    """One node's way to be a voter, and its part in that of others. Belongs to the event loop's thread."""

    def __init__(
        self, *, node: str, standing: Standing, journal: RaftJournal, owner: Owner, settings: RaftSettings, clock: Clock
    ) -> None:
        self._node = node
        self._standing = standing
        self._journal = journal
        self._owner = owner
        self._settings = settings
        self._clock = clock
        self._voter_from: int | None = None
        """It may be a voter once the journal is durable up to this position; None: it may not."""
        self._next_keep_s = 0.0
        self._next_word_s = 0.0
        self._joined_said_s: dict[tuple[str, bytes], float] = {}
        """By node and nonce: when this node, leading, let the log say so."""
        self._over = False
        self.task: asyncio.Task[None] | None = None
        """What is being stored."""

    # What is said.

    def say(self, peer: str) -> None:
        """Tell this peer of this node's standing."""
        self._owner.say(peer, self._standing.say(peer, history=self._journal.has_history))

    def heard(self, peer: str, message: Message) -> None:
        """A peer's standing."""
        standing = self._standing
        if standing.hear(peer, message):
            self.say(peer)
        if standing.is_refused_by(message):
            self._owner.failed(
                StandingRefused(
                    f"{self._node} was a member of this cluster, as {peer} knows, and its log is not in "
                    f"{self._journal.disk.where()}. If its disk is really lost, start it with --rejoin (`outlast start "
                    f"{self._node} --rejoin`); else put the right folder in place. Nothing of what was there has been "
                    "changed"
                )
            )
            return
        self.found()
        self.keep()

    def _say_to_all(self) -> None:
        for peer in sorted(self._owner.reachable()):
            self.say(peer)

    # What makes a voter.

    def found(self) -> None:
        """Be a voter of a cluster that begins, if this is that moment."""
        reachable, history = self._owner.reachable(), self._journal.has_history
        if self._voter_from is None and self._standing.may_found(reachable, history=history):
            self._voter_from = self._journal.position
            self.keep()

    def joined(self, node: str, nonce: bytes) -> None:
        """The log says that this node was there with that nonce, and that is committed."""
        if self._voter_from is None and self._standing.admits(node, nonce):
            self._owner.abstain()
            self._voter_from = self._journal.position
        elif node == self._node and self._standing.is_voter:
            # Its leader has not heard that it is one already.
            self._say_to_all()

    def admit(self, now_s: float) -> None:
        """As leader: let those join who came without a log, and say so again for as long as they are not in."""
        if self._journal.full is not None:
            return
        said, self._joined_said_s = self._joined_said_s, {}
        for peer, nonce in self._standing.joiners():
            said_s = said.get((peer, nonce), -math.inf)
            if now_s - said_s >= self._settings.leader_fallback_s:
                said_s = now_s
                self._owner.append_joined(peer, nonce)
            self._joined_said_s[peer, nonce] = said_s

    def ask_again(self, now_s: float) -> None:
        """Who does not count says so again every while."""
        if not self._standing.is_voter and now_s >= self._next_word_s:
            # Who leads now may not know; and the word may have been overtaken by one that was older.
            self._next_word_s = now_s + self._settings.leader_fallback_s
            self._say_to_all()

    # What is stored.

    def keep(self) -> None:
        """Store what has changed, and rely on it when it is durable."""
        marker = self._standing.marker
        if marker.voter and marker.known == self._standing.known:
            return  # nearly always
        if self._over or self.task is not None or self._clock.monotonic_s() < self._next_keep_s:
            return
        voter = marker.voter or (self._voter_from is not None and self._voter_from <= self._journal.durable_position)
        known = frozenset(self._standing.known)
        if (voter, known) == (marker.voter, marker.known):
            return
        wanted = replace(marker, known=known)
        if voter:
            wanted = Marker(node=self._node, voter=True, known=known)
        self.task = asyncio.get_running_loop().create_task(self._keep(wanted))
        self.task.add_done_callback(self._kept)

    async def _keep(self, wanted: Marker) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, store, self._journal.disk, wanted)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _log.error("%s: no room to note this node's standing: %s", self._node, error)
            self._next_keep_s = self._clock.monotonic_s() + self._settings.snapshot_retry_s
            return
        is_new = wanted.voter and not self._standing.is_voter
        self._standing.marker = wanted
        if is_new and not self._over:
            _log.warning("%s: this node counts from now on", self._node)
            self._say_to_all()
            self._owner.counts_now(founded=not self._journal.has_history)

    def _kept(self, task: asyncio.Task[None]) -> None:
        self.task = None
        error = task.exception()
        if error is not None:
            self._owner.failed(error)

    def end(self) -> None:
        """Store nothing more, and say nothing; what is under way is done."""
        self._over = True
