"""A load generator as a process of its own: as many clients as asked for, each sending one transaction after another.

It speaks just enough HTTP/1.1 over kept connections to cost little beside what it measures. What a client sees is
timed: from the request's first byte to the response's last.

    python -m tests.bench.load '{"urls": [...], "clients": 64, "seconds": 5, "branches": [...]}'
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop


class Connection(asyncio.Protocol):
    """One kept connection; one request at a time."""

    def __init__(self) -> None:
        self._buffer = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank or self._answer is None:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            if line[:15].lower() == b"content-length:":
                length = int(line[15:])
        if len(rest) >= length:
            self._buffer = rest[length:]
            self._answer.set_result((int(head[9:12]), rest[:length]))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(request)
        return await self._answer


@dataclass(slots=True)
class Counts:
    latencies_ms: list[float] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


def _branches(templates: list[dict[str, Any]], spread: int, rng: random.Random) -> list[dict[str, Any]]:
    """`spread` rows, so that clients do not all want one row's lock; {n} in a string payload field becomes the row."""

    def fill(value: Any) -> Any:
        return value.replace("{n}", str(rng.randrange(spread))) if isinstance(value, str) else value

    return [
        {**branch, "payload": {name: fill(value) for name, value in branch.get("payload", {}).items()}}
        for branch in templates
    ]


async def _client(number: int, plan: dict[str, Any], until_s: float, counts: Counts) -> None:
    url = urlsplit(plan["urls"][number % len(plan["urls"])])
    rng = random.Random(number)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, url.hostname, url.port)
    warm_s = time.perf_counter() + plan.get("warm_up", 1.0)
    while time.perf_counter() < until_s:
        body = json.dumps({"branches": _branches(plan["branches"], plan.get("spread", 1000), rng)}).encode()
        head = (
            f"POST /v1/transactions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        started_s = time.perf_counter()
        status, answer = await connection.ask(head.encode() + body)
        ended_s = time.perf_counter()
        if started_s >= warm_s:
            counts.latencies_ms.append((ended_s - started_s) * 1000)
            counts.add(str(json.loads(answer).get("decision")) if status == 200 else str(status))


def report(plan: dict[str, Any], counts: Counts) -> None:
    """What was measured, on standard output."""
    ordered = sorted(counts.latencies_ms)
    print(
        json.dumps(
            {
                "clients": plan["clients"],
                "per_second": round(len(ordered) / plan["seconds"], 1),
                "p50_ms": round(ordered[len(ordered) // 2], 2) if ordered else None,
                "p99_ms": round(ordered[int(len(ordered) * 0.99)], 2) if ordered else None,
                "outcomes": counts.outcomes,
            }
        )
    )


async def _main(plan: dict[str, Any]) -> None:
    counts = Counts()
    warm_up_s = plan.get("warm_up", 1.0)
    until_s = time.perf_counter() + plan["seconds"] + warm_up_s
    await asyncio.gather(*(_client(number, plan, until_s, counts) for number in range(plan["clients"])))
    report(plan, counts)


if __name__ == "__main__":
    uvloop.run(_main(json.loads(sys.argv[1])))
