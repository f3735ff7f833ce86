"""How long it takes until everything is over when the leader is gone: a real cluster, real signals.

    python -m tests.bench.failover [--kills 50] [--large-kills 5] [--cuts 10] [--json FILE]

Two participants hold nothing and vote prepared on everything. Transactions are begun, one branch of each is prepared,
the prepares of the other wait on their way. Then the leader is gone, and what waited is lost. The clock runs until a
new leader has asked again, decided them all, and every branch has heard it. A *kill* is SIGKILL; a *silent* process is
SIGSTOP: nothing is closed, nobody is told. *cut* is the same for a whole host: each node has a network of its own, with
TLS and a token, and all that the leader sends or is sent is lost (it takes root, and is left out otherwise). *transfer*
is the time until another node leads, asked for by SIGTERM.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from cluster.calls import Caller
from cluster.local import LocalCluster
from cluster.ports import HOST, free_ports
from cluster.service import Service
from cluster.tap import Tap, is_prepare
from tests.support.net_cluster import NetCluster
from tests.support.networks import Network, why_not

LIMIT_S = 60.0
NAMES = ("null-a", "null-b")


class Bench:
    """A cluster, two participants behind taps, and what is asked of them."""

    def __init__(self, folder: Path, cluster: LocalCluster, caller: Caller, taps: Sequence[Tap]) -> None:
        self.folder = folder
        self.cluster = cluster
        self.caller = caller
        self.taps = taps

    async def begin(self, leader: str, count: int) -> None:
        """So many transactions, each prepared at one participant; the other's prepares wait."""
        body = {
            "branches": [{"participant": name, "payload": {}} for name in NAMES],
            "timeout_s": 120.0,
            "wait": "none",
        }
        gate = asyncio.Semaphore(32)

        async def one() -> None:
            async with gate:
                answer = await self.caller.once("POST", f"{leader}/v1/transactions", body=body, within_s=LIMIT_S)
                assert answer.status in (200, 202), answer

        await asyncio.gather(*(one() for _ in range(count)))

    def open(self) -> int:
        """Branches that have not heard."""
        return sum(1 for tap in self.taps for times in tap.branches.values() if times.finished_s is None)

    async def round(self, count: int, how: signal.Signals | Network) -> float:
        """Seconds from the leader's loss to the end of the last of `count` transactions."""
        for tap in self.taps:
            tap.branches.clear()
        leader = await self.cluster.wait_for_leader(within_s=LIMIT_S)
        hold = self.taps[1].hold(is_prepare)
        await self.begin(leader.url, count)
        await self._until(lambda: len(self.taps[0].prepared_now()) == count)
        identity = self.cluster.process(leader.node).identity
        assert identity is not None
        began_s = time.monotonic()
        if isinstance(how, Network):
            how.cut_off(leader.node)
        else:
            identity.signal(how)
        hold.drop()
        await self._until(
            lambda: all(len(tap.branches) == count for tap in self.taps) and self.open() == 0,
        )
        took_s = max(times.finished_s or 0.0 for tap in self.taps for times in tap.branches.values()) - began_s
        if isinstance(how, Network):
            how.heal()
        elif how is signal.SIGSTOP:
            identity.signal(signal.SIGCONT)
        else:
            await self.cluster.kill(leader.node)
            await self.cluster.start_node(leader.node)
        await self._all_ready()
        return took_s

    async def transfer(self) -> float:
        """Seconds from SIGTERM to another leader."""
        leader = await self.cluster.wait_for_leader(within_s=LIMIT_S)
        identity = self.cluster.process(leader.node).identity
        assert identity is not None
        began_s = time.monotonic()
        identity.signal(signal.SIGTERM)
        other = next(node for node in self.cluster.nodes if node != leader.node)
        while True:
            status = await self.cluster.status(other)
            if status is not None and status["leader"] not in (None, leader.node):
                break
            assert time.monotonic() - began_s < LIMIT_S
        took_s = time.monotonic() - began_s
        await self.cluster.process(leader.node).gone(within_s=LIMIT_S)
        await self.cluster.kill(leader.node)
        await self.cluster.start_node(leader.node)
        await self._all_ready()
        return took_s

    async def _all_ready(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            for node in self.cluster.nodes:
                while True:
                    status = await self.cluster.status(node)
                    if status is not None and status["ready"]:
                        break
                    await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)  # a cluster that has been up for a while is what is measured

    @staticmethod
    async def _until(condition: Any) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():  # noqa: ASYNC110 - what is looked at has no event
                await asyncio.sleep(0.002)


