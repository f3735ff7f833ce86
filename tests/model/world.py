"""A small world around the production rules: its states, every step between them, and what must hold in each.

The rules under test are the real ones: `TwoPhaseCommit`, `Ledger`, `Tally`, `participants.resource`. This module adds
only their surroundings (a log, a network, leaders, crashes), and gives an adversary all the power it can have there.

What may happen, at any moment and in any order
-----------------------------------------------
- A message is lost, repeated, late, overtaken. The network is a set that only grows: whatever was once sent may be
  delivered now, again, or never.
- A proposal is lost, or is appended to the log late, or twice, also after its proposer was deposed: a set, too.
- The leader changes: the next epoch begins with `TookOver`, what the old leader had heard is gone for the new one, and
  the new one runs `owed` over every unfinished transaction. The deposed leader goes on from what it has applied and
  heard, and applies the rest of the log late or never.
- The deadline passes; the client asks for an abort.
- A participant's work ends in any vote; the participant walks away before its vote; it crashes, and keeps what is
  durable; on request, it also loses a refusal or a read-only vote that it has just sent (the automaton says that no
  safety hangs on their records).
- A participant in doubt asks a node, with any applied prefix of the log, and does as it is told.
- Anybody asks for an outcome. A leader that cannot tell logs the abort.
- An application does a transaction itself: it begins, enlists branches and asks for the commit of all of them, in any
  order, again, late, or never, because it has died; once a branch is enlisted it prepares it on a connection of its
  own, without a message, whatever has been decided meanwhile.
- With an operator: a branch to which something is owed is resolved by hand, in line with the decision or against it;
  then, and only then, somebody may end it by hand in its database. What was resolved is acknowledged once the branch is
  on record as ended there, which is the operator's duty.
- With forgetting: the leader proposes `Forgotten`, and a participant prunes what its horizon allows.

Why a state is so small
-----------------------
Four things only grow, so they need not be stepped; they are functions of the rest, and nothing is lost by it:

1. *What was sent.* Leader k sends what `owed` says over each prefix it applies, and it applies the log in order, up to
   but never past the `TookOver` of its successor. To send at once is the adversary's best: a message need not arrive.
2. *What was told*, to clients and to whoever asks for an outcome: each prefix of the log is applied at some node.
3. *What leader k may have heard* is any tally that `Tally.heard` makes of the answers given to k so far, in any order,
   each any number of times, with a request to abort at any point: the closure is computed by running the real `heard`.
4. *What was proposed* is `decide` over every prefix that leader k may have applied and every such tally, expired or
   not.

So a state is: the log (as the sequence of distinct ledgers it went through), and for each participant its automaton,
its horizon and the set of answers it has given to each leader. A step appends a command to the log, or changes one
participant. Answers that a participant repeats without changing are given at once, for the same reason as 1.

Participants that play the same role are interchangeable: of the states that differ only by their names, one is kept.
Reasons (texts that no rule reads) are left out of states.

What must hold in every state is in `violations` and what it calls. That nothing is stuck is checked by the explorer:
from every state a `settled` one must be reachable, and by helpful steps alone. Helpful is what must happen when the
chaos is over and a majority is there: the leader of today, with all of the log applied, sends what it owes now and
proposes what it wants now; work ends; nodes that have applied all of the log answer. Old messages, old leaders, stale
nodes, crashes and walks away may hinder, and must not be needed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

from coordinator.commands import encode_command
from coordinator.facts import Knowledge
from coordinator.ledger import Ledger
from coordinator.levels import NEWEST
from coordinator.protocol.base import CommitProtocol
from coordinator.protocol.effects import Reply, Send
from coordinator.protocol.entries import (
    Acknowledged,
    Beginning,
    Begun,
    BranchPlan,
    Decided,
    Enlisted,
    Entry,
    Forgotten,
    Header,
    Opened,
    Raised,
    Registered,
    Resolved,
    Sealed,
    TookOver,
)
from coordinator.protocol.invariants import check, check_delta, check_owed
from coordinator.protocol.messages import (
    Abort,
    Acked,
    Answer,
    Commit,
    Contradicted,
    Gid,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    Request,
    Stamp,
    Vote,
)
from coordinator.protocol.record import replace
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import NOTHING_HEARD, Decision, Tally, Transaction, VoteKind
from coordinator.protocol.two_phase import TwoPhaseCommit
from participants import resource
from participants.resource import Branch, Horizon, State, Step

CLUSTER = "m"
NAMES = ("a", "b", "c")
NOW = 1
"""Every date in the model; time passes only as "expired"."""

# The answers a participant has given to one leader, as bits.
PREPARED, READ_ONLY, REFUSED, ACKED, CONTRADICTED = 1, 2, 4, 8, 16
_BITS: dict[type, int] = {
    Prepared: PREPARED,
    ReadOnly: READ_ONLY,
    Refused: REFUSED,
    Acked: ACKED,
    Contradicted: CONTRADICTED,
}
_NOT_ENLISTED = -1
_RECORDED = (None, VoteKind.PREPARED, VoteKind.READ_ONLY, VoteKind.REFUSED)


def told_floor(ledger: Ledger, name: str) -> int | None:
    """As the driver has it: no floor while nothing names the participant; and what is active may yet come to."""
    naming = [
        number
        for number, txn in ledger.unfinished.items()
        if any(branch.participant == name for branch in txn.branches)
    ]
    active = [number for number, txn in ledger.unfinished.items() if txn.active]
    return min([*naming, *active]) if naming else None


@dataclass(frozen=True)
class Rules:
    """Whatever decides anything. The defaults are production; a variant replaces one or two."""

    protocol: CommitProtocol = field(default_factory=TwoPhaseCommit)
    ledger: Callable[[str], Ledger] = Ledger
    nothing_heard: Tally = NOTHING_HEARD
    receive: Callable[[Branch, Horizon, Request, Stamp], Step] = resource.receive
    finish: Callable[[Branch, Any], Step] = resource.finish
    walk_away: Callable[[Branch, str], Step] = resource.walk_away
    crashed: Callable[[Branch], Branch] = resource.crashed
    prunable: Callable[[Branch, str, Horizon], bool] = resource.prunable
    horizon_survives: bool = True
    """Whether a participant's horizon is durable."""
    tells_early: bool = False
    """Whether a leader tells the client what it has only wished for."""
    may_prepare: Callable[[Branch, str, Horizon], bool] = resource.may_prepare
    """Whether a branch that an application prepares comes to be."""
    floor_of: Callable[[Ledger, str], int | None] = told_floor
    """The number below which a leader tells `name` that nothing will be asked of it."""
    works_unenlisted: bool = False
    """Whether an application prepares where it has not been told that its branch is enlisted."""


