"""What every manager of a database with prepared transactions must do: tests to inherit, run on a real server.

A subclass provides the fixture `bench`, a `Bench` of its database, and is called `Test...`.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from coordinator.protocol.messages import (
    Abort,
    Acked,
    Answer,
    Commit,
    Contradicted,
    Prepare,
    Prepared,
    ReadOnly,
    Refused,
    StaleEpoch,
    Stamp,
)
from participants.manager import Envelope, InDoubt
from participants.prepared import NOT_ENLISTED, PreparedManager


class Bench:
    """A manager on one database with accounts ann, bob and cy of 100 each, and messages in short.

    A subclass says how to make the manager, how to look at the balances from outside, and how to enlist. Operations:
    `pay` (account, amount) takes from an account that has enough, and is refused as `poor` otherwise;
    `look` (account) reads a balance; `fail` (how) is for each database to fill.
    """

    manager: PreparedManager
    late_enlisting_fails: type[Exception]
    """What the application's marker raises when a tombstone is there."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    async def start(self) -> Sequence[InDoubt]:
        """Open a manager; what it found."""
        self.manager = self.new_manager()
        return await self.manager.open()

    async def stop(self) -> None:
        await self.manager.close()

    async def restart(self) -> Sequence[InDoubt]:
        await self.stop()
        return await self.start()

    def new_manager(self) -> PreparedManager:
        raise NotImplementedError

    async def balance(self, account: str) -> int:
        """As others see it."""
        raise NotImplementedError

    async def rows(self) -> Mapping[tuple[str, str], str]:
        """The states in outlast_branches, by gid and branch."""
        raise NotImplementedError

    async def enlist(self, gid: str, branch: str, account: str, amount: int) -> None:
        """What an application does: pay, leave the marker, prepare under the branch's name."""
        raise NotImplementedError

    def gid(self, *, epoch: int = 1) -> str:
        return f"shop-{epoch}-{next(self._numbers)}"

    async def send(self, message: Any, *, epoch: int = 1, floor: str | None = None) -> Answer:
        (answer,) = await self.manager.handle([Envelope(message, Stamp(epoch=epoch, floor=floor))])
        return answer

    async def prepare(self, gid: str, *, epoch: int = 1, floor: str | None = None, **payload: Any) -> Answer:
        body = payload or {"op": "pay", "account": "ann", "amount": 10}
        message = Prepare(gid=gid, branch="b", payload=json.dumps(body).encode())
        return await self.send(message, epoch=epoch, floor=floor)

    async def commit(self, gid: str, **stamp: Any) -> Answer:
        return await self.send(Commit(gid=gid, branch="b"), **stamp)

    async def abort(self, gid: str, **stamp: Any) -> Answer:
        return await self.send(Abort(gid=gid, branch="b"), **stamp)


def acked(gid: str) -> Acked:
    return Acked(gid=gid, branch="b")


def prepared(gid: str, result: bytes | None = b'{"left":90}') -> Prepared:
    return Prepared(gid=gid, branch="b", result=result)


