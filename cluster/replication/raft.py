"""`Replica`, a node of pysyncobj's: Raft's elections, terms and log are its, all around them is ours.

This is the only file that imports pysyncobj, and it leans on the insides of one exact version; a test fails loudly
when they change. `RaftLog` (`raft_log.py`) drives it. What we put in the place of its own:

| of pysyncobj | here |
|---|---|
| its thread and poller | the event loop: a *turn* on a timer, and at once when there is work for one |
| its tick | taken to campaign alone: `Replica.turn` does whatever else is due |
| its transport (pickle) | `Transport`, by way of `_Adapter` |
| its journal's creation | a property, so that its constructor finds the journal we were given |
| sending entries | `Replica` sends when nothing is outstanding to a follower, and then all that has come since |
| counting who holds what | `Replica` counts acknowledgements, and commits what a majority holds, not entry by entry |
| looking into the log by position | `Log`, by index |
| its commands (pickled calls) | opaque bytes: `_applyCommand(bytes, callback, REGULAR)`, applied by the state machine |
| forwarding commands to the leader | refused: a proposal off the leader is `NotProposed` |
| its snapshots | ours (`snapshot.py`), taken by size (`compaction.py`), handed over piece by piece (`catch_up.py`) |

**A turn** does what is due, in the order of pysyncobj's tick. Whoever leads commits what a majority holds, steps down
if no majority has answered of late, applies, sends the heartbeat, takes what was proposed into the log, and sends it.
All others apply, and refuse what was proposed; or, where the deadline has passed and they may, they campaign, by a
tick. Messages are handled as they arrive.
"""

import logging
import math
import operator
import queue
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from pysyncobj import syncobj as stock
from pysyncobj.config import FAIL_REASON, SERIALIZER_STATE, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport as StockTransport

from cluster.replication.catch_up import CatchUp
from cluster.replication.entries import Entry
from cluster.replication.guard import Guard, Message
from cluster.replication.holdback import ACKNOWLEDGEMENT, HoldBack
from cluster.replication.log import NotProposed, ProposalUnknown
from cluster.replication.prevote import PreVote
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.settings import RaftSettings
from cluster.replication.snapshot import NOTHING_COMMAND
from cluster.replication.standing import NONCE_BYTES, Standing
from cluster.replication.transport import Transport

_log = logging.getLogger(__name__)

_LEADER: Final = stock._RAFT_STATE.LEADER

_REGULAR: Final = 0
_NO_OP: Final = 1
_JOINED: Final = 4
"""Beyond those of pysyncobj, none of which but the first two we use. Older software passes over it."""

_OF_LEADERS: Final = frozenset({"append_entries", "snapshot_piece"})
_OF_VOTERS: Final = frozenset({"request_vote", "timeout_now"})
_POLLS: Final = frozenset({"pre_vote", "pre_vote_answer"})

_NOT_IN_THE_LOG = frozenset({FAIL_REASON.QUEUE_FULL, FAIL_REASON.MISSING_LEADER, FAIL_REASON.REQUEST_DENIED})


def _ignored(owner: object, made: object) -> None:
    """The setter of a property in whose place a constructor of pysyncobj puts something of its own."""
    del owner, made