@dataclass(frozen=True)
class Planned:
    """A transaction that a client may begin: `gid`'s epoch says at which leader."""

    gid: str
    members: tuple[int, ...]
    key: str | None = None
    application: bool = False
    """Whether an application does the work itself: then `members` is where it will."""
    strays: tuple[int, ...] = ()
    """Where the application has a branch enlisted that it does not name when it asks for the commit."""


@dataclass(frozen=True)
class Scope:
    """How large the world is."""

    participants: int
    changes: int
    """Leader changes after the first leader: epochs run from 1 to changes + 1."""
    transactions: tuple[Planned, ...] = ()
    forgetting: bool = False
    serial: bool = False
    """Whether messages about a branch wait while its work runs, as the participants' server makes them wait.

    The automaton is safe without. But a fenced branch refuses before its tombstone is durable; were that refusal's
    transaction forgotten while a late prepare runs again, nobody could tell the prepared branch its outcome any more.
    """
    records_lost: bool = False
    """Whether refusals and read-only votes may be sent without being durable."""
    operator: bool = False
    """Whether branches are resolved by hand."""

    def planned(self) -> tuple[Planned, ...]:
        """The transactions; one over all participants unless said otherwise."""
        return self.transactions or (Planned("m-1-1", tuple(range(self.participants))),)


class Message(NamedTuple):
    """A request on its way: what, about which transaction, from which leader, with which floor."""

    kind: type[Request]
    txn: int
    epoch: int
    floor: str | None


class Part(NamedTuple):
    """A participant's side of one transaction. `asker` is the leader that waits for the running work's vote."""

    state: State
    asker: int
    said: tuple[int, ...]
    """To each leader, the bits of the answers it was given."""


class Site(NamedTuple):
    """A participant: what is durable, what runs, and what it has said."""

    epoch: int
    floor: int
    parts: tuple[Part, ...]


class Environment(NamedTuple):
    """What surrounds a participant: all that was sent to it, what is owed to it now; all answers, and today's.

    enlisted: the transactions whose application may work here.
    resolved: for each transaction, how the branch here was resolved by an operator.
    """

    requests: tuple[Message, ...]
    owed: frozenset[Message]
    answers: tuple[frozenset[Decision], ...]
    fresh: tuple[frozenset[Decision], ...]
    enlisted: frozenset[int]
    resolved: tuple[Decision | None, ...]


class Wish(NamedTuple):
    """What a leader may have proposed, and out of what knowledge; no tally where none was needed."""

    entry: Entry
    tally: Tally | None
    expired: bool


class Log:
    """A committed log, as the distinct ledgers it went through, and all that follows from them.

    The leader of epoch k acts over the ledgers of epoch k: from its own barrier to its successor's.
    """

    def __init__(self, number: int, commands: tuple[tuple[Header, Entry], ...], ledgers: tuple[Ledger, ...]) -> None:
        self.number = number
        self.commands = commands
        self.ledgers = ledgers
        self.epoch = max(ledger.epoch for ledger in ledgers)
        self.requests: tuple[tuple[Message, ...], ...] = ()
        """To each participant, all that was sent."""
        self.environments: tuple[int, ...] = ()
        self.answers: tuple[frozenset[Decision], ...] = ()
        """For each transaction, what some node may answer to whoever asks for the outcome."""
        self.colours: tuple[tuple[int, ...], ...] = ()
        self.violations: tuple[str, ...] = ()
        self.settled = False


StateId = tuple[int, ...]
"""The log's number, then each participant's."""


