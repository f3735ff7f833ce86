"""The shop: its operations refuse what they should, and its audit finds what is wrong."""

import json

import apsw
import pytest

from coordinator.protocol.messages import Abort, Acked, Commit, Prepare, Prepared, Refused, Stamp
from participants.manager import Envelope
from participants.shop import SERVICES, audit, inventory, orders, payments
from participants.shop.__main__ import main
from participants.shop.audit import order_ids

STAMP = Stamp(epoch=1)
DOUBLED = """
CREATE TABLE two AS SELECT * FROM purchase;
INSERT INTO two SELECT * FROM two;
DROP TABLE purchase;
ALTER TABLE two RENAME TO purchase;
"""


class Shop:
    """The three managers on one folder, without a network between."""

    def __init__(self, folder):
        self.folder = folder
        inventory.seed(folder, {"tea": 10, "cup": 5})
        payments.seed(folder, {"ann": 1000, "bob": 300})
        orders.seed(folder)

    async def start(self):
        self.managers = {name: service.manager(self.folder) for name, service in SERVICES.items()}
        for manager in self.managers.values():
            await manager.open()

    async def stop(self):
        for manager in self.managers.values():
            await manager.close()

    async def prepare(self, name, gid, **payload):
        message = Prepare(gid=gid, branch=name, payload=json.dumps(payload).encode())
        (answer,) = await self.managers[name].handle([Envelope(message, STAMP)])
        return answer

    async def decide(self, kind, name, gid):
        (answer,) = await self.managers[name].handle([Envelope(kind(gid=gid, branch=name), STAMP)])
        return answer

    async def order(self, gid, sku="tea", quantity=2, account="ann", amount_cents=250, *, until="commit", **ids):
        """Prepares all three branches, and decides them unless `until` is "prepare"."""
        votes = [
            await self.prepare("inventory", gid, op="reserve", sku=sku, quantity=quantity, **ids),
            await self.prepare("payments", gid, op="charge", account=account, amount_cents=amount_cents, **ids),
            await self.prepare(
                "orders", gid, op="place", account=account, sku=sku, quantity=quantity, amount_cents=amount_cents, **ids
            ),
        ]
        if until == "commit":
            kind = Commit if all(isinstance(vote, Prepared) for vote in votes) else Abort
            for name in SERVICES:
                assert isinstance(await self.decide(kind, name, gid), Acked)
        return votes


@pytest.fixture
async def shop(tmp_path):
    it = Shop(tmp_path)
    await it.start()
    yield it
    await it.stop()


async def test_an_order_moves_goods_and_money_together(shop):
    votes = await shop.order("shop-1-1", order_id="A-17")
    assert [json.loads(vote.result) for vote in votes] == [
        {"available": 8},
        {"balance_cents": 750},
        {"order_id": "A-17"},
    ]
    await shop.order("shop-1-2", sku="cup", quantity=5, account="bob", amount_cents=300)
    report = audit(shop.folder)
    assert report.ok, report.discrepancies
    assert (report.orders, report.reservations, report.charges) == (2, 2, 2)
    assert (report.stock_initial, report.stock_available, report.sold) == (15, 8, 7)
    assert (report.balance_initial_cents, report.balance_cents, report.charged_cents) == (1300, 750, 550)
    assert report.in_doubt == 0
    assert order_ids(shop.folder) == {"A-17": "shop-1-1", "shop-1-2": "shop-1-2"}


@pytest.mark.parametrize(
    ("service", "payload", "reason"),
    [
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": 11}, "out_of_stock"),
        ("inventory", {"op": "reserve", "sku": "gold", "quantity": 1}, "unknown_sku"),
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": 0}, "bad_arguments: quantity must be positive"),
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": -1}, "bad_arguments: quantity must be positive"),
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": 2**60}, "bad_arguments: quantity must be positive"),
        ("inventory", {"op": "reserve", "sku": "tea", "quantity": 1, "order_id": ""}, "bad_arguments: order_id"),
        (
            "inventory",
            {"op": "reserve", "sku": "tea", "quantity": True},
            "bad_arguments: quantity of reserve must be an",
        ),
        ("payments", {"op": "charge", "account": "bob", "amount_cents": 301}, "insufficient_funds"),
        ("payments", {"op": "charge", "account": "eve", "amount_cents": 1}, "unknown_account"),
        ("payments", {"op": "charge", "account": "bob", "amount_cents": 1.5}, "bad_arguments: amount_cents of charge"),
        ("orders", {"op": "place", "account": "bob", "sku": "tea", "quantity": 1}, "bad_arguments: place needs amount"),
        ("orders", {"op": "refund"}, "unknown_operation: refund"),
    ],
)
async def test_what_cannot_be_is_refused_for_good(shop, service, payload, reason):
    refused = await shop.prepare(service, "shop-1-1", **payload)
    assert isinstance(refused, Refused)
    assert refused.reason.startswith(reason)
    assert not refused.retryable
    assert audit(shop.folder).in_doubt == 0


