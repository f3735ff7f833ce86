"""The checkers themselves: each kind of wrong outcome, made by hand, must be found."""

import shutil
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from participants.shop import inventory, orders, payments
from tests.integration.shop_world import ShopWorld, wrong_in_books
from tests.integration.world import Told, bad_lines

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

Tamper = Callable[[Path, list[Told]], None]


def run(path: Path, sql: str, *parameters: object) -> None:
    """Change a database that nobody serves, past all its guards."""
    connection = apsw.Connection(str(path))
    try:
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
        connection.execute(sql, parameters)
        assert connection.total_changes() > 0, "nothing was tampered with"
    finally:
        connection.close()


def one_told(requests: list[Told], decision: str) -> Told:
    return next(told for told in requests if told.decision == decision)


def committed_in_two(books: Path, requests: list[Told]) -> None:
    run(books / orders.DATABASE, "DELETE FROM purchase WHERE order_id = ?", one_told(requests, "commit").key)


def aborted_in_one(books: Path, requests: list[Told]) -> None:
    told = one_told(requests, "abort")
    run(books / orders.DATABASE, "INSERT INTO purchase VALUES (?, ?, 'a', 's', 1, 1)", told.key, told.gid)


def paid_twice(books: Path, requests: list[Told]) -> None:
    told = one_told(requests, "commit")
    run(
        books / payments.DATABASE,
        "UPDATE account SET balance_cents = balance_cents - 1 WHERE account ="
        " (SELECT account FROM charge WHERE order_id = ?)",
        told.key,
    )


def goods_lost(books: Path, requests: list[Told]) -> None:
    run(books / inventory.DATABASE, "UPDATE stock SET available = available - 1 WHERE sku = 'sku-1'")


def committed_nowhere(books: Path, requests: list[Told]) -> None:
    """All three databases agree, and the client was told otherwise."""
    told = one_told(requests, "commit")
    run(
        books / inventory.DATABASE,
        "UPDATE stock SET available = available + (SELECT quantity FROM reservation WHERE order_id = ?1)"
        " WHERE sku = (SELECT sku FROM reservation WHERE order_id = ?1)",
        told.key,
    )
    run(books / inventory.DATABASE, "DELETE FROM reservation WHERE order_id = ?", told.key)
    run(
        books / payments.DATABASE,
        "UPDATE account SET balance_cents = balance_cents + (SELECT amount_cents FROM charge WHERE order_id = ?1)"
        " WHERE account = (SELECT account FROM charge WHERE order_id = ?1)",
        told.key,
    )
    run(books / payments.DATABASE, "DELETE FROM charge WHERE order_id = ?", told.key)
    run(books / orders.DATABASE, "DELETE FROM purchase WHERE order_id = ?", told.key)


def aborted_everywhere_but_there(books: Path, requests: list[Told]) -> None:
    """The client was told of an abort, and all three databases agree on the opposite."""
    one_told(requests, "commit").decision = "abort"


def committed_under_another_gid(books: Path, requests: list[Told]) -> None:
    """Its first try was done, and a later one as well, or instead."""
    one_told(requests, "commit").gid = "c-1-999999"


def nobody_asked(books: Path, requests: list[Told]) -> None:
    requests.remove(one_told(requests, "commit"))


def left_prepared(books: Path, requests: list[Told]) -> None:
    run(
        books / payments.DATABASE,
        "UPDATE outlast_branch SET state = 'prepared' WHERE id = (SELECT max(id) FROM outlast_branch)",
    )


async def test_each_wrong_outcome_is_found(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=2) as world:
        async with world.load(clients=2):
            await world.told(40)
        await world.ask(*world.checkout("no-such-sku", "account-1"))
        await world.verify()
        known = world.requests
    assert wrong_in_books(world.books, known) == []
    tampers: list[Tamper] = [
        committed_in_two,
        aborted_in_one,
        paid_twice,
        goods_lost,
        committed_nowhere,
        aborted_everywhere_but_there,
        committed_under_another_gid,
        nobody_asked,
        left_prepared,
    ]
    for tamper in tampers:
        copy = tmp_path / tamper.__name__
        shutil.copytree(world.books, copy)
        requests = [
            Told(key=told.key, branches=(), timeout_s=1, gid=told.gid, decision=told.decision) for told in known
        ]
        tamper(copy, requests)
        assert wrong_in_books(copy, requests), f"{tamper.__name__} was not found"
    assert wrong_in_books(world.books, known) == []


async def test_nodes_that_disagree_with_a_client_are_found(tmp_path: Path) -> None:
    async with ShopWorld(tmp_path, seed=3) as world:
        told = await world.ask(*world.checkout("sku-1", "account-1"))
        await world.verify()
        told.decision = "abort"
        with pytest.raises(AssertionError, match=str(told.gid)):
            await world.check_agreement(world.cluster.nodes)
        told.decision, told.gid = "commit", f"{world.cluster.name}-1-999999"
        with pytest.raises(AssertionError):
            await world.check_agreement(world.cluster.nodes)


def test_lines_that_should_not_be_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert bad_lines(log) == []
    log.write_text(
        "2026-01-01 00:00:00,000 INFO coordinator.driver: no ERROR here\n"
        "2026-01-01 00:00:00,000 WARNING coordinator.courier: participant orders: CRITICAL\n"
    )
    assert bad_lines(log) == []
    bad = [
        "2026-01-01 00:00:00,000 ERROR coordinator.api: POST / failed",
        "2026-01-01 00:00:00,000 CRITICAL cluster.replication.raft_log: n1: this node must stop",
        "Traceback (most recent call last):",
        "Exception ignored in: <coroutine object at 0x7f>",
        "Fatal Python error: Segmentation fault",
        "/x.py:1: RuntimeWarning: coroutine was never awaited",
    ]
    log.write_text("\n".join(bad))
    assert bad_lines(log) == bad
