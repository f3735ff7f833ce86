"""Clients: they transfer money under idempotency keys, ask again elsewhere when they are not answered, and vanish."""

import asyncio
import random
from typing import TYPE_CHECKING, Any

from tests.simulation.faults import BANKS, NODES
from tests.simulation.http import NoAnswer, call

if TYPE_CHECKING:
    from tests.simulation.world import World

API_PORT = 8000
ACCOUNTS = ("a", "b", "c", "d")
_NOT_DONE = (
    "no_leader",
    "shutting_down",
    "too_many_in_flight",
    "participant_backlog",
    "too_many_connections",
    "awaiting_copy",
)
"""Codes of answers that say that nothing was done."""


class Client:
    """One client, through all its lives."""

    def __init__(self, world: "World", name: str, rng: random.Random) -> None:
        self.world = world
        self.name = name
        self.rng = rng
        self.count = 0
        self.gids: list[str] = []
        self.done = False
        self.told = 0

    async def live(self) -> None:
        """Transfer until the world comes to its end; then once more, which must succeed."""
        rng = self.rng
        while not self.world.closing:
            await self._transfer()
            if self.gids and rng.random() < 0.3:
                await self._look(rng.choice(self.gids[-5:]))
            await asyncio.sleep(rng.expovariate(1 / 0.35))
        while not await self._transfer(last=True):  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.3)
        self.done = True

    async def _ask(self, node: str, method: str, path: str, **how: Any) -> tuple[int, Any]:
        return await call(self.world.machines[node].address, API_PORT, method, path, **how)

    def _wish(self) -> list[dict[str, Any]]:
        """Branches whose amounts add up to nothing."""
        rng = self.rng
        banks = rng.sample(BANKS, rng.choice((2, 2, 2, 3)))
        amounts = [rng.randrange(1, 40) for _ in banks[1:]]
        if rng.random() < 0.1:
            amounts[-1] = 0  # it only looks
        amounts.append(-sum(amounts))
        return [
            {
                "participant": bank,
                "payload": {"account": rng.choice(ACCOUNTS), "amount": amount, "request": f"{self.name}-{self.count}"},
            }
            for bank, amount in zip(banks, amounts, strict=True)
        ]

    async def _transfer(self, *, last: bool = False) -> bool:
        """Whether it came to a decision, as far as this client knows."""
        rng = self.rng
        self.count += 1
        keyed = last or rng.random() < 0.75
        key = f"{self.name}-{self.count}" if keyed else None
        body = {
            "branches": self._wish(),
            "timeout_s": rng.choice((0.5, 1.0, 2.0, 4.0)),
            "wait": "ended" if last else rng.choice(("none", "decided", "decided", "ended")),
        }
        patience_s = 8.0 if last else rng.choice((0.3, 1.0, 3.0, 6.0))
        tries = len(NODES) if last else 1 if key is None else rng.randrange(1, 7)
        racing = key is not None and rng.random() < 0.15
        answers = []
        order = rng.sample(NODES, len(NODES))
        for attempt in range(tries):
            # In turn: one of them may be gone for good, and say nothing.
            nodes = order[:2] if racing and attempt == 0 else [order[attempt % len(order)]]
            told = await asyncio.gather(*[self._submit(node, key, body, patience_s) for node in nodes])
            answers += told
            if any(gid is not None for gid, _, _ in told):
                break
            await asyncio.sleep(rng.uniform(0.0, 0.6))
        gids = [gid for gid, _, _ in answers if gid is not None]
        if key is not None and not gids and all(definite for _, _, definite in answers):
            self.world.hear("refused", self.name, key)
        if not gids:
            return False
        self.gids.append(gids[0])
        if key is not None and not last and rng.random() < 0.1:
            await self._submit(rng.choice(NODES), key, {**body, "timeout_s": 3.0}, patience_s)
        if not last and rng.random() < 0.12:
            await self._abort(gids[0])
        return all(state in ("committed", "aborted") for gid, state, _ in answers if gid is not None)

    async def _submit(self, node: str, key: str | None, body: Any, within_s: float) -> tuple[str | None, str, bool]:
        """Gid, state, and whether "no" means that nothing was done."""
        headers = {} if key is None else {"Idempotency-Key": key}
        try:
            status, told = await self._ask(
                node, "POST", "/v1/transactions", body=body, headers=headers, within_s=within_s
            )
        except NoAnswer as error:
            self.world.note(self.name, f"submit {key} at {node}: {error}")
            return None, "", not error.perhaps_done
        if status in (200, 202):
            self._saw(told, f"{self.name} told by {node}")
            self.world.hear("named", self.name, key, told["gid"], _plain(body))
            self.world.note(self.name, f"submit {key} at {node}: {told['gid']} {told['state']}")
            return told["gid"], told["state"], False
        self.world.note(self.name, f"submit {key} at {node}: {status} {told['code']}")
        if status not in (422, 429, 503):
            self.world.defect(f"{self.name}: submit at {node}: {status} {told}")
        # Under a key that was used before, something may have been done earlier; the checker looks at all answers.
        return None, "", told["code"] in _NOT_DONE

    def _saw(self, told: Any, where: str) -> None:
        self.told += 1
        if told["decision"] is not None:
            outcome = "committed" if told["decision"] == "commit" else "aborted"
            self.world.hear("saw", told["gid"], outcome, where)

    async def _look(self, gid: str) -> None:
        node = self.rng.choice(NODES)
        outcomes = self.rng.random() < 0.4
        path = f"/v1/{'outcomes' if outcomes else 'transactions'}/{gid}"
        try:
            status, told = await self._ask(node, "GET", path, within_s=2.0)
        except NoAnswer:
            return
        self.world.note(self.name, f"GET {path} at {node}: {status}")
        if status in (404, 410):
            self.world.hear("missed", self.name, gid, status)
        elif status == 200 and outcomes:
            self.world.hear("saw", gid, told["outcome"], f"{self.name} asked {node}")
        elif status == 200:
            self._saw(told, f"{self.name} asked {node}")
        elif status != 503:
            self.world.defect(f"{self.name}: {path} at {node}: {status} {told}")

    async def _abort(self, gid: str) -> bool:
        """Asks for it, once. True when it is known how the transaction is decided."""
        node = self.rng.choice(NODES)
        try:
            status, told = await self._ask(node, "POST", f"/v1/transactions/{gid}/abort", within_s=2.0)
        except NoAnswer:
            return False
        self.world.note(self.name, f"abort {gid} at {node}: {status}")
        if status == 200:
            self._saw(told, f"{self.name} aborted at {node}")
        elif status in (404, 410):
            self.world.hear("missed", self.name, gid, status)
        elif status != 503:
            self.world.defect(f"{self.name}: abort of {gid} at {node}: {status} {told}")
        return status == 200


def _plain(body: Any) -> str:
    """What the key stands for: `wait` is no part of it."""
    return repr([body["branches"], body["timeout_s"]])
