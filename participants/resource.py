"""The resource manager's side of the protocol, pure: one branch, one automaton, no I/O and no clock.

A branch begins as something nobody here has heard of (`UNKNOWN`). A prepare makes it work (`WORKING`); the work ends in
a vote, and the vote in a record: `PREPARED`, `READ_ONLY`, or `ABORTED` when it was refused. A prepared branch waits for
the decision, however long that takes; every other branch may walk away. `COMMITTED`, `ABORTED` and `READ_ONLY` are kept
only to answer repeats: the first is called a done row, the other two tombstones.

    UNKNOWN --prepare--> WORKING --vote--> PREPARED --commit--> COMMITTED
       |                    |                  '------abort---> ABORTED
       |                    |--vote--> READ_ONLY
       |                    |--refusal--> ABORTED
       |                    '--abort, or the branch walks away--> FENCED --the work ends, whatever its vote--> ABORTED
       '--abort, or the branch walks away--> ABORTED

How it is used. For each message that arrives:

    horizon = observe(horizon, message.gid, stamp)      # one horizon per cluster
    step = receive(branch, horizon, message, stamp)     # `branch` is Branch() when there is no record

and then, in this order: do `step.work`, make `step.branch` and `horizon` durable, send `step.answer`. `Work.RUN` means
that the branch's work starts; when it has ended, `finish(branch, vote)` is the next step, and its answer the vote.
An answer of None (`Work.JOIN`, `Work.FENCE`) means: wait for the running work, then receive the same message again.

What must be durable before what:
- a vote `Prepared`: the branch's effects, able to survive a crash, and the record `PREPARED`, before the answer
- an ack of a commit: the effects, visible, and the record `COMMITTED`, before the answer
- an ack of an abort: the record `ABORTED`, and no running work that could still prepare, before the answer
- a vote `Refused`: the record `ABORTED`, before the answer. Nothing is owed to a branch that refused, so nobody would
  release it if a late repetition of its prepare ran after all
- a vote `ReadOnly`: nothing needs to survive; the record saves running the work again
- a pruned record: the horizon whose floor allowed it, in the same step. A record that is gone while the floor is
  forgotten would let a late prepare run

`WORKING` and `FENCED` are never durable: after a crash there is no such work (`crashed`).

The horizon holds what all messages of one cluster have taught: the newest epoch, and the floor (a gid's number) below
which nothing will ever be asked again. Epochs fence prepares only: a commit or an abort is true whoever repeats it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Final, NamedTuple

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
    StaleEpoch,
    Stamp,
    Vote,
)

ABORTED_REASON: Final = "aborted"
"""Why a prepare is refused after an abort, when nothing more precise is known."""

FORGOTTEN_REASON: Final = "ended"
"""Why a prepare below the floor is refused: its transaction has ended."""


class State(Enum):
    """What is known of a branch. The values are what is stored and what an answer shows."""

    UNKNOWN = "unknown"
    WORKING = "working"
    FENCED = "fenced"
    PREPARED = "prepared"
    COMMITTED = "committed"
    ABORTED = "aborted"
    READ_ONLY = "read_only"


class Work(Enum):
    """What a step asks its caller to do before it answers."""

    NOTHING = auto()
    RUN = auto()
    """Run the branch's work; then `finish`."""
    JOIN = auto()
    """The work runs already: wait for its end, then receive this message again."""
    FENCE = auto()
    """The running work must not become prepared: stop it if possible, wait for its end, then receive this again."""
    APPLY = auto()
    """Make the prepared effects visible, and release what they held."""
    UNDO = auto()
    """Drop the prepared effects, and release what they held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """All that is kept of one branch.

    result: the vote's, JSON text; of PREPARED, COMMITTED and READ_ONLY.
    reason, retryable: the refusal's; of ABORTED and FENCED.
    """

    state: State = State.UNKNOWN
    result: bytes | None = None
    reason: str | None = None
    retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Horizon:
    """What the messages of one cluster have taught so far: both only ever rise."""

    epoch: int = 0
    floor: int = 0
    """A gid's `number`: below it every transaction that names this participant has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a message does: `branch` is the next record. See the top of the module for what comes before what."""

    branch: Branch
    work: Work = Work.NOTHING
    answer: Answer | None = None


class Reply(Enum):
    """The kinds of answer in the table below."""

    LATER = auto()
    VOTE = auto()
    """`Prepared`, as before."""
    READ_ONLY = auto()
    """`ReadOnly`, as before."""
    REFUSAL = auto()
    ACK = auto()
    CONTRADICTION = auto()


