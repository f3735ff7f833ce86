"""A `ReplicatedLog` over Raft: one `Replica`, driven turn by turn, with what it needs around it.

Messages are handled as they arrive. A turn is taken at every tick, and between ticks when there is work for one,
coalesced with `call_soon`; what comes most often makes none for a follower, which applies tick by tick. Nothing in a
turn runs code of others except `StateMachine.apply`: proposers hear through futures, `on_leadership` through
`call_soon`.

**After a stall** (the loop stood still, or the machine did) what peers have said meanwhile waits in the sockets.
Judging the election deadline before reading it would depose a healthy leader, so a late turn lets the loop read
first.

**Whoever loses leadership** answers its open proposals at the end of the same turn: by then all that is known to be
committed has been applied, and what never entered the log has been refused; nobody knows about the rest.

**A node that came without a log** takes no part in elections and counts for nothing until it has joined
(`standing.py`, `membership.py`).
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from functools import partial

from cluster.replication.catch_up import CatchUp
from cluster.replication.clock import Clock, SystemClock
from cluster.replication.compaction import Compaction
from cluster.replication.guard import Guard, Message
from cluster.replication.holdback import ACKNOWLEDGEMENT
from cluster.replication.journal import JournalHandlers
from cluster.replication.log import CannotStart, Leadership, NotProposed, OnFatal, StateMachine
from cluster.replication.membership import Membership
from cluster.replication.proposals import Proposals
from cluster.replication.raft import Peer, Replica
from cluster.replication.raft_journal import JournalFactory, RaftJournal
from cluster.replication.settings import RaftSettings
from cluster.replication.snapshot import Snapshot, Snapshots, recover
from cluster.replication.standing import NONCE_BYTES, Marker, Standing, at_start
from cluster.replication.transport import Handlers, Transport

_log = logging.getLogger(__name__)

_OFTEN = frozenset({"append_entries", ACKNOWLEDGEMENT})
"""Kinds of messages that come many times a second."""

_READS_BEFORE_A_LATE_TURN = 2
"""Turns of the event loop: the first may run before the sockets are polled, the second cannot."""


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
    _compaction_type = Compaction
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
        everyone = {id_: Peer(id_, rank) for rank, id_ in enumerate(ids)}
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
        self._membership: Membership | None = None
        self._replica: Replica | None = None
        self._journal: RaftJournal | None = None
        self._machine: StateMachine | None = None
        self._catch_up: CatchUp | None = None
        self._compaction: Compaction | None = None
        self._queued_bytes = 0
        """Of commands that are not in the log yet, about."""
        self._on_leadership: Callable[[Leadership], None] | None = None
        self._told: Leadership | None = None
        self._proposals = Proposals(self._clock, self._settings.proposal_timeout_s)
        self._orphaned = False
        self._dead_leader: str | None = None
        """Until it is decided whether this node campaigns at once to take its place."""
        self._transferring = False
        self._ended: str | None = "not started"
        self._leaving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._woken = False
        self._turned_s = 0.0
        self._reads_owed: int | None = None
        """Loop turns that a late turn still lets pass; None: it was not late."""
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
        newest: Snapshot | None = None
        if found is not None:
            newest, put = found
            put()
        self._membership = Membership(
            node=self._node,
            standing=self._standing,
            journal=journal,
            owner=self,
            settings=self._settings,
            clock=self._clock,
        )
        self._replica = self._replica_type(
            node=self._self,
            peers=list(self._peers.values()),
            transport=self._transport,
            journal=journal,
            guard=self._guard,
            apply=machine.apply,
            settings=self._settings,
            standing=self._standing,
            joined=self._membership.joined,
        )
        self._replica.catch_up = self._catch_up = CatchUp(
            snapshots=snapshots,
            owner=self,
            send=self._replica.held.send,
            clock=self._clock,
            piece_bytes=self._settings.snapshot_piece_bytes,
            repeat_s=self._settings.leader_fallback_s,
        )
        self._compaction = self._compaction_type(
            node=self._node,
            replica=self._replica,
            machine=machine,
            snapshots=snapshots,
            newest=newest,
            failed=self.failed,
            settings=self._settings,
            clock=self._clock,
        )
        if newest is not None:
            self._replica.start_at(newest.index)
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
        self._membership.found()  # with nobody else there is nobody to ask
        self._tell()
        self._on_timer()

    def _read_disk(self) -> tuple[RaftJournal, Snapshots, tuple[Snapshot, Callable[[], object]] | None]:
        """On a thread: read what is on disk."""
        assert self._machine is not None
        self._journal = journal = self._open_journal()
        try:
            snapshots = self._snapshots_type(journal.disk)
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
        self._proposals.begin(future)
        self._queued_bytes += len(command)
        replica.propose(command, partial(self._proposals.answer, future))
        self._wake()
        return future

    def leadership(self) -> Leadership:
        """Who leads, as this node knows it now."""
        replica = self._replica
        if replica is None:
            return Leadership(term=0, leader=None, is_leader=False)
        if self._ended is not None:
            return Leadership(term=replica.term, leader=None, is_leader=False)
        return Leadership(term=replica.term, leader=replica.leader(), is_leader=replica.leads())

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
                replica.hand_over(successor)
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
        under_way = [] if self._compaction is None else [self._compaction.task]
        under_way += [] if self._membership is None else [self._membership.task]
        tasks = [task for task in under_way if task is not None]
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
        if not self._replica.leads():
            return f"{self._node} does not lead"
        if self._transferring:
            return f"{self._node} hands leadership over"
        if len(command) > self._settings.max_command_bytes:
            return f"{len(command)} bytes; the limit is {self._settings.max_command_bytes}"
        if self._journal is not None and self._unsynced_bytes() >= self._settings.unsynced_bytes_max:
            return "the disk does not keep up"
        if len(self._proposals) >= self._settings.proposals_max:
            return f"{self._settings.proposals_max} proposals are open already"
        return None

    def _unsynced_bytes(self) -> int:
        assert self._journal is not None
        return self._queued_bytes + self._journal.unsynced_bytes

    # Snapshots.

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
        if self._compaction is not None:
            self._compaction.installed(snapshot)
        _log.info("%s: caught up to entry %d by a snapshot", self._node, snapshot.index)
        return replaced

    def caught_up(self, peer: str, index: int) -> None:
        """See `catch_up.Owner`."""
        if self._ended is None and self._replica is not None:
            self._replica.caught_up(self._peers[peer], index)
            self._wake()

    def failed(self, error: BaseException) -> None:
        """See `catch_up.Owner`, and `membership.Owner`."""
        self._fail(error)

    # Who counts; see `membership.py`.

    def say(self, peer: str, message: Message) -> None:
        """See `membership.Owner`."""
        assert self._replica is not None
        self._transport.send(peer, self._replica.term, message)

    def abstain(self) -> None:
        """See `membership.Owner`."""
        assert self._replica is not None
        self._replica.abstain()

    def append_joined(self, node: str, nonce: bytes) -> None:
        """See `membership.Owner`."""
        assert self._replica is not None
        self._replica.append_joined(node, nonce)

    def counts_now(self, *, founded: bool) -> None:
        """See `membership.Owner`."""
        if founded:
            self._campaign_in_turn(self._peers)
        self._wake()

    # What the journal tells.

    def _durable(self, _position: int) -> None:
        if self._ended is None and self._replica is not None:
            assert self._membership is not None
            self._replica.held.release()
            self._membership.keep()
            self._wake_for_work()

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
        assert self._membership is not None
        if message["type"] == "understands":
            self._peers_understand[peer] = message["level"]
            return
        if message["type"] == "standing":
            self._membership.heard(peer, message)
            return
        try:
            self._replica.receive(self._peers[peer], term, message)
        except Exception as error:  # noqa: BLE001 - whatever it is, this node must stop
            self._fail(error)
            return
        self._tell()
        if message["type"] in _OFTEN:
            self._wake_for_work()
        else:
            self._wake()

    def _connected(self, peer: str) -> None:
        assert self._replica is not None
        assert self._membership is not None
        self._membership.say(peer)
        self._replica.connect(self._peers[peer])
        self.say(peer, {"type": "understands", "level": self._understands})
        self._wake()

    def _disconnected(self, peer: str) -> None:
        assert self._replica is not None
        self._replica.disconnect(self._peers[peer])
        self._peers_understand.pop(peer, None)
        self._standing.forget(peer)
        self._wake()

    def _refused(self, peer: str) -> None:
        """If this was the leader: elect another, once what is known to be committed is applied."""
        replica = self._replica
        if self._ended is None and replica is not None and replica.follows(self._peers[peer]):
            self._dead_leader = peer
            self._wake()

    def _succeed(self, replica: Replica, dead: str) -> None:
        """After a turn: there has to be another leader, so the survivors campaign one after the other.

        Followers apply tick by tick, so only what is left then is a backlog.
        """
        if replica.commit_index > replica.applied_index:
            return  # this goes on with the next turn
        self._dead_leader = None
        # Who has a backlog still has the election timeout, should nobody else win.
        if replica.follows(self._peers[dead]) and not replica.has_backlog():
            self._campaign_in_turn(id_ for id_ in self._peers if id_ != dead)
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

    def _wake_for_work(self) -> None:
        """After what comes often, and seldom asks for anything: a turn costs more than to look."""
        assert self._replica is not None
        if self._orphaned or self._watchers or self._replica.has_work():
            self._wake()

    def _on_timer(self) -> None:
        replica, membership, compaction = self._replica, self._membership, self._compaction
        if self._ended is not None or replica is None:
            return
        assert membership is not None
        assert compaction is not None
        self._timer = asyncio.get_running_loop().call_later(self._settings.tick_s, self._on_timer)
        now_s = self._clock.monotonic_s()
        self._proposals.expire(now_s)
        if replica.leads():
            try:
                membership.admit(now_s)
            except Exception as error:  # noqa: BLE001 - whatever it is, this node must stop
                self._fail(error)
                return
            replica.tell_commits()
        else:
            membership.ask_again(now_s)
        membership.keep()
        compaction.take_if_due(now_s)
        self._wake()

    def _turn(self) -> None:
        self._woken = False
        replica = self._replica
        if self._ended is not None or replica is None:
            return
        now_s = self._clock.monotonic_s()
        # Once for each late turn: where every turn of the loop takes so long, the node would do nothing else.
        if self._reads_owed is None and now_s - self._turned_s > self._settings.stall_s:
            self._reads_owed = _READS_BEFORE_A_LATE_TURN
        self._turned_s = now_s
        if self._reads_owed:
            self._reads_owed -= 1
            self._wake()
            return
        self._reads_owed = None
        self._queued_bytes = 0
        try:
            replica.turn()
        except Exception as error:  # noqa: BLE001 - whatever it is, this node must stop
            self._fail(error)
            return
        self._tell()
        if self._orphaned:
            self._orphaned = False
            self._proposals.abandon("this node no longer leads")
        if self._dead_leader is not None:
            self._succeed(replica, self._dead_leader)
        if replica.commit_index > replica.applied_index:
            self._wake()
        for condition, future in self._watchers:
            if not future.done() and condition():
                future.set_result(None)

    def _tell(self) -> None:
        """Report a change of leadership, and note its loss."""
        told, replica = self._told, self._replica
        if (
            told is not None
            and replica is not None
            and self._ended is None
            and (told.term, told.is_leader, told.leader) == (replica.term, replica.leads(), replica.leader())
        ):
            return  # nearly always
        now = self.leadership()
        if now == told:
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

    def _successor(self) -> Peer | None:
        """A follower that holds all of this leader's log, nothing in it being open."""
        replica = self._replica
        if replica is None or not self.leadership().is_leader:
            return None
        if len(self._proposals) or replica.applied_index != replica.last_index:
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

    def _end(self, why: str) -> None:
        """Neither act nor speak from here on."""
        self._ended = why
        if self._timer is not None:
            self._timer.cancel()
        for part in (self._membership, self._compaction):
            if part is not None:
                part.end()
        self._tell()
        self._proposals.abandon(f"the node has ended: {why}")
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