def _of_majority(own: Any, others: dict[Any, Any]) -> Any:
    """What most have got to, of a leader and all others; pysyncobj's tables hold all of them while it leads."""
    ranked = sorted([own, *others.values()])
    return ranked[(len(ranked) - 1) // 2]


class Peer(Node):  # type: ignore[misc] # pysyncobj has no types
    """A node of the cluster. Its rank is its place among all ids, and its hash: sets of nodes then have one order."""

    __slots__ = ("id",)

    def __init__(self, node: str, rank: int) -> None:
        super().__init__(node, rank=rank)
        object.__setattr__(self, "id", node)  # asked for often; a property in pysyncobj

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
    """In the place of pysyncobj's serializer: it takes no snapshots and sends none. `CatchUp` and `Compaction` do."""

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


class _NoPoller:
    """In the place of pysyncobj's poller: the event loop polls."""

    def poll(self, timeout: float) -> None:
        pass


@dataclass(slots=True, kw_only=True)
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
        node: Peer,
        peers: list[Peer],
        transport: Transport,
        journal: RaftJournal,
        guard: Guard,
        apply: Callable[[bytes], object],
        settings: RaftSettings,
        standing: Standing,
        joined: Callable[[str, bytes], None],
    ) -> None:
        self._journal = journal
        self._log = journal.log
        self._wire = transport
        self._standing = standing
        self._joined = joined
        self._guard = guard
        self._apply = apply
        self._settings = settings
        self._peers = peers
        self._outstanding: dict[str, _Outstanding] = {}
        self._told_commit: dict[str, int] = {}
        self._commit_at_tick = 0
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
        super().__init__(node, peers, conf=conf, nodeClass=Peer, transport=_Adapter(self.held))
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

    # And it looks into it by way of these.

    def _SyncObj__getCurrentLogIndex(self) -> int:
        return self._log.last

    def _SyncObj__getEntries(self, fromIDx: int, count: int | None = None) -> list[Entry]:
        end = self._log.last + 1
        if count is not None:
            end = min(end, fromIDx + count)
        return self._log.entries.span(fromIDx, end) if fromIDx >= self._log.base else []

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
        return self._log.entries.last

    def term_at(self, index: int) -> int | None:
        """The term of its entry at `index`, None where it has none."""
        return self._log.term_at(index)

    # Who leads.

    def leads(self) -> bool:
        """Whether this node does, as far as it knows."""
        leads: bool = self._SyncObj__raftState == _LEADER
        return leads

    def leader(self) -> str | None:
        """Who does, if that is this node or one that it is connected to."""
        leader = self._SyncObj__raftLeader
        # Without any connection pysyncobj does not campaign, and would believe in the last leader for ever.
        if leader is None or not (leader is self._SyncObj__selfNode or self.is_connected(leader)):
            return None
        id_: str = leader.id
        return id_

    def follows(self, peer: Peer) -> bool:
        """Whether `peer` is the last leader that it has heard of, connected or not."""
        follows: bool = self._getLeader() == peer
        return follows

    def has_backlog(self) -> bool:
        """Whether it has so much to apply that another had better lead."""
        return self.last_index - self.applied_index > self._settings.backlog_entries_max

    def has_work(self) -> bool:
        """Whether it should take a turn now, and not at the next tick.

        A leader, if it can commit, apply or send anything. A follower applies tick by tick, in batches: only who asks
        it, and not its leader, waits for that.
        """
        committed = self.commit_index
        return self.leads() and (
            committed > self.applied_index or self._held_by_majority() > committed or bool(self._peers_to_send_to())
        )

    def hand_over(self, peer: Peer) -> None:
        """As leader: ask this follower, which holds all of the log, to lead."""
        self.transferLeadership(peer)

    # What arrives.

    def receive(self, sender: Peer, sender_term: int, message: Message) -> None:
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
            if self.leads() and sender_term == self.term:
                if not self._standing.is_joining(sender.id):
                    self._SyncObj__lastResponseTime[sender] = stock.monotonicTime()
                self.catch_up.got(sender.id, self.term, message)
        elif kind == "progress":
            if self.leads() and self._guard.counts_acknowledgement(message, sender_term, self):
                outstanding = self._outstanding.get(sender.id)
                if outstanding is not None and message["next_node_idx"] > outstanding.last:
                    del self._outstanding[sender.id]
        elif kind == "next_node_idx":
            if self.leads() and self._guard.counts_acknowledgement(message, sender_term, self):
                self._acknowledged(sender, message)
        elif kind != "response_vote" or self._guard.counts_vote(message, sender.id):
            self._SyncObj__onMessageReceived(sender, message)

    # Polls before campaigns; see `prevote.py`.

    def _polled(self, sender: Peer, sender_term: int, message: Message) -> None:
        """A question, or an answer."""
        if sender_term > self.term:
            # It will not follow, nor be led by, who is behind it; a question alone begins no term.
            self._SyncObj__setCurrentTerm(sender_term, None)
            self._step_down()
        if message["type"] == "pre_vote_answer":
            self._prevote.note(sender.id, message["term"], granted=message["granted"])
        elif self.leads():
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
        if self.has_backlog():
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

    # Catching up.

    def _catch_up_with(self, sender: Peer, message: Message) -> None:
        if message["index"] > self.commit_index:
            self.catch_up.piece(sender.id, message)
            return
        done = {"type": "snapshot_got", "index": message["index"], "offset": message["size"], "done": True}
        self.held.send(sender.id, done)

    def _acknowledged(self, sender: Peer, message: Message) -> None:
        """As pysyncobj would take it, but for what it would send again, and for whom it would count."""
        next_index, next_indices = message["next_node_idx"], self._SyncObj__raftNextIndex
        outstanding = self._outstanding.get(sender.id)
        if not self._standing.is_joining(sender.id):  # with it there is no majority
            self._SyncObj__lastResponseTime[sender] = stock.monotonicTime()
        if message["success"]:
            if next_index - 1 > self.match_index(sender):
                self._SyncObj__raftMatchIndex[sender] = next_index - 1
                # It would go back to there, and send again all that is under way.
                next_indices[sender] = max(next_indices[sender], next_index)
            if outstanding is not None and next_index > outstanding.last:
                del self._outstanding[sender.id]
        if message["reset"]:
            asked = next_indices[sender] - 1 if outstanding is None else outstanding.previous
            # Else it denies something sent earlier, and has been heeded already. (Any denial of what was sent last asks
            # for something before it.) Going forward again would let a long tail of another leader's never be overcome.
            if next_index <= asked:
                next_indices[sender] = next_index
                self._outstanding.pop(sender.id, None)

    def connect(self, peer: Peer) -> None:
        """There is a connection to `peer`."""
        self._SyncObj__onNodeConnected(peer)

    def disconnect(self, peer: Peer) -> None:
        """There is none any more."""
        self._SyncObj__onNodeDisconnected(peer)
        # Whether it arrived is told by the answer to the next heartbeat.
        self._outstanding.pop(peer.id, None)
        self.held.forget(peer.id)
        self.catch_up.forget(peer.id)

    def is_connected(self, peer: Peer) -> bool:
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
        if not idle or not self.leads():
            return
        voters = [peer for peer in self._peers if not self._standing.is_joining(peer.id)]
        best = max(voters, key=lambda peer: (self.is_connected(peer), self.match_index(peer)), default=None)
        if best is not None:
            self.held.send(best.id, {"type": "timeout_now", "term": self.term})
        self._step_down()

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

    def caught_up(self, peer: Peer, index: int) -> None:
        """This follower holds the log up to `index`, by a snapshot."""
        if not self.leads():
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
        for peer in self._peers_to_send_to():
            self._append_to(peer)

    def _peers_to_send_to(self) -> list[Peer]:
        """One that needs a snapshot is not among them: it gets heartbeats, and pieces."""
        next_index, first, last = self._SyncObj__raftNextIndex, self._log.base, self._log.last
        return [
            peer
            for peer in self._peers
            if peer.id not in self._outstanding and first < next_index[peer] <= last and self.is_connected(peer)
        ]

    def tell_commits(self) -> None:
        """At every tick: tell followers what is committed, where no entries tell them.

        While commits go on, the next entries will, as a rule; so only what was committed a tick ago is told by itself,
        and to who has all of it already.
        """
        committed = self.commit_index
        before, self._commit_at_tick = self._commit_at_tick, committed
        if before != committed:
            return
        for peer in self._peers:
            untold = self._told_commit.get(peer.id) != committed and peer.id not in self._outstanding
            if untold and self._SyncObj__raftNextIndex[peer] > committed:
                self._append_to(peer)

    def match_index(self, peer: Peer) -> int:
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

    def _append_to(self, peer: Peer) -> None:
        """One message: all that is new; or none of it while an answer is outstanding, only what that builds on."""
        if not self.is_connected(peer):
            return
        now_s = stock.monotonicTime()
        outstanding = self._outstanding.get(peer.id)
        if outstanding is not None and now_s > outstanding.since_s + self._settings.leader_fallback_s:
            del self._outstanding[peer.id]
            self._SyncObj__raftNextIndex[peer] = outstanding.previous + 1
            outstanding = None
        first = self._log.base
        previous = self._SyncObj__raftNextIndex[peer] - 1 if outstanding is None else outstanding.previous
        entries: list[Entry] = []
        if previous < first:
            self._outstanding.pop(peer.id, None)
            self.catch_up.needed(peer.id, self.term)
            previous = first  # it will deny that it has it, and so be heard of; and if it has it, all is well
        elif outstanding is None:
            end = min(self._log.last, previous + self._settings.append_entries_max) + 1
            entries = self._log.entries.span(previous + 1, end)
            size = 0
            for count, (command, _index, _term) in enumerate(entries, start=1):
                size += len(command)
                if size >= self._settings.append_bytes_max:
                    entries = entries[:count]
                    break
        previous_term = self._log.term_at(previous)
        assert previous_term is not None
        message = {
            "type": "append_entries",
            "term": self.term,
            "commit_index": self.commit_index,
            "prevLogIdx": previous,
            "prevLogTerm": previous_term,
            "entries": entries,
        }
        if self.held.send(peer.id, message):
            last: int = entries[-1][1] if entries else previous
            # Of more than it is known to hold, a follower believes nothing.
            self._told_commit[peer.id] = min(self.commit_index, last)
            if entries:
                self._outstanding[peer.id] = _Outstanding(previous=previous, last=last, since_s=now_s)
                self._SyncObj__raftNextIndex[peer] = last + 1

    # What is proposed, committed and applied.

    def turn(self) -> None:
        """Do what is due."""
        if self.leads():
            self._lead()
            return
        self.catch_up.lead_no_more()
        if self._idle or not self._standing.is_voter:
            self._SyncObj__raftElectionDeadline = stock.monotonicTime() + self._settings.election_min_s
        if self._may_campaign():
            self.doTick()
            return
        # Not by its tick. That reads the clock for itself, a moment later: what was not due for us could be for it.
        self._SyncObj__applyLogEntries()
        self._checkCommandsToApply()

    def _lead(self) -> None:
        # Its tick would look at every entry that is not committed, one by one, each time: a second, for a new leader of
        # a million entries.
        self._commit()
        if not self._hears_majority():
            self._step_down()
        self._SyncObj__applyLogEntries()
        if self.leads() and stock.monotonicTime() > self._SyncObj__newAppendEntriesTime:
            self._SyncObj__sendAppendEntries()
        self._checkCommandsToApply()
        if self.leads():
            self.send_eagerly()

    def _hears_majority(self) -> bool:
        """Whether so many have answered of late that no other node can have been elected unheard."""
        now_s: float = stock.monotonicTime()
        heard_s: float = _of_majority(now_s, self._SyncObj__lastResponseTime)
        return heard_s > now_s - self._settings.leader_fallback_s

    def _step_down(self) -> None:
        """Nobody does, as far as it knows."""
        self._SyncObj__setState(stock._RAFT_STATE.FOLLOWER)
        self._SyncObj__raftLeader = None

    def propose(self, command: bytes, answered: Callable[[object, Exception | None], None]) -> None:
        """Take `command` into the log; `answered` hears its result, or a `NotProposed` or `ProposalUnknown`.

        `answered` must not raise: pysyncobj would apply the entry a second time.
        """
        self._applyCommand(command, partial(self._answer, answered), _REGULAR)

    def _answer(self, answered: Callable[[object, Exception | None], None], result: object, reason: int) -> None:
        if reason == FAIL_REASON.SUCCESS:
            answered(result, None)
        elif reason in _NOT_IN_THE_LOG:
            answered(None, NotProposed(f"{self.selfNode.id} no longer leads"))
        else:
            answered(None, ProposalUnknown(f"pysyncobj's reason is {reason}"))

    def append_joined(self, node: str, nonce: bytes) -> None:
        """As its leader: let the log say that this node was there with that nonce."""
        assert self.leads()
        self._journal.add(bytes([_JOINED]) + nonce + node.encode(), self.last_index + 1, self.term)

    def abstain(self) -> None:
        """Vote for nobody in this term."""
        self._SyncObj__setCurrentTerm(self.term, self.selfNode.id)

    def _commit(self) -> None:
        """Commit what a majority holds, if the last of it is of this term (with it all before it is committed)."""
        committed, by_majority = self.commit_index, self._held_by_majority()
        if by_majority > committed and self.term_at(by_majority) == self.term:
            self._SyncObj__raftCommitIndex = committed = by_majority
            self._journal.setRaftCommitIndex(committed)
        self._by_majority = committed

    def _held_by_majority(self) -> int:
        committed = self.commit_index
        if committed == self._log.last:
            return committed  # there is no more to be held
        index: int = _of_majority(self._own_match_index(), self._SyncObj__raftMatchIndex)
        return index

    def _own_match_index(self) -> int:
        """Up to where this leader may count itself."""
        return self._journal.durable_index

    def _checkCommandsToApply(self) -> None:
        if not self._SyncObj__commandsQueue._FastQueue__queue:
            return  # nearly always
        if self.leads():
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
        if self.leads() and not self._peers:
            # Alone in its cluster pysyncobj would count it before its sync.
            self._SyncObj__raftCommitIndex = min(self.commit_index, self._by_majority)
        # In slices: replaying a long log in one go would silence this node for longer than its followers wait.
        applied, size = self.applied_index, 0
        until = min(self.commit_index, applied + self._settings.apply_entries_max)
        if until <= applied:
            return False
        for command, index, term in self._log.entries.span(applied + 1, until + 1):
            waiting = self._SyncObj__commandsWaitingCommit.pop(index, ())
            result = self._SyncObj__doApplyCommand(command)
            for proposed_term, callback in waiting:
                if proposed_term == term:
                    callback(result, FAIL_REASON.SUCCESS)
                else:
                    callback(None, FAIL_REASON.DISCARDED)
            self._SyncObj__raftLastApplied = index
            size += len(command)
            if size >= self._settings.apply_bytes_max:
                break
        return False

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
