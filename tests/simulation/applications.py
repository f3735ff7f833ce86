"""Applications: they work in the banks' databases by themselves, and hand the decision to the cluster (the XA style).

Most do as they should. Some die, at any step; some fall silent; some prepare when their time is over, and some ask for
the commit of a branch that they have not prepared, or prepare it only then. Nothing of that may do any harm.
"""

import asyncio
import random
from typing import TYPE_CHECKING, Any

from tests.simulation.bank import Denied
from tests.simulation.clients import Client
from tests.simulation.database import Connection, Lost
from tests.simulation.faults import NODES
from tests.simulation.http import NoAnswer

if TYPE_CHECKING:
    from tests.simulation.world import World

_MANNERS = {"well": 62, "dies": 14, "falls silent": 6, "is late": 9, "lies": 9}
"""How an application behaves, and how often."""


class _GivesUp(Exception):
    """It wants its transaction aborted. The text says why."""


class Application(Client):
    """One application, through all its lives."""

    def __init__(self, world: "World", name: str, rng: random.Random) -> None:
        super().__init__(world, name, rng)
        self._dies_in = -1
        """So many steps are left; none for whoever does not die."""
        self._silent: set[str] = set()
        """Nodes that have left its last question unanswered."""
        self._in_earnest = False
        """All is healed, and it has to be served."""
        self._must_wait = False
        """It was told that not all nodes are known to understand it yet, and one never will be."""

    async def _transfer(self, *, last: bool = False) -> bool:
        """One transaction. True once it is known to be decided."""
        rng = self.rng
        self.count += 1
        self._in_earnest = last
        manner = "well" if last else rng.choices(list(_MANNERS), list(_MANNERS.values()))[0]
        self._dies_in = rng.randrange(1, 9) if manner == "dies" else -1
        if manner != "well":
            self.world.net.count(f"an application {manner}")
        timeout_s = 4.0 if last else rng.choice((1.0, 2.0, 4.0))
        gid = await self._begin(timeout_s, last=last)
        if gid is None:
            return last and self._must_wait
        self.gids.append(gid)
        self.world.note(self.name, f"{gid}: this one {manner}")
        opened: dict[str, Connection] = {}
        try:
            await self._work(gid, opened)
            if manner == "falls silent":
                return False
            if manner == "is late":
                await asyncio.sleep(timeout_s + rng.uniform(-0.3, 2.5))
            liar = rng.choice(list(opened)) if manner == "lies" else None
            await self._prepare([connection for bank, connection in opened.items() if bank != liar])
            committing = asyncio.get_running_loop().create_task(self._commit(gid, list(opened), last=last))
            if liar is not None and rng.random() < 0.7:
                await asyncio.sleep(rng.uniform(0.0, 0.3))
                await self._prepare([opened[liar]])
            return await committing
        except _GivesUp as error:
            self.world.note(self.name, f"{gid}: {error}")
            return await self._abort(gid)
        finally:
            for connection in opened.values():
                connection.close()

    async def _step(self) -> None:
        """Perhaps the last one."""
        self._dies_in -= 1
        if self._dies_in == 0:
            self.world.dies_by_itself(self.name, self.rng.uniform(0.1, 1.0))
            await asyncio.sleep(1.0)  # and never wakes up

    async def _begin(self, timeout_s: float, *, last: bool) -> str | None:
        key = f"{self.name}-{self.count}"
        body = {"timeout_s": timeout_s}
        answer = await self._insist("/v1/transactions/begin", body, {"Idempotency-Key": key}, last=last)
        await self._step()
        if answer is None:
            return None
        status, told = answer
        if status != 200:
            plan = self.world.plan
            never = plan.stays_old or (plan.old and plan.left_out)
            self._must_wait = told["code"] == "not_before_upgrade" and bool(never)
            if told["code"] == "not_before_upgrade":
                self.world.net.count("applications that are told to wait for an upgrade")
            elif told["code"] != "too_many_in_flight":
                self.world.defect(f"{self.name}: begin: {status} {told}")
            return None
        self.world.hear("named", self.name, key, told["gid"], repr(body))
        gid: str = told["gid"]
        return gid

    async def _work(self, gid: str, opened: dict[str, Connection]) -> None:
        """Enlists every branch, and then works there."""
        for wish in self._wish():
            bank = wish["participant"]
            answer = await self._insist(f"/v1/transactions/{gid}/branches", {"participant": bank})
            await self._step()
            if answer is None:
                raise _GivesUp(f"{bank} is perhaps not enlisted")
            status, told = answer
            self._perhaps_missed(gid, status)
            if status != 200:
                if told["code"] not in ("not_active", "participant_backlog", "forgotten"):
                    self.world.defect(f"{self.name}: {bank} is not enlisted in {gid}: {status} {told}")
                raise _GivesUp(f"{bank} is not enlisted: {told['code']}")
            payload = wish["payload"]
            try:
                address = self.world.machines[bank].address
                opened[bank] = connection = await Connection.open(address, within_s=2.0)
                await connection.ask(
                    do="work", gid=gid, branch=bank, account=payload["account"], amount=payload["amount"], within_s=2.0
                )
            except (Lost, Denied) as error:
                raise _GivesUp(f"no work at {bank}: {error}") from error
            await self._step()

    async def _prepare(self, connections: list[Connection]) -> None:
        done = await asyncio.gather(
            *[connection.ask(do="prepare", within_s=3.0) for connection in connections], return_exceptions=True
        )
        await self._step()
        for error in done:
            if isinstance(error, Lost | Denied):
                raise _GivesUp(f"not prepared: {error}") from error
            if error is not None:
                raise error

    async def _commit(self, gid: str, branches: list[str], *, last: bool) -> bool:
        body = {"branches": branches, "wait": self.rng.choice(("none", "decided", "ended"))}
        answer = await self._insist(f"/v1/transactions/{gid}/commit", body, last=last)
        if answer is None:
            return False
        status, told = answer
        self._perhaps_missed(gid, status)
        if status not in (200, 202, 404, 410):
            self.world.defect(f"{self.name}: commit of {gid}: {status} {told}")
        if status not in (200, 202):
            return False
        self._saw(told, f"{self.name} asked for the commit")
        self.world.note(self.name, f"commit {gid}: {told['state']}")
        return told["decision"] is not None

    def _perhaps_missed(self, gid: str, status: int) -> None:
        if status in (404, 410):
            self.world.hear("missed", self.name, gid, status)

    async def _insist(
        self, path: str, body: Any, headers: dict[str, str] | None = None, *, last: bool = False
    ) -> tuple[int, Any] | None:
        """The first answer that says something, of one node after the other; None when none did."""
        order = self.rng.sample(NODES, len(NODES))
        if self._in_earnest:
            # One may be gone for good: whoever asks it first, again and again, is late for ever.
            order.sort(key=self._silent.__contains__)
        for attempt in range(6 if last else self.rng.randrange(2, 6)):
            node = order[attempt % len(order)]
            try:
                within_s = 8.0 if last else self.rng.choice((1.0, 3.0))
                status, told = await self._ask(node, "POST", path, body=body, headers=headers, within_s=within_s)
            except NoAnswer as error:
                self._silent.add(node)
                self.world.note(self.name, f"{path} at {node}: {error}")
            else:
                self._silent.discard(node)
                if status != 503 or told["code"] == "not_before_upgrade":
                    return status, told
                self.world.note(self.name, f"{path} at {node}: {status} {told['code']}")
            await asyncio.sleep(self.rng.uniform(0.0, 0.4))
        return None
