"""A `ReplicatedLog` over pysyncobj: Raft's elections, terms and log are its, all around them is ours.

This is the only file that imports pysyncobj, and it leans on the insides of one exact version; a test fails loudly
when they change. What we put in the place of its own:

| of pysyncobj | here |
|---|---|
| its thread and poller | the event loop: a *turn* when a message or a proposal has arrived, and on a timer |
| its transport (pickle) | `Transport`, by way of `_Adapter` |
| its journal's creation | a property, so that its constructor finds the journal we were given |
| sending entries | `Replica` sends when nothing is outstanding to a follower, and then all that has come since |
| counting who holds what | `Replica` commits what a majority holds, without looking at every entry |
| its commands (pickled calls) | opaque bytes: `_applyCommand(bytes, callback, REGULAR)`, applied by the state machine |
| forwarding commands to the leader | refused: a proposal off the leader is `NotProposed` |
| its snapshots | ours (`snapshot.py`), taken by size, handed over piece by piece (`catch_up.py`) |

**A turn**: commit what a majority holds; one tick of pysyncobj's (campaign if the deadline has passed, apply, take
what was proposed into the log); then we send. Messages are handled as they arrive, turns are coalesced with
`call_soon`. Nothing in a turn runs code of others except `StateMachine.apply`: proposers hear through futures,
`on_leadership` through `call_soon`.

**After a stall** (the loop stood still, or the machine did) what peers have said meanwhile waits in the sockets.
Judging the election deadline before reading it would depose a healthy leader, so a late turn lets the loop read
first.

**Whoever loses leadership** answers its open proposals at the end of the same turn: by then all that is known to be
committed has been applied, and what never entered the log has been refused; nobody knows about the rest.

**A node that came without a log** takes no part in elections and counts for nothing until it has joined
(`standing.py`).
"""

import asyncio
import logging
import math
import operator
import queue
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from pysyncobj import syncobj as stock
from pysyncobj.config import FAIL_REASON, SERIALIZER_STATE, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport as StockTransport

from cluster.replication.catch_up import CatchUp
from cluster.replication.clock import Clock, SystemClock
from cluster.replication.disk import NO_ROOM
from cluster.replication.guard import Guard, Message
from cluster.replication.holdback import ACKNOWLEDGEMENT, HoldBack
from cluster.replication.journal import JournalHandlers
from cluster.replication.log import CannotStart, Leadership, NotProposed, OnFatal, ProposalUnknown, StateMachine
from cluster.replication.prevote import PreVote
from cluster.replication.raft_journal import JournalFactory, RaftJournal
from cluster.replication.settings import RaftSettings
from cluster.replication.snapshot import NOTHING_COMMAND, Snapshot, Snapshots, recover
from cluster.replication.standing import NONCE_BYTES, Marker, Standing, StandingRefused, at_start, store
from cluster.replication.transport import Handlers, Transport

_log = logging.getLogger(__name__)

_REGULAR: Final = 0
_NO_OP: Final = 1
_JOINED: Final = 4
"""Beyond those of pysyncobj, none of which but the first two we use. Older software passes over it."""

_OF_LEADERS: Final = frozenset({"append_entries", "snapshot_piece"})
_OF_VOTERS: Final = frozenset({"request_vote", "timeout_now"})
_POLLS: Final = frozenset({"pre_vote", "pre_vote_answer"})

_READS_BEFORE_A_LATE_TURN = 2
"""Turns of the event loop: the first may run before the sockets are polled, the second cannot."""

_NOT_IN_THE_LOG = frozenset({FAIL_REASON.QUEUE_FULL, FAIL_REASON.MISSING_LEADER, FAIL_REASON.REQUEST_DENIED})


def _ignored(owner: object, made: object) -> None:
    """The setter of a property in whose place a constructor of pysyncobj puts something of its own."""
    del owner, made


class _Peer(Node):  # type: ignore[misc] # pysyncobj has no types
    """A node of the cluster. Its rank is its place among all ids, and its hash: sets of nodes then have one order."""

    def __init__(self, node: str, rank: int) -> None:
        super().__init__(node, rank=rank)

    __eq__ = Node.__eq__

    def __hash__(self) -> int:
        rank: int = self.rank
        return rank


class _Adapter(StockTransport):  # type: ignore[misc] # pysyncobj has no types
    """Our transport, as pysyncobj sends by it. What arrives goes to `Replica.receive`, with its sender's term."""

    def __init__(self, held: HoldBack) -> None:
        super().__init__(None, None, ())
        self._held = held

    def send(self, node: Node, message: Message) -> bool:
        return self._held.send(node.id, message)


class _NoSnapshots:
    """In the place of pysyncobj's serializer: it takes no snapshots and sends none. `CatchUp` and `RaftLog` do."""

    def checkSerializing(self) -> tuple[int, None]:
        return SERIALIZER_STATE.NOT_SERIALIZING, None

    def serialize(self, data: object, id_: object) -> None:
        raise NotImplementedError("its own snapshots are never taken")

    def deserialize(self) -> object:
        raise NotImplementedError("its own snapshots are never loaded")

    def getTransmissionData(self, transmission: object) -> None:
        del transmission

    def setTransmissionData(self, data: object) -> bool:
        del data
        _log.error("refused a piece of a snapshot")
        return False

    def cancelTransmisstion(self, transmission: object) -> None:
        pass


class _NobodyHolds(dict[Any, int]):
    """In the place of pysyncobj's table of what followers hold, while it ticks."""

    def __missing__(self, node: object) -> int:
        return 0


class _NoPoller:
    """In the place of pysyncobj's poller: the event loop polls."""

    def poll(self, timeout: float) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outstanding:
    """Entries that were sent to a follower, and whose answer has not come."""

    previous: int
    """The entry before them."""
    last: int
    since_s: float


