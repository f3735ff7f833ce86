"""Real processes under load, and what their clients were told: the ground on which the fault tests stand.

A `World` is a local cluster, services behind taps, and clients that keep asking for transactions. Each client notes
what it was told, and hides from itself only what an application may hide: a 503 or 429, a connection that broke, an
answer that did not come. Then it asks again, at another node, with the same idempotency key.

    async with ShopWorld(folder, seed=7) as world:
        async with world.load(clients=8):
            await world.told(50)
            await world.cluster.kill_leader()
            await world.told(150)
        await world.verify()            # all is over, and the books are right

What the processes wrote is part of the truth: a traceback, or a line of level ERROR or CRITICAL, fails a test that did
not announce it.
"""

import asyncio
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from cluster.calls import Answer, Caller, Unreachable
from cluster.local import Leader, LocalCluster
from cluster.ports import HOST
from cluster.process import Process
from cluster.service import Service
from cluster.tap import Tap
from coordinator.client import Client, ClientError
from tests.support import waiting

T = TypeVar("T")

PATIENCE_S = 60.0
"""Until a test gives up on what must happen: far beyond what it takes, for machines that are busy with other things."""

TRY_S = 5.0
"""Until a client gives up on one answer and asks another node. A node promises its own 503 within 3 s."""

_LOOK_S = 0.02
_BAD_LINE = re.compile(
    r"^\S+ \S+ (ERROR|CRITICAL) |^Traceback \(most recent call last\)|^Fatal Python error|^Exception ignored"
    r"|^\S+:\d+: \w*Warning: "
)


async def eventually(
    look: Callable[[], Awaitable[T | None]] | Callable[[], T | None], what: str, *, within_s: float = PATIENCE_S
) -> T:
    """The first true value of `look`, asked with the patience that processes need. Raises `TimeoutError`."""
    return cast("T", await waiting.eventually(look, what, within_s=within_s, pause_s=_LOOK_S))


@dataclass(slots=True, kw_only=True)
class Told:
    """One request of a client, and what came of it. `key` is its idempotency key, and names it in the books.

    decision: commit or abort, once the client knows; None: it gave up, or still asks.
    tries: an entry for every time that it asked: the status, or the text of what went wrong.
    """

    key: str
    branches: Sequence[Mapping[str, Any]]
    timeout_s: float
    began_s: float = field(default_factory=time.monotonic)
    gid: str | None = None
    decision: str | None = None
    reason: str | None = None
    tries: list[str] = field(default_factory=list)
    ended_s: float | None = None

    @property
    def took_s(self) -> float:
        """From the first question to the answer, or until now."""
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.began_s


