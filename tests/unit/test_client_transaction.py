"""An application's own transaction, from Python: real nodes, real participants, and a source of branches that obeys."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from coordinator.client import (
    Client,
    Conflict,
    InvalidRequest,
    OutcomeUnknown,
    TransactionAborted,
    TransactionResult,
    Unavailable,
)
from coordinator.protocol.transaction import State
from participants.server import Participant
from tests.support.nodes import RunningNode
from tests.support.participants import ScriptedParticipant, hang, on, refusing
from tests.support.waiting import eventually


class DatabaseError(Exception):
    """What a driver raises."""


@dataclass(eq=False)
class Source:
    """A pool of sorts: it notes what is done to its branches. `refuses`, `hangs`: at the prepare."""

    refuses: bool = False
    hangs: bool = False
    unreachable: bool = False
    done: list[str] = field(default_factory=list)
    opened: list[tuple[str, str]] = field(default_factory=list)

    async def outlast_begin(self, gid: str, branch: str) -> "Work":
        if self.unreachable:
            raise DatabaseError("no connection")
        self.opened.append((gid, branch))
        self.done.append("begin")
        return Work(self)


@dataclass(eq=False)
class Work:
    source: Source

    @property
    def connection(self) -> "Work":
        return self

    def execute(self) -> None:
        self.source.done.append("execute")

    async def prepare(self) -> None:
        if self.source.hangs:
            self.source.done.append("preparing")
            await asyncio.Event().wait()
        if self.source.refuses:
            raise DatabaseError("deferred constraint")
        self.source.done.append("prepare")

    async def close(self) -> None:
        self.source.done.append("close")


@pytest.fixture
async def client(node: RunningNode, scripted: ScriptedParticipant, null: Participant) -> AsyncIterator[Client]:
    """A client of a node that knows two participants."""
    async with Client([node.url]) as client:
        await client.register("orders", scripted.url)
        await client.register("stock", null.url)
        yield client


async def ended(node: RunningNode) -> None:
    await eventually(lambda: not node.node.ledger.unfinished)


async def test_the_end_of_the_block_commits(client: Client, node: RunningNode, scripted: ScriptedParticipant) -> None:
    orders, stock = Source(), Source()
    async with client.transaction(timeout_s=30) as tx:
        assert tx.result.state is State.ACTIVE
        async with tx.enlist("orders", orders) as connection:
            connection.execute()
        async with tx.enlist("stock", stock, branch="more") as connection:
            connection.execute()
        assert orders.done == stock.done == ["begin", "execute"]
        assert orders.opened == [(tx.gid, "orders")]
        assert stock.opened == [(tx.gid, "more")]
        assert [branch.name for branch in (await client.get(tx.gid)).branches] == ["orders", "more"]
        assert scripted.calls() == []
    assert tx.result.committed
    assert orders.done == stock.done == ["begin", "execute", "prepare", "close"]
    await ended(node)
    assert scripted.calls() == ["prepare", "commit"]


async def test_an_empty_block_commits(client: Client) -> None:
    async with client.transaction() as tx:
        pass
    assert tx.result.committed


async def test_an_exception_aborts_all_and_propagates(
    client: Client, node: RunningNode, scripted: ScriptedParticipant
) -> None:
    orders, stock = Source(), Source()
    with pytest.raises(KeyError):
        async with client.transaction() as tx:
            async with tx.enlist("orders", orders):
                pass
            async with tx.enlist("stock", stock):
                raise KeyError("mine")
    assert tx.result.aborted
    assert orders.done == stock.done == ["begin", "close"]
    await ended(node)
    assert scripted.calls() == ["abort"]


async def test_a_failed_branch_cannot_be_passed_over(client: Client) -> None:
    orders, stock = Source(), Source()
    with pytest.raises(TransactionAborted) as caught:
        async with client.transaction() as tx:
            async with tx.enlist("orders", orders):
                pass
            try:
                async with tx.enlist("stock", stock):
                    raise KeyError("mine")
            except KeyError:
                pass
    assert isinstance(caught.value.__cause__, KeyError)
    assert orders.done == stock.done == ["begin", "close"]


async def test_a_branch_that_cannot_be_prepared_aborts_all(
    client: Client, node: RunningNode, scripted: ScriptedParticipant
) -> None:
    orders, stock = Source(), Source(refuses=True)
    with pytest.raises(TransactionAborted) as caught:
        async with client.transaction() as tx, tx.enlist("orders", orders), tx.enlist("stock", stock):
            pass
    assert isinstance(caught.value.__cause__, DatabaseError)
    assert "deferred constraint" in str(caught.value)
    assert (orders.done, stock.done) == (["begin", "prepare", "close"], ["begin", "close"])
    assert (await client.get(tx.gid)).aborted
    await ended(node)
    assert scripted.calls() == ["abort"]


async def test_a_participant_that_does_not_find_the_branch_aborts_all(
    client: Client, scripted: ScriptedParticipant
) -> None:
    scripted.rule = refusing("not_enlisted")
    with pytest.raises(TransactionAborted, match="orders refused: not_enlisted"):
        async with client.transaction() as tx, tx.enlist("orders", Source()):
            pass
    assert tx.result.aborted


async def test_a_database_that_cannot_be_reached_aborts_all(client: Client, node: RunningNode) -> None:
    orders = Source()
    with pytest.raises(DatabaseError):
        async with client.transaction() as tx:
            async with tx.enlist("orders", orders):
                pass
            async with tx.enlist("stock", Source(unreachable=True)):
                pass
    assert tx.result.aborted
    assert orders.done == ["begin", "close"]


async def test_an_unknown_participant_aborts_all(client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        async with client.transaction() as tx, tx.enlist("nobody", Source()):
            pass
    assert caught.value.code == "unknown_participant"
    assert tx.result.aborted


async def test_a_source_of_an_unknown_kind_aborts_all(client: Client) -> None:
    with pytest.raises(TypeError, match="cannot be enlisted"):
        async with client.transaction() as tx, tx.enlist("orders", object()):
            pass
    assert tx.result.aborted


async def test_work_that_outlasts_the_deadline_is_cut_off(client: Client, node: RunningNode) -> None:
    orders = Source()
    with pytest.raises(TransactionAborted, match="timeout: not done within") as caught:
        async with client.transaction(timeout_s=0.2) as tx, tx.enlist("orders", orders):
            await asyncio.Event().wait()
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert caught.value.retryable
    assert orders.done == ["begin", "close"]
    await ended(node)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_work_that_does_not_heed_the_deadline_is_not_prepared(client: Client) -> None:
    orders = Source()
    with pytest.raises(TransactionAborted, match="timeout: not done within"):
        async with client.transaction(timeout_s=0.2) as tx:
            async with tx.enlist("orders", orders):
                pass
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
    assert orders.done == ["begin", "close"]


async def test_what_was_aborted_meanwhile_takes_no_more_branches(client: Client) -> None:
    stock = Source()
    with pytest.raises(TransactionAborted, match="requested by a client"):
        async with client.transaction() as tx:
            await client.abort(tx.gid)
            async with tx.enlist("stock", stock):
                pass
    assert stock.done == []
    with pytest.raises(TransactionAborted, match="requested by a client"):
        async with client.transaction() as tx:
            async with tx.enlist("stock", stock):
                pass
            await client.abort(tx.gid)
    assert stock.done == ["begin", "prepare", "close"]


async def test_a_branch_that_was_enlisted_before_the_abort_is_not_worked_in(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the first try was lost; by the second one the transaction is aborted."""
    stock, enlist = Source(), client.enlist

    async def late(gid: str, participant: str, **fields: Any) -> TransactionResult:
        await enlist(gid, participant, **fields)
        await client.abort(gid)
        return await enlist(gid, participant, **fields)

    monkeypatch.setattr(client, "enlist", late)
    with pytest.raises(TransactionAborted):
        async with client.transaction() as tx, tx.enlist("stock", stock):
            pass
    assert stock.done == []


