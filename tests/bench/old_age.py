"""What becomes of a cluster that has lived for long: real nodes, and figures that must not grow.

    python -m tests.bench.old_age soak [--minutes 10]
    python -m tests.bench.old_age start [--ended 1000000] [--tail-mb 32]

*soak*: load without end. The nodes' calendars run a hundred times as fast as the machine's, so that the quarter of an
hour for which an ended transaction is remembered passes in nine seconds. (The timeouts of transactions are dates, too,
and therefore as long as they may be.) Memory and disk of each node are looked at all the time, and must have levelled
off: what the last third of the time has reached is not above what the third before it had, but for a margin. It takes
some minutes until the log's files have come and gone. `--forget-nothing` shows that this would notice: dates then go by
as they do, and it must fail.

*start*: the data of a node that remembers a million ended transactions, and as much log after its snapshot as there can
be, is written; three real nodes are started on it, and timed until they take part, and until one leads.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.calls import Unreachable
from cluster.local import LocalCluster
from cluster.ports import HOST, free_ports
from cluster.process import Process, Program, arguments
from cluster.replication.raft_journal import file_journal
from cluster.replication.snapshot import NOTHING_COMMAND, Snapshots
from cluster.service import Service
from coordinator.commands import encode_command
from coordinator.ledger import Ledger
from coordinator.protocol.entries import (
    Begun,
    BranchPlan,
    BranchVote,
    Decided,
    Ended,
    Entry,
    Header,
    Registered,
    TookOver,
)
from coordinator.protocol.transaction import Decision, VoteKind

NAMES = ("null-a", "null-b")
FASTER = 100
LIMITS = {"compact_log_bytes": 8 << 20, "default_timeout_s": 300}
PAYLOAD = "x" * 4000
"""So much that the log's files, of 64 MiB, come and go within a minute."""
MARGIN = 1.05
MARGIN_BYTES = 4 << 20
LOOK_S = 1.0
_PAGE_BYTES = resource.getpagesize()
_REGULAR = b"\0"
"""What a command of ours begins with in the log."""
_AT_ONCE = 100


# ------------------------------------------------------------------------------------------------ soak


@dataclass(frozen=True, slots=True)
class Look:
    """One look at one node; bytes."""

    at_s: float
    memory: int
    disk: int


class AgingCluster(LocalCluster):
    """Nodes whose calendars run `faster`."""

    faster = FASTER

    def lay_out(self) -> None:
        super().lay_out()
        for node, process in self._nodes.items():
            program = process.program
            words = arguments(self.faster, program.module, *program.arguments)
            program = Program(module="tests.support.fast_clock", arguments=words, log=program.log)
            self._nodes[node] = Process(node, program, tether=process._tether)