class World:
    """See the module's text. `services` is filled by who knows what to serve: see `shop_world.py`."""

    host = HOST
    """Where nodes find the services."""

    def __init__(self, folder: Path, *, seed: int, timeout_s: float = 10.0, batch: bool = True) -> None:
        self.cluster = LocalCluster(folder / "c")
        self.folder = folder
        self.seed = seed
        self.rng = random.Random(seed)
        self.timeout_s = timeout_s
        self.batch = batch
        self.services: dict[str, Service] = {}
        self.taps: dict[str, Tap] = {}
        self.requests: list[Told] = []
        self.surprises: list[str] = []
        """What no client should ever see."""
        self.expected_lines: list[str] = []
        """Patterns of lines of level ERROR or CRITICAL that the test brings about."""
        self._caller = Caller()
        print(f"seed {seed}")  # shown when the test fails

    # -------------------------------------------------------------------------------------------- life

    async def __aenter__(self) -> "World":
        try:
            self.cluster.lay_out()
            self._caller = self.cluster.caller()
            await self._caller.__aenter__()
            self.lay_out()
            await asyncio.gather(
                self.cluster.start(), *(service.start(within_s=PATIENCE_S) for service in self.services.values())
            )
            for name, service in self.services.items():
                self.taps[name] = Tap(service.url, name=name, host=self.host)
                await self.taps[name].start()
                await service.register(
                    self.cluster.urls,
                    url=self.taps[name].url,
                    batch=self.batch,
                    token=self.cluster.token,
                    ca=self.cluster.ca,
                )
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()
        if kind is None:
            # Again, for what was said at the very end.
            self.check_logs()

    async def _end(self) -> None:
        try:
            await asyncio.gather(self.cluster.stop(), *(tap.stop() for tap in self.taps.values()))
        finally:
            for service in self.services.values():
                await service.stop()
            await self._caller.__aexit__(None, None, None)

    def lay_out(self) -> None:
        """Fill `services`; the nodes' addresses are known, and nothing runs yet."""

    # -------------------------------------------------------------------------------------------- what clients do

    def next_request(self, rng: random.Random) -> tuple[str, Sequence[Mapping[str, Any]]]:
        """Key and branches of the next transaction."""
        raise NotImplementedError

    async def ask(
        self,
        key: str,
        branches: Sequence[Mapping[str, Any]],
        *,
        start: int = 0,
        timeout_s: float | None = None,
        within_s: float = PATIENCE_S,
    ) -> Told:
        """Ask node after node, with one key, until the answer is definite or patience is over."""
        told = Told(key=key, branches=branches, timeout_s=timeout_s or self.timeout_s)
        self.requests.append(told)
        await self._ask(told, start, within_s)
        return told

    async def _ask(self, told: Told, start: int, within_s: float) -> None:
        deadline_s = told.began_s + within_s
        urls = self.cluster.urls
        body = {"branches": list(told.branches), "timeout_s": told.timeout_s, "wait": "decided"}
        turn = start
        try:
            while told.decision is None and (left_s := deadline_s - time.monotonic()) > 0:
                url = urls[turn % len(urls)]
                turn += 1
                try:
                    answer = await self._caller.once(
                        "POST",
                        f"{url}/v1/transactions",
                        body=body,
                        headers={"Idempotency-Key": told.key},
                        within_s=min(TRY_S, left_s),
                    )
                except Unreachable as error:
                    told.tries.append(str(error))
                    await asyncio.sleep(0.02)
                    continue
                told.tries.append(f"{answer.status}")
                if answer.status in (200, 202):
                    self._take(told, answer.body)
                elif answer.status in (429, 503):
                    if answer.retry_after_s is None:
                        self.surprises.append(f"{told.key}: {answer.status} without Retry-After: {answer.body}")
                    await asyncio.sleep(0.05)
                else:
                    self.surprises.append(f"{told.key} after {told.tries}: {answer.body}")
                    break
        finally:
            told.ended_s = time.monotonic()

    async def submit(self, key: str, branches: Sequence[Mapping[str, Any]], *, start: int = 0) -> Told:
        """The same by our own client, which hides all that may be hidden: whatever it raises is a surprise."""
        told = Told(key=key, branches=branches, timeout_s=self.timeout_s)
        self.requests.append(told)
        urls = [*self.cluster.urls[start % 3 :], *self.cluster.urls[: start % 3]]
        try:
            async with Client(urls, patience_s=PATIENCE_S) as client:
                txn = await client.submit(branches, key=key, timeout_s=self.timeout_s)
        except ClientError as error:
            self.surprises.append(f"{key}: {error!r}")
        else:
            told.gid, told.reason, told.tries = txn.gid, txn.reason, ["by our client"]
            told.decision = None if txn.decision is None else str(txn.decision)
        finally:
            told.ended_s = time.monotonic()
        return told

    def _take(self, told: Told, body: Any) -> None:
        if told.gid is not None and told.gid != body["gid"]:
            self.surprises.append(f"{told.key} was {told.gid}, and is {body['gid']} now")
        told.gid = body["gid"]
        told.decision, told.reason = body["decision"], body["reason"]

    @asynccontextmanager
    async def load(self, *, clients: int = 8, sdk: bool = False) -> AsyncIterator[None]:
        """Clients that ask for one transaction after the other; on leaving, each waits for its last answer.

        sdk: they use our own client.
        """
        ask = self.submit if sdk else self.ask
        over = asyncio.Event()

        async def client(number: int) -> None:
            rng = random.Random(f"{self.seed}-{number}")
            while not over.is_set():
                told = await ask(*self.next_request(rng), start=number)
                if told.decision is None:
                    self.surprises.append(f"{told.key} has no answer after {told.took_s:.1f} s: {told.tries}")

        tasks = [asyncio.create_task(client(number)) for number in range(clients)]
        try:
            yield
        finally:
            over.set()
            done, _ = await asyncio.wait(tasks)
            for task in done:
                task.result()

    @property
    def answered(self) -> int:
        """How many requests have a definite answer."""
        return sum(told.decision is not None for told in self.requests)

    async def told(self, more: int, *, within_s: float = PATIENCE_S) -> None:
        """Return once `more` requests that are begun from now on have a definite answer."""
        begun = len(self.requests)

        def enough() -> bool:
            return sum(told.decision is not None for told in self.requests[begun:]) >= more

        await eventually(enough, f"{more} more answers (there were {begun} requests)", within_s=within_s)

    # -------------------------------------------------------------------------------------------- what can be seen

    async def get(self, url: str, *, within_s: float = TRY_S) -> Answer:
        """One GET. Raises `Unreachable`."""
        return await self._caller.once("GET", url, within_s=within_s)

    async def post(self, url: str, body: object, *, within_s: float = TRY_S, key: str | None = None) -> Answer:
        """One POST. Raises `Unreachable`."""
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self._caller.once("POST", url, body=body, headers=headers, within_s=within_s)

    async def ready(self, node: str) -> None:
        """Return once `node` follows or leads, and has applied its leader's barrier."""

        async def looks_so() -> bool:
            status = await self.cluster.status(node)
            return status is not None and status["ready"]

        await eventually(looks_so, f"{node} takes part")

    async def kill_at_once(self, nodes: Sequence[str]) -> None:
        """kill -9 of several nodes, before any of them can notice what happens to the others."""
        identities = [self.cluster.process(node).identity for node in nodes]
        for identity in identities:
            assert identity is not None, "all of them run"
            identity.signal(signal.SIGKILL)
        for node in nodes:
            await self.cluster.process(node).gone(within_s=PATIENCE_S)
            await self.cluster.kill(node)

    async def kill_service(self, name: str) -> None:
        """kill -9 of a service."""
        assert await self.services[name].kill(), f"{name} does not run"

    async def start_service(self, name: str) -> None:
        """Start it again, on its data."""
        await self.services[name].start(within_s=PATIENCE_S)

    async def prepared(self, name: str) -> list[str]:
        """Gids of the branches that service `name` holds prepared."""
        answer = await self.get(f"{self.services[name].url}/branches")
        assert answer.status == 200, answer
        return [row["gid"] for row in answer.body["branches"]]

    async def new_leader(self, before: Leader) -> Leader:
        """The leader of a later epoch than `before`'s, past its barrier."""

        async def ready() -> Leader | None:
            leader = await self.cluster.wait_for_leader(newer_than=before.epoch, within_s=PATIENCE_S)
            status = await self.cluster.status(leader.node)
            return leader if status is not None and status["ready"] and status["role"] == "leader" else None

        return await eventually(ready, "a new leader past its barrier")

    async def settled(self, *, nodes: Sequence[str] | None = None, within_s: float = PATIENCE_S) -> None:
        """Return once no node knows of an unfinished transaction and no service holds a prepared branch."""
        asked = self.cluster.running if nodes is None else nodes
        seen: dict[str, Any] = {}

        async def quiet() -> bool:
            for node in asked:
                status = await self.cluster.status(node)
                seen[node] = None if status is None else (status["in_flight"], status["ready"], status["epoch"])
            for name in self.services:
                seen[name] = await self.prepared(name)
            epochs = {seen[node] and seen[node][2] for node in asked}
            return (
                len(epochs) == 1
                and all(seen[node] is not None and seen[node][:2] == (0, True) for node in asked)
                and not any(seen[name] for name in self.services)
            )

        try:
            await eventually(quiet, "everything is over", within_s=within_s)
        except (TimeoutError, Unreachable) as error:
            raise AssertionError(f"{error}; (in flight, ready, epoch) or prepared: {seen}") from error

    # -------------------------------------------------------------------------------------------- what must hold

    async def verify(self, *, nodes: Sequence[str] | None = None) -> None:
        """Wait until all is over; then: no surprises, all nodes agree with what clients were told, logs are clean."""
        await self.settled(nodes=nodes)
        assert not self.surprises, "\n".join(self.surprises[:20])
        await self.check_agreement(self.cluster.running if nodes is None else nodes)
        self.check_logs()

    async def check_agreement(self, nodes: Sequence[str], *, at_most: int = 400) -> None:
        """Every node tells of every transaction what its client was told; of `at_most` if there are more."""
        known = [told for told in self.requests if told.gid is not None]
        if len(known) > at_most:
            telling = [told for told in known if len(told.tries) > 1][: at_most // 2]
            known = telling + self.rng.sample(known, at_most - len(telling))
        for node in nodes:
            for told in known:
                shown = await self.get(f"{self.cluster.url(node)}/v1/transactions/{told.gid}")
                assert shown.status == 200, (node, told, shown)
                decision = shown.body["decision"]
                assert decision == (told.decision or decision), (node, told, shown.body)
                outcome = await self.get(f"{self.cluster.url(node)}/v1/outcomes/{told.gid}")
                assert outcome.status == 200, (node, told, outcome)
                assert outcome.body["outcome"] == {"commit": "committed", "abort": "aborted"}[decision], (node, told)

    @property
    def processes(self) -> dict[str, Process]:
        """All of them, by name."""
        nodes = {node: self.cluster.process(node) for node in self.cluster.nodes}
        return nodes | {name: service.process for name, service in self.services.items()}

    def check_logs(self) -> None:
        """No process has written a traceback, or of an error that the test did not announce."""
        found = [
            f"{name}: {line}"
            for name, process in self.processes.items()
            for line in bad_lines(process.program.log)
            if not any(re.search(pattern, line) for pattern in self.expected_lines)
        ]
        assert not found, "\n".join(found[:50])


def bad_lines(log: Path) -> list[str]:
    """Lines of a process's log that should not be there."""
    if not log.exists():
        return []
    return [line for line in log.read_text(errors="replace").splitlines() if _BAD_LINE.search(line)]
