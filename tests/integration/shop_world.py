"""The shop of `participants.shop` in a `World`: checkouts, and the books that must be right in the end."""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cluster.ports import free_ports
from cluster.service import Service
from cluster.tap import Match, Message
from participants.shop import SERVICES, audit, inventory, orders, payments
from participants.shop.audit import order_ids
from tests.integration.world import Told, World

SKUS: Final = 60
ACCOUNTS: Final = 60
STOCK: Final = 10_000
BALANCE_CENTS: Final = 5_000_000

SOLD_OUT: Final = "sold-out"
BROKE: Final = "broke"
APART: Final = "apart"
"""A SKU, and an account, that the load leaves alone: nothing else can lock them. So are apart-0 to apart-19."""


class ShopWorld(World):
    """Inventory, payments and orders. One checkout in ten asks for what is sold out, or by who is broke."""

    @property
    def books(self) -> Path:
        """The folder of the three databases."""
        return self.folder / "books"

    def lay_out(self) -> None:
        self._orders = itertools.count(1)
        stock = {f"sku-{i}": STOCK for i in range(SKUS)}
        balances = {f"account-{i}": BALANCE_CENTS for i in range(ACCOUNTS)}
        apart = [APART, *(f"apart-{i}" for i in range(20))]
        inventory.seed(self.books, stock | dict.fromkeys(apart, STOCK) | {SOLD_OUT: 0})
        payments.seed(self.books, balances | dict.fromkeys(apart, BALANCE_CENTS) | {BROKE: 0})
        orders.seed(self.books)
        for name, port in zip(SERVICES, free_ports(len(SERVICES)), strict=True):
            self.services[name] = Service.shop(
                name, data=self.books, port=port, coordinators=self.cluster.urls, folder=self.folder / name
            )

    def next_request(self, rng: random.Random) -> tuple[str, Sequence[Mapping[str, Any]]]:
        sku = SOLD_OUT if rng.random() < 0.05 else f"sku-{rng.randrange(SKUS)}"
        account = BROKE if rng.random() < 0.05 else f"account-{rng.randrange(ACCOUNTS)}"
        return self.checkout(sku, account, rng.randint(1, 3), rng.randint(1, 500))

    def checkout(
        self, sku: str, account: str, quantity: int = 1, amount_cents: int = 100
    ) -> tuple[str, list[Mapping[str, Any]]]:
        """An order's id, and the branches that place it."""
        order = f"order-{next(self._orders):06d}"
        return order, [
            {
                "participant": "inventory",
                "payload": {"op": "reserve", "sku": sku, "quantity": quantity, "order_id": order},
            },
            {
                "participant": "payments",
                "payload": {"op": "charge", "account": account, "amount_cents": amount_cents, "order_id": order},
            },
            {
                "participant": "orders",
                "payload": {
                    "op": "place",
                    "account": account,
                    "sku": sku,
                    "quantity": quantity,
                    "amount_cents": amount_cents,
                    "order_id": order,
                },
            },
        ]

    async def verify(self, *, nodes: Sequence[str] | None = None) -> None:
        """Also: the books are right."""
        await super().verify(nodes=nodes)
        complaints = wrong_in_books(self.books, self.requests)
        assert not complaints, "\n".join(complaints[:20])


def prepare_of(order: str) -> Match:
    """The prepares of one order."""
    return lambda message: message.call == "prepare" and message.body["payload"]["order_id"] == order


def decision_of(world: World, order: str) -> Match:
    """The commits and aborts of one order that has not been asked for yet."""
    gids: set[str] = set()

    def note(message: Message, _status: int, _answer: object) -> None:
        if prepare_of(order)(message):
            gids.add(message.gid)

    for tap in world.taps.values():
        tap.watchers.append(note)
    return lambda message: message.call != "prepare" and message.gid in gids


def wrong_in_books(books: Path, requests: Sequence[Told]) -> list[str]:
    """What the three databases say against each other, or against what clients were told."""
    report = audit(books)
    complaints = list(report.discrepancies)
    if report.in_doubt:
        complaints.append(f"{report.in_doubt} branches are prepared")
    placed = order_ids(books)
    for told in requests:
        gid = placed.pop(told.key, None)
        if told.decision == "commit" and gid != told.gid:
            complaints.append(f"{told.key} was told to be committed as {told.gid}; in the books it is {gid}")
        if told.decision == "abort" and gid is not None:
            complaints.append(f"{told.key} was told to be aborted; in the books it is {gid}")
    complaints += [
        f"nobody has asked for order {order}, which is in the books as {gid}" for order, gid in placed.items()
    ]
    return complaints
