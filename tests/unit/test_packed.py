"""Transactions that have ended, as bytes: what is in comes out."""

import msgpack
import pytest

from coordinator.packed import ended_at_of, is_committed, pack, unpack
from coordinator.protocol.messages import Gid
from coordinator.protocol.transaction import Branch, Decision, Transaction, VoteKind

GID = Gid("m", 3, 7)
FIELDS = {
    "reason": "sold out",
    "retryable": True,
    "result": b"1",
    "contradiction": "aborted",
    "resolved": Decision.ABORT,
    "resolved_at": 9,
    "note": "",
}


def ended(*branches: Branch, decision: Decision = Decision.COMMIT) -> Transaction:
    return Transaction(
        gid=str(GID),
        protocol="2pc",
        epoch=GID.epoch,
        branches=branches,
        timeout_ms=50,
        started_at=1,
        decision=decision,
        decided_at=2,
        ended_at=3,
    )


@pytest.mark.parametrize("participant", ["a", "b"])
@pytest.mark.parametrize("vote", [None, *VoteKind])
@pytest.mark.parametrize("field", [None, *FIELDS])
def test_a_branch_comes_out_as_it_went_in(vote: VoteKind | None, field: str | None, participant: str) -> None:
    more = {} if field is None else {field: FIELDS[field]}
    txn = ended(Branch(name="a", participant=participant, vote=vote, **more), Branch(name="z", participant="z"))
    assert unpack("m", GID.number, pack(txn)) == txn


def test_rows_of_today_are_read_for_ever() -> None:
    txn = ended(Branch(name="a", participant="a", vote=VoteKind.PREPARED), Branch(name="z", participant="y"))
    plain = [3, 1, 2, 1, 50, "2pc", None, None, None, [["a", 1], ["z", 0, "y"]]]
    assert msgpack.unpackb(pack(txn)) == plain
    assert unpack("m", GID.number, msgpack.packb(plain)) == txn


def test_every_field_that_a_branch_keeps_is_tried() -> None:
    kept = set(Branch.__slots__) - {"name", "participant", "vote"}
    assert kept - {"payload"} == set(FIELDS), "a payload leaves with the decision"


@pytest.mark.parametrize("decision", Decision)
def test_the_outcome_and_the_end_are_read_without_the_rest(decision: Decision) -> None:
    packed = pack(ended(Branch(name="a", participant="a"), decision=decision))
    assert is_committed(packed) is (decision is Decision.COMMIT)
    assert ended_at_of(packed) == 3
