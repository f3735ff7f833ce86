"""Nodes in this process, on any log, and a plain HTTP client for them."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from cluster.ports import free_ports
from cluster.replication.clock import Clock, SystemClock
from cluster.replication.log import ReplicatedLog
from cluster.replication.memory import MemoryLog
from coordinator.config import Limits, NodeConfig, Peer, Timing
from coordinator.node import Node
from tests.support.waiting import eventually

QUICK = Timing(backoff_min_s=0.005, backoff_max_s=0.05, participant_timeout_s=2.0, housekeeping_s=0.02)
"""Tests wait for conditions; these make them come true soon."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a node answered. `json` is None where the body was something else."""

    status: int
    headers: CIMultiDictProxy[str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw) if "json" in self.headers.get("Content-Type", "") else None

    @property
    def code(self) -> str:
        """The `code` of a problem, after looking whether it is one that may be shown to anybody."""
        assert self.headers["Content-Type"].startswith("application/problem+json"), self.raw[:200]
        problem = self.json
        assert problem["status"] == self.status
        assert problem["type"] == f"urn:outlast:problem:{problem['code']}"
        assert problem["title"]
        assert problem["detail"]
        assert b"Traceback" not in self.raw
        assert ("Retry-After" in self.headers) == (self.status in (429, 503))
        return str(problem["code"])


@dataclass(slots=True, eq=False)
class RunningNode:
    """A node that listens, and a session to talk to it."""

    node: Node
    session: aiohttp.ClientSession
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.node.config.me.url

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Reply:
        """One request. `body` is JSON; `raw` is sent as it is, instead."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        async with self.session.request(
            method,
            URL(self.url + path, encoded=True),
            data=data,
            headers={**self.headers, **(headers or {})},
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=30),
        ) as response:
            return Reply(response.status, response.headers, await response.read())

    async def register(self, name: str, url: str, *, batch: bool = False) -> None:
        """Register a participant, whatever it takes."""
        reply = await self.call("PUT", f"/v1/participants/{name}", {"url": url, "batch": batch})
        assert reply.status == 200, reply.raw

    async def submit(self, *participants: str, key: str | None = None, **fields: Any) -> Reply:
        """Submit a transaction with a branch for each of `participants`."""
        body = {"branches": [{"participant": name} for name in participants], **fields}
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self.call("POST", "/v1/transactions", body, headers=headers)

    async def show(self, gid: str) -> dict[str, Any]:
        """The transaction as the node shows it now."""
        reply = await self.call("GET", f"/v1/transactions/{gid}")
        assert reply.status == 200, reply.raw
        shown: dict[str, Any] = reply.json
        return shown


def configs(
    nodes: Sequence[str] = ("n1",),
    *,
    limits: Limits | None = None,
    timing: Timing | None = None,
    token: str | None = None,
    participant_token: str | None = None,
) -> list[NodeConfig]:
    """Settings of every node of one cluster, on free ports."""
    ports = free_ports(2 * len(nodes))
    peers = tuple(
        Peer(id=node, api=f"127.0.0.1:{ports[2 * i]}", raft=f"127.0.0.1:{ports[2 * i + 1]}")
        for i, node in enumerate(nodes)
    )
    return [
        NodeConfig(
            cluster="test",
            node=node,
            data=Path("unused"),
            nodes=peers,
            secret="0123456789abcdef",
            token=token,
            participant_token=participant_token,
            limits=limits or Limits(),
            timing=timing or QUICK,
        )
        for node in nodes
    ]


@asynccontextmanager
async def running(
    config: NodeConfig | None = None,
    log: ReplicatedLog | None = None,
    clock: Clock | None = None,
    *,
    ready: bool = True,
) -> AsyncIterator[RunningNode]:
    """A node that runs while the context is open; alone on a log in memory unless told otherwise."""
    config = config or configs()[0]
    log = log or MemoryLog(config.node, understands=config.compatibility.announced)
    node = Node(config, log, clock or SystemClock())
    headers = {} if config.token is None else {"Authorization": f"Bearer {config.token}"}
    before = asyncio.all_tasks()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as session:
        await node.start()
        try:
            if ready:
                await eventually(lambda: node.driver.leading)
            yield RunningNode(node, session, headers)
        finally:
            await node.stop()
    left = {task for task in asyncio.all_tasks() - before if "coordinator" in repr(task.get_coro())}
    assert not left, f"a stopped node left tasks behind: {left}"