async def test_somebody_else_who_asks_for_the_commit_ends_it(client: Client) -> None:
    with pytest.raises(Conflict) as caught:
        async with client.transaction() as tx:
            await client.commit(tx.gid, [])
            async with tx.enlist("stock", Source()):
                pass
    assert caught.value.code == "not_active"


async def test_a_prepare_that_hangs_ends_with_the_deadline(client: Client) -> None:
    orders = Source(hangs=True)
    with pytest.raises(TransactionAborted) as caught:
        async with client.transaction(timeout_s=0.5) as tx, tx.enlist("orders", orders):
            pass
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert orders.done == ["begin", "preparing", "close"]
    assert tx.result.aborted


@pytest.mark.parametrize("moment", ["working", "preparing", "voting"])
async def test_who_is_cancelled_cleans_up(
    client: Client, node: RunningNode, scripted: ScriptedParticipant, moment: str
) -> None:
    orders, entered = Source(hangs=moment == "preparing"), asyncio.Event()
    scripted.rule = on("prepare", hang)
    seen: list[Any] = []

    async def work() -> None:
        async with client.transaction() as tx:
            seen.append(tx)
            async with tx.enlist("orders", orders):
                entered.set()
                if moment == "working":
                    await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await entered.wait()
    if moment == "preparing":
        await eventually(lambda: "preparing" in orders.done)
    if moment == "voting":
        await eventually(scripted.calls)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen[0].result.aborted
    assert orders.done[-1] == "close"
    scripted.cut()
    await ended(node)


