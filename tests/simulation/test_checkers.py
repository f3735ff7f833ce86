"""What single checkers have to tell apart, where whole runs would come to it too seldom."""

from types import SimpleNamespace
from typing import Any

from coordinator.facts import Applied, Verdict
from coordinator.ledger import Ledger
from coordinator.lost import EPOCH_MARGIN
from coordinator.protocol.entries import Ended
from coordinator.protocol.messages import Gid
from coordinator.protocol.record import replace
from coordinator.protocol.transaction import Branch, Decision, Transaction
from participants.resource import Horizon
from tests.simulation.checkers.floors import FloorsHold

GID = Gid("sim", 4, 7)
DECIDED = Transaction(
    gid=str(GID),
    protocol="2pc",
    epoch=4,
    branches=(Branch(name="b1", participant="oak"),),
    timeout_ms=1_000,
    started_at=0,
    decision=Decision.COMMIT,
    decided_at=1,
)


def told(floor: int) -> Any:
    return SimpleNamespace(name="oak", tables={"horizons": {"sim": Horizon(epoch=4, floor=floor)}})


def test_what_had_ended_holds_floors_again_when_the_copy_holds_it_unfinished() -> None:
    checker: Any = FloorsHold()
    ended = Applied(entry=Ended(gid=str(GID)), verdict=Verdict.APPLIED, txn=replace(DECIDED, ended_at=2))
    checker.applied("n1", Applied(entry=Ended(gid=str(GID)), verdict=Verdict.UNCHANGED, txn=DECIDED))
    checker.applied("n1", ended)
    checker.bank_changed(told(GID.number + 1))
    assert checker.complaints == []

    copy = Ledger("sim")
    copy.epoch = GID.epoch
    copy.unfinished[GID.number] = DECIDED
    checker.anew(SimpleNamespace(), copy)
    checker.bank_changed(told(GID.number + 2))  # by the old cluster, before it was lost
    assert checker.complaints == []
    newer = Gid("sim", GID.epoch + EPOCH_MARGIN + 1, 0).number
    checker.bank_changed(told(newer))
    assert [complaint.partition(" is below")[0] for complaint in checker.complaints] == [f"floors: {GID}"]

    checker.applied("n1", ended)
    checker.bank_changed(told(newer + 1))
    assert len(checker.complaints) == 1
