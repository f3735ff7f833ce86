"""Customers at a steady rate: each orders once, retries safely, and remembers what it was told.

A customer's request carries an idempotency key, so it may be repeated at any node until one answers. Two orders for the
same article at the same moment meet a lock; the loser is told `retryable`, and tries again under a new key but with the
same order id. The shop refuses an order id that it has seen, so an order that was told "aborted" and yet took place
would not stay hidden.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from cluster.calls import Answer, Caller, Unreachable

MAX_WAITING: Final = 100
"""Customers who wait for their answer at the same time; who comes then is turned away, as by a full pool."""

PATIENCE_S: Final = 60.0
"""After that a customer gives up, which is an error."""

_TIMEOUT_S: Final = 10.0
_TRY_S: Final = _TIMEOUT_S + 2.0
_BACKOFF_S: Final = 0.05

SKUS: Final = 80
ACCOUNTS: Final = 80
PRICE_CENTS: Final = 4_50


def stock() -> dict[str, int]:
    """Plenty of most articles, three pieces of each rare one."""
    return {f"sku-{number}": 10_000 for number in range(SKUS)} | {f"rare-{number}": 3 for number in range(4)}


def balances_cents() -> dict[str, int]:
    """Plenty of money in most accounts, two purchases' worth in each poor one."""
    rich = {f"account-{number}": 1_000_000_00 for number in range(ACCOUNTS)}
    return rich | {f"poor-{number}": 2 * PRICE_CENTS for number in range(4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkout:
    """What one customer wants."""

    order: str
    sku: str
    account: str
    quantity: int

    def body(self) -> dict[str, Any]:
        """As a transaction."""
        cents = self.quantity * PRICE_CENTS
        goods = {"sku": self.sku, "quantity": self.quantity}
        money = {"account": self.account, "amount_cents": cents}
        payloads: Mapping[str, dict[str, Any]] = {
            "inventory": {"op": "reserve", "order_id": self.order, **goods},
            "payments": {"op": "charge", "order_id": self.order, **money},
            "orders": {"op": "place", "order_id": self.order, **goods, **money},
        }
        return {
            "branches": [{"participant": name, "payload": payload} for name, payload in payloads.items()],
            "timeout_s": _TIMEOUT_S,
        }


def customers(prefix: str, rng: random.Random) -> Iterator[Checkout]:
    """An endless queue; one in twelve wants something rare, one in twelve is poor."""
    for number in count():
        rare, poor = number % 12 == 5, number % 12 == 11
        yield Checkout(
            order=f"{prefix}-{number}",
            sku=f"rare-{rng.randrange(4)}" if rare else f"sku-{rng.randrange(SKUS)}",
            account=f"poor-{rng.randrange(4)}" if poor else f"account-{rng.randrange(ACCOUNTS)}",
            quantity=1 if rare or poor else rng.randint(1, 3),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a customer heard in the end. `outcome`: committed, refused, or error; `reason`: why not."""

    order: str
    outcome: str
    gid: str | None
    reason: str | None
    latency_s: float


class Load:
    """The customers of one run. `caller` reaches the nodes."""

    def __init__(self, caller: Caller, queue: Iterator[Checkout], rng: random.Random, *, per_s: float) -> None:
        self.told: list[Told] = []
        self.begun = 0
        self.turned_away = 0
        self.tried_again = 0
        """Transactions begun anew because another order held a lock."""
        self._caller = caller
        self._queue = queue
        self._rng = rng
        self._period_s = 1.0 / per_s
        self._waiting: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Customers without an answer so far."""
        return len(self._waiting)

    @property
    def repeated(self) -> int:
        """Requests that were made again because a node did not answer. Customers do not notice."""
        return self._caller.repeated

    def count(self, outcome: str) -> int:
        """Customers who were told so."""
        return sum(told.outcome == outcome for told in self.told)

    async def arrive(self) -> None:
        """Customers come at a steady rate, whatever happens, until this is cancelled."""
        next_s = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            next_s += self._period_s
            if len(self._waiting) >= MAX_WAITING:
                self.turned_away += 1
                continue
            self.begun += 1
            task = asyncio.create_task(self._serve(next(self._queue)))
            self._waiting.add(task)
            task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._waiting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect of this file, not of the cluster: nobody was told anything, so the verdict will not add up.
            asyncio.get_running_loop().call_exception_handler({"message": "a customer failed", "exception": error})

    async def finish(self, *, within_s: float = PATIENCE_S) -> None:
        """Wait until everyone has an answer. Those who have none by then stay without."""
        if self._waiting:
            await asyncio.wait(self._waiting, timeout=within_s)

    async def close(self) -> None:
        """Send everyone home."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _serve(self, checkout: Checkout) -> None:
        began_s = time.monotonic()
        outcome, gid, reason = await self._outcome(checkout, began_s + PATIENCE_S)
        self.told.append(
            Told(
                order=checkout.order,
                outcome=outcome,
                gid=gid,
                reason=reason,
                latency_s=time.monotonic() - began_s,
            )
        )

    async def _outcome(self, checkout: Checkout, until_s: float) -> tuple[str, str | None, str | None]:
        attempt = 0
        gid: str | None = None
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                answer = await self._caller.anywhere(
                    "POST",
                    "/v1/transactions",
                    body=checkout.body(),
                    headers={"Idempotency-Key": f"{checkout.order}-{attempt}"},
                    within_s=left_s,
                    try_s=_TRY_S,
                    start=self._rng.randrange(1 << 16),
                )
            except Unreachable as error:
                return "error", gid, str(error)
            if answer.status == 202:
                continue  # not decided within the wait: the same key waits on
            if answer.status != 200:
                return "error", gid, answer.trouble
            gid = answer.body["gid"]
            if answer.body["decision"] == "commit":
                return "committed", gid, None
            refusal = _refusal(answer)
            if refusal is not None:
                return "refused", gid, refusal
            attempt += 1
            self.tried_again += 1
            await asyncio.sleep(_BACKOFF_S * min(attempt, 10) * (0.5 + self._rng.random()))
        return "error", gid, f"no answer within {PATIENCE_S:g} s"


def _refusal(answer: Answer) -> str | None:
    """Why the shop will not have it; None when another try may fare better."""
    for branch in answer.body["branches"]:
        if branch["state"] == "refused" and not branch.get("retryable"):
            return f"{branch['branch']}: {branch['reason']}"
    return None
