"""How fast a replicated log commits: three processes on loopback, 200-byte commands, nothing else running.

    python -m tests.bench.log [--folder FOLDER] [--seconds 3] [--solo]

The journals are in FOLDER, else where temporary files are: compare a disk with /dev/shm. `--solo` measures one node and
one synced file instead: the unreplicated baseline. Prints commits per second, latency, and CPU time per commit.
"""

import argparse
import asyncio
import multiprocessing
import multiprocessing.connection
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from cluster.replication.log import Leadership, ReplicatedLog
from cluster.replication.raft_journal import file_journal
from cluster.replication.raft_log import RaftLog
from cluster.replication.solo import SoloLog
from cluster.replication.transport import SocketTransport
from tests.contract.worlds import reserved_addresses

COMMAND = bytes(200)
IN_FLIGHT = (1, 16, 256)


class Counter:
    """A state machine that costs nothing."""

    applied = 0

    def apply(self, command: bytes) -> object:
        self.applied += 1
        return self.applied

    def snapshot(self) -> Any:
        raise NotImplementedError

    def restore(self, state: bytes) -> None:
        raise NotImplementedError


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def load(log: ReplicatedLog, in_flight: int, seconds: float) -> tuple[int, list[float]]:
    """Commits, and a sample of their latencies in milliseconds."""
    latencies: list[float] = []
    end_s = time.perf_counter() + seconds

    async def client() -> None:
        now_s = time.perf_counter()
        while now_s < end_s:
            began_s = now_s
            await log.propose(COMMAND)
            now_s = time.perf_counter()
            latencies.append((now_s - began_s) * 1000)

    await asyncio.gather(*[client() for _ in range(in_flight)])
    return len(latencies), latencies


async def node(name: str, addresses: dict[str, Any], folder: Path, args: argparse.Namespace, pipe: Any) -> None:
    log: ReplicatedLog
    if args.solo:
        log = SoloLog(folder / name, name)
    else:
        log = RaftLog(
            node=name,
            peers=[other for other in addresses if other != name],
            transport=SocketTransport(node=name, addresses=addresses, cluster="bench", secret=b"bench" * 4),
            journal=file_journal(folder / name),
        )
    leads = asyncio.Event()

    def told(now: Leadership) -> None:
        if now.is_leader:
            leads.set()
            pipe.send(("leads", name))

    await log.start(Counter(), told)
    loop = asyncio.get_running_loop()
    while True:
        wanted, argument = await loop.run_in_executor(None, pipe.recv)
        if wanted == "load":
            pipe.send(("done", await load(log, argument, args.seconds)))
        elif wanted == "cpu":
            pipe.send(("cpu", cpu_s()))
        else:
            await log.stop()
            return


def run_node(*args: Any) -> None:
    uvloop.run(node(*args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--solo", action="store_true")
    args = parser.parse_args()
    names = ("n1",) if args.solo else ("n1", "n2", "n3")
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    with reserved_addresses(*names) as addresses:
        for name in names:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=run_node, args=(name, addresses, folder, args, theirs), daemon=True)
            process.start()
            processes.append(process)
        ready = multiprocessing.connection.wait(pipes.values(), timeout=20)
        _leads, leader = ready[0].recv()  # type: ignore[union-attr]

        def ask(name: str, *question: Any) -> Any:
            pipes[name].send(question)
            return pipes[name].recv()[1]

        for in_flight in IN_FLIGHT:
            before = {name: ask(name, "cpu", None) for name in names}
            commits, latencies = ask(leader, "load", in_flight)
            used_us = {name: (ask(name, "cpu", None) - before[name]) / commits * 1e6 for name in names}
            ranked = statistics.quantiles(latencies, n=100)
            cost = "  ".join(f"{name}{'*' if name == leader else ''} {used_us[name]:5.1f}" for name in names)
            print(
                f"{in_flight:4} in flight: {commits / args.seconds:8,.0f}/s   "
                f"p50 {ranked[49]:6.3f} ms  p99 {ranked[98]:6.3f} ms   CPU us/commit: {cost}"
            )
        for name in names:
            pipes[name].send(("stop", None))
        for process in processes:
            process.join(10)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