async def test_an_order_id_is_used_once(shop):
    await shop.order("shop-1-1", order_id="A-17")
    votes = await shop.order("shop-1-2", order_id="A-17")
    assert [vote.reason for vote in votes] == ["duplicate_order"] * 3
    assert audit(shop.folder).orders == 1


async def test_the_same_goods_at_the_same_time_are_tried_again(shop):
    await shop.order("shop-1-1", until="prepare")
    votes = await shop.order("shop-1-2", until="prepare")
    assert [type(vote) for vote in votes] == [Refused, Refused, Prepared]
    assert [(vote.reason, vote.retryable) for vote in votes[:2]] == [("locked: stock", True), ("locked: account", True)]


async def test_orders_in_doubt_are_unfinished_not_wrong(shop):
    await shop.order("shop-1-1", until="prepare")
    report = audit(shop.folder)
    assert (report.ok, report.in_doubt, report.orders) == (True, 3, 0)
    await shop.decide(Commit, "orders", "shop-1-1")
    await shop.decide(Commit, "inventory", "shop-1-1")
    report = audit(shop.folder)
    assert (report.ok, report.in_doubt, report.orders, report.charges) == (True, 1, 1, 0)
    await shop.stop()
    await shop.start()
    await shop.decide(Commit, "payments", "shop-1-1")
    report = audit(shop.folder)
    assert (report.ok, report.in_doubt, report.charges) == (True, 0, 1)


@pytest.mark.parametrize(
    ("database", "tampering", "complaint"),
    [
        (inventory.DATABASE, "DELETE FROM reservation", "no reservation"),
        (payments.DATABASE, "DELETE FROM charge", "no charge"),
        (orders.DATABASE, "DELETE FROM purchase", "no order"),
        (inventory.DATABASE, "UPDATE stock SET available = available + 1 WHERE sku = 'tea'", "SKU tea: 9 left and 2"),
        (inventory.DATABASE, "UPDATE stock SET available = -2, initial = 0 WHERE sku = 'tea'", "below zero"),
        (payments.DATABASE, "UPDATE account SET balance_cents = 1000 WHERE account = 'ann'", "account ann: 1000 left"),
        (payments.DATABASE, "DELETE FROM account WHERE account = 'ann'", "there is no such account"),
        (orders.DATABASE, "UPDATE purchase SET quantity = 3", "3 tea ordered, 2 tea reserved"),
        (orders.DATABASE, "UPDATE purchase SET amount_cents = 1", "1 due from ann, 250 charged to ann"),
        (inventory.DATABASE, "UPDATE reservation SET sku = 'cup'", "2 tea ordered, 2 cup reserved"),
        (inventory.DATABASE, "UPDATE reservation SET order_id = 'A-18'", "was reserved as A-18"),
        (payments.DATABASE, "INSERT INTO charge VALUES ('X', 'shop-1-9', 'ann', 1)", "shop-1-9: no reservation"),
        (
            orders.DATABASE,
            DOUBLED,
            "more than one order",
        ),
    ],
)
async def test_an_audit_finds_what_was_tampered_with(tmp_path, database, tampering, complaint):
    shop = Shop(tmp_path)
    await shop.start()
    await shop.order("shop-1-1", order_id="A-17")
    await shop.stop()
    assert audit(tmp_path).ok
    connection = apsw.Connection(str(tmp_path / database))
    connection.execute(tampering)
    connection.close()
    report = audit(tmp_path)
    assert not report.ok
    assert any(complaint in sentence for sentence in report.discrepancies), report.discrepancies
    assert main(["audit", "--data", str(tmp_path)]) == 1


def test_an_audit_of_no_shop_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"inventory\.db is missing"):
        audit(tmp_path)


def test_the_command_line_fills_a_shop_once(tmp_path, capsys):
    for _ in range(2):
        assert main(["seed", "--data", str(tmp_path), "--skus", "3", "--stock", "7", "--accounts", "2"]) == 0
    assert main(["audit", "--data", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["stock_initial"], report["balance_initial_cents"], report["ok"]) == (21, 2_000_000, True)


async def test_a_shop_may_be_restocked_while_it_is_open(shop):
    await shop.order("shop-1-1", until="prepare")
    inventory.seed(shop.folder, {"pot": 3, "tea": 99})
    assert audit(shop.folder).stock_initial == 18
