"""Clients that order from the shop, and write down all that they ask and are told.

An order's id is its idempotency key, so that the databases tell which transaction a key named. A client repeats a
request under its key, at any node, until it has a definite answer. Now and then it asks two nodes at once; uses a key
again for something else, which must be refused; asks for an abort of what is under way; or looks at what it was told.
"""

import asyncio
import random
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from cluster.calls import Answer, Caller, Unreachable
from cluster.chaos.history import Recorder

SKUS: Final = 24
ACCOUNTS: Final = 24
STOCK: Final = 1_000_000
BALANCE_CENTS: Final = 1_000_000_00
RARE: Final = 40
"""Pieces of the one article that runs out, so that some orders are refused."""

_TRY_S: Final = 4.0
"""Until another node is asked. A node promises its own 503 within 3 s; one that is paused says nothing."""

MOVE_TIMEOUT_S: Final = 4.0
"""Of a transaction of the application's own."""

_TIMEOUT_S: Final = 5.0
_BACKOFF_S: Final = 0.05
_LOOKS_BACK: Final = 200


def stock() -> dict[str, int]:
    """Pieces by SKU."""
    return {f"sku-{number}": STOCK for number in range(SKUS)} | {"rare": RARE}


def balances_cents() -> dict[str, int]:
    """Money by account."""
    return {f"account-{number}": BALANCE_CENTS for number in range(ACCOUNTS)}


def order_of(key: str, sku: str, account: str, quantity: int) -> dict[str, Any]:
    """A transaction that places an order."""
    goods, money = {"sku": sku, "quantity": quantity}, {"account": account, "amount_cents": 100 * quantity}
    payloads: Mapping[str, Mapping[str, Any]] = {
        "inventory": {"op": "reserve", "order_id": key, **goods},
        "payments": {"op": "charge", "order_id": key, **money},
        "orders": {"op": "place", "order_id": key, **goods, **money},
    }
    return {
        "branches": [{"participant": name, "payload": payload} for name, payload in payloads.items()],
        "timeout_s": _TIMEOUT_S,
    }


