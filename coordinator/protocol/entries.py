"""All that the log holds. Entries about one transaction carry its gid; the others keep the house.

One log command carries many entries under one `Header`, so what they have in common is said once: group commit. Each
kind has a tag, by which it is known in the log for ever (see `coordinator.commands`): a new one takes the next.
"""

from coordinator.protocol.record import Record
from coordinator.protocol.transaction import Decision, VoteKind


class Header(Record, frozen=True):
    """Who proposed the entries behind it, and when.

    epoch: the proposer's; the ledger refuses all entries of an older epoch than it has applied.
    at: the proposer's wall clock, milliseconds since 1970. Replicas take time from here and never from a clock.
    """

    epoch: int
    at: int


# ------------------------------------------------------------------------------------------------ of one transaction


class BranchPlan(Record, frozen=True, tag=3):
    """A branch as the client asked for it; `payload` is JSON text."""

    name: str
    participant: str
    payload: bytes


class Begun(Record, frozen=True, tag=2):
    """A client wants this transaction. `key` and `body_hash` make a client's retry find it again."""

    gid: str
    protocol: str
    branches: tuple[BranchPlan, ...]
    timeout_ms: int
    key: str | None = None
    body_hash: bytes | None = None


class Opened(Record, frozen=True, tag=16):
    """An application begins a transaction of its own: it does the work itself, on its own connections.

    timeout_ms: within it the application must have asked for the commit, and all votes be in. `key` and `body_hash` as
    in `Begun`.
    """

    gid: str
    protocol: str
    timeout_ms: int
    key: str | None = None
    body_hash: bytes | None = None


class Enlisted(Record, frozen=True, tag=17):
    """The application will work at `participant`, as `branch`. Logged before it does: an abort has to reach it."""

    gid: str
    branch: str
    participant: str


class Sealed(Record, frozen=True, tag=18):
    """The application has prepared its branches and asks for the commit. `branches`: their names, as it knows them.

    It changes something only where these are the branches that were enlisted: work at any other would be lost.
    """

    gid: str
    branches: tuple[str, ...]


class BranchVote(Record, frozen=True, tag=5):
    """A vote, as the decision was based on it."""

    branch: str
    vote: VoteKind
    reason: str | None = None
    retryable: bool = False
    result: bytes | None = None


class Decided(Record, frozen=True, tag=4):
    """A leader wants this decision. The first one that is applied is the decision; others change nothing."""

    gid: str
    decision: Decision
    reason: str | None = None
    retryable: bool = False
    votes: tuple[BranchVote, ...] = ()


class ContradictionSeen(Record, frozen=True, tag=6):
    """A participant says that a branch is in `state`, against the decision. Kept for people to see."""

    gid: str
    branch: str
    state: str


class Ended(Record, frozen=True, tag=7):
    """Every branch that the decision concerns is where it belongs: nothing is owed any more."""

    gid: str


class Resolved(Record, frozen=True, tag=19):
    """An operator says that a branch of a decided transaction is, or will be, ended by hand: nothing is owed to it.

    outcome: how, whatever the decision is. The first one that is applied stays. `note` is the operator's own words.
    """

    gid: str
    branch: str
    outcome: Decision
    note: str | None = None


class Acknowledged(Record, frozen=True, tag=20):
    """An operator has seen to all that was resolved by hand in a transaction: it may be forgotten like any other."""

    gid: str


Beginning = Begun | Opened
TransactionEntry = Begun | Opened | Enlisted | Sealed | Decided | ContradictionSeen | Ended | Resolved | Acknowledged

# ------------------------------------------------------------------------------------------------ of the house


class TookOver(Record, frozen=True, tag=1):
    """A new leader's first entry: its epoch (the header's) begins, and all older epochs are over."""

    node: str


class Registered(Record, frozen=True, tag=8):
    """A participant has a name, a URL, and understands batches or not."""

    name: str
    url: str
    batch: bool = False


class Unregistered(Record, frozen=True, tag=9):
    """A participant's name is given up."""

    name: str


class Forgotten(Record, frozen=True, tag=10):
    """Transactions numbered at most `floor` that ended at or before `before` (ms since 1970) leave the ledger."""

    floor: int
    before: int


class Raised(Record, frozen=True, tag=11):
    """Every node understands `level`: from here on entries of it may be written. It never falls again."""

    level: int


# ------------------------------------------------------------------------------------------------ of a restore


class CopyPiece(Record, frozen=True, tag=12):
    """A piece of a copy that is to be restored; the first one (`index` 0) takes the place of what came before it.

    restore: tells one try from another.
    """

    restore: str
    index: int
    data: bytes


class CopyInstalled(Record, frozen=True, tag=13):
    """All pieces have come: let the copy be the state, if there never was a transaction; else drop them.

    digest: over all pieces, see `coordinator.copies`. epoch_base: epochs are Raft terms plus it from here on.
    """

    restore: str
    pieces: int
    digest: bytes
    epoch_base: int


class Reconciled(Record, frozen=True, tag=14):
    """What the participants have told of a transaction that a copy does not know, or holds undecided.

    decision: None when they show that it has ended, and nobody knows how: it leaves the ledger, as if forgotten.
    branches, votes: those that must hear the decision, where the ledger does not know the branches; payloads are empty.
    """

    gid: str
    decision: Decision | None = None
    reason: str | None = None
    branches: tuple[BranchPlan, ...] = ()
    votes: tuple[BranchVote, ...] = ()


class LostRangeNoted(Record, frozen=True, tag=15):
    """The operator says that a participant is not waited for (`without`), or a leader that nothing is open any more."""

    without: str | None = None
    closed: bool = False


RestoreEntry = CopyPiece | CopyInstalled | Reconciled | LostRangeNoted
HouseEntry = TookOver | Registered | Unregistered | Forgotten | Raised | RestoreEntry
Entry = TransactionEntry | HouseEntry