class World:
    """All states of one scope under one set of rules, made as they are asked for."""

    def __init__(self, scope: Scope, rules: Rules | None = None) -> None:
        self.scope = scope
        self.rules = rules if rules is not None else Rules()
        self.names = NAMES[: scope.participants]
        self.planned = scope.planned()
        self.gids = tuple(planned.gid for planned in self.planned)
        self.last_epoch = scope.changes + 1
        self.interchangeable = True
        """Whether states that differ only in participants' names are one."""
        self.repeats_at_once = True
        """Whether answers that change nothing else are given at once."""
        self._ledgers: dict[bytes, Ledger] = {}
        self.logs: list[Log] = []
        self._log_numbers: dict[tuple[int, ...], int] = {}
        self.sites: list[Site] = []
        self._site_numbers: dict[Site, int] = {}
        self._environments: dict[Environment, int] = {}
        self._environment_list: list[Environment] = []
        # Memos of pure functions, by numbers.
        self._site_steps: dict[tuple[int, int], dict[int, bool]] = {}
        self._at_once: dict[tuple[int, int], int] = {}
        self._house: dict[int, dict[int, bool]] = {}
        self._wished_logs: dict[tuple[int, int, int, tuple[int, ...]], dict[int, bool]] = {}
        self._wished: dict[tuple[int, int, tuple[int, ...]], tuple[Wish, ...]] = {}
        self._site_verdicts: dict[tuple[int, int, int], tuple[str, ...]] = {}
        self._canonical: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._appends: dict[tuple[int, Header, Entry], Log | None] = {}
        self._tallies_of = cache(self._tallies)
        self._registry = patch.dict(PROTOCOLS, {"2pc": self.rules.protocol})

    def __enter__(self) -> "World":
        # The ledger finds protocols by name; a variant has to be found under the real one.
        self._registry.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._registry.stop()

    # -------------------------------------------------------------------------------------------- states

    def initial(self) -> StateId:
        """Participants are registered, nobody leads, nobody has heard of anything."""
        ledger = self.rules.ledger(CLUSTER)
        ledger.apply(encode_command(Header(epoch=0, at=NOW), [Raised(level=NEWEST)]))
        for name in self.names:
            ledger.apply(encode_command(Header(epoch=0, at=NOW), [Registered(name=name, url=f"http://{name}")]))
        ledger = self._interned(ledger)
        log = self._log_of((), (ledger,))
        silent = Part(State.UNKNOWN, 0, (0,) * self.last_epoch)
        site = self._site_number(Site(0, 0, (silent,) * len(self.gids)))
        return self._settle(log, (site,) * len(self.names))

    def successors(self, state: StateId) -> Iterator[tuple[StateId, bool]]:
        """Every state that one step leads to, and whether the step is a helpful one.

        The names of interchangeable participants may change places.
        """
        log, sites = self.logs[state[0]], state[1:]
        for position, site in enumerate(sites):
            for after, helpful in self._steps_of_site(log.environments[position], site).items():
                yield self._sorted(log, (*sites[:position], after, *sites[position + 1 :])), helpful
        for number, helpful in self._steps_of_log(state).items():
            yield self._settle(self.logs[number], sites), helpful

    def settled(self, state: StateId) -> bool:
        """Every transaction has ended or never will begin, and no participant waits, works or is in doubt."""
        return self.logs[state[0]].settled and all(
            part.state not in (State.WORKING, State.FENCED, State.PREPARED)
            for site in state[1:]
            for part in self.sites[site].parts
        )

    def _settle(self, log: Log, sites: tuple[int, ...]) -> StateId:
        """The state of `log` and `sites` once repeated answers have been given, under its canonical names."""
        sites = tuple(
            self._repeating(environment, site) for environment, site in zip(log.environments, sites, strict=True)
        )
        number, order = self._canonical_log(log)
        return self._sorted(self.logs[number], tuple(sites[position] for position in order))

    def _sorted(self, log: Log, sites: tuple[int, ...]) -> StateId:
        if len(sites) == 1:
            return (log.number, *sites)
        return (log.number, *(site for _, site in sorted(zip(log.colours, sites, strict=True))))

    def _canonical_log(self, log: Log) -> tuple[int, tuple[int, ...]]:
        """The log under canonical names, and the old position of each new one."""
        known = self._canonical.get(log.number)
        if known is None:
            order = tuple(sorted(range(len(self.names)), key=lambda position: log.colours[position]))
            known = (self._renamed(log, order).number, order)
            self._canonical[log.number] = known
        return known

    def _renamed(self, log: Log, order: tuple[int, ...]) -> Log:
        if order == tuple(range(len(order))):
            return log
        names = {self.names[old]: self.names[new] for new, old in enumerate(order)}
        other = self.logs[0]
        for header, entry in log.commands:
            if isinstance(entry, Decided):
                votes = sorted(
                    (replace(vote, branch=names[vote.branch]) for vote in entry.votes), key=lambda vote: vote.branch
                )
                renamed: Entry = replace(entry, votes=tuple(votes))
            elif isinstance(entry, Resolved):
                renamed = replace(entry, branch=names[entry.branch])
            elif isinstance(entry, Enlisted):
                renamed = replace(entry, branch=names[entry.branch], participant=names[entry.participant])
            else:
                renamed = entry
            other = self._appended(other, header, renamed) or other
        return other

    # -------------------------------------------------------------------------------------------- the log

    def _interned(self, ledger: Ledger) -> Ledger:
        return self._ledgers.setdefault(b"".join(ledger.snapshot()()), ledger)

    def _appended(self, log: Log, header: Header, entry: Entry) -> Log | None:
        """The log with one more command; None when the command changes no ledger."""
        key = (log.number, header, entry)
        if key not in self._appends:
            self._appends[key] = self._newly_appended(log, header, entry)
        return self._appends[key]

    def _newly_appended(self, log: Log, header: Header, entry: Entry) -> Log | None:
        before = log.ledgers[-1]
        after = before.fork()
        after.apply(encode_command(header, [entry]))
        after = self._interned(after)
        if after is before:
            return None
        return self._log_of((*log.commands, (header, entry)), (*log.ledgers, after))

    def _log_of(self, commands: tuple[tuple[Header, Entry], ...], ledgers: tuple[Ledger, ...]) -> Log:
        key = tuple(id(ledger) for ledger in ledgers)
        number = self._log_numbers.get(key)
        if number is not None:
            return self.logs[number]
        log = Log(len(self.logs), commands, ledgers)
        self._log_numbers[key] = log.number
        self.logs.append(log)
        log.answers = tuple(frozenset(_answers(ledgers, gid)) for gid in self.gids)
        fresh = tuple(frozenset(_answers(ledgers[-1:], gid)) for gid in self.gids)
        log.requests = tuple(self._requests(ledgers, name) for name in self.names)
        log.environments = tuple(
            self._environment(
                Environment(
                    requests,
                    frozenset(self._requests(ledgers[-1:], name)),
                    log.answers,
                    fresh,
                    frozenset(self._enlisted(ledgers, position)),
                    tuple(_resolution(ledgers, gid, name) for gid in self.gids),
                )
            )
            for position, (name, requests) in enumerate(zip(self.names, log.requests, strict=True))
        )
        log.colours = tuple(self._colour(log, position) for position in range(len(self.names)))
        log.violations = tuple(self._log_violations(log))
        last = ledgers[-1]
        log.settled = not last.unfinished and all(
            _gid(gid).epoch > last.epoch
            or last.knowledge(gid) in (Knowledge.COMMITTED, Knowledge.ABORTED, Knowledge.FORGOTTEN)
            for gid in self.gids
        )
        return log

    def _requests(self, ledgers: tuple[Ledger, ...], name: str) -> tuple[Message, ...]:
        """All that leaders have sent to `name` over these ledgers.

        The stamp is put on when a letter leaves, so one that was owed earlier may go out, or again, with today's floor.
        """
        found: dict[Message, None] = {}
        owed: dict[tuple[type[Request], int, int], None] = {}
        for ledger in ledgers:
            for txn in ledger.unfinished.values():
                for effect in self.rules.protocol.owed(txn):
                    if isinstance(effect, Send) and effect.participant == name and txn.gid in self.gids:
                        owed[type(effect.message), self.gids.index(txn.gid), ledger.epoch] = None
            number = self.rules.floor_of(ledger, name)
            floor = str(Gid.of_number(CLUSTER, number)) if number is not None else None
            for kind, index, epoch in owed:
                if epoch == ledger.epoch:
                    found[Message(kind, index, epoch, floor)] = None
        return tuple(found)

    def _enlisted(self, ledgers: tuple[Ledger, ...], position: int) -> Iterator[int]:
        """The transactions whose application knows that its branch at this participant is enlisted."""
        for index, planned in enumerate(self.planned):
            if position in (*planned.members, *planned.strays) and planned.application:
                known = (ledger.get(planned.gid) for ledger in ledgers)
                if any(txn is not None and self._works(txn, position) for txn in known):
                    yield index

    def _works(self, txn: Transaction, position: int) -> bool:
        return self.rules.works_unenlisted or any(branch.name == self.names[position] for branch in txn.branches)

    def _environment(self, environment: Environment) -> int:
        number = self._environments.setdefault(environment, len(self._environment_list))
        if number == len(self._environment_list):
            self._environment_list.append(environment)
        return number

    def _colour(self, log: Log, position: int) -> tuple[int, ...]:
        """What tells this participant from the others, as far as the log goes: its roles and its recorded votes."""
        if not self.interchangeable:
            return (position,)
        roles = [int(position in planned.members) + 2 * (position in planned.strays) for planned in self.planned]
        votes = []
        for ledger, gid in product(log.ledgers, self.gids):
            txn = ledger.get(gid)
            recorded = [b.vote for b in txn.branches if b.name == self.names[position]] if txn is not None else []
            votes += [_RECORDED.index(vote) for vote in recorded] or [_NOT_ENLISTED]
            resolved = _resolution((ledger,), gid, self.names[position])
            votes += [0 if resolved is None else 1 + (resolved is Decision.ABORT)]
        return (*roles, *votes)

    def _steps_of_log(self, state: StateId) -> dict[int, bool]:
        """The numbers of the logs that one more command leads to, and whether it was a helpful one."""
        log = self.logs[state[0]]
        found = dict(self._house_steps(log))
        # Today's ledger comes last, so that where several commands lead to one log, the helpful one is kept.
        for ledger in log.ledgers:
            for index, gid in enumerate(self.gids):
                if _gid(gid).number in ledger.unfinished:
                    said = self._may_have_heard(ledger, index, state[1:])
                    found.update(self._wished_steps(log, ledger, index, said))
        if self.scope.operator:
            done = self._numbers(log, ((header, entry, False) for header, entry in self._operated(log, state[1:])))
            found.update({number: found.get(number, False) or helpful for number, helpful in done.items()})
        return found

    def _operated(self, log: Log, sites: tuple[int, ...]) -> Iterator[tuple[Header, Entry]]:
        """What an operator may ask today's leader to log. It is never needed, so it is not helpful."""
        if not self.scope.operator:
            return
        ledger = log.ledgers[-1]
        header = Header(epoch=ledger.epoch, at=NOW)
        for index, gid in enumerate(self.gids):
            txn = ledger.get(gid)
            if txn is None:
                continue
            for branch in txn.branches:
                for outcome in Decision:
                    yield header, Resolved(gid=gid, branch=branch.name, outcome=outcome)
            parts = {name: self.sites[site].parts[index].state for name, site in zip(self.names, sites, strict=True)}
            resolved = [branch.name for branch in txn.branches if branch.resolved is not None]
            if resolved and all(parts[name] in (State.COMMITTED, State.ABORTED) for name in resolved):
                yield header, Acknowledged(gid=gid)

    def _house_steps(self, log: Log) -> dict[int, bool]:
        known = self._house.get(log.number)
        if known is None:
            known = self._house[log.number] = self._numbers(log, self._unheard(log))
        return known

    def _wished_steps(self, log: Log, ledger: Ledger, index: int, said: tuple[int, ...]) -> dict[int, bool]:
        key = (log.number, id(ledger), index, said)
        known = self._wished_logs.get(key)
        if known is None:
            header, helpful = Header(epoch=ledger.epoch, at=NOW), ledger is log.ledgers[-1]
            commands = ((header, wish.entry, helpful) for wish in self._wishes(ledger, index, said))
            known = self._wished_logs[key] = self._numbers(log, commands)
        return known

    def _numbers(self, log: Log, commands: Iterable[tuple[Header, Entry, bool]]) -> dict[int, bool]:
        found: dict[int, bool] = {}
        for header, entry, helpful in commands:
            after = self._appended(log, header, entry)
            if after is not None:
                found[after.number] = helpful or found.get(after.number, False)
        return found

    def _unheard(self, log: Log) -> Iterator[tuple[Header, Entry, bool]]:
        """Every command that may come next whatever participants said, and whether it is a helpful one."""
        for epoch in range(1, min(log.epoch + 1, self.last_epoch) + 1):
            yield Header(epoch=epoch, at=NOW), TookOver(node=f"n{epoch}"), log.epoch == 0
        for ledger in log.ledgers:
            header, helpful = Header(epoch=ledger.epoch, at=NOW), ledger is log.ledgers[-1]
            for planned in self.planned:
                if _gid(planned.gid).epoch == ledger.epoch:
                    yield header, self._begun(planned), helpful
                if planned.application and ledger.get(planned.gid) is not None:
                    # Nothing may hang on what an application still does.
                    names = tuple(self.names[member] for member in planned.members)
                    for name in (*names, *(self.names[stray] for stray in planned.strays)):
                        yield header, Enlisted(gid=planned.gid, branch=name, participant=name), False
                    yield header, Sealed(gid=planned.gid, branches=names), False
                if ledger.epoch and ledger.knowledge(planned.gid) is Knowledge.ASK_LEADER:
                    yield header, Decided(gid=planned.gid, decision=Decision.ABORT), helpful
            if self.scope.forgetting:
                for number, _ in ledger.forgettable(NOW):
                    yield header, Forgotten(floor=number, before=NOW), False

    def _heard(self, log: Log, sites: tuple[int, ...]) -> Iterator[tuple[Header, Wish]]:
        """Every command that may come next because of what its leader heard."""
        for ledger in log.ledgers:
            for index, gid in enumerate(self.gids):
                if _gid(gid).number in ledger.unfinished:
                    for wish in self._wishes(ledger, index, self._may_have_heard(ledger, index, sites)):
                        yield Header(epoch=ledger.epoch, at=NOW), wish

    def _may_have_heard(self, ledger: Ledger, index: int, sites: tuple[int, ...]) -> tuple[int, ...]:
        """What was said to the leader of `ledger`'s epoch, while `ledger` is what it has applied.

        A leader that has applied no decision has sent none, so no answer to one can have reached it.
        """
        txn = ledger.unfinished[_gid(self.gids[index]).number]
        bits = PREPARED | READ_ONLY | REFUSED | (0 if txn.decision is None else ACKED | CONTRADICTED)
        return tuple(self.sites[site].parts[index].said[ledger.epoch - 1] & bits for site in sites)

    def _wishes(self, ledger: Ledger, index: int, said: tuple[int, ...]) -> tuple[Wish, ...]:
        key = (id(ledger), index, said)
        known = self._wished.get(key)
        if known is None:
            txn = ledger.unfinished[_gid(self.gids[index]).number]
            known = self._wished[key] = tuple(self._newly_wished(txn, said))
        return known

    def _begun(self, planned: Planned) -> Beginning:
        body = b"same" if planned.key is not None else None
        if planned.application:
            return Opened(gid=planned.gid, protocol="2pc", timeout_ms=1, key=planned.key, body_hash=body)
        branches = tuple(
            BranchPlan(name=self.names[member], participant=self.names[member], payload=b"1")
            for member in planned.members
        )
        return Begun(gid=planned.gid, protocol="2pc", branches=branches, timeout_ms=1, key=planned.key, body_hash=body)

    def _newly_wished(self, txn: Transaction, said: tuple[int, ...]) -> Iterator[Wish]:
        """What `decide` wants for `txn` over every tally that can be made of what was said."""
        seen: set[Entry] = set()
        for tally in self._tallies_of(txn.gid, said):
            for expired in (False, True):
                wish = self.rules.protocol.decide(txn, tally, expired=expired)
                if wish is None:
                    continue
                if isinstance(wish, Decided):
                    wish = replace(
                        wish,
                        reason=None,
                        retryable=False,
                        votes=tuple(replace(vote, reason=None) for vote in wish.votes),
                    )
                if wish not in seen:
                    seen.add(wish)
                    yield Wish(wish, tally, expired)

    def _tallies(self, gid: str, said: tuple[int, ...]) -> tuple[Tally, ...]:
        """Every tally that `heard` makes of these answers, smallest first."""
        answers = [
            answer for name, bits in zip(self.names, said, strict=True) for answer in _answers_of(gid, name, bits)
        ]
        # A tally is not hashable; its parts are.
        found: dict[object, Tally] = {_tally_key(self.rules.nothing_heard): self.rules.nothing_heard}
        fresh = [self.rules.nothing_heard]
        for tally in fresh:
            for after in (*(tally.heard(answer) for answer in answers), tally.asked_to_abort("the client asked")):
                key = _tally_key(after)
                if key not in found:
                    found[key] = after
                    fresh.append(after)
        return tuple(found.values())

    # -------------------------------------------------------------------------------------------- participants

    def _site_number(self, site: Site) -> int:
        number = self._site_numbers.get(site)
        if number is None:
            number = self._site_numbers[site] = len(self.sites)
            self.sites.append(site)
        return number

    def _repeating(self, environment: int, number: int) -> int:
        """The participant after all deliveries that change nothing but what it has said."""
        if not self.repeats_at_once:
            return number
        known = self._at_once.get((environment, number))
        if known is None:
            site = self.sites[number]
            for message in self._environment_list[environment].requests:
                if self.scope.serial and site.parts[message.txn].state in (State.WORKING, State.FENCED):
                    continue
                after = self._delivered(site, message)
                if _unsaid(after) == _unsaid(site):
                    site = after
            known = self._at_once[environment, number] = self._site_number(site)
        return known

    def _steps_of_site(self, environment: int, number: int) -> dict[int, bool]:
        known = self._site_steps.get((environment, number))
        if known is None:
            known = {}
            for _, site, helpful in self._site_moves(environment, self.sites[number]):
                after = self._repeating(environment, self._site_number(site))
                known[after] = helpful or known.get(after, False)
            known.pop(number, None)
            self._site_steps[environment, number] = known
        return known

    def _site_moves(self, environment: int, site: Site) -> Iterator[tuple[str, Site, bool]]:
        """Every step of one participant, told from its own side, and whether it is a helpful one."""
        requests, owed, answers, fresh, enlisted, resolved = self._environment_list[environment]
        horizon = Horizon(epoch=site.epoch, floor=site.floor)
        for message in requests:
            if self.scope.serial and site.parts[message.txn].state in (State.WORKING, State.FENCED):
                continue
            gid = self.gids[message.txn]
            told = f"receives {message.kind.__name__.lower()} {gid} of n{message.epoch}"
            if message.floor not in (None, gid):
                told += f" with floor {message.floor}"
            yield told, self._delivered(site, message), message in owed
        yield "crashes and restarts", self._crashed(site), False
        for index, gid in enumerate(self.gids):
            part = site.parts[index]
            branch = Branch(state=part.state)
            if part.state in (State.WORKING, State.FENCED):
                yield from self._finishes(site, index, may_be_prepared=index in enlisted)
            if index in enlisted and self.rules.may_prepare(branch, gid, horizon):
                yield f"has {gid} prepared by its application", _with(site, index, state=State.PREPARED), False
            if part.state is not State.UNKNOWN or not resource.below_floor(gid, horizon):
                walked = self.rules.walk_away(branch, "-").branch.state
                yield f"walks away from {gid}", _with(site, index, state=walked), False
            if part.state is State.PREPARED:
                for outcome in sorted(answers[index]):
                    kind = Commit if outcome is Decision.COMMIT else Abort
                    step = self.rules.receive(branch, horizon, kind(gid=gid, branch="-"), Stamp(epoch=0))
                    told = f"is in doubt about {gid}, asks a node, and is told {outcome}"
                    yield told, _with(site, index, state=step.branch.state), outcome in fresh[index]
            by_hand = resolved[index]
            if part.state is State.PREPARED and by_hand is not None:
                ended = State.COMMITTED if by_hand is Decision.COMMIT else State.ABORTED
                yield f"has {gid} ended by hand: {by_hand}", _with(site, index, state=ended), False
            if part.state is not State.UNKNOWN and self.rules.prunable(branch, gid, horizon):
                yield f"prunes {gid}", _with(site, index, state=State.UNKNOWN), False

    def _delivered(self, site: Site, message: Message) -> Site:
        gid, stamp = self.gids[message.txn], Stamp(epoch=message.epoch, floor=message.floor)
        horizon = resource.observe(Horizon(epoch=site.epoch, floor=site.floor), gid, stamp)
        part = site.parts[message.txn]
        request = (
            Prepare(gid=gid, branch="-", payload=b"1") if message.kind is Prepare else message.kind(gid=gid, branch="-")
        )
        step = self.rules.receive(Branch(state=part.state), horizon, request, stamp)
        site = site._replace(epoch=horizon.epoch, floor=horizon.floor)
        runs = step.branch.state in (State.WORKING, State.FENCED)
        asker = 0 if not runs else message.epoch if step.work is resource.Work.RUN else part.asker
        return _with(site, message.txn, state=step.branch.state, asker=asker, to=message.epoch, answer=step.answer)

    def _finishes(self, site: Site, index: int, *, may_be_prepared: bool) -> Iterator[tuple[str, Site, bool]]:
        gid, part = self.gids[index], site.parts[index]
        votes: list[Vote] = [
            Prepared(gid=gid, branch="-"),
            ReadOnly(gid=gid, branch="-"),
            Refused(gid=gid, branch="-", reason="-"),
        ]
        if self.planned[index].application:
            # The work is to look. What the application prepares in that very moment is found, or fenced.
            votes = [
                vote for vote in votes if isinstance(vote, Refused) or (may_be_prepared and type(vote) is Prepared)
            ]
        for vote in votes:
            step = self.rules.finish(Branch(state=part.state), vote)
            after = _with(site, index, state=step.branch.state, asker=0, to=part.asker, answer=step.answer)
            told = f"ends its work for {gid} ({_word(vote)}) and answers n{part.asker}: {_word(step.answer)}"
            yield told, after, True
            if self.scope.records_lost and isinstance(step.answer, ReadOnly | Refused):
                lost = self._crashed(_with(after, index, state=State.UNKNOWN))
                yield f"{told}; crashes before that is durable", lost, False

    def _crashed(self, site: Site) -> Site:
        parts = []
        for part in site.parts:
            state = self.rules.crashed(Branch(state=part.state)).state
            runs = state in (State.WORKING, State.FENCED)
            parts.append(part._replace(state=state, asker=part.asker if runs else 0))
        if not self.rules.horizon_survives:
            site = site._replace(epoch=0, floor=0)
        return site._replace(parts=tuple(parts))

    def outline(self, state: StateId) -> object:
        """A state without what participants have said: what the log, automata and horizons are."""
        sites = [self.sites[site] for site in state[1:]]
        ledgers = self.logs[state[0]].ledgers
        return tuple(b"".join(ledger.snapshot()()) for ledger in ledgers), tuple(
            (site.epoch, site.floor, _states(site)) for site in sites
        )

    # -------------------------------------------------------------------------------------------- what must hold

    def violations(self, state: StateId) -> list[str]:
        """What is wrong with this state, in words; empty when all is well."""
        log = self.logs[state[0]]
        found = list(log.violations)
        for position, site in enumerate(state[1:]):
            key = (state[0], position, site)
            known = self._site_verdicts.get(key)
            if known is None:
                known = self._site_verdicts[key] = tuple(self._participant_violations(log, position, self.sites[site]))
            found += known
        if len(state) > 2:
            found += self._disagreements(log, state[1:])
        if self.rules.tells_early:
            found += self._early_violations(log, state[1:])
        return found

    def _disagreements(self, log: Log, sites: tuple[int, ...]) -> Iterator[str]:
        """Gray & Lamport's consistency, from the durable states alone; but for what an operator has resolved."""
        for index, gid in enumerate(self.gids):
            members = [
                member
                for member in self.planned[index].members
                if _resolution(log.ledgers, gid, self.names[member]) is None
            ]
            parts = [self.sites[site].parts[index] for position, site in enumerate(sites) if position in members]
            committed = any(part.state is State.COMMITTED for part in parts)
            if committed and any(part.state is State.ABORTED and not _ever(part, READ_ONLY) for part in parts):
                yield f"{gid} is committed at one participant and aborted at another"

    def _log_violations(self, log: Log) -> Iterator[str]:
        for gid, answers in zip(self.gids, log.answers, strict=True):
            if len(answers) > 1:
                yield f"of {gid} one node answers committed, and another aborted"
            told = {
                txn.decision
                for ledger in log.ledgers
                if (txn := ledger.get(gid)) is not None
                if any(isinstance(effect, Reply) for effect in self.rules.protocol.owed(txn))
            }
            if len(told) > 1:
                yield f"clients are told both outcomes of {gid}"
            if any(outcome not in answers for outcome in told):
                yield f"a client is told an outcome of {gid} that no node answers"
            txn = log.ledgers[-1].get(gid)
            if txn is not None:
                yield from check(txn)
                yield from check_owed(txn, self.rules.protocol.owed(txn))
            if len(log.ledgers) > 1 and getattr(log.commands[-1][1], "gid", None) == gid:
                yield from check_delta(log.ledgers[-2].get(gid), txn)
        yield from self._floor_violations(log)
        keys = [
            planned.key
            for planned in self.planned
            if planned.key is not None and any(_has_begun(ledger, planned.gid) for ledger in log.ledgers)
        ]
        if len(set(keys)) < len(keys):
            yield "one idempotency key began two transactions"

    def _floor_violations(self, log: Log) -> Iterator[str]:
        """Below a floor that a participant was told, nothing is to be asked of it."""
        for name, requests in zip(self.names, log.requests, strict=True):
            floors = [_gid(request.floor).number for request in requests if request.floor is not None]
            for txn in log.ledgers[-1].unfinished.values():
                named = any(branch.participant == name for branch in txn.branches)
                if named and any(_gid(txn.gid).number < floor for floor in floors):
                    yield f"{txn.gid} names {name}, and is below a floor that {name} was told"

    def _participant_violations(self, log: Log, position: int, site: Site) -> Iterator[str]:
        name = self.names[position]
        for index, gid in enumerate(self.gids):
            part, answers = site.parts[index], log.answers[index]
            if position not in self.planned[index].members:
                continue
            voted_yes = _ever(part, PREPARED | READ_ONLY)
            if _resolution(log.ledgers, gid, name) is not None:
                # A participant may be where the operator said, or where the decision is; not where neither is.
                wanted = {*answers, _resolution(log.ledgers, gid, name)}
                if part.state is State.COMMITTED and Decision.COMMIT not in wanted:
                    yield f"{name} committed {gid}, which no log and no operator says"
                if part.state is State.ABORTED and _ever(part, PREPARED) and Decision.ABORT not in wanted:
                    yield f"{name} aborted {gid}, which no log and no operator says"
                if Decision.COMMIT in answers and not voted_yes:
                    yield f"{gid} is committed, and {name} never voted for it"
                continue
            if Decision.COMMIT in answers and not voted_yes:
                yield f"{gid} is committed, and {name} never voted for it"
            if part.state is State.COMMITTED and Decision.COMMIT not in answers:
                yield f"{name} committed {gid}, which no log says"
            if part.state is State.ABORTED and _ever(part, PREPARED) and Decision.ABORT not in answers:
                yield f"{name} voted prepared on {gid} and aborted it on its own"
            if part.state is State.ABORTED and Decision.COMMIT in answers and not _ever(part, READ_ONLY):
                yield f"{gid} is committed, and {name} has aborted it"
            if part.state is State.COMMITTED and Decision.ABORT in answers:
                yield f"{gid} is aborted, and {name} has committed it"
            if _ever(part, CONTRADICTED):
                yield f"{name} cannot follow the decision on {gid}"
            if _ever(part, ACKED) and part.state in (State.WORKING, State.FENCED, State.PREPARED):
                yield f"{name} acknowledged the decision on {gid}, and holds its locks again"

    def _early_violations(self, log: Log, sites: tuple[int, ...]) -> Iterator[str]:
        told: dict[str, set[Decision]] = {gid: set() for gid in self.gids}
        for _, wish in self._heard(log, sites):
            if isinstance(wish.entry, Decided):
                told[wish.entry.gid].add(wish.entry.decision)
        for gid, answers in zip(self.gids, log.answers, strict=True):
            if answers and not told[gid] <= answers:
                yield f"a client is told an outcome of {gid} that is not its outcome"

    # -------------------------------------------------------------------------------------------- telling

    def tell(self, path: list[StateId]) -> list[str]:
        """A path as a conversation. Names stay put in it, although they change places along `path`."""
        log, sites = self.logs[path[0][0]], path[0][1:]
        lines = []
        for wanted in path[1:]:
            line, log, sites = next(
                (line, after, moved)
                for line, after, moved in self._concretely(log, sites)
                if self._settle(after, moved) == wanted
            )
            lines.append(line)
        state = (log.number, *sites)
        return [*lines, *(f"!! {violation}" for violation in dict.fromkeys(self.violations(state)))]

    def _concretely(self, log: Log, sites: tuple[int, ...]) -> Iterator[tuple[str, Log, tuple[int, ...]]]:
        for position, site in enumerate(sites):
            environment = log.environments[position]
            for line, after, _ in self._site_moves(environment, self.sites[site]):
                number = self._repeating(environment, self._site_number(after))
                yield (
                    f"{self.names[position]} {line}{_change(self.sites[site], after)}",
                    log,
                    (*sites[:position], number, *sites[position + 1 :]),
                )
        unheard = ((header, Wish(entry, None, False)) for header, entry, _ in self._unheard(log))
        operated = ((header, Wish(entry, None, False)) for header, entry in self._operated(log, sites))
        for header, wish in (*self._heard(log, sites), *unheard, *operated):
            appended = self._appended(log, header, wish.entry)
            if appended is not None:
                moved = tuple(
                    self._repeating(environment, site)
                    for environment, site in zip(appended.environments, sites, strict=True)
                )
                yield _log_line(header, wish), appended, moved


