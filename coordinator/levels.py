"""Which software understands what.

A *level* is a number, and to each belong kinds of log entries and fields of what is stored. Software that understands a
level understands all below it. A cluster works at one level, which is part of its replicated state, begins at 1 and
only ever rises; nothing of a higher level is written before every node understands it. So a cluster is upgraded node by
node without a stop, and until its level rises every node can go back to the software it had.

    level 1   what the first software with levels found, and the software before it
    level 2   `Raised`, and all kinds added with it

How it rises: each node tells every other, as its first word on a connection, which level it understands; software that
knows no levels says nothing, and counts as level 1. A leader that is connected to every node, and finds that all
understand more than the cluster's level, proposes `Raised`: with its `TookOver`, or later. Once that is applied, the
driver lets the new kinds through. The ledger refuses any that come before, on every node alike.

To add a kind of entry, a field or a protocol: give it a level here (tests demand it), the newest one as long as that
has not been released, else a new one; call `Driver._require_level` where it would be proposed. A field goes to the end
of its record and has a default, and the default means what its absence meant: it is then left out of the bytes, which
older software reads. The meaning and the type of what is there never change.
"""

from collections.abc import Mapping
from typing import Any, Final

from msgspec import NODEFAULT
from msgspec.structs import fields

from coordinator.protocol.entries import (
    Acknowledged,
    Beginning,
    Begun,
    BranchPlan,
    BranchVote,
    ContradictionSeen,
    CopyInstalled,
    CopyPiece,
    Decided,
    Ended,
    Enlisted,
    Entry,
    Forgotten,
    LostRangeNoted,
    Opened,
    Raised,
    Reconciled,
    Registered,
    Resolved,
    Sealed,
    TookOver,
    Unregistered,
)
from coordinator.protocol.record import Record

OLDEST: Final = 1
NEWEST: Final = 2
"""What this software understands."""

ENTRY_LEVELS: Final[Mapping[type, int]] = {
    TookOver: 1,
    Begun: 1,
    BranchPlan: 1,
    Decided: 1,
    BranchVote: 1,
    ContradictionSeen: 1,
    Ended: 1,
    Registered: 1,
    Unregistered: 1,
    Forgotten: 1,
    Raised: 2,
    Opened: 2,
    Enlisted: 2,
    Sealed: 2,
    CopyPiece: 2,
    CopyInstalled: 2,
    Reconciled: 2,
    LostRangeNoted: 2,
    Resolved: 2,
    Acknowledged: 2,
}
"""By kind of entry, or of a part of one."""

FIELD_LEVELS: Final[Mapping[tuple[type, str], int]] = {}
"""Fields that an entry, or a part of one, was given later: anything but their default is of this level."""

PROTOCOL_LEVELS: Final[Mapping[str, int]] = {"2pc": 1}
"""By the name of a commit protocol."""

_GROWN: Final = frozenset(kind for kind, _name in FIELD_LEVELS)


def level_of(entry: Entry) -> int:
    """The level that a cluster must work at before this may be in its log."""
    level = ENTRY_LEVELS[type(entry)]
    if isinstance(entry, Beginning):
        level = max(level, PROTOCOL_LEVELS.get(entry.protocol, level))
    return max(level, _level_of_fields(entry)) if _GROWN else level


def _level_of_fields(record: Any) -> int:
    level = OLDEST
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, tuple):
            level = max([level, *(_level_of_fields(part) for part in value if isinstance(part, Record))])
        since = FIELD_LEVELS.get((type(record), field.name), OLDEST)
        if since > level and (field.default is NODEFAULT or value != field.default):
            level = since
    return level