class Load:
    """All clients of a run. `caller` reaches the nodes; per_s: orders begun, at the most, by all of them together."""

    def __init__(
        self, caller: Caller, nodes: Mapping[str, str], recorder: Recorder, seed: int, *, per_s: float
    ) -> None:
        self.clients = 10
        self.used: set[tuple[str, str]] = set()
        """SKU and account of every order."""
        self._caller = caller
        self._nodes = dict(nodes)
        self._recorder = recorder
        self._seed = seed
        self._pause_s = self.clients / per_s
        self._known: list[str] = []
        self._op = 0
        self._over = asyncio.Event()
        self._patience_s = float("inf")

    async def run(self) -> None:
        """Order, until `stop` is called; on return everyone has an answer, or has lost patience."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(number))

    def stop(self, *, patience_s: float) -> None:
        """Begin nothing more. Whoever waits has so long."""
        self._patience_s = self._recorder.now_s + patience_s
        self._over.set()

    async def _client(self, number: int) -> None:
        rng = random.Random(f"client {self._seed} {number}")
        turn = 0
        while not self._over.is_set():
            turn += 1
            began_s = self._recorder.now_s
            await self._order(rng, number, f"order-{number}-{turn}")
            if self._known and rng.random() < 0.1:
                await self._look(rng, number)
            pause_s = began_s + self._pause_s * rng.uniform(0.5, 1.5) - self._recorder.now_s
            if pause_s > 0:
                try:
                    async with asyncio.timeout(pause_s):
                        await self._over.wait()
                except TimeoutError:
                    continue

    async def _order(self, rng: random.Random, client: int, key: str) -> None:
        sku = "rare" if rng.random() < 0.05 else f"sku-{rng.randrange(SKUS)}"
        account, quantity = f"account-{rng.randrange(ACCOUNTS)}", rng.randint(1, 3)
        body = order_of(key, sku, account, quantity)
        if sku != "rare":
            self.used.add((sku, account))
        what = rng.random()
        if what < 0.08:
            # The same at two nodes at once.
            await asyncio.gather(*(self._until_told(rng, client, key, "order", body) for _ in range(2)))
        elif what < 0.12:
            # Something else under the same key, at once: one of the two must be refused.
            other = order_of(key, sku, account, quantity + 10)
            await asyncio.gather(
                self._until_told(rng, client, key, "order", body),
                self._until_told(rng, client, key, "another", other),
            )
        else:
            await self._until_told(rng, client, key, "order", body)
            if what < 0.15:
                await self._until_told(rng, client, key, "another", order_of(key, sku, account, quantity + 10))

    async def _until_told(self, rng: random.Random, client: int, key: str, name: str, body: Mapping[str, Any]) -> None:
        if rng.random() < 0.04:
            body_now = {**body, "wait": "none"}  # it does not count for the key
            outcome, gid = await self._ask(rng, client, key, name, body_now)
            if gid is not None and outcome == "undecided":
                await self._abort(rng, client, gid)
        while self._recorder.now_s < self._patience_s:
            outcome, _ = await self._ask(rng, client, key, name, body)
            if outcome not in ("undecided", "unknown"):
                return
            await asyncio.sleep(_BACKOFF_S * rng.uniform(0.5, 2.0))

    async def _ask(
        self, rng: random.Random, client: int, key: str, name: str, body: Mapping[str, Any]
    ) -> tuple[str, str | None]:
        node = rng.choice(list(self._nodes))
        self._op += 1
        op = self._op
        self._recorder.note("asked", op=op, client=client, key=key, body=name, node=node)
        url = f"{self._nodes[node]}/v1/transactions"
        outcome, gid, _ = await asked(self._caller, self._recorder, op, url, key, body)
        if gid is not None:
            self._known.append(gid)
            del self._known[:-_LOOKS_BACK]
        return outcome, gid

    async def _abort(self, rng: random.Random, client: int, gid: str) -> None:
        await self._read(rng, client, "POST", gid, "/abort", {})

    async def _look(self, rng: random.Random, client: int) -> None:
        await self._read(rng, client, "GET", rng.choice(self._known), "", None)

    async def _read(self, rng: random.Random, client: int, method: str, gid: str, suffix: str, body: object) -> None:
        node = rng.choice(list(self._nodes))
        try:
            answer = await self._caller.once(
                method, f"{self._nodes[node]}/v1/transactions/{gid}{suffix}", body=body, within_s=_TRY_S
            )
        except Unreachable:
            return
        if answer.status in (200, 202, 404, 410):
            self._recorder.note("read", client=client, node=node, gid=gid, outcome=seen(answer))


class Told(NamedTuple):
    """What came of a request that begins a transaction, as the history has it."""

    outcome: str
    gid: str | None
    detail: str | None


async def asked(
    caller: Caller,
    recorder: Recorder,
    op: int,
    url: str,
    key: str,
    body: Mapping[str, Any],
    *,
    within_s: float = _TRY_S,
) -> Told:
    """Begin a transaction, or ask under its key again; noted as what came of `op`."""
    try:
        answer = await caller.once("POST", url, body=body, headers={"Idempotency-Key": key}, within_s=within_s)
    except Unreachable as error:
        told = Told("unknown", None, str(error))
    else:
        told = _judged(answer)
    recorder.note("answered", op=op, **told._asdict())
    return told


def _judged(answer: Answer) -> Told:
    """What an answer to an order says."""
    if answer.status in (200, 202):
        reason = answer.body.get("reason")
        return Told(seen(answer), answer.body["gid"], None if reason is None else str(reason))
    code = answer.body.get("code") if isinstance(answer.body, dict) else None
    if code == "idempotency_key_reused":
        return Told("reused", None, None)
    if answer.status in (429, 503):
        return Told("unknown", None, f"{answer.status} {code}")
    return Told("surprise", None, f"{answer.status} {answer.body}")


def seen(answer: Answer) -> str:
    """What an answer about a transaction says of it."""
    if answer.status == 404:
        return "missing"
    if answer.status == 410:
        return "forgotten"
    decision = answer.body["decision"]
    return "undecided" if decision is None else {"commit": "committed", "abort": "aborted"}[decision]
