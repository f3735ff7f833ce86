"""What a ledger says: where participants are, what came of an applied entry, what is known of an outcome."""

from enum import Enum

from coordinator.protocol.entries import Entry
from coordinator.protocol.record import Record
from coordinator.protocol.transaction import Transaction


class Participant(Record, frozen=True, tag=3):
    """Where a participant listens, and whether it takes batches."""

    name: str
    url: str
    batch: bool


class Verdict(Enum):
    """What applying an entry did. Everything but APPLIED changed nothing."""

    APPLIED = "applied"
    FENCED = "fenced: of an older epoch"
    UNCHANGED = "out of turn"
    KEY_TAKEN = "its idempotency key names another transaction with the same body"
    KEY_REUSED = "its idempotency key was used with another body"
    UNKNOWN_PARTICIPANT = "a participant is not registered"
    IN_USE = "unfinished transactions name the participant"
    MALFORMED = "not understood"
    TOO_EARLY = "of a kind that is not used before every node understands it"


class Applied(Record, frozen=True):
    """One applied entry: what it was, what it did, and the transaction concerned as it now is.

    For KEY_TAKEN and KEY_REUSED, `txn` is the one that has the key.
    """

    entry: Entry
    verdict: Verdict
    txn: Transaction | None = None
    detail: str | None = None


class Knowledge(Enum):
    """What a ledger can say of a gid's outcome; see "The floor" in `coordinator.ledger`."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNDECIDED = "undecided"
    FORGOTTEN = "forgotten"
    ASK_LEADER = "only the leader can tell"
    LOST = "of what is found out after a restore"
    FOREIGN = "not a gid of this cluster"