class Replica(stock.SyncObj):  # type: ignore[misc] # pysyncobj has no types
    """pysyncobj's node, guarded, and with our way of sending and applying. Itself a `LogView`."""

    _hold_back_type = HoldBack

    def __init__(
        self,
        *,
        node: _Peer,
        peers: list[_Peer],
        transport: Transport,
        journal: RaftJournal,
        guard: Guard,
        apply: Callable[[bytes], object],
        settings: RaftSettings,
        standing: Standing,
        joined: Callable[[str, bytes], None],
    ) -> None:
        self._journal = journal
        self._wire = transport
        self._standing = standing
        self._joined = joined
        self._guard = guard
        self._apply = apply
        self._settings = settings
        self._peers = peers
        self._outstanding: dict[str, _Outstanding] = {}
        self._told_commit: dict[str, int] = {}
        self._idle = False
        self._heard_s = -math.inf
        """When a leader last spoke."""
        self._patient_until_s: float | None = None
        """With much to apply, it leaves it to others to campaign until then; None: it has not come to that."""
        self._prevote = PreVote(nodes=len(peers) + 1, poll_s=settings.poll_s)
        self.applied_bytes = 0
        """Of commands, since somebody set it to 0."""
        self._by_majority = 0
        """Up to here this leader has found that a majority holds its log durably."""
        self.held = self._hold_back_type(journal=journal, term=lambda: self.term, send=self._say)
        minimum_s = settings.election_min_s + node.rank * settings.election_step_s
        conf = SyncObjConf(
            autoTick=False,
            appendEntriesPeriod=settings.heartbeat_s,
            raftMinTimeout=minimum_s,
            raftMaxTimeout=minimum_s + settings.election_spread_s,
            connectionTimeout=minimum_s + settings.election_spread_s,  # its own transport's; it checks the relation
            leaderFallbackTimeout=settings.leader_fallback_s,
            # A proposal made without a leader would otherwise be applied seconds later under another one.
            commandsWaitLeader=False,
            commandsQueueSize=settings.proposals_max,
            dynamicMembershipChange=False,
            # Batching here means: taking a command into the log does not send it. `send_eagerly` does.
            appendEntriesUseBatch=True,
            # Above it commands would go in pieces, which lose their last byte and are not on our wire.
            appendEntriesBatchSizeBytes=settings.max_command_bytes * 4,
            logCompactionMinEntries=2**62,
            logCompactionMinTime=2**62,
            useFork=False,
        )
        super().__init__(node, peers, conf=conf, nodeClass=_Peer, transport=_Adapter(self.held))
        self._SyncObj__serializer = _NoSnapshots()
        self._poller = _NoPoller()

    _SyncObj__raftElectionDeadline: float
    _SyncObj__raftMatchIndex: dict[Any, int]
    _SyncObj__raftLeader: Any
    _SyncObj__transferInProgress: bool
    _SyncObj__raftLastApplied: int
    _SyncObj__raftCommitIndex: int
    catch_up: CatchUp
    """Set before it is used."""

    # Its constructor makes a journal here, and goes on with what it finds here: ours.
    _SyncObj__raftLog = property(operator.attrgetter("_journal"), _ignored)

    # What the guard may know.

    @property
    def term(self) -> int:
        """Its current term."""
        term: int = self._SyncObj__raftCurrentTerm
        return term

    @property
    def commit_index(self) -> int:
        """The last entry that it knows to be committed."""
        index: int = self._SyncObj__raftCommitIndex
        return index

    @property
    def applied_index(self) -> int:
        """The last entry that it has applied."""
        index: int = self._SyncObj__raftLastApplied
        return index

    @property
    def last_index(self) -> int:
        """The last entry of its log."""
        return self._journal.last_index

    def term_at(self, index: int) -> int | None:
        """The term of its entry at `index`, None where it has none."""
        return self._journal.term_at(index)

    # What arrives.

    def receive(self, sender: _Peer, sender_term: int, message: Message) -> None:
        """Handle one message, as far as the guard lets it. Raises what must stop the node."""
        kind = message["type"]
        if kind in _OF_LEADERS and message["term"] >= self.term:
            self._heard_s = stock.monotonicTime()
            self._patient_until_s = None
            self._prevote.cancel()
        if kind in _OF_VOTERS and not self._standing.is_voter:
            return
        if kind == "append_entries":
            verdict = self._guard.append(message, self)
            self._SyncObj__onMessageReceived(sender, verdict.message)
            if verdict.confirmed_index is not None:
                self._SyncObj__sendNextNodeIdx(sender, nextNodeIdx=verdict.confirmed_index + 1, success=True)
            elif verdict.wanted_index is not None:
                self._SyncObj__sendNextNodeIdx(sender, nextNodeIdx=verdict.wanted_index, reset=True)
        elif kind in _POLLS:
            self._polled(sender, sender_term, message)
        elif kind == "snapshot_piece":
            if message["term"] >= self.term:
                # Its sender leads: that much pysyncobj is told.
                heartbeat = {"type": "append_entries", "term": message["term"], "commit_index": self.commit_index}
                self._SyncObj__onMessageReceived(sender, heartbeat)
                self._catch_up_with(sender, message)
        elif kind == "snapshot_got":
            if self._isLeader() and sender_term == self.term:
                if not self._standing.is_joining(sender.id):
                    self._SyncObj__lastResponseTime[sender] = stock.monotonicTime()
                self.catch_up.got(sender.id, self.term, message)
        elif kind == "progress":
            if self._isLeader() and self._guard.counts_acknowledgement(message, sender_term, self):
                outstanding = self._outstanding.get(sender.id)
                if outstanding is not None and message["next_node_idx"] > outstanding.last:
                    del self._outstanding[sender.id]
        elif kind == "next_node_idx":
            if self._isLeader() and self._guard.counts_acknowledgement(message, sender_term, self):
                self._acknowledged(sender, message)
        elif kind != "response_vote" or self._guard.counts_vote(message, sender.id):
            self._SyncObj__onMessageReceived(sender, message)

    # Polls before campaigns; see `prevote.py`.

    def _polled(self, sender: _Peer, sender_term: int, message: Message) -> None:
        """A question, or an answer."""
        if sender_term > self.term:
            # It will not follow, nor be led by, who is behind it; a question alone begins no term.
            self._SyncObj__setCurrentTerm(sender_term, None)
            self._SyncObj__setState(stock._RAFT_STATE.FOLLOWER)
            self._SyncObj__raftLeader = None
        if message["type"] == "pre_vote_answer":
            self._prevote.note(sender.id, message["term"], granted=message["granted"])
        elif self._isLeader():
            self._append_to(sender)  # the only answer of a leader: here I am
        else:
            answer = {"type": "pre_vote_answer", "term": message["term"], "granted": self._would_vote(message)}
            self.held.send(sender.id, answer)

    def _would_vote(self, message: Message) -> bool:
        last = self.term_at(self.last_index) or 0, self.last_index
        return (
            self._standing.is_voter
            and not self._idle
            and message["term"] > self.term
            and (message["last_log_term"], message["last_log_index"]) >= last
            and not self._has_leader()
        )

    def _has_leader(self) -> bool:
        leader = self._SyncObj__raftLeader
        return (
            leader is not None
            and leader in self._peers
            and self.is_connected(leader)
            and stock.monotonicTime() - self._heard_s < self._settings.election_min_s
        )

    def _may_campaign(self) -> bool:
        """Whether it is time, and a majority would vote for this node; when it is time, and that is not known: ask."""
        if not self._peers or self._SyncObj__transferInProgress:
            return True
        now_s = stock.monotonicTime()
        if self._SyncObj__raftElectionDeadline >= now_s:
            return False
        if self.last_index - self.applied_index > self._settings.backlog_entries_max:
            # It would lead for as long as that takes and be of no use; another may have less to do.
            if self._patient_until_s is None:
                self._patient_until_s = now_s + self._settings.backlog_wait_s
            if now_s < self._patient_until_s:
                return False
        connected = {peer.id for peer in self._peers if self.is_connected(peer)}
        term = self.term + 1
        if self._prevote.is_won(term, now_s, connected):
            self._prevote.cancel()
            return True
        if self._prevote.is_due(term, now_s):
            if self._prevote.term == term:
                # The leader was asked, too, and has not answered.
                self._SyncObj__raftLeader = None
            self._prevote.begin(term, now_s)
            last = self.last_index
            question = {"type": "pre_vote", "term": term, "last_log_index": last, "last_log_term": self.term_at(last)}
            for peer in self._peers:
                if peer.id in connected:
                    self.held.send(peer.id, question)
        return False

    def _tick_without_campaign(self) -> None:
        """Its tick reads the clock for itself, a moment later: what was not due for us could be for it."""
        deadline_s, self._SyncObj__raftElectionDeadline = self._SyncObj__raftElectionDeadline, math.inf
        try:
            self.doTick()
        finally:
            if self._SyncObj__raftElectionDeadline == math.inf:
                self._SyncObj__raftElectionDeadline = deadline_s

    # Catching up.

    def _catch_up_with(self, sender: _Peer, message: Message) -> None:
        if message["index"] > self.commit_index:
            self.catch_up.piece(sender.id, message)
            return
        done = {"type": "snapshot_got", "index": message["index"], "offset": message["size"], "done": True}
        self.held.send(sender.id, done)

    def _acknowledged(self, sender: _Peer, message: Message) -> None:
        next_index = self._SyncObj__raftNextIndex
        next_before = next_index[sender]
        outstanding = self._outstanding.get(sender.id)
        asked = next_before - 1 if outstanding is None else outstanding.previous
        if message["reset"] and message["next_node_idx"] > asked:
            # It denies something sent earlier, and has been heeded already. (Any denial of what was sent last asks for
            # something before it.) Going forward again would let a long tail of another leader's never be overcome.
            message = message | {"reset": False}
        responded_s = self._SyncObj__lastResponseTime[sender]
        self._SyncObj__onMessageReceived(sender, message)
        if self._standing.is_joining(sender.id):
            self._SyncObj__lastResponseTime[sender] = responded_s  # with it there is no majority
        if message["reset"]:
            self._outstanding.pop(sender.id, None)
            return
        # It goes back to what is acknowledged, and would send again all that is under way.
        next_index[sender] = max(next_index[sender], next_before)
        if outstanding is not None and message["success"] and message["next_node_idx"] > outstanding.last:
            del self._outstanding[sender.id]

    def connect(self, peer: _Peer) -> None:
        """There is a connection to `peer`."""
        self._SyncObj__onNodeConnected(peer)

    def disconnect(self, peer: _Peer) -> None:
        """There is none any more."""
        self._SyncObj__onNodeDisconnected(peer)
        # Whether it arrived is told by the answer to the next heartbeat.
        self._outstanding.pop(peer.id, None)
        self.held.forget(peer.id)
        self.catch_up.forget(peer.id)

    def is_connected(self, peer: _Peer) -> bool:
        """Whether there is one."""
        connected: bool = self.isNodeConnected(peer)
        return connected

    def campaign_within(self, delay_s: float) -> None:
        """The leader is known to be dead: do not wait for the election timeout."""
        soon_s = stock.monotonicTime() + delay_s
        self._SyncObj__raftElectionDeadline = min(self._SyncObj__raftElectionDeadline, soon_s)

    def idle(self, *, idle: bool) -> None:
        """Whether it lets others lead: it campaigns no more, and if it leads it asks a follower to take over."""
        self._idle = idle
        if not idle or not self._isLeader():
            return
        voters = [peer for peer in self._peers if not self._standing.is_joining(peer.id)]
        best = max(voters, key=lambda peer: (self.is_connected(peer), self.match_index(peer)), default=None)
        if best is not None:
            self.held.send(best.id, {"type": "timeout_now", "term": self.term})
        self._SyncObj__setState(stock._RAFT_STATE.FOLLOWER)
        self._SyncObj__raftLeader = None

    # Snapshots.

    def start_at(self, index: int) -> None:
        """At start: the state is that of entry `index`, from a snapshot."""
        self._SyncObj__raftLastApplied = index
        self._SyncObj__raftCommitIndex = max(self.commit_index, index)

    def jump_to(self, index: int, term: int) -> None:
        """The state is that of entry `index` now, from a leader's snapshot; it is later than what was applied."""
        if self.term_at(index) != term:
            self._journal.reset((NOTHING_COMMAND, index, term))
            self._journal.release(index)
        self.start_at(index)
        self._journal.setRaftCommitIndex(self.commit_index)
        waiting = self._SyncObj__commandsWaitingCommit
        for passed in [waited for waited in waiting if waited <= index]:
            for _term, callback in waiting.pop(passed):
                callback(None, FAIL_REASON.UNKNOWN_OUTCOME)

    def caught_up(self, peer: _Peer, index: int) -> None:
        """This follower holds the log up to `index`, by a snapshot."""
        if not self._isLeader():
            return
        self._SyncObj__raftMatchIndex[peer] = max(self.match_index(peer), index)
        self._SyncObj__raftNextIndex[peer] = max(self._SyncObj__raftNextIndex[peer], index + 1)
        self._outstanding.pop(peer.id, None)

    def compact(self, index: int) -> None:
        """A snapshot in use holds all up to `index`, and the log may begin there."""
        if self._journal.first_index < index <= self._journal.last_index:
            self._journal.move_base(index)
        if index <= self._journal.first_index:
            self._journal.release(index)

    # What is sent.

    def _say(self, peer: str, term: int, message: Message) -> bool:
        """The last thing before the wire: a node that does not count says nothing that could be counted."""
        if message["type"] == ACKNOWLEDGEMENT and message["success"] and not self._standing.is_voter:
            message = {"type": "progress", "next_node_idx": message["next_node_idx"]}
        return self._wire.send(peer, term, message)

    def send_eagerly(self) -> None:
        """Send what is new to each follower that has answered all it was sent."""
        first, last = self._journal.first_index, self.last_index
        for peer in self._peers:
            # One that needs a snapshot gets heartbeats, and pieces.
            if peer.id not in self._outstanding and first < self._SyncObj__raftNextIndex[peer] <= last:
                self._append_to(peer)

    def tell_commits(self) -> None:
        """Tell followers what is committed, where no entries have told them."""
        for peer in self._peers:
            if peer.id not in self._outstanding and self._told_commit.get(peer.id) != self.commit_index:
                self._append_to(peer)

    def match_index(self, peer: _Peer) -> int:
        """Up to where this follower is known to hold the leader's log."""
        index: int = self._SyncObj__raftMatchIndex.get(peer, 0)
        return index

    def _SyncObj__sendAppendEntries(self) -> None:
        """The heartbeat."""
        self._SyncObj__newAppendEntriesTime = stock.monotonicTime() + self._settings.heartbeat_s
        for peer in self._peers:
            self._append_to(peer)

    def _SyncObj__onBecomeLeader(self) -> None:
        self._outstanding.clear()
        self._told_commit.clear()
        self.catch_up.lead_no_more()
        super()._SyncObj__onBecomeLeader()

    def _append_to(self, peer: _Peer) -> None:
        """One message: all that is new; or none of it while an answer is outstanding, only what that builds on."""
        if not self.is_connected(peer):
            return
        now_s = stock.monotonicTime()
        outstanding = self._outstanding.get(peer.id)
        if outstanding is not None and now_s > outstanding.since_s + self._settings.leader_fallback_s:
            del self._outstanding[peer.id]
            self._SyncObj__raftNextIndex[peer] = outstanding.previous + 1
            outstanding = None
        first = self._journal.first_index
        previous = self._SyncObj__raftNextIndex[peer] - 1 if outstanding is None else outstanding.previous
        entries: list[tuple[bytes, int, int]] = []
        if previous < first:
            self._outstanding.pop(peer.id, None)
            self.catch_up.needed(peer.id, self.term)
            previous = first  # it will deny that it has it, and so be heard of; and if it has it, all is well
        elif outstanding is None:
            begin = previous + 1 - first
            entries = self._journal[begin : begin + self._settings.append_entries_max]
            size = 0
            for count, (command, _index, _term) in enumerate(entries, start=1):
                size += len(command)
                if size >= self._settings.append_bytes_max:
                    entries = entries[:count]
                    break
        message = {
            "type": "append_entries",
            "term": self.term,
            "commit_index": self.commit_index,
            "prevLogIdx": previous,
            "prevLogTerm": self._journal[previous - first][2],
            "entries": entries,
        }
        if self._SyncObj__transport.send(peer, message):
            self._told_commit[peer.id] = self.commit_index
            if entries:
                last: int = entries[-1][1]
                self._outstanding[peer.id] = _Outstanding(previous=previous, last=last, since_s=now_s)
                self._SyncObj__raftNextIndex[peer] = last + 1

    # What is proposed, committed and applied.

    def turn(self) -> None:
        """One of its ticks; a leader commits before it, and sends after it."""
        if not self._isLeader():
            self.catch_up.lead_no_more()
            if self._idle or not self._standing.is_voter:
                self._SyncObj__raftElectionDeadline = stock.monotonicTime() + self._settings.election_min_s
            if self._may_campaign():
                self.doTick()
            else:
                self._tick_without_campaign()
            return
        self._commit()
        # It would look at every entry that is not committed, one by one, each time: a second, for a new leader of a
        # million entries, and nothing would come of it. As far as it knows now, nobody holds anything.
        held, self._SyncObj__raftMatchIndex = self._SyncObj__raftMatchIndex, _NobodyHolds()
        try:
            self.doTick()
        finally:
            self._SyncObj__raftMatchIndex = held
        if self._isLeader():
            self.send_eagerly()

    def append_joined(self, node: str, nonce: bytes) -> None:
        """As its leader: let the log say that this node was there with that nonce."""
        assert self._isLeader()
        self._journal.add(bytes([_JOINED]) + nonce + node.encode(), self.last_index + 1, self.term)

    def abstain(self) -> None:
        """Vote for nobody in this term."""
        self._SyncObj__setCurrentTerm(self.term, self.selfNode.id)

    def _commit(self) -> None:
        """Commit what a majority holds, if the last of it is of this term (with it all before it is committed)."""
        held = sorted([self._own_match_index(), *[self.match_index(peer) for peer in self._peers]])
        by_majority = held[(len(held) - 1) // 2]
        if by_majority > self.commit_index and self.term_at(by_majority) == self.term:
            self._SyncObj__raftCommitIndex = by_majority
            self._journal.setRaftCommitIndex(by_majority)
        self._by_majority = self.commit_index

    def _own_match_index(self) -> int:
        """Up to where this leader may count itself."""
        return self._journal.durable_index

    def _checkCommandsToApply(self) -> None:
        if self._isLeader():
            super()._checkCommandsToApply()
            return
        # It would forward them to the leader, which might run them long after we have given up.
        while True:
            try:
                _command, callback = self._SyncObj__commandsQueue.get_nowait()
            except queue.Empty:
                return
            callback(None, FAIL_REASON.MISSING_LEADER)

    def _SyncObj__applyLogEntries(self) -> bool:
        if self._isLeader() and not self._peers:
            # Alone in its cluster pysyncobj would count it before its sync.
            self._SyncObj__raftCommitIndex = min(self.commit_index, self._by_majority)
        # In slices: replaying a long log in one go would silence this node for longer than its followers wait.
        known, until = self.commit_index, self.applied_index
        first, most = self._journal.first_index, min(known, until + self._settings.apply_entries_max)
        size = 0
        while until < most and size < self._settings.apply_bytes_max:
            until += 1
            size += len(self._journal[until - first][0])
        self._SyncObj__raftCommitIndex = until
        try:
            more: bool = super()._SyncObj__applyLogEntries()
        finally:
            self._SyncObj__raftCommitIndex = known
        return more

    def _SyncObj__doApplyCommand(self, command: bytes) -> object:
        # Its own would unpickle the others: changes of membership and of code version.
        kind = command[0]
        self.applied_bytes += len(command)
        if kind == _REGULAR:
            return self._apply(command[1:])
        if kind == _JOINED:
            self._joined(command[1 + NONCE_BYTES :].decode(), command[1 : 1 + NONCE_BYTES])
        elif kind != _NO_OP:
            _log.error("ignored a command of unknown type %d in the log", kind)
        return None


class RaftLog:
    """One node of a replicated log.

    `peers` are the ids of the other nodes; `transport` connects to exactly these. `journal` opens this node's journal
    (`raft_journal.file_journal(folder)`). When anything fails that must not be survived (`apply` raises, a sync fails,
    logs have diverged), the node goes silent for good: it leaves the network, its open proposals end in
    `ProposalUnknown`, and `on_fatal` hears why; the process should then end. A disk that is full is survived: the node
    neither leads nor counts until there is room. `rejoin` says that the disk of this node, which was a member, is
    lost; without it a node that comes back without its log fails with `StandingRefused`.
    """

    _replica_type = Replica
    _snapshots_type = Snapshots
    _standing_type = Standing

    def __init__(
        self,
        *,
        node: str,
        peers: Iterable[str],
        transport: Transport,
        journal: JournalFactory,
        settings: RaftSettings | None = None,
        clock: Clock | None = None,
        guard: Guard | None = None,
        on_fatal: OnFatal | None = None,
        understands: int = 1,
        rejoin: bool = False,
    ) -> None:
        self._node = node
        self._settings = settings or RaftSettings()
        ids = sorted({*peers, node})
        everyone = {id_: _Peer(id_, rank) for rank, id_ in enumerate(ids)}
        self._self = everyone.pop(node)
        self._peers = everyone
        self._transport = transport
        self._open_journal = journal
        self._clock = clock or SystemClock()
        self._guard = guard or Guard()
        self._on_fatal = on_fatal
        self._understands = understands
        self._peers_understand: dict[str, int] = {}
        """What peers have said of themselves, each on its present connection."""
        self._rejoin = rejoin
        self._standing = self._standing_type(node, everyone, Marker(node=node, voter=False))
        """Until it is read from disk, that of a node that does not count."""
        self._voter_from: int | None = None
        """It may be a voter once the journal is durable up to this position; None: it may not."""
        self._keeping: asyncio.Task[None] | None = None
        self._next_keep_s = 0.0
        self._next_word_s = 0.0
        self._joined_said_s: dict[tuple[str, bytes], float] = {}
        """By node and nonce: when this node, leading, let the log say so."""
        self._replica: Replica | None = None
        self._journal: RaftJournal | None = None
        self._machine: StateMachine | None = None
        self._snapshots: Snapshots | None = None
        self._catch_up: CatchUp | None = None
        self._snapshot: Snapshot | None = None
        """The newest that this node has."""
        self._taking: asyncio.Task[None] | None = None
        self._next_snapshot_s = 0.0
        self._queued_bytes = 0
        """Of commands that are not in the log yet, about."""
        self._on_leadership: Callable[[Leadership], None] | None = None
        self._told: Leadership | None = None
        self._open: dict[asyncio.Future[object], float] = {}
        """Open proposals and when they time out, oldest first."""
        self._orphaned = False
        self._transferring = False
        self._ended: str | None = "not started"
        self._leaving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._woken = False
        self._turned_s = 0.0
        self._reads_owed = 0
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        assert transport.frame_bytes_max >= self._settings.message_bytes_max

    @property
    def node(self) -> str:
        """This node's id."""
        return self._node

    async def start(self, machine: StateMachine, on_leadership: Callable[[Leadership], None]) -> None:
        """Open the journal, listen, and begin. Raises OSError, `CannotStart`."""
        assert self._replica is None, "a log starts once"
        self._on_leadership = on_leadership
        self._machine = machine
        journal, snapshots, found = await asyncio.get_running_loop().run_in_executor(None, self._read_disk)
        if found is not None:
            self._snapshot, put = found
            put()
        self._replica = self._replica_type(
            node=self._self,
            peers=list(self._peers.values()),
            transport=self._transport,
            journal=journal,
            guard=self._guard,
            apply=machine.apply,
            settings=self._settings,
            standing=self._standing,
            joined=self._joined,
        )
        self._replica.catch_up = self._catch_up = CatchUp(
            snapshots=snapshots,
            owner=self,
            send=self._replica.held.send,
            clock=self._clock,
            piece_bytes=self._settings.snapshot_piece_bytes,
            repeat_s=self._settings.leader_fallback_s,
        )
        if self._snapshot is not None:
            self._replica.start_at(self._snapshot.index)
        handlers = Handlers(
            message=self._received,
            connected=self._connected,
            disconnected=self._disconnected,
            refused=self._refused,
        )
        self._ended = None
        journal.start(
            JournalHandlers(durable=self._durable, full=self._disk_full, room=self._disk_has_room, fatal=self._fail)
        )
        try:
            await self._transport.start(handlers)
        except OSError:
            await self.stop()
            raise
        self._turned_s = self._clock.monotonic_s()
        self._found()  # with nobody else there is nobody to ask
        self._tell()
        self._on_timer()

    def _read_disk(self) -> tuple[RaftJournal, Snapshots, tuple[Snapshot, Callable[[], object]] | None]:
        """On a thread: read what is on disk."""
        assert self._machine is not None
        self._journal = journal = self._open_journal()
        try:
            self._snapshots = snapshots = self._snapshots_type(journal.disk)
            has_history = journal.has_history or bool(snapshots.indices())
            # Before anything else is made of what is there.
            self._read_standing(journal, has_history=has_history)
            return journal, snapshots, recover(snapshots, journal, self._machine.restore)
        except BaseException:
            journal.close()
            raise

    def _read_standing(self, journal: RaftJournal, *, has_history: bool) -> None:
        marker = at_start(
            journal.disk,
            self._node,
            has_log=journal.has_log,
            has_history=has_history,
            rejoin=self._rejoin,
            nonce=secrets.token_bytes(NONCE_BYTES),
        )
        self._standing = self._standing_type(self._node, self._peers, marker)
        if not marker.voter:
            _log.warning(
                "%s: %s holds no whole log of this node; it counts for nothing until it has joined, or, in a new "
                "cluster, until all nodes are there",
                self._node,
                journal.disk.where(),
            )

    def propose(self, command: bytes) -> asyncio.Future[object]:
        """Ask for `command` to be committed; known to have ended after `proposal_timeout_s` at the latest."""
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        replica = self._replica
        refusal = self._refusal(command)
        if refusal is not None or replica is None:
            future.set_exception(NotProposed(refusal))
            return future
        self._open[future] = self._clock.monotonic_s() + self._settings.proposal_timeout_s
        self._queued_bytes += len(command)
        replica._applyCommand(command, partial(self._answered, future), _REGULAR)
        self._wake()
        return future

    def leadership(self) -> Leadership:
        """Who leads, as this node knows it now."""
        replica = self._replica
        if replica is None:
            return Leadership(term=0, leader=None, is_leader=False)
        if self._ended is not None:
            return Leadership(term=replica.term, leader=None, is_leader=False)
        leader = replica._getLeader()
        if leader is not None and leader is not self._self and not replica.is_connected(leader):
            # Without any connection pysyncobj does not campaign, and would believe in the last leader for ever.
            leader = None
        return Leadership(
            term=replica.term, leader=None if leader is None else leader.id, is_leader=bool(replica._isLeader())
        )

    def reachable(self) -> frozenset[str]:
        """Ids of the other nodes that this one is connected to."""
        return frozenset() if self._ended is not None else self._transport.connected()

    def understands(self) -> dict[str, int | None]:
        """What each node has said that it understands; see `ReplicatedLog`."""
        reachable = self.reachable()
        said: dict[str, int | None] = {self._node: self._understands}
        return said | {peer: self._peers_understand.get(peer, 1) if peer in reachable else None for peer in self._peers}

    def joining(self) -> frozenset[str]:
        """Ids of the nodes that came without a log and do not count yet; its own as well."""
        if self._replica is None or self._ended is not None:
            return frozenset()
        joiners = frozenset(peer for peer, _nonce in self._standing.joiners())
        return joiners if self._standing.is_voter else joiners | {self._node}

    async def transfer(self) -> bool:
        """Hand leadership over: no proposals are taken meanwhile, and what is open is ended first.

        False if this node does not lead, nobody can take over (at once, when nobody is there), or
        `transfer_timeout_s` has passed; then it goes on.
        """
        replica = self._replica
        if replica is None or self._transferring or not self._can_hand_over():
            return False
        self._transferring = True
        try:
            async with asyncio.timeout(self._settings.transfer_timeout_s):
                await self._until(lambda: self._successor() is not None or not self._can_hand_over())
                successor = self._successor()
                if successor is None:
                    return self._has_another_leader()
                replica.transferLeadership(successor)
                await self._until(lambda: self._has_another_leader() or not self._anybody_else())
                return self._has_another_leader()
        except TimeoutError:
            return False
        finally:
            self._transferring = False

    async def stop(self) -> None:
        """Stop taking part, and release sockets and files. Futures still open end in `ProposalUnknown`."""
        if self._ended == "stopped":
            return
        self._end("stopped")
        if self._leaving is not None:
            await self._leaving
        await self._transport.stop()
        if self._catch_up is not None:
            await self._catch_up.stop()
        tasks = [task for task in (self._taking, self._keeping) if task is not None]
        if tasks:
            await asyncio.wait(tasks)
        if self._replica is not None:
            self._replica.destroy()
        if self._journal is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._journal.close)

    @property
    def trouble(self) -> str | None:
        """What keeps this node from taking part, for people; None: nothing does."""
        return None if self._journal is None else self._journal.full

    def _refusal(self, command: bytes) -> str | None:
        """Why this command cannot be taken."""
        if self._ended is not None or self._replica is None:
            return f"{self._node} does not run: {self._ended}"
        if not self._replica._isLeader():
            return f"{self._node} does not lead"
        if self._transferring:
            return f"{self._node} hands leadership over"
        if len(command) > self._settings.max_command_bytes:
            return f"{len(command)} bytes; the limit is {self._settings.max_command_bytes}"
        if self._journal is not None and self._unsynced_bytes() >= self._settings.unsynced_bytes_max:
            return "the disk does not keep up"
        if len(self._open) >= self._settings.proposals_max:
            return f"{self._settings.proposals_max} proposals are open already"
        return None

    def _answered(self, future: asyncio.Future[object], result: object, reason: int) -> None:
        """How pysyncobj answers a proposal. Must not raise: it would apply the entry a second time."""
        self._open.pop(future, None)
        if future.done():
            return
        if reason == FAIL_REASON.SUCCESS:
            future.set_result(result)
        elif reason in _NOT_IN_THE_LOG:
            future.set_exception(NotProposed(f"{self._node} no longer leads"))
        else:
            future.set_exception(ProposalUnknown(f"pysyncobj's reason is {reason}"))

    def _unsynced_bytes(self) -> int:
        assert self._journal is not None
        return self._queued_bytes + self._journal.unsynced_bytes

    # Snapshots.

    def _take_snapshot(self, now_s: float) -> None:
        """Begin one, if it is time."""
        replica, settings, last = self._replica, self._settings, self._snapshot
        if replica is None or self._taking is not None or now_s < self._next_snapshot_s:
            return
        index, since = (0, settings.snapshot_log_bytes) if last is None else (last.index, last.size)
        if (
            replica.applied_bytes < max(settings.snapshot_log_bytes, since)
            and replica.applied_index - index < settings.snapshot_log_entries
        ) or replica.applied_index <= index:
            return
        replica.applied_bytes = 0
        self._taking = asyncio.get_running_loop().create_task(self._taken())
        self._taking.add_done_callback(self._took)

    async def _taken(self) -> None:
        replica, machine, snapshots = self._replica, self._machine, self._snapshots
        assert replica is not None
        assert machine is not None
        assert snapshots is not None
        index = replica.applied_index
        term = replica.term_at(index)
        assert term is not None
        frozen = [machine.snapshot()]

        def written() -> Snapshot:
            # It is let go of here: freeing a million rows takes time, and the loop has none.
            return snapshots.write(index, term, frozen.pop()())

        try:
            snapshot = await asyncio.get_running_loop().run_in_executor(None, written)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _log.error("%s: no room for a snapshot: %s", self._node, error)
            self._next_snapshot_s = self._clock.monotonic_s() + self._settings.snapshot_retry_s
            replica.applied_bytes += self._settings.snapshot_log_bytes
            return
        if self._ended is not None or (self._snapshot is not None and self._snapshot.index > snapshot.index):
            return
        _log.info("%s: a snapshot of entry %d, %d bytes", self._node, snapshot.index, snapshot.size)
        previous, self._snapshot = self._snapshot, snapshot
        if previous is not None:
            replica.compact(previous.index)

    def _took(self, task: asyncio.Task[None]) -> None:
        self._taking = None
        error = task.exception()
        if error is not None:
            self.failed(error)

    def decode(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        """See `catch_up.Owner`."""
        assert self._machine is not None
        return self._machine.restore(pieces)

    def install(self, snapshot: Snapshot, put: Callable[[], object]) -> object:
        """See `catch_up.Owner`."""
        replica = self._replica
        if self._ended is not None or replica is None or snapshot.index <= replica.applied_index:
            return None
        replaced = put()
        replica.jump_to(snapshot.index, snapshot.term)
        replica.applied_bytes = 0
        self._snapshot = snapshot
        _log.info("%s: caught up to entry %d by a snapshot", self._node, snapshot.index)
        return replaced

    def caught_up(self, peer: str, index: int) -> None:
        """See `catch_up.Owner`."""
        if self._ended is None and self._replica is not None:
            self._replica.caught_up(self._peers[peer], index)
            self._wake()

    def failed(self, error: BaseException) -> None:
        """See `catch_up.Owner`."""
        self._fail(error)

    # This node's standing, and its peers'; see `standing.py`.

    def _say_standing(self, peer: str) -> None:
        replica, journal = self._replica, self._journal
        assert replica is not None
        assert journal is not None
        self._transport.send(peer, replica.term, self._standing.say(peer, history=journal.has_history))

    def _say_standings(self) -> None:
        for peer in sorted(self.reachable()):
            self._say_standing(peer)

    def _heard_standing(self, peer: str, message: Message) -> None:
        standing, journal = self._standing, self._journal
        assert journal is not None
        if standing.hear(peer, message):
            self._say_standing(peer)
        if standing.is_refused_by(message):
            self._fail(
                StandingRefused(
                    f"{self._node} was a member of this cluster, as {peer} knows, and its log is not in "
                    f"{journal.disk.where()}. If its disk is really lost, start it with --rejoin (`outlast start "
                    f"{self._node} --rejoin`); else put the right folder in place. Nothing of what was there has been "
                    "changed"
                )
            )
            return
        self._found()
        self._keep_standing()

    def _found(self) -> None:
        """Be a voter of a cluster that begins, if this is that moment."""
        replica, journal = self._replica, self._journal
        assert replica is not None
        assert journal is not None
        if self._voter_from is None and self._standing.may_found(self.reachable(), history=journal.has_history):
            self._voter_from = journal.position
            self._keep_standing()

    def _joined(self, node: str, nonce: bytes) -> None:
        """The log says that this node was there with that nonce, and that is committed."""
        replica, journal = self._replica, self._journal
        assert replica is not None
        assert journal is not None
        if self._voter_from is None and self._standing.admits(node, nonce):
            replica.abstain()
            self._voter_from = journal.position
        elif node == self._node and self._standing.is_voter:
            # Its leader has not heard that it is one already.
            self._say_standings()

    def _keep_standing(self) -> None:
        """Store what has changed, and rely on it when it is durable."""
        journal, marker = self._journal, self._standing.marker
        assert journal is not None
        if self._ended is not None or self._keeping is not None or self._clock.monotonic_s() < self._next_keep_s:
            return
        voter = marker.voter or (self._voter_from is not None and self._voter_from <= journal.durable_position)
        known = frozenset(self._standing.known)
        if (voter, known) == (marker.voter, marker.known):
            return
        wanted = replace(marker, known=known)
        if voter:
            wanted = Marker(node=self._node, voter=True, known=known)
        self._keeping = asyncio.get_running_loop().create_task(self._kept(journal, wanted))
        self._keeping.add_done_callback(self._has_kept)

    async def _kept(self, journal: RaftJournal, wanted: Marker) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, store, journal.disk, wanted)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _log.error("%s: no room to note this node's standing: %s", self._node, error)
            self._next_keep_s = self._clock.monotonic_s() + self._settings.snapshot_retry_s
            return
        is_new = wanted.voter and not self._standing.is_voter
        self._standing.marker = wanted
        if is_new and self._ended is None and self._replica is not None:
            _log.warning("%s: this node counts from now on", self._node)
            self._say_standings()
            if not journal.has_history:
                # The cluster begins; there is no leader to wait for.
                self._campaign_in_turn(self._peers)
            self._wake()

    def _has_kept(self, task: asyncio.Task[None]) -> None:
        self._keeping = None
        error = task.exception()
        if error is not None:
            self.failed(error)

    def _admit(self, now_s: float) -> None:
        """As leader: let those join who came without a log, and say so again for as long as they are not in."""
        assert self._replica is not None
        if self.trouble is not None:
            return
        said, self._joined_said_s = self._joined_said_s, {}
        for peer, nonce in self._standing.joiners():
            said_s = said.get((peer, nonce), -math.inf)
            if now_s - said_s >= self._settings.leader_fallback_s:
                said_s = now_s
                self._replica.append_joined(peer, nonce)
            self._joined_said_s[peer, nonce] = said_s

    # What the journal tells.

    def _durable(self, _position: int) -> None:
        if self._ended is None and self._replica is not None:
            self._replica.held.release()
            self._keep_standing()
            self._wake()

    def _disk_full(self, why: str) -> None:
        if self._ended is not None or self._replica is None:
            return
        _log.error("%s takes no part until there is room: %s", self._node, why)
        self._replica.idle(idle=True)
        self._tell()
        self._wake()

    def _disk_has_room(self) -> None:
        if self._ended is None and self._replica is not None:
            _log.warning("%s takes part again", self._node)
            self._replica.idle(idle=False)
            self._wake()

    # What the transport tells.

    def _received(self, peer: str, term: int, message: Message) -> None:
        if self._ended is not None or self._replica is None:
            return
        if message["type"] == "understands":
            self._peers_understand[peer] = message["level"]
            return
        if message["type"] == "standing":
            self._heard_standing(peer, message)
            return
        try:
            self._replica.receive(self._peers[peer], term, message)
        except Exception as error:  # noqa: BLE001 - whatever it is, this node must stop
            self._fail(error)
            return
        self._tell()
        self._wake()

    def _connected(self, peer: str) -> None:
        assert self._replica is not None
        self._say_standing(peer)
        self._replica.connect(self._peers[peer])
        self._transport.send(peer, self._replica.term, {"type": "understands", "level": self._understands})
        self._wake()

    def _disconnected(self, peer: str) -> None:
        assert self._replica is not None
        self._replica.disconnect(self._peers[peer])
        self._peers_understand.pop(peer, None)
        self._standing.forget(peer)
        self._wake()

    def _refused(self, peer: str) -> None:
        """If this was the leader: elect another, the survivors one after the other."""
        if self._ended is not None or self._replica is None or self._replica._getLeader() != self._peers[peer]:
            return
        if self._replica.last_index - self._replica.applied_index > self._settings.backlog_entries_max:
            return  # the election timeout is still there, should nobody else win
        self._campaign_in_turn(id_ for id_ in self._peers if id_ != peer)
        self._wake()

    def _campaign_in_turn(self, others: Iterable[str]) -> None:
        """There is no leader: campaign soon, one after the other."""
        assert self._replica is not None
        self._replica.campaign_within(sum(1 for id_ in others if id_ < self._node) * self._settings.death_step_s)

    # Turns.

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _on_timer(self) -> None:
        if self._ended is not None or self._replica is None:
            return
        self._timer = asyncio.get_running_loop().call_later(self._settings.tick_s, self._on_timer)
        now_s = self._clock.monotonic_s()
        late = []
        for future, deadline_s in self._open.items():
            if deadline_s > now_s:
                break
            late.append(future)
        for future in late:
            del self._open[future]
            if not future.done():
                future.set_exception(ProposalUnknown(f"no majority within {self._settings.proposal_timeout_s} s"))
        if self._replica._isLeader():
            try:
                self._admit(now_s)
            except Exception as error:  # noqa: BLE001 - whatever it is, this node must stop
                self._fail(error)
                return
            self._replica.tell_commits()
        elif not self._standing.is_voter and now_s >= self._next_word_s:
            # Who leads now may not know; and the word may have been overtaken by one that was older.
            self._next_word_s = now_s + self._settings.leader_fallback_s
            self._say_standings()
        self._keep_standing()
        self._take_snapshot(now_s)
        self._wake()

    def _turn(self) -> None:
        self._woken = False
        replica = self._replica
        if self._ended is not None or replica is None:
            return
        now_s = self._clock.monotonic_s()
        if now_s - self._turned_s > self._settings.stall_s:
            self._reads_owed = _READS_BEFORE_A_LATE_TURN
        self._turned_s = now_s
        if self._reads_owed:
            self._reads_owed -= 1
            self._wake()
            return
        self._queued_bytes = 0
        try:
            replica.turn()
        except Exception as error:  # noqa: BLE001 - whatever it is, this node must stop
            self._fail(error)
            return
        self._tell()
        if self._orphaned:
            self._orphaned = False
            self._abandon("this node no longer leads")
        if replica.commit_index > replica.applied_index:
            self._wake()
        for condition, future in self._watchers:
            if not future.done() and condition():
                future.set_result(None)

    def _tell(self) -> None:
        """Report a change of leadership, and note its loss."""
        now = self.leadership()
        if now == self._told:
            return
        if self._told is not None and self._told.is_leader:
            self._orphaned = True
        self._told = now
        if self._on_leadership is not None:
            asyncio.get_running_loop().call_soon(self._on_leadership, now)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for the end of a turn in which `condition` holds."""
        if condition():
            return
        watcher = (condition, asyncio.get_running_loop().create_future())
        self._watchers.append(watcher)
        try:
            await watcher[1]
        finally:
            self._watchers.remove(watcher)

    def _has_another_leader(self) -> bool:
        return self.leadership().leader not in (None, self._node)

    def _anybody_else(self) -> bool:
        """Whether another node is there, and enough of them to elect one of them."""
        return len(self.reachable() - self.joining()) >= (len(self._peers) + 1) // 2

    def _can_hand_over(self) -> bool:
        return self.leadership().is_leader and self._anybody_else()

    def _successor(self) -> _Peer | None:
        """A follower that holds all of this leader's log, nothing in it being open."""
        replica = self._replica
        if replica is None or not self.leadership().is_leader:
            return None
        if self._open or replica.applied_index != replica.last_index:
            return None
        ready = [
            peer
            for peer in self._peers.values()
            if replica.is_connected(peer)
            and replica.match_index(peer) == replica.last_index
            and not self._standing.is_joining(peer.id)
        ]
        return ready[0] if ready else None

    # The end.

    def _abandon(self, why: str) -> None:
        abandoned, self._open = self._open, {}
        for future in abandoned:
            if not future.done():
                future.set_exception(ProposalUnknown(why))

    def _end(self, why: str) -> None:
        """Neither act nor speak from here on."""
        self._ended = why
        if self._timer is not None:
            self._timer.cancel()
        self._tell()
        self._abandon(f"the node has ended: {why}")
        for _condition, future in self._watchers:
            if not future.done():
                future.set_result(None)

    def _fail(self, error: BaseException) -> None:
        """Go silent for good, and say so."""
        if self._ended is not None:
            return
        loop = asyncio.get_running_loop()
        if isinstance(error, CannotStart):
            _log.critical("%s: this node must stop: %s", self._node, error)  # it says what to do, to people
        else:
            _log.critical("%s: this node must stop", self._node, exc_info=error)
        self._end(f"failed: {error!r}")
        self._leaving = loop.create_task(self._transport.stop())
        if self._on_fatal is not None:
            loop.call_soon(self._on_fatal, error)