def figures(what: str, goal: str, samples: Sequence[float]) -> dict[str, Any]:
    """One row: milliseconds."""
    ranked = sorted(sample * 1000 for sample in samples)
    return {
        "what": what,
        "times": len(ranked),
        "median_ms": round(statistics.median(ranked), 1),
        "p99_ms": round(ranked[math.ceil(0.99 * len(ranked)) - 1], 1),
        "max_ms": round(ranked[-1], 1),
        "goal": goal,
    }


@contextlib.asynccontextmanager
async def stage(folder: Path, cluster: LocalCluster, *, host: str = HOST) -> AsyncIterator[Bench]:
    """A cluster, and the two participants, whose taps listen on `host`."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(cluster)
        caller = await stack.enter_async_context(cluster.caller())
        taps = []
        for participant, port in zip(NAMES, free_ports(2), strict=True):
            service = Service(
                participant,
                module="participants",
                arguments=("null", "--port", str(port)),
                url=f"http://{HOST}:{port}",
                folder=folder / participant,
            )
            await service.start()
            stack.push_async_callback(service.stop)
            tap = await stack.enter_async_context(Tap(service.url, name=participant, host=host))
            await service.register(cluster.urls, url=tap.url, token=cluster.token, ca=cluster.ca)
            taps.append(tap)
        yield Bench(folder, cluster, caller, taps)


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def row(what: str, goal: str, samples: Sequence[float]) -> None:
        rows.append(figures(what, goal, samples))
        show(rows[-1])

    with tempfile.TemporaryDirectory(prefix="outlast-failover-") as name:
        folder = Path(name)
        async with stage(folder, LocalCluster(folder / "cluster")) as bench:
            await bench.round(3, signal.SIGKILL)  # warms everything up
            plan = (
                ("kill, 10 in flight", "median 120, p99 300", arguments.kills, 10, signal.SIGKILL),
                ("kill, 1,000 in flight", "1,500", arguments.large_kills, 1000, signal.SIGKILL),
                ("silent, 10 in flight", "1,200", arguments.silences, 10, signal.SIGSTOP),
            )
            for what, goal, times, count, how in plan:
                if times:
                    row(what, goal, [await bench.round(count, how) for _ in range(times)])
            if arguments.transfers:
                row("transfer (SIGTERM)", "100", [await bench.transfer() for _ in range(arguments.transfers)])
        if arguments.cuts and (missing := why_not()) is not None:
            print(f"cut: left out, {missing}", flush=True)
        elif arguments.cuts:
            with Network("n1", "n2", "n3") as network:
                cluster = NetCluster(folder / "apart", network)
                async with stage(folder, cluster, host=network.here) as bench:
                    await bench.round(3, network)
                    row("cut, 10 in flight", "1,200", [await bench.round(10, network) for _ in range(arguments.cuts)])
    return rows


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['what']:<24} {row['times']:>5} {row['median_ms']:>10,.1f} {row['p99_ms']:>10,.1f} "
        f"{row['max_ms']:>10,.1f}   {row['goal']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--large-kills", type=int, default=5)
    parser.add_argument("--silences", type=int, default=10)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--transfers", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    print(f"{os.cpu_count()} processors; until all are decided and every branch has heard; milliseconds")
    print(f"{'':<24} {'times':>5} {'median':>10} {'p99':>10} {'max':>10}   goal")
    rows = asyncio.run(measure(arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