@cache
def _gid(text: str) -> Gid:
    gid = Gid.parse(text)
    assert gid is not None
    return gid


def _answers(ledgers: tuple[Ledger, ...], gid: str) -> Iterator[Decision]:
    """What some node may answer to whoever asks for the outcome."""
    for ledger in ledgers:
        match ledger.knowledge(gid):
            case Knowledge.COMMITTED:
                yield Decision.COMMIT
            case Knowledge.ABORTED:
                yield Decision.ABORT
            case _:
                pass


def _resolution(ledgers: tuple[Ledger, ...], gid: str, name: str) -> Decision | None:
    """How an operator has resolved the branch, as far as any of these ledgers knows."""
    for ledger in reversed(ledgers):
        txn = ledger.get(gid)
        for branch in txn.branches if txn is not None else ():
            if branch.name == name and branch.resolved is not None:
                return branch.resolved
    return None


def _has_begun(ledger: Ledger, gid: str) -> bool:
    txn = ledger.get(gid)
    return txn is not None and (txn.active or bool(txn.branches))


def _ever(part: Part, bits: int) -> bool:
    return any(said & bits for said in part.said)


def _states(site: Site) -> tuple[State, ...]:
    return tuple(part.state for part in site.parts)


def _unsaid(site: Site) -> Site:
    return site._replace(parts=tuple(part._replace(said=()) for part in site.parts))