class PreparedContract:
    """See the top of the module."""

    async def test_prepared_work_is_invisible_until_the_commit_and_gone_after_an_abort(self, bench):
        kept, dropped = bench.gid(), bench.gid()
        assert await bench.prepare(kept) == prepared(kept)
        assert await bench.balance("ann") == 100
        assert [(each.gid, each.branch) for each in await bench.manager.in_doubt()] == [(kept, "b")]
        assert await bench.commit(kept) == acked(kept)
        assert await bench.balance("ann") == 90
        assert isinstance(await bench.prepare(dropped, op="pay", account="bob", amount=1), Prepared)
        assert await bench.abort(dropped) == acked(dropped)
        assert await bench.balance("bob") == 100
        assert await bench.rows() == {(kept, "b"): "committed", (dropped, "b"): "aborted"}
        assert await bench.manager.in_doubt() == []

    async def test_every_message_may_come_twice_and_after_a_restart(self, bench):
        one, other = bench.gid(), bench.gid()
        assert await bench.prepare(one) == prepared(one)
        assert await bench.prepare(one) == prepared(one)
        assert [each.gid for each in await bench.restart()] == [one]
        assert isinstance(await bench.prepare(one), Prepared)
        assert await bench.commit(one) == acked(one)
        assert await bench.commit(one) == acked(one)
        assert isinstance(await bench.prepare(other), Prepared)
        assert await bench.abort(other) == acked(other)
        await bench.restart()
        assert await bench.commit(one) == acked(one)
        assert await bench.prepare(one) == prepared(one)
        assert await bench.abort(other) == acked(other)
        assert await bench.prepare(other) == Refused(gid=other, branch="b", reason="aborted")
        assert await bench.balance("ann") == 90

    async def test_an_abort_before_the_prepare_leaves_a_tombstone(self, bench):
        gid = bench.gid()
        assert await bench.abort(gid) == acked(gid)
        await bench.restart()
        assert await bench.prepare(gid) == Refused(gid=gid, branch="b", reason="aborted")

    async def test_what_contradicts_is_no_ack(self, bench, caplog):
        never, done, gone = bench.gid(), bench.gid(), bench.gid()
        assert await bench.commit(never) == Contradicted(gid=never, branch="b", state="unknown")
        await bench.prepare(done)
        await bench.commit(done)
        assert await bench.abort(done) == Contradicted(gid=done, branch="b", state="committed")
        await bench.abort(gone)
        assert await bench.commit(gone) == Contradicted(gid=gone, branch="b", state="aborted")
        assert "ALARM" in caplog.text

    async def test_work_without_changes_votes_read_only_and_does_not_run_again(self, bench):
        gid = bench.gid()
        wanted = ReadOnly(gid=gid, branch="b", result=b'{"balance":100}')
        assert await bench.prepare(gid, op="look", account="ann") == wanted
        assert await bench.manager.in_doubt() == []
        other = bench.gid()
        await bench.prepare(other)
        await bench.commit(other)
        await bench.restart()
        assert await bench.prepare(gid, op="look", account="ann") == wanted
        assert await bench.commit(gid) == acked(gid)
        assert await bench.abort(gid) == acked(gid)
        assert await bench.rows() == {(gid, "b"): "aborted", (other, "b"): "committed"}
        assert isinstance(await bench.prepare(gid, op="look", account="ann"), Refused)

    async def test_a_refusal_is_kept_too(self, bench):
        gid = bench.gid()
        refused = Refused(gid=gid, branch="b", reason="poor", retryable=False)
        assert await bench.prepare(gid, op="pay", account="ann", amount=101) == refused
        await bench.restart()
        assert await bench.prepare(gid, op="pay", account="ann", amount=1) == refused
        assert await bench.balance("ann") == 100

    async def test_what_no_operation_accepts_is_refused(self, bench):
        for payload in ({"op": "rm"}, {"op": "pay"}, {"op": "pay", "account": 7, "amount": 1}):
            answer = await bench.prepare(bench.gid(), **payload)
            assert isinstance(answer, Refused)
            assert not answer.retryable

    async def test_the_epoch_survives_a_restart(self, bench):
        gid = bench.gid()
        await bench.prepare(gid, epoch=5)
        await bench.restart()
        late = bench.gid()
        assert await bench.prepare(late, epoch=4) == StaleEpoch(gid=late, branch="b", epoch=5)
        assert await bench.commit(gid, epoch=4) == acked(gid)

    async def test_below_the_floor_records_are_forgotten_and_nothing_new_begins(self, bench):
        old = [bench.gid() for _ in range(3)]
        for gid in old:
            await bench.prepare(gid)
            await bench.commit(gid)
        floor = bench.gid()
        await bench.prepare(floor, floor=floor)
        # A floor prunes nothing before it was saved a whole round ago.
        await bench.manager.tidy()
        assert len(await bench.rows()) == 3
        await bench.manager.tidy()
        assert await bench.rows() == {}
        await bench.restart()
        assert await bench.prepare(old[0]) == Refused(gid=old[0], branch="b", reason="ended")
        assert await bench.commit(old[0]) == acked(old[0])
        assert await bench.commit(floor) == acked(floor)
        assert await bench.rows() == {(floor, "b"): "committed"}
        assert await bench.balance("ann") == 60

    async def test_what_is_no_longer_remembered_is_looked_up(self, bench):
        bench.manager._memory._limit = 2
        gids = [bench.gid() for _ in range(6)]
        for gid in gids:
            await bench.prepare(gid, op="pay", account="ann", amount=1)
            await bench.commit(gid)
        for gid in gids:
            assert isinstance(await bench.prepare(gid, op="pay", account="ann", amount=1), Prepared)
            assert await bench.commit(gid) == acked(gid)
        assert await bench.balance("ann") == 94

    async def test_it_tells_what_became_of_branches(self, bench):
        kept, dropped, held, never = (bench.gid() for _ in range(4))
        for gid, account in ((kept, "ann"), (dropped, "bob"), (held, "cy")):
            await bench.prepare(gid, epoch=3, op="pay", account=account, amount=1)
        await bench.commit(kept)
        await bench.abort(dropped)
        for _ in range(2):
            known = await bench.manager.known([kept, dropped, held, never])
            told = {(each.gid, each.branch): each.state for each in known.branches}
            assert told == {(kept, "b"): "committed", (dropped, "b"): "aborted", (held, "b"): "prepared"}
            assert (known.epoch, known.floor) == (3, 0)
            await bench.restart()

    async def test_a_branch_whose_name_cannot_be_one_is_refused_for_good(self, bench):
        gid, branch = bench.gid(), "é" * 200
        payload = b'{"op": "pay", "account": "ann", "amount": 1}'
        answer = await bench.send(Prepare(gid=gid, branch=branch, payload=payload))
        assert isinstance(answer, Refused)
        assert answer.reason.startswith("unfit_branch")
        assert not answer.retryable
        assert await bench.send(Abort(gid=gid, branch=branch)) == Acked(gid=gid, branch=branch)

    async def test_a_branch_that_its_application_prepared(self, bench):
        kept, dropped, never = bench.gid(), bench.gid(), bench.gid()
        await bench.enlist(kept, "b", "ann", 10)
        assert await bench.prepare(kept, op="outlast.enlisted") == prepared(kept, None)
        await bench.enlist(dropped, "b", "bob", 10)
        assert await bench.prepare(dropped, op="outlast.enlisted") == prepared(dropped, None)
        assert await bench.commit(kept) == acked(kept)
        assert await bench.abort(dropped) == acked(dropped)
        assert (await bench.balance("ann"), await bench.balance("bob")) == (90, 100)
        assert await bench.prepare(never, op="outlast.enlisted") == Refused(gid=never, branch="b", reason=NOT_ENLISTED)
        assert await bench.rows() == {(kept, "b"): "committed", (dropped, "b"): "aborted", (never, "b"): "aborted"}

    async def test_an_application_that_comes_too_late_cannot_prepare(self, bench):
        gid = bench.gid()
        assert isinstance(await bench.prepare(gid, op="outlast.enlisted"), Refused)
        with pytest.raises(bench.late_enlisting_fails):
            await bench.enlist(gid, "b", "ann", 10)
        assert await bench.manager.in_doubt() == []