class Rule(NamedTuple):
    """One row's right side: the next state, what is done, what is answered."""

    to: State
    work: Work
    reply: Reply


UNKNOWN, WORKING, FENCED, PREPARED = State.UNKNOWN, State.WORKING, State.FENCED, State.PREPARED
COMMITTED, ABORTED, READ_ONLY = State.COMMITTED, State.ABORTED, State.READ_ONLY

TRANSITIONS: Final[Mapping[tuple[State, type[Request]], Rule]] = MappingProxyType(
    {
        (UNKNOWN, Prepare): Rule(WORKING, Work.RUN, Reply.LATER),
        (WORKING, Prepare): Rule(WORKING, Work.JOIN, Reply.LATER),
        (FENCED, Prepare): Rule(FENCED, Work.FENCE, Reply.LATER),
        (PREPARED, Prepare): Rule(PREPARED, Work.NOTHING, Reply.VOTE),
        # It did vote so. To refuse would let a coordinator with a short memory abort the other branches.
        (COMMITTED, Prepare): Rule(COMMITTED, Work.NOTHING, Reply.VOTE),
        (ABORTED, Prepare): Rule(ABORTED, Work.NOTHING, Reply.REFUSAL),
        (READ_ONLY, Prepare): Rule(READ_ONLY, Work.NOTHING, Reply.READ_ONLY),
        (UNKNOWN, Commit): Rule(UNKNOWN, Work.NOTHING, Reply.CONTRADICTION),
        (WORKING, Commit): Rule(WORKING, Work.NOTHING, Reply.CONTRADICTION),
        (FENCED, Commit): Rule(FENCED, Work.NOTHING, Reply.CONTRADICTION),
        (PREPARED, Commit): Rule(COMMITTED, Work.APPLY, Reply.ACK),
        (COMMITTED, Commit): Rule(COMMITTED, Work.NOTHING, Reply.ACK),
        (ABORTED, Commit): Rule(ABORTED, Work.NOTHING, Reply.CONTRADICTION),
        # Nobody owes it a commit, but there is nothing to make visible, so the ack is true.
        (READ_ONLY, Commit): Rule(READ_ONLY, Work.NOTHING, Reply.ACK),
        (UNKNOWN, Abort): Rule(ABORTED, Work.NOTHING, Reply.ACK),
        (WORKING, Abort): Rule(FENCED, Work.FENCE, Reply.LATER),
        (FENCED, Abort): Rule(FENCED, Work.FENCE, Reply.LATER),
        (PREPARED, Abort): Rule(ABORTED, Work.UNDO, Reply.ACK),
        (COMMITTED, Abort): Rule(COMMITTED, Work.NOTHING, Reply.CONTRADICTION),
        (ABORTED, Abort): Rule(ABORTED, Work.NOTHING, Reply.ACK),
        # A leader that never saw the vote aborts this branch too; from now on its prepare is refused.
        (READ_ONLY, Abort): Rule(ABORTED, Work.NOTHING, Reply.ACK),
    }
)
"""Every state and every message, when the gid is not below the floor or a record exists."""

BELOW_FLOOR: Final[Mapping[type[Request], Rule]] = MappingProxyType(
    {
        Prepare: Rule(UNKNOWN, Work.NOTHING, Reply.REFUSAL),
        # It ended, so this branch acked once: the record that would say so is pruned.
        Commit: Rule(UNKNOWN, Work.NOTHING, Reply.ACK),
        Abort: Rule(UNKNOWN, Work.NOTHING, Reply.ACK),
    }
)
"""What an unknown branch answers below the floor: nothing new is ever written there."""

_SHOWN: Final = {FENCED: ABORTED.value}
"""A fenced branch can only end aborted; "fenced" is a word of this house, not of the wire."""


# ------------------------------------------------------------------------------------------------ the functions


def observe(horizon: Horizon, gid: str, stamp: Stamp) -> Horizon:
    """The horizon once a message about `gid` has arrived. A floor of another cluster says nothing, and is ignored."""
    floor = horizon.floor
    if stamp.floor is not None:
        told, about = Gid.parse(stamp.floor), Gid.parse(gid)
        if told is not None and about is not None and told.cluster == about.cluster:
            floor = max(floor, told.number)
    if stamp.epoch <= horizon.epoch and floor == horizon.floor:
        return horizon
    return Horizon(epoch=max(horizon.epoch, stamp.epoch), floor=floor)