def _with(
    site: Site,
    index: int,
    *,
    state: State,
    asker: int | None = None,
    to: int = 0,
    answer: Answer | None = None,
) -> Site:
    part = site.parts[index]
    said = part.said
    bit = _BITS.get(type(answer), 0)
    if bit:
        said = (*said[: to - 1], said[to - 1] | bit, *said[to:])
    after = Part(state, part.asker if asker is None else asker, said)
    return site._replace(parts=(*site.parts[:index], after, *site.parts[index + 1 :]))


def _answers_of(gid: str, name: str, bits: int) -> Iterator[Answer]:
    if bits & PREPARED:
        yield Prepared(gid=gid, branch=name)
    if bits & READ_ONLY:
        yield ReadOnly(gid=gid, branch=name)
    if bits & REFUSED:
        yield Refused(gid=gid, branch=name, reason="-")
    if bits & ACKED:
        yield Acked(gid=gid, branch=name)
    if bits & CONTRADICTED:
        yield Contradicted(gid=gid, branch=name, state="unknown")


def _tally_key(tally: Tally) -> object:
    # A variant may keep more than production does.
    return (
        frozenset(tally.votes.items()),
        tally.acked,
        frozenset(tally.contradictions.items()),
        tally.abort_reason,
        getattr(tally, "count", None),
    )


