"""The replicated state machine: every transaction, participant and idempotency key, as the log made them.

One `apply(bytes)` serves the leader, the followers and a replay after a restart. It is deterministic, reads no clock,
and raises on nothing that this software can have written.

Fencing
-------
Every command carries the epoch of the leader that proposed it. `TookOver` starts an epoch, and from then on everything
of an older epoch is refused, however it came into the log. So once `TookOver(e)` is applied, a gid of an epoch before
`e` that is not in the table will never be in it: its transaction has aborted, by presumption, for ever.

Within an epoch transactions begin in the order of their numbers, and one that comes after a newer one is refused. A
leader's log keeps that order anyway; the rule makes sure, because the floors that participants are told rest on it.

The floor
---------
Ended transactions are forgotten in the end, and a forgotten one must not be taken for one that never began. Hence the
floor, moved by `Forgotten`: a gid numbered at or below it that is not in the table *may* have been there. Nothing at or
below the floor can begin any more.

    gid in the table, decided            its outcome, from any node: decisions never change
    gid in the table, undecided          not known yet
    not in the table, at or below floor  forgotten
    not in the table, older epoch        aborted (presumed), from any node
    not in the table, a newer one is     aborted (presumed), from any node: it would begin out of order
    not in the table, current epoch      only the leader past its barrier can tell
    not in the table, in a lost range    not known yet, see `lost.py`: after a restore, before all the others

What is not understood
----------------------
Commands enter the log through `encode_command` of some node's software (`commands.py`), the newest included. So what
this software does not understand is one of two things:

- *Newer software may have written it*: a newer command version, an unknown tag, more fields than are known, an unknown
  value of an enum or name of a protocol, `Raised` beyond what this software understands. Others may well understand
  it. To pass it over would make this replica differ from theirs without a sign, so the node stops (`NeedsNewer`) before
  it has changed anything, and stops again at each start, until it runs software that understands it.
- *Nobody can have written it*, by the rules of `levels.py` and of `RecordCodec`: not msgpack, another shape, a field of
  another type. Every replica of every version comes to that same conclusion. It changes nothing, and people hear of it;
  to stop would stop all nodes for good, at every start again, and help nobody.

An entry whose level (`levels.py`) is above the cluster's is refused too, by every replica that understands it. The
driver proposes none; this is so that nothing else can.

Memory
------
Ended transactions are kept packed (`packed.py`). The table is keyed by gid number and ordered by it, because
transactions begin in that order (`rows.py`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import msgpack

from cluster.replication.log import NeedsNewer
from coordinator.codec import Malformed, Newer, to_msgpack
from coordinator.commands import decode_command
from coordinator.copies import NO_DIGEST, chained
from coordinator.facts import Applied, Knowledge, Participant, Verdict
from coordinator.levels import NEWEST, OLDEST, level_of
from coordinator.lost import EPOCH_MARGIN, EPOCH_MAX, LostRange, first_of, last_of
from coordinator.packed import ended_at_of, is_committed, pack, unpack
from coordinator.protocol.entries import (
    Acknowledged,
    Beginning,
    Begun,
    ContradictionSeen,
    CopyInstalled,
    CopyPiece,
    Decided,
    Ended,
    Enlisted,
    Entry,
    Forgotten,
    Header,
    LostRangeNoted,
    Opened,
    Raised,
    Reconciled,
    Registered,
    Resolved,
    Sealed,
    TookOver,
    TransactionEntry,
    Unregistered,
)
from coordinator.protocol.messages import Gid
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import Branch, Decision, Heuristic, State, Transaction, VoteKind
from coordinator.rows import Keys, Rows
from coordinator.states import (
    Bounds,
    head_piece,
    needs_newer,
    participants_of,
    read_head,
    refuse_strange_participants,
    restore_rows,
    row_pieces,
    works_at,
)

_log = logging.getLogger(__name__)

_APPLIED: Final = Verdict.APPLIED
"""To look a member up in its enum takes as long as to make a small record, and every entry comes by here."""


@dataclass(slots=True, eq=False)
class Staged:
    """A copy on its way in: how much of it has come, and what that amounts to."""

    restore: str
    ledger: "Ledger"
    count: int = 0
    digest: bytes = NO_DIGEST


class Ledger:
    """State and its one transition function. `on_applied` hears what every command did, on every node."""

    def __init__(
        self, cluster: str, on_applied: Callable[[list[Applied]], None] | None = None, *, understands: int = NEWEST
    ) -> None:
        """understands: the level of the software; less than `NEWEST` is for tests."""
        self.cluster = cluster
        self.on_applied = on_applied
        self.on_restored: Callable[[], None] | None = None
        """Called when a snapshot has taken the place of the state, on a node that was far behind."""
        self.understands = understands
        self.level = OLDEST
        """The level that the cluster works at; see `levels.py`."""
        self.epoch = 0
        self.leader: str | None = None
        """The node that took over last; of the last epoch applied here, not necessarily today's."""
        self.floor = -1
        self.participants: dict[str, Participant] = {}
        self.keys = Keys()
        self.unfinished: dict[int, Transaction] = {}
        self.kept: set[int] = set()
        """Numbers of transactions of which an operator has resolved a branch, until that is acknowledged."""
        self._table = Rows()
        """Every known gid number, in order; the packed transaction once it has ended, None while it has not."""
        self.epoch_base = 0
        """Epochs are Raft terms and this; only a restore changes it."""
        self.lost: LostRange | None = None
        """What is being found out since a restore."""
        self.staged: Staged | None = None
        self._expected: int | None = None
        """While it is being decoded: how many transactions there will be; None before the first piece."""

    # -------------------------------------------------------------------------------------------- applying

    def apply(self, command: bytes) -> list[Applied]:
        """Apply one committed command. Raises `NeedsNewer`, and nothing else; then nothing has changed."""
        try:
            header, entries = decode_command(command)
        except Newer as error:
            raise NeedsNewer(needs_newer(f"the log holds {error}", self.understands)) from error
        except Malformed as error:
            # Every replica comes to this same conclusion, so the copies stay equal; people must hear of it.
            _log.critical("a committed command is not understood and changed nothing: %s", error)
            return []
        if header.epoch >= self.epoch:
            self._refuse_what_is_newer(entries)
        applied = [self._apply_entry(header, entry) for entry in entries]
        if self.on_applied is not None:
            self.on_applied(applied)
        return applied

    def _refuse_what_is_newer(self, entries: list[Entry]) -> None:
        """Before the first of them is applied: a command is applied as a whole, or not at all."""
        for entry in entries:
            if type(entry) is Raised and entry.level > self.understands:
                raise NeedsNewer(works_at(entry.level, self.understands))
            if (type(entry) is Begun or type(entry) is Opened) and entry.protocol not in PROTOCOLS:
                what = f"the log holds a transaction of the unknown protocol {entry.protocol!r:.40}"
                raise NeedsNewer(needs_newer(what, self.understands))

    def _apply_entry(self, header: Header, entry: Entry) -> Applied:
        if header.epoch < self.epoch:
            return Applied(entry=entry, verdict=Verdict.FENCED)
        # Nothing that is understood is above `NEWEST`.
        if self.level < NEWEST and level_of(entry) > self.level and not isinstance(entry, Raised):
            return Applied(entry=entry, verdict=Verdict.TOO_EARLY)
        match entry:  # what every transaction comes by stands first
            case Begun():
                return self._begin(header, entry)
            case Decided() | Ended():
                return self._advance(header, entry)
            case TookOver():
                return self._take_over(header, entry)
            case Opened():
                return self._begin(header, entry)
            case Enlisted() if entry.participant not in self.participants:
                return Applied(entry=entry, verdict=Verdict.UNKNOWN_PARTICIPANT, detail=entry.participant)
            case Enlisted() | Sealed() | ContradictionSeen() | Resolved() | Acknowledged():
                return self._advance(header, entry)
            case Registered():
                self.participants[entry.name] = Participant(name=entry.name, url=entry.url, batch=entry.batch)
                return Applied(entry=entry, verdict=Verdict.APPLIED)
            case Unregistered():
                return self._unregister(entry)
            case Forgotten():
                return self._forget(entry)
            case Raised():
                return self._raise(entry)
            case CopyPiece():
                return self._stage(entry)
            case CopyInstalled():
                return self._install(header, entry)
            case Reconciled():
                return self._reconcile(header, entry)
            case LostRangeNoted():
                return self._note_lost(entry)

    def _take_over(self, header: Header, entry: TookOver) -> Applied:
        if header.epoch == self.epoch and self.leader != entry.node:
            # Raft elects one leader a term; a second claim to one epoch would be its failure, and is not honoured.
            _log.critical("%s claims epoch %d, which %s has", entry.node, header.epoch, self.leader)
            return Applied(entry=entry, verdict=Verdict.FENCED)
        if header.epoch > self.epoch:
            self.staged = None  # a restore ends with the leader that it came by; a later one starts over
        self.epoch, self.leader = header.epoch, entry.node
        return Applied(entry=entry, verdict=Verdict.APPLIED)

    def _begin(self, header: Header, entry: Beginning) -> Applied:
        gid = self.own_gid(entry.gid)
        protocol = PROTOCOLS.get(entry.protocol)
        if gid is None or protocol is None:
            return Applied(entry=entry, verdict=Verdict.MALFORMED)
        if header.epoch != self.epoch or gid.epoch != header.epoch:
            return Applied(entry=entry, verdict=Verdict.FENCED)
        number = gid.number
        if number <= self._newest() or number <= self.floor:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, txn=self._at(number))
        holding = None if entry.key is None else self.keys.get(entry.key)
        if holding is not None:
            holder = self._at(holding)
            same = holder is not None and holder.body_hash == entry.body_hash
            return Applied(entry=entry, verdict=Verdict.KEY_TAKEN if same else Verdict.KEY_REUSED, txn=holder)
        for plan in entry.branches if isinstance(entry, Begun) else ():
            if plan.participant not in self.participants:
                return Applied(entry=entry, verdict=Verdict.UNKNOWN_PARTICIPANT, detail=plan.participant)
        txn = protocol.evolve(None, entry, header)
        if txn is None:
            return Applied(entry=entry, verdict=Verdict.MALFORMED)
        if entry.key is not None:
            self.keys[entry.key] = number
        self._store(number, txn)
        return Applied(entry=entry, verdict=_APPLIED, txn=txn)

    def _advance(self, header: Header, entry: TransactionEntry) -> Applied:
        number = Gid.number_in(self.cluster, entry.gid)
        if number is None:
            return Applied(entry=entry, verdict=Verdict.MALFORMED)
        before = self.unfinished.get(number)
        if before is None:
            if number not in self._table:
                return self._presume(header, entry, number)
            if not isinstance(entry, Acknowledged):
                return Applied(entry=entry, verdict=Verdict.UNCHANGED, txn=self._at(number))
            before = self._at(number)
            assert before is not None, "it is in the table"
        after = PROTOCOLS[before.protocol].evolve(before, entry, header)
        if after is None or after is before:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, txn=before)
        self._store(number, after)
        return Applied(entry=entry, verdict=_APPLIED, txn=after)

    def _presume(self, header: Header, entry: TransactionEntry, number: int) -> Applied:
        """Somebody in doubt asked for a gid of this epoch that never began: note the abort, so that it never does."""
        if (
            not isinstance(entry, Decided)
            or entry.decision is not Decision.ABORT
            or header.epoch != self.epoch
            or not first_of(self.epoch) <= number <= last_of(self.epoch)
            or number <= self.floor
            or number < self._newest()
        ):
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        txn = Transaction(
            gid=entry.gid,
            protocol="2pc",
            epoch=header.epoch,
            branches=(),
            timeout_ms=0,
            started_at=header.at,
            decision=Decision.ABORT,
            reason=entry.reason,
            decided_at=header.at,
            ended_at=header.at,
        )
        self._store(number, txn)
        return Applied(entry=entry, verdict=Verdict.APPLIED, txn=txn)

    def _unregister(self, entry: Unregistered) -> Applied:
        if entry.name not in self.participants:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        for txn in self.unfinished.values():
            if any(branch.participant == entry.name for branch in txn.branches):
                return Applied(entry=entry, verdict=Verdict.IN_USE, detail=txn.gid)
        del self.participants[entry.name]
        return Applied(entry=entry, verdict=Verdict.APPLIED)

    def _forget(self, entry: Forgotten) -> Applied:
        if entry.floor < self.floor and self.level == OLDEST:
            # Software of level 1 does nothing then. Since, a restore may raise the floor above all that it brought,
            # which is then forgotten piece by piece, below the floor.
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        doomed = [number for number, _ in self.forgettable(entry.before, entry.floor)]
        for number in doomed:
            txn = self._at(number)
            del self._table[number]
            if txn is not None and txn.key is not None and self.keys.get(txn.key) == number:
                del self.keys[txn.key]
        self.floor = max(self.floor, entry.floor)
        return Applied(entry=entry, verdict=Verdict.APPLIED)

    def _raise(self, entry: Raised) -> Applied:
        if entry.level <= self.level:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        self.level = entry.level
        return Applied(entry=entry, verdict=Verdict.APPLIED)

    # -------------------------------------------------------------------------------------------- restoring

    @property
    def is_fresh(self) -> bool:
        """Whether there never was a transaction: only then a copy can take its place."""
        return not len(self._table) and self.floor < 0 and self.lost is None and not self.epoch_base

    def _stage(self, entry: CopyPiece) -> Applied:
        """Decoded as they come, so that installing them takes no time."""
        if entry.index == 0:
            # It understands no more than all replicas do, whatever software each of them runs.
            self.staged = Staged(entry.restore, Ledger(self.cluster, understands=self.level))
        staged = self.staged
        if staged is None or staged.restore != entry.restore or staged.count != entry.index:
            self.staged = None
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, detail="a piece before it is missing")
        try:
            staged.ledger.feed(entry.data, foreign=True)
        except (Malformed, NeedsNewer) as error:
            self.staged = None
            return Applied(entry=entry, verdict=Verdict.MALFORMED, detail=str(error))
        staged.count += 1
        staged.digest = chained(staged.digest, entry.data)
        return Applied(entry=entry, verdict=Verdict.APPLIED)

    def _install(self, header: Header, entry: CopyInstalled) -> Applied:
        staged = self.staged
        if staged is not None and staged.restore != entry.restore:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, detail="another restore has begun")
        self.staged = None
        if staged is None or (staged.restore, staged.count, staged.digest) != (
            entry.restore,
            entry.pieces,
            entry.digest,
        ):
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, detail="pieces of the copy are missing")
        copy = staged.ledger
        if not self.is_fresh:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, detail="this cluster has had transactions")
        if not copy.is_whole:
            return Applied(entry=entry, verdict=Verdict.MALFORMED, detail="transactions of the copy are missing")
        if not max(self.epoch, copy.epoch) < entry.epoch_base <= EPOCH_MAX - EPOCH_MARGIN:
            return Applied(entry=entry, verdict=Verdict.MALFORMED, detail="the base is not above the copy's epoch")
        undecided = [number for number, txn in copy.unfinished.items() if txn.decision is None]
        newest, table = copy._newest(), copy._table  # noqa: SLF001  # one ledger's from another's
        low = min([max(newest + 1, copy.floor + 1, first_of(copy.epoch)), *undecided])
        if copy.lost is not None:
            low = min(low, copy.lost.low)
        self.lost = LostRange(low=low, high=last_of(entry.epoch_base), since=header.at)
        # Who has registered here by now is where it says, and not where it was.
        self.participants = {**copy.participants, **self.participants}
        self.floor, self.keys, self.unfinished, self._table = copy.floor, copy.keys, copy.unfinished, table
        self.kept = copy.kept
        self.level = max(self.level, copy.level)
        self.epoch = self.epoch_base = entry.epoch_base
        return Applied(entry=entry, verdict=Verdict.APPLIED)

    def _reconcile(self, header: Header, entry: Reconciled) -> Applied:
        gid = self.own_gid(entry.gid)
        if gid is None or self.lost is None or gid.number not in self.lost:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        before = self._at(gid.number)
        if before is None:
            return self._find(header, entry, gid)
        if before.decision is not None:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, txn=before)
        if entry.decision is None:
            del self.unfinished[gid.number], self._table[gid.number]
            if before.key is not None and self.keys.get(before.key) == gid.number:
                del self.keys[before.key]
            return Applied(entry=entry, verdict=Verdict.APPLIED)
        decided = Decided(gid=entry.gid, decision=entry.decision, reason=entry.reason, votes=entry.votes)
        after = PROTOCOLS[before.protocol].evolve(before, decided, header)
        if after is None or after is before:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED, txn=before)
        self._store(gid.number, after)
        return Applied(entry=entry, verdict=Verdict.APPLIED, txn=after)

    def _find(self, header: Header, entry: Reconciled, gid: Gid) -> Applied:
        """One that the copy knows nothing of: what its participants hold is all that will be known of it."""
        votes = {vote.branch: vote.vote for vote in entry.votes}
        names = [plan.name for plan in entry.branches]
        known = len(set(names)) == len(names) and all(votes.get(name) is VoteKind.PREPARED for name in names)
        if entry.decision is None or not names or not known:
            return Applied(entry=entry, verdict=Verdict.MALFORMED)
        for plan in entry.branches:
            if plan.participant not in self.participants:
                return Applied(entry=entry, verdict=Verdict.UNKNOWN_PARTICIPANT, detail=plan.participant)
        txn = Transaction(
            gid=entry.gid,
            protocol="2pc",
            epoch=gid.epoch,
            branches=tuple(
                Branch(name=plan.name, participant=plan.participant, vote=VoteKind.PREPARED) for plan in entry.branches
            ),
            timeout_ms=0,
            started_at=header.at,
            decision=entry.decision,
            reason=entry.reason,
            decided_at=header.at,
        )
        self._store(gid.number, txn)
        return Applied(entry=entry, verdict=Verdict.APPLIED, txn=txn)

    def _note_lost(self, entry: LostRangeNoted) -> Applied:
        lost = self.lost
        if lost is None:
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        if entry.without is not None:
            if entry.without not in lost.without:
                self.lost = replace(lost, without=tuple(sorted({*lost.without, entry.without})))
            return Applied(entry=entry, verdict=Verdict.APPLIED)
        if not entry.closed or any(number in lost and txn.decision is None for number, txn in self.unfinished.items()):
            return Applied(entry=entry, verdict=Verdict.UNCHANGED)
        self.lost, self.floor = None, max(self.floor, lost.high)
        return Applied(entry=entry, verdict=Verdict.APPLIED)

    def _store(self, number: int, txn: Transaction) -> None:
        if txn.kept:
            self.kept.add(number)
        elif self.kept:
            self.kept.discard(number)
        if txn.ended_at is not None:
            self.unfinished.pop(number, None)
            self._table[number] = pack(txn)
        elif number in self.unfinished:
            self.unfinished[number] = txn
        else:
            ascends = number > next(reversed(self.unfinished), -1)
            self.unfinished[number] = txn
            if not ascends:
                self.unfinished = dict(sorted(self.unfinished.items()))
            self._table[number] = None

    # -------------------------------------------------------------------------------------------- reading

    def own_gid(self, text: str) -> Gid | None:
        """The gid, if it is one of this cluster's."""
        gid = Gid.parse(text)
        return gid if gid is not None and gid.cluster == self.cluster else None

    def get(self, text: str) -> Transaction | None:
        """The transaction of this gid, if it is in the table."""
        number = Gid.number_in(self.cluster, text)
        return None if number is None else self._at(number)

    def _at(self, number: int) -> Transaction | None:
        unfinished = self.unfinished.get(number)
        if unfinished is not None:
            return unfinished
        packed = self._table.get(number)
        return None if packed is None else unpack(self.cluster, number, packed)

    def at(self, number: int) -> Transaction | None:
        """The transaction of this number, if it is in the table."""
        return self._at(number)

    def _state_at(self, number: int) -> State:
        """The state of a transaction in the table, without unpacking it."""
        packed = self._table[number]
        if packed is None:
            return self.unfinished[number].state
        return State.COMMITTED if is_committed(packed) else State.ABORTED

    def holder(self, key: str) -> Transaction | None:
        """The transaction that an idempotency key names."""
        number = self.keys.get(key)
        return None if number is None else self._at(number)

    def knowledge(self, text: str) -> Knowledge:
        """What can be said of a gid's outcome from applied state alone."""
        gid = self.own_gid(text)
        if gid is None:
            return Knowledge.FOREIGN
        txn = self._at(gid.number)
        if txn is not None:
            if txn.decision is None:
                return Knowledge.UNDECIDED
            return Knowledge.COMMITTED if txn.decision is Decision.COMMIT else Knowledge.ABORTED
        if self.lost is not None and gid.number in self.lost:
            return Knowledge.LOST
        if gid.number <= self.floor:
            return Knowledge.FORGOTTEN
        if gid.epoch < self.epoch or gid.number < self._newest():
            return Knowledge.ABORTED
        return Knowledge.ASK_LEADER

    def newest(self) -> Gid | None:
        """The last gid in the table."""
        number = self._newest()
        return None if number < 0 else Gid.of_number(self.cluster, number)

    def _newest(self) -> int:
        """The last number in the table, which is the highest; nothing below it can begin any more."""
        return self._table.highest

    def __len__(self) -> int:
        """Transactions in the table, ended ones included."""
        return len(self._table)

    def heuristic(self) -> list[int]:
        """Numbers of transactions that an operator should see to, newest first."""
        contradicted = {number for number, txn in self.unfinished.items() if txn.heuristic is Heuristic.CONTRADICTED}
        return sorted(self.kept | contradicted, reverse=True)

    def page(
        self, *, state: State | None, after: str | None, limit: int, scan: int, heuristic: bool = False
    ) -> tuple[list[Transaction], str | None]:
        """Transactions, newest first, older than gid `after`; and the gid to go on after, or None at the end.

        heuristic: only those that an operator should see to.
        At most `scan` rows are looked at, so a page may be short, or empty, although more follow.
        """
        bound = Gid.parse(after) if after is not None else None
        found: list[Transaction] = []
        unfinished_only = state in (State.ACTIVE, State.PREPARING, State.COMMITTING, State.ABORTING)
        numbers: Iterable[int] = reversed(self.unfinished if unfinished_only else self._table)
        if heuristic:
            numbers = self.heuristic()
        for number in numbers:
            if bound is not None and number >= bound.number:
                continue
            scan -= 1
            if state is None or self._state_at(number) is state:
                txn = self._at(number)
                assert txn is not None, "it is in the table"
                found.append(txn)
            if len(found) == limit or scan <= 0:
                return found, str(Gid.of_number(self.cluster, number))
        return found, None

    def forgettable(self, before: int, floor: int | None = None) -> Iterator[tuple[int, int]]:
        """(number, ended_at) of transactions that ended at or before `before`, oldest first, up to number `floor`.

        Without a floor it ends at the first one that has to stay for its date; those that are unfinished, or that an
        operator has resolved and not acknowledged, are passed over.
        """
        for number, packed in self._table.items():
            if floor is not None and number > floor:
                return
            if packed is None or number in self.kept:
                continue
            ended_at = ended_at_of(packed)
            if ended_at <= before:
                yield number, ended_at
            elif floor is None:
                return

    # -------------------------------------------------------------------------------------------- snapshots

    def snapshot(self) -> Callable[[], Iterator[bytes]]:
        """Freeze now, encode later, on any thread: all that is held is immutable, so shallow copies are enough.

        See `states.py` for what comes of it.
        """
        count = len(self._table) if self._expected is None else self._expected
        rest = [self.cluster, self.epoch, self.leader, self.floor]
        head = head_piece(self.level, rest, self.participants, count)
        chunks, unfinished = self._table.freeze(), dict(self.unfinished)
        more: dict[str, Any] = {}
        if self.epoch_base or self.lost is not None:
            more["restored"] = [self.epoch_base, None if self.lost is None else self.lost.to_plain()]
        staged = None
        if self.staged is not None:
            more["staged"] = [self.staged.restore, self.staged.count, self.staged.digest]
            staged = self.staged.ledger.snapshot() if self.staged.count else None

        def encode() -> Iterator[bytes]:
            yield to_msgpack(head)
            if more:
                yield to_msgpack(more)
            for piece in staged() if staged is not None else ():
                yield to_msgpack({"piece": piece})
            yield from row_pieces(chunks, unfinished)

        return encode

    def restore(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        """Decode what `snapshot` froze; what is returned puts it in place.

        Raises `Malformed`, or `NeedsNewer` when newer software has written it; nothing has changed then.
        """
        made = Ledger(self.cluster, understands=self.understands)
        try:
            for piece in pieces:
                made.feed(piece)
        except Newer as error:
            raise NeedsNewer(needs_newer(f"the snapshot holds {error}", self.understands)) from error
        if not made.is_whole:
            raise Malformed("not a state: transactions are missing, or there are too many")

        def put() -> object:
            replaced = self.participants, self.keys, self._table, self.unfinished, self.staged
            self.level, self.epoch, self.leader, self.floor = made.level, made.epoch, made.leader, made.floor
            self.participants, self.keys, self._table = made.participants, made.keys, made._table
            self.unfinished, self.staged, self.kept = made.unfinished, made.staged, made.kept
            self.epoch_base, self.lost = made.epoch_base, made.lost
            if self.on_restored is not None:
                self.on_restored()
            return replaced

        return put

    @property
    def is_whole(self) -> bool:
        """Whether all transactions have come that the first piece announced."""
        return len(self._table) == self._expected

    def feed(self, piece: bytes, *, foreign: bool = False) -> None:
        """Decode the next piece of a snapshot into this ledger, which is new. Raises `Malformed`, `NeedsNewer`.

        foreign: it comes from outside, as a copy, and anybody may have written it: whatever a ledger would not write is
        refused now, for once it is installed nothing may fail on it.
        """
        try:
            if self._expected is None:
                self.level, (cluster, epoch, leader, floor, participants, count) = read_head(piece, self.understands)
                if cluster != self.cluster:
                    raise Malformed("of another cluster")
                if not all(type(number) is int for number in (epoch, floor, count)):
                    raise Malformed("something else where a number should be")
                if foreign and not (0 <= epoch <= EPOCH_MAX and -1 <= floor <= last_of(epoch) and count >= 0):
                    raise Malformed("a number that cannot be")
                if foreign and not isinstance(leader, str | None):
                    raise Malformed("something else where a node should be")
                self.epoch, self.leader, self.floor = epoch, leader, floor
                self.participants, self._expected = participants_of(participants), count
                if foreign:
                    refuse_strange_participants(self.participants.values())
                return
            plain = msgpack.unpackb(piece)
            if isinstance(plain, dict):
                if foreign:
                    # Of a restore that was under way when the copy was made nothing is wanted.
                    plain = {name: value for name, value in plain.items() if name not in ("staged", "piece")}
                self._feed_more(plain)
                return
            bounds = None
            if foreign:
                bounds = Bounds(cluster=self.cluster, last=last_of(self.epoch), participants=self.participants)
            restore_rows(plain, self._table, self.unfinished, self.keys, self.kept, bounds)
        except Malformed:
            raise
        except (
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            RecursionError,
            msgpack.exceptions.UnpackException,
        ) as error:
            raise Malformed(f"not a state: {error!r:.200}") from error

    def _feed_more(self, more: dict[str, Any]) -> None:
        """What only a cluster has that is being restored, or was."""
        for name, value in more.items():
            if name == "restored":
                self.epoch_base, lost = value
                self.lost = None if lost is None else LostRange.of(lost)
            elif name == "staged":
                restore, count, digest = value
                self.staged = Staged(restore, Ledger(self.cluster, understands=self.level), count, digest)
            elif name == "piece" and self.staged is not None:
                self.staged.ledger.feed(value)
            else:
                raise Newer(f"{name[:40]!r} in a state")

    def fork(self) -> "Ledger":
        """An independent copy, without a listener: for models that walk many futures of one state."""
        copy = Ledger(self.cluster, understands=self.understands)
        copy.level = self.level
        copy.epoch, copy.leader, copy.floor = self.epoch, self.leader, self.floor
        copy.participants, copy.keys = dict(self.participants), self.keys.copy()
        copy.unfinished, copy._table, copy.kept = dict(self.unfinished), self._table.copy(), set(self.kept)
        copy.epoch_base, copy.lost, copy._expected = self.epoch_base, self.lost, self._expected
        if self.staged is not None:
            copy.staged = replace(self.staged, ledger=self.staged.ledger.fork())
        return copy