def below_floor(gid: str, horizon: Horizon) -> bool:
    """Has the transaction certainly ended? `horizon` is that of the gid's own cluster."""
    parsed = Gid.parse(gid)
    return parsed is not None and parsed.number < horizon.floor


def receive(branch: Branch, horizon: Horizon, message: Request, stamp: Stamp) -> Step:
    """What `message` does to `branch`. Total. `horizon` has already observed `stamp`."""
    if type(message) is Prepare and stamp.epoch < horizon.epoch:
        return Step(branch=branch, answer=StaleEpoch(gid=message.gid, branch=message.branch, epoch=horizon.epoch))
    if branch.state is UNKNOWN and below_floor(message.gid, horizon):
        return _follow(BELOW_FLOOR[type(message)], replace(branch, reason=FORGOTTEN_REASON), message)
    return _follow(TRANSITIONS[branch.state, type(message)], branch, message)


def may_prepare(branch: Branch, gid: str, horizon: Horizon) -> bool:
    """Whether an application's own work may become prepared, on its own connection and without a message.

    Where there is a record, or none is kept any more, it comes too late: the branch was fenced, or has ended. The
    database must see to it in the transaction that prepares, with the record as a row of its own.
    """
    return branch.state is UNKNOWN and not below_floor(gid, horizon)


def _follow(rule: Rule, branch: Branch, message: Request) -> Step:
    answer = _answer(rule.reply, branch, message)
    if rule.to is branch.state:
        after = branch if branch.state is not UNKNOWN else Branch()
    elif rule.to is COMMITTED:
        after = replace(branch, state=COMMITTED)
    else:
        after = Branch(state=rule.to)
    return Step(branch=after, work=rule.work, answer=answer)


def _answer(reply: Reply, branch: Branch, message: Request) -> Answer | None:
    gid, name = message.gid, message.branch
    match reply:
        case Reply.LATER:
            return None
        case Reply.VOTE:
            return Prepared(gid=gid, branch=name, result=branch.result)
        case Reply.READ_ONLY:
            return ReadOnly(gid=gid, branch=name, result=branch.result)
        case Reply.REFUSAL:
            return Refused(gid=gid, branch=name, reason=branch.reason or ABORTED_REASON, retryable=branch.retryable)
        case Reply.ACK:
            return Acked(gid=gid, branch=name)
        case Reply.CONTRADICTION:
            return Contradicted(gid=gid, branch=name, state=_SHOWN.get(branch.state, branch.state.value))


def finish(branch: Branch, vote: Vote) -> Step:
    """The branch's work has ended with `vote`. Total: a vote nobody waits for changes nothing.

    A fenced branch ends aborted whatever its work achieved, and `Work.UNDO` says when there is something to drop.
    """
    match branch.state, vote:
        case State.WORKING, Prepared():
            return Step(branch=Branch(state=PREPARED, result=vote.result), answer=vote)
        case State.WORKING, ReadOnly():
            return Step(branch=Branch(state=READ_ONLY, result=vote.result), answer=vote)
        case State.WORKING, Refused():
            after = Branch(state=ABORTED, reason=vote.reason, retryable=vote.retryable)
            return Step(branch=after, answer=vote)
        case State.FENCED, _:
            return Step(
                branch=replace(branch, state=ABORTED),
                work=Work.UNDO if isinstance(vote, Prepared) else Work.NOTHING,
                answer=_answer(Reply.REFUSAL, branch, Prepare(gid=vote.gid, branch=vote.branch, payload=b"")),
            )
        case _:
            return Step(branch=branch)


def walk_away(branch: Branch, reason: str, *, retryable: bool = False) -> Step:
    """The participant aborts the branch on its own, which it may until the vote; later it changes nothing.

    Running work is fenced first, as by an abort: `finish` then leaves the tombstone, with this reason.
    """
    match branch.state:
        case State.UNKNOWN:
            return Step(branch=Branch(state=ABORTED, reason=reason, retryable=retryable))
        case State.WORKING:
            return Step(branch=Branch(state=FENCED, reason=reason, retryable=retryable), work=Work.FENCE)
        case _:
            return Step(branch=branch)


def crashed(branch: Branch) -> Branch:
    """What a restarted participant finds: running work is gone without a trace, records stay."""
    return Branch() if branch.state in (WORKING, FENCED) else branch


def prunable(branch: Branch, gid: str, horizon: Horizon) -> bool:
    """May the record be forgotten? Only below the floor, never by time, and never while prepared or at work."""
    return branch.state in (COMMITTED, ABORTED, READ_ONLY) and below_floor(gid, horizon)