_WORDS = {Prepared: "prepared", ReadOnly: "read-only", Refused: "refused", Acked: "done", Contradicted: "cannot"}


def _word(answer: Answer | None) -> str:
    return "nothing" if answer is None else _WORDS.get(type(answer), "not now")


def _change(before: Site, after: Site) -> str:
    states = [
        f"{old.state.value} -> {new.state.value}"
        for old, new in zip(before.parts, after.parts, strict=True)
        if old.state is not new.state
    ]
    return f"   [{', '.join(states)}]" if states else ""


def _log_line(header: Header, wish: Wish) -> str:
    entry, tally = wish.entry, wish.tally
    knows: list[str] = []
    if tally is not None:
        heard = [
            *(f"{_word(vote)} from {vote.branch}" for vote in tally.votes.values()),
            *(f"done from {name}" for name in sorted(tally.acked)),
        ]
        knows += [f"has heard {', '.join(heard)}"] if heard else []
        knows += ["is asked to abort"] if tally.abort_reason else []
        knows += ["sees the deadline pass"] if wish.expired else []
    elif isinstance(entry, Decided):
        knows = ["is asked for an outcome it cannot find"]
    match entry:
        case TookOver():
            logs = "takes over"
        case Begun():
            logs = f"begins {entry.gid} with {', '.join(plan.name for plan in entry.branches)}"
        case Opened():
            logs = f"begins {entry.gid} for an application"
        case Enlisted():
            logs = f"enlists {entry.branch} in {entry.gid}"
        case Sealed():
            logs = f"seals {entry.gid} with {', '.join(entry.branches)}"
        case Decided():
            logs = f"decides: {entry.decision} {entry.gid}"
        case Resolved():
            logs = f"is told that {entry.branch} of {entry.gid} is resolved by hand: {entry.outcome}"
        case Acknowledged():
            logs = f"is told that {entry.gid} is seen to"
        case Forgotten():
            logs = f"forgets up to {Gid.of_number(CLUSTER, entry.floor)}"
        case _:
            logs = f"logs {type(entry).__name__.lower()} {getattr(entry, 'gid', '')}"
    return f"n{header.epoch} {', '.join((*knows, logs))}"