def memory(pid: int) -> int:
    """Of a process: what of it is in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def worked_s(pid: int | None) -> float:
    """Of a process: for how long it has had a processor. On a busy machine that says more than the time that passed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disk(folder: Path) -> int:
    """What the files in a folder take up, while they come and go."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_blocks * 512
    return size


def complaints(node: str, looks: Sequence[Look]) -> list[str]:
    """What has not levelled off."""
    third = len(looks) // 3
    before, last = looks[third : 2 * third], looks[2 * third :]
    found = []
    for what in ("memory", "disk"):
        then, now = (max(getattr(look, what) for look in part) for part in (before, last))
        if now > then * MARGIN + MARGIN_BYTES:
            found.append(f"{node}'s {what} still grows: {then / 2**20:.1f} MiB, and then {now / 2**20:.1f} MiB")
    return found


async def soak(options: argparse.Namespace) -> int:
    AgingCluster.faster = 1 if options.forget_nothing else FASTER
    looks: dict[str, list[Look]] = {}
    with tempfile.TemporaryDirectory(prefix="outlast-soak-") as name:
        folder = Path(name)
        cluster = AgingCluster(folder / "c", settings={"limits": LIMITS})
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(cluster)
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
                await service.register(cluster.urls)
            plan = {
                "urls": list(cluster.urls),
                "clients": options.clients,
                "seconds": options.minutes * 60,
                "branches": [{"participant": participant, "payload": {"what": PAYLOAD}} for participant in NAMES],
            }
            load = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.bench.load", json.dumps(plan), stdout=asyncio.subprocess.PIPE
            )
            answer = asyncio.create_task(load.communicate())
            caller = await stack.enter_async_context(cluster.caller())
            began_s = told_s = time.monotonic()
            while not answer.done():
                await asyncio.wait([answer], timeout=LOOK_S)
                at_s = time.monotonic() - began_s
                for node in cluster.nodes:
                    pid = cluster.process(node).pid
                    assert pid is not None, f"{node} has ended"
                    looks.setdefault(node, []).append(Look(at_s, memory(pid), disk(cluster.data / node / "data")))
                if time.monotonic() - told_s > options.tell_s:
                    told_s = time.monotonic()
                    await _tell(caller, cluster, looks)
            result = json.loads((await answer)[0])
    print(f"{result['per_second']:,.0f} transactions/s for {options.minutes:g} min, p99 {result['p99_ms']} ms")
    print(f"outcomes: {result['outcomes']}")
    found = [text for node, seen in looks.items() for text in complaints(node, seen)]
    for node, seen in looks.items():
        print(f"{node}: at most {max(look.memory for look in seen) / 2**20:.1f} MiB in memory, ", end="")
        print(f"{max(look.disk for look in seen) / 2**20:.1f} MiB on disk")
    print("\n".join(found) or "all of it has levelled off")
    return 1 if found else 0


async def _tell(caller: Any, cluster: LocalCluster, looks: dict[str, list[Look]]) -> None:
    texts = []
    for node in cluster.nodes:
        retained = "?"
        with contextlib.suppress(Unreachable):
            answer = await caller.once("GET", f"{cluster.url(node)}/metrics", within_s=5.0)
            retained = next(
                line.split()[1].partition(".")[0]
                for line in str(answer.body).splitlines()
                if line.startswith("outlast_transactions_retained ")
            )
        look = looks[node][-1]
        texts.append(f"{node} {look.memory / 2**20:.1f} + {look.disk / 2**20:.1f} MiB, {retained} remembered")
    print(f"{looks[cluster.nodes[0]][-1].at_s:>6.0f} s  {' | '.join(texts)}", flush=True)


# ------------------------------------------------------------------------------------------------ start


def history(first: int, count: int, at_ms: int) -> Iterator[bytes]:
    """Commands of so many transactions from beginning to end, some of them in each."""
    branches = tuple(BranchPlan(name=name, participant=name, payload=b"null") for name in NAMES)
    votes = tuple(BranchVote(branch=name, vote=VoteKind.PREPARED) for name in NAMES)
    for begin in range(first, first + count, _AT_ONCE):
        entries: list[Entry] = []
        for number in range(begin, min(begin + _AT_ONCE, first + count)):
            gid = f"{CLUSTER}-1-{number}"
            entries += [
                Begun(
                    gid=gid, protocol="2pc", branches=branches, timeout_ms=10_000, key=f"k{number}", body_hash=bytes(16)
                ),
                Decided(gid=gid, decision=Decision.COMMIT, votes=votes),
                Ended(gid=gid),
            ]
        yield encode_command(Header(epoch=1, at=at_ms), entries)


CLUSTER = "aged"


def write_past(folder: Path, ended: int, tail_bytes: int) -> dict[str, Any]:
    """The log folder of a node that has seen all that; what is in it."""
    now_ms = time.time_ns() // 1_000_000
    ledger = Ledger(CLUSTER)
    index = 2
    known = [Registered(name=name, url="http://127.0.0.1:1", batch=True) for name in NAMES]
    ledger.apply(encode_command(Header(epoch=1, at=now_ms), [TookOver(node="n1"), *known]))
    for command in history(0, ended, now_ms):
        ledger.apply(command)
        index += 1
    assert len(ledger) == ended
    journal = file_journal(folder)()
    journal.reset((NOTHING_COMMAND, index, 1))
    journal.setCurrentTerm(1, None)
    tail, number = 0, ended
    while tail < tail_bytes:
        for command in history(number, _AT_ONCE, now_ms):
            index += 1
            journal.add(_REGULAR + command, index, 1)
            tail += len(command)
        number += _AT_ONCE
    snapshot = Snapshots(journal.disk).write(index - (number - ended) // _AT_ONCE, 1, ledger.snapshot()())
    journal.close()
    return {"ended": ended, "snapshot_mb": snapshot.size / 1e6, "tail_mb": tail / 1e6, "tail": number - ended}


async def start(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="outlast-start-") as name:
        cluster = LocalCluster(Path(name) / "c", name=CLUSTER)
        cluster.lay_out()
        folders = [cluster.data / node / "data" / "log" for node in cluster.nodes]
        for folder in folders:
            folder.parent.mkdir(mode=0o700)
        past = await asyncio.to_thread(write_past, folders[0], options.ended, int(options.tail_mb * 1e6))
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
        print(
            "{ended:,} ended, snapshot {snapshot_mb:.1f} MB, log after it {tail_mb:.1f} MB ({tail:,} more)".format(
                **past
            )
        )
        began_s = time.monotonic()
        ready_s: dict[str, tuple[float, float]] = {}

        async def watch(node: str) -> None:
            async with cluster.caller() as caller:
                while True:
                    with contextlib.suppress(Unreachable):
                        answer = await caller.once("GET", f"{cluster.url(node)}/readyz", within_s=2.0)
                        if answer.status == 200:
                            ready_s[node] = (time.monotonic() - began_s, worked_s(cluster.process(node).pid))
                            return
                    assert cluster.process(node).identity is not None or not ready_s, f"{node} has ended"
                    await asyncio.sleep(0.01)

        try:
            watching = [asyncio.create_task(watch(node)) for node in cluster.nodes]
            await cluster.start(within_s=options.within_s)
            async with asyncio.timeout(options.within_s):
                await asyncio.gather(*watching)
            for node in cluster.nodes:
                pid = cluster.process(node).pid
                assert pid is not None
                took_s, own_s = ready_s[node]
                print(f"{node}: ready after {took_s:.2f} s ({own_s:.2f} s its own work), ", end="")
                print(f"{memory(pid) / 2**20:.0f} MiB in memory")
            async with cluster.caller() as caller:
                for number in (0, past["ended"] - 1, past["ended"] + past["tail"] - 1):
                    gid = f"{CLUSTER}-1-{number}"
                    answer = await caller.once("GET", f"{cluster.urls[0]}/v1/outcomes/{gid}", within_s=5.0)
                    assert answer.body == {"outcome": "committed"}, (gid, answer)
        finally:
            await cluster.stop()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(required=True)
    one = parsers.add_parser("soak")
    one.add_argument("--minutes", type=float, default=10.0)
    one.add_argument("--clients", type=int, default=16)
    one.add_argument("--tell-s", type=float, default=15.0)
    one.add_argument("--forget-nothing", action="store_true")
    one.set_defaults(run=soak)
    one = parsers.add_parser("start")
    one.add_argument("--ended", type=int, default=1_000_000)
    one.add_argument("--tail-mb", type=float, default=32.0)
    one.add_argument("--within-s", type=float, default=120.0)
    one.set_defaults(run=start)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    status: int = asyncio.run(options.run(options))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
