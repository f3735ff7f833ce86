"""A log that holds an entry of every kind, and the states that it leads to."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import msgpack

from coordinator import rendering
from coordinator.codec import json_bytes
from coordinator.commands import encode_command
from coordinator.config import valid_url
from coordinator.copies import NO_DIGEST, chained, cut
from coordinator.ledger import Ledger
from coordinator.levels import NEWEST
from coordinator.protocol.entries import (
    Acknowledged,
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
    Header,
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
from coordinator.protocol.messages import Gid
from coordinator.protocol.registry import PROTOCOLS
from coordinator.protocol.transaction import NOTHING_HEARD, Decision, State, VoteKind

CLUSTER: Final = "m"


def _plans(*names: str) -> tuple[BranchPlan, ...]:
    return tuple(BranchPlan(name=name, participant=name, payload=b'{"op":1}') for name in names)


def _votes(*names: str) -> tuple[BranchVote, ...]:
    return tuple(BranchVote(branch=name, vote=VoteKind.PREPARED, result=b"[1]") for name in names)


def _begun(gid: str, *names: str, key: str | None = None) -> Begun:
    return Begun(gid=gid, protocol="2pc", branches=_plans(*names), timeout_ms=1000, key=key, body_hash=b"h" * 16)


def _lived() -> Iterator[tuple[int, list[Entry]]]:
    commit, abort = Decision.COMMIT, Decision.ABORT
    yield 1, [TookOver(node="n1"), Raised(level=NEWEST)]
    yield 1, [Registered(name=name, url=f"http://{name}", batch=name == "pay") for name in ("stock", "pay", "old")]
    yield 1, [_begun("m-1-1", "stock", "pay", key="k1"), _begun("m-1-2", "stock", "pay")]
    yield 1, [Decided(gid="m-1-1", decision=commit, votes=_votes("stock", "pay")), Ended(gid="m-1-1")]
    yield 1, [Decided(gid="m-1-2", decision=abort, reason="no", votes=_votes("stock"))]
    yield 1, [ContradictionSeen(gid="m-1-2", branch="stock", state="committed")]
    yield 1, [Resolved(gid="m-1-2", branch="stock", outcome=commit, note="by hand"), Ended(gid="m-1-2")]
    yield 1, [Opened(gid="m-1-3", protocol="2pc", timeout_ms=5000, key="k3", body_hash=b"i" * 16)]
    yield 1, [Enlisted(gid="m-1-3", branch="stock", participant="stock"), Sealed(gid="m-1-3", branches=("stock",))]
    yield 1, [Opened(gid="m-1-4", protocol="2pc", timeout_ms=5000), Acknowledged(gid="m-1-2")]
    yield 2, [TookOver(node="n2"), _begun("m-2-1", "pay", key="k4"), Unregistered(name="old")]
    yield 2, [Decided(gid="m-2-1", decision=commit, votes=_votes("pay"))]
    yield 2, [Decided(gid="m-2-2", decision=abort), Forgotten(floor=Gid("m", 1, 1).number, before=10_000)]
    yield 2, [_begun("m-2-3", "stock")]


def _commands(steps: Iterator[tuple[int, list[Entry]]]) -> list[tuple[Header, list[Entry]]]:
    return [(Header(epoch=epoch, at=1000 + 7 * n), entries) for n, (epoch, entries) in enumerate(steps)]


LIFE: Final = _commands(_lived())


def applied(commands: list[tuple[Header, list[Entry]]], ledger: Ledger | None = None) -> Ledger:
    """A ledger that these commands have made."""
    ledger = Ledger(CLUSTER) if ledger is None else ledger
    for header, entries in commands:
        ledger.apply(encode_command(header, entries))
    return ledger


def _restored() -> Iterator[tuple[int, list[Entry]]]:
    yield 1, [TookOver(node="n1"), Raised(level=NEWEST), Registered(name="stock", url="http://s")]
    digest, pieces = NO_DIGEST, list(cut(applied(LIFE).snapshot()(), 120))
    for index, data in enumerate(pieces):
        digest = chained(digest, data)
        yield 1, [CopyPiece(restore="r", index=index, data=data)]
    yield 1, [CopyInstalled(restore="r", pieces=len(pieces), digest=digest, epoch_base=100_002)]
    yield 100_003, [TookOver(node="n1"), LostRangeNoted(without="pay")]
    yield 100_003, [Reconciled(gid="m-2-3", decision=Decision.ABORT, votes=_votes("stock"))]
    found = {"branches": _plans("stock"), "votes": _votes("stock")}
    yield 100_003, [Reconciled(gid="m-2-9", decision=Decision.COMMIT, **found)]  # type: ignore[arg-type]
    yield 100_003, [Reconciled(gid="m-1-3"), Reconciled(gid="m-1-4")]
    yield 100_003, [LostRangeNoted(closed=True)]


RESTORE: Final = _commands(_restored())

PLAIN: Final[list[Any]] = [msgpack.unpackb(encode_command(header, entries)) for header, entries in LIFE + RESTORE]
"""What commands hold, as lists."""


@cache
def ledger_after(which: str, count: int) -> Ledger:
    """One that has lived so long; to be forked, never changed."""
    return applied((LIFE if which == "life" else RESTORE)[:count])


def content(ledger: Ledger) -> bytes:
    """All that is replicated."""
    return b"".join(ledger.snapshot()())


def check_usable(ledger: Ledger) -> None:
    """Whatever it has been given, all that is done with a ledger can be done with it. Changes it."""
    held = content(ledger)
    again = Ledger(CLUSTER)
    again.restore(ledger.snapshot()())()
    assert content(again) == held, "what is written is read back as it was"
    for state in (None, *State):
        found, _more = ledger.page(state=state, after=None, limit=100, scan=1000)
        for txn in found:
            gid = Gid.parse(txn.gid)
            assert gid is not None
            assert gid.cluster == CLUSTER
            assert ledger.get(txn.gid) == txn
            json_bytes(rendering.transaction(txn, NOTHING_HEARD))
            list(PROTOCOLS[txn.protocol].owed(txn))
            ledger.knowledge(txn.gid)
    assert all(valid_url(each.url) or each.url is not None for each in ledger.participants.values())
    for number, ended_at in ledger.forgettable(2**62):
        assert ended_at <= 2**62
        assert number >= 0
    header = Header(epoch=ledger.epoch, at=5)
    for entry in (
        Resolved(gid="m-2-1", branch="pay", outcome=Decision.ABORT),
        Acknowledged(gid="m-1-2"),
        Ended(gid="m-2-1"),
        CopyPiece(restore="s", index=1, data=b""),
        CopyInstalled(restore="s", pieces=1, digest=b"", epoch_base=5),
        LostRangeNoted(closed=True),
        Unregistered(name="stock"),
        Forgotten(floor=max(ledger.floor, 2**63), before=2**62),
    ):
        ledger.apply(encode_command(header, [entry]))
    content(ledger)