async def test_the_commit_may_be_unknown(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(gid: str, branches: Any, **_: Any) -> TransactionResult:
        raise OutcomeUnknown("no majority", gid=gid)

    monkeypatch.setattr(client, "commit", lost)
    orders = Source()
    with pytest.raises(OutcomeUnknown) as caught:
        async with client.transaction() as tx, tx.enlist("orders", orders):
            pass
    assert caught.value.gid == tx.gid
    # It may be committing: nobody has asked for an abort.
    assert (await client.get(tx.gid)).decision is None
    assert orders.done == ["begin", "prepare", "close"]


async def test_a_commit_that_was_certainly_not_asked_for_is_an_abort(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(*_: Any, **__: Any) -> TransactionResult:
        raise Unavailable("no node could")

    monkeypatch.setattr(client, "commit", nobody)
    with pytest.raises(TransactionAborted) as caught:
        async with client.transaction() as tx, tx.enlist("orders", Source()):
            pass
    assert isinstance(caught.value.__cause__, Unavailable)
    assert (await client.get(tx.gid)).aborted


async def test_an_abort_that_reaches_nobody_is_said_and_comes_with_the_deadline(
    client: Client, node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(*_: Any, **__: Any) -> TransactionResult:
        raise Unavailable("no node could")

    monkeypatch.setattr(client, "abort", nobody)
    with pytest.raises(KeyError) as caught:
        async with client.transaction(timeout_s=0.5) as tx, tx.enlist("orders", Source()):
            raise KeyError("mine")
    assert any("aborts it at its deadline" in note for note in caught.value.__notes__)
    await ended(node)
    with pytest.raises(TransactionAborted) as aborted:
        async with client.transaction(timeout_s=0.5) as tx, tx.enlist("orders", Source(refuses=True)):
            pass
    assert isinstance(aborted.value.__cause__, DatabaseError)
    await ended(node)


async def test_use_that_makes_no_sense(client: Client) -> None:
    tx = client.transaction()
    with pytest.raises(RuntimeError, match="begins with its block"):
        tx.gid  # noqa: B018
    with pytest.raises(RuntimeError, match="within the transaction's block"):
        async with tx.enlist("orders", Source()):
            pass
    async with tx, tx.enlist("orders", Source()):
        with pytest.raises(ValueError, match="enlisted already"):
            async with tx.enlist("orders", Source()):
                pass
    assert tx.result.committed
    with pytest.raises(RuntimeError, match="used already"):
        async with tx:
            pass
    with pytest.raises(RuntimeError, match="within the transaction's block"):
        async with tx.enlist("stock", Source()):
            pass


async def test_a_block_that_is_left_while_work_goes_on_is_aborted(client: Client) -> None:
    orders, entered = Source(), asyncio.Event()

    async def work(tx: Any) -> None:
        async with tx.enlist("orders", orders):
            entered.set()
            await asyncio.Event().wait()

    async def leave(tx: Any) -> None:
        async with tx:
            tasks.append(asyncio.create_task(work(tx)))
            await entered.wait()

    tasks: list[asyncio.Task[None]] = []
    tx = client.transaction()
    with pytest.raises(RuntimeError, match="while work in a branch went on"):
        await leave(tx)
    tasks[0].cancel()
    assert orders.done == ["begin", "close"]
    assert tx.result.aborted


async def test_a_key_finds_the_transaction_again(client: Client) -> None:
    async with client.transaction(key="once", timeout_s=5) as tx:
        pass
    with pytest.raises(Conflict, match="committed already"):
        async with client.transaction(key="once", timeout_s=5):
            pass
    with pytest.raises(KeyError):
        async with client.transaction(key="twice", timeout_s=5):
            raise KeyError("mine")
    with pytest.raises(TransactionAborted):
        async with client.transaction(key="twice", timeout_s=5):
            pass
    assert tx.result.committed


async def test_the_calls_it_is_made_of(client: Client) -> None:
    txn = await client.begin(timeout_s=5, key="mine")
    assert (txn.state, txn.key) == (State.ACTIVE, "mine")
    assert (await client.enlist(txn.gid, "orders", branch="o")).branch("o").state == "active"
    with pytest.raises(Conflict) as caught:
        await client.commit(txn.gid, [])
    assert caught.value.code == "branches_differ"
    assert (await client.commit(txn.gid, ["o"], wait="ended")).ended
