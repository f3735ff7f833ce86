"""Transactions that have ended, as bytes: a third of what objects cost, and nothing for the garbage collector to walk.

    [ended_at, started_at, decided_at, flags, timeout_ms, protocol, reason, key, body_hash, branches, acknowledged_at]

Gid and epoch are in the number that a row stands under, and the last field is there only where it is set. The end
comes first, so that finding what may be forgotten reads a few bytes of each row; the flags come after integers only,
so that the state of thousands of rows can be looked at without unpacking them. Snapshots hold rows as they are.
"""

from operator import attrgetter
from typing import Any, Final

import msgpack

from coordinator.codec import to_msgpack
from coordinator.protocol.messages import Gid
from coordinator.protocol.transaction import Branch, Decision, Transaction, VoteKind

_COMMIT, _RETRYABLE, _KEPT = 1, 2, 4
_INTEGER_BYTES: Final = bytes(
    {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}.get(first, 1) for first in range(256)
)
"""Length of a packed integer, by its first byte. Small ones, and nil, are that byte alone."""
_FLAGS: Final = 3
_PROTOCOL: Final = 5
_KEY: Final = 7
_BRANCHES: Final = 9
"""Where they stand in a row."""
_RESULT: Final = 5
"""Where it stands in a branch."""
_COMMITTED: Final = Decision.COMMIT
_RESOLVED: Final = (None, _COMMITTED, Decision.ABORT)
_VOTES: Final = (None, VoteKind.PREPARED, VoteKind.READ_ONLY, VoteKind.REFUSED)
_PREPARED: Final = VoteKind.PREPARED
_more: Final = attrgetter("reason", "retryable", "result", "contradiction", "resolved", "resolved_at", "note")
_NO_MORE: Final = (None, False, None, None, None, None, None)
"""What stands in a row behind a branch's vote and participant, where that is left out."""

_ROW_HEADS: Final = (b"\x9a", b"\x9b")
"""The first byte of a row: a list of 10, or of 11."""
_INT, _TEXT, _BYTES = (int,), (str, type(None)), (bytes, type(None))
_MAYBE_INT: Final = (int, type(None))
_ROW_TYPES: Final = (_INT, _INT, _MAYBE_INT, _INT, _INT, (str,), _TEXT, _TEXT, _BYTES, (list,), _MAYBE_INT)
_BRANCH_TYPES: Final = (
    (str,), _MAYBE_INT, _TEXT, _TEXT, (bool, type(None)), _BYTES, _TEXT, _MAYBE_INT, _MAYBE_INT, _TEXT
)  # fmt: skip


def row_of(packed: bytes) -> Any:
    """The fields of a row, as they are. Raises what bad bytes raise."""
    return msgpack.unpackb(packed)


def is_row(packed: bytes, row: Any) -> bool:
    """Whether `pack` writes such bytes. row: `row_of` them. Raises what bad bytes raise."""
    return (
        packed[:1] in _ROW_HEADS
        and all(type(value) in types for value, types in zip(row, _ROW_TYPES, strict=False))
        and 0 <= row[_FLAGS] <= _COMMIT | _RETRYABLE | _KEPT
        and all(type(branch) is list and 0 < len(branch) <= 10 and _is_branch(branch) for branch in row[_BRANCHES])
    )


def _is_branch(branch: list[Any]) -> bool:
    """Whether `_pack_branch` writes this."""
    return (
        all(type(value) in types for value, types in zip(branch, _BRANCH_TYPES, strict=False))
        and (len(branch) < 2 or (branch[1] or 0) in range(len(_VOTES)))
        and (len(branch) < 8 or (branch[7] or 0) in range(len(_RESOLVED)))
    )


def pack(txn: Transaction) -> bytes:
    """A transaction that has ended, as a row."""
    flags = (_COMMIT if txn.decision is _COMMITTED else 0) | (_RETRYABLE if txn.retryable else 0)
    row = [
        txn.ended_at,
        txn.started_at,
        txn.decided_at,
        flags | _KEPT if txn.kept else flags,
        txn.timeout_ms,
        txn.protocol,
        txn.reason,
        txn.key,
        txn.body_hash,
        [_pack_branch(branch) for branch in txn.branches],
    ]
    if txn.acknowledged_at is not None:
        row.append(txn.acknowledged_at)
    return to_msgpack(row)


def _pack_branch(branch: Branch) -> list[Any]:
    participant = None if branch.participant == branch.name else branch.participant
    if branch.vote is _PREPARED and _more(branch) == _NO_MORE:  # nearly always
        return [branch.name, 1] if participant is None else [branch.name, 1, participant]
    row = [
        branch.name,
        _VOTES.index(branch.vote),
        participant,
        branch.reason,
        branch.retryable,
        branch.result,
        branch.contradiction,
        _RESOLVED.index(branch.resolved) or None,
        branch.resolved_at,
        branch.note,
    ]
    while row[-1] is None or row[-1] is False:
        row.pop()
    return row


def unpack(cluster: str, number: int, packed: bytes) -> Transaction:
    """The inverse; number: that of its gid."""
    row = msgpack.unpackb(packed)
    ended_at, started_at, decided_at, flags, timeout_ms, protocol, reason, key, body_hash, branches = row[:10]
    gid = Gid.of_number(cluster, number)
    return Transaction(
        gid=str(gid),
        protocol=protocol,
        epoch=gid.epoch,
        branches=tuple(_unpack_branch(branch) for branch in branches),
        timeout_ms=timeout_ms,
        started_at=started_at,
        key=key,
        body_hash=body_hash,
        decision=Decision.COMMIT if flags & _COMMIT else Decision.ABORT,
        reason=reason,
        retryable=bool(flags & _RETRYABLE),
        decided_at=decided_at,
        ended_at=ended_at,
        acknowledged_at=row[10] if len(row) > 10 else None,
    )


def _unpack_branch(row: list[Any]) -> Branch:
    row = row + [None] * (10 - len(row))
    name, vote, participant, reason, retryable, result, contradiction, resolved, resolved_at, note = row
    return Branch(
        name=name,
        participant=participant if participant is not None else name,
        vote=_VOTES[vote or 0],
        reason=reason,
        retryable=bool(retryable),
        result=result,
        contradiction=contradiction,
        resolved=_RESOLVED[resolved or 0],
        resolved_at=resolved_at,
        note=note,
    )


def is_committed(packed: bytes) -> bool:
    """Whether it was committed; reads the flags alone."""
    at = 1  # after the length of the row
    for _date in ("ended_at", "started_at", "decided_at"):
        at += _INTEGER_BYTES[packed[at]]
    return bool(packed[at] & _COMMIT)


def ended_at_of(packed: bytes) -> int:
    """When it ended; reads the first bytes alone."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(packed[:16])
    unpacker.read_array_header()
    ended_at: int = unpacker.unpack()
    return ended_at


def key_and_kept(row: Any) -> tuple[Any, bool]:
    """Its idempotency key, of whatever type it is in there, and whether it is kept for an operator."""
    return row[_KEY], bool(row[_FLAGS] & _KEPT)


def protocol_and_results(row: Any) -> tuple[str, list[bytes]]:
    """Of a row that `is_row`: the protocol, and what its branches have answered."""
    return row[_PROTOCOL], [
        branch[_RESULT] for branch in row[_BRANCHES] if len(branch) > _RESULT and branch[_RESULT] is not None
    ]
