"""`make bench`: transfers of two branches, per second, and what a client waits for one.

Every figure is a client's: the time from its request to the decision in its hands, `wait=decided`. Each row is measured
on three replicated nodes, and beside it, in the same run, on one node with the log in memory: the same code without
replication and without a disk. Everything runs on this machine: nodes, participants and load; compare the columns, not
machines.

    python -m tests.bench --clients 1 8 64 256 --seconds 5 --json bench.json
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.local import LocalCluster, register
from cluster.ports import HOST, free_ports
from cluster.service import Service
from tests.bench.bank import ACCOUNTS

_KINDS = {
    "null, batches": ("null-a", "null-b"),
    "null, single": ("single-a", "single-b"),
    "SQLite, batches": ("bank-a", "bank-b"),
}


async def _services(folder: Path, cluster: LocalCluster) -> tuple[list[Service], Service]:
    ports = free_ports(5)
    nulls = [
        Service(
            name,
            module="participants",
            arguments=("null", "--port", str(port)),
            url=f"http://{HOST}:{port}",
            folder=folder / name,
        )
        for name, port in zip(("null-a", "null-b"), ports[:2], strict=True)
    ]
    banks = [
        Service(
            name,
            module="tests.bench.bank",
            arguments=("--port", str(port), "--data", str(folder / name)),
            url=f"http://{HOST}:{port}",
            folder=folder / name,
        )
        for name, port in zip(("bank-a", "bank-b"), ports[2:4], strict=True)
    ]
    memory = Service(
        "memory",
        module="tests.bench.memory_node",
        arguments=("--port", str(ports[4])),
        url=f"http://{HOST}:{ports[4]}",
        folder=folder / "memory",
    )
    await asyncio.gather(*(service.start() for service in (*nulls, *banks, memory)))
    for nodes in (cluster.urls, (memory.url,)):
        for service in (*nulls, *banks):
            await service.register(nodes)
        for name, service in zip(("single-a", "single-b"), nulls, strict=True):
            await register(nodes, name, service.url, batch=False)
    return [*nulls, *banks], memory


async def _load(url: str, names: tuple[str, str], clients: int, seconds: float) -> dict[str, Any]:
    payload = {"op": "add", "account": "{n}", "cents": 1}
    plan = {
        "urls": [url],
        "clients": clients,
        "seconds": seconds,
        "spread": ACCOUNTS,
        "branches": [{"participant": name, "payload": payload} for name in names],
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.load", json.dumps(plan), stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), seconds + 60)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise SystemExit(f"the load generator failed with exit status {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


async def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="outlast-bench-") as name:
        folder = Path(name)
        async with LocalCluster(folder / "cluster") as cluster:
            services, memory = await _services(folder, cluster)
            try:
                for kind, names in _KINDS.items():
                    for clients in arguments.clients:
                        leader = await cluster.wait_for_leader()
                        replicated = await _load(leader.url, names, clients, arguments.seconds)
                        alone = await _load(memory.url, names, clients, arguments.seconds)
                        rows.append(
                            {"participants": kind, "clients": clients, "replicated": replicated, "memory": alone}
                        )
                        _print_row(rows[-1])
            finally:
                await asyncio.gather(*(service.stop() for service in (*services, memory)))
    return rows


def _print_row(row: dict[str, Any]) -> None:
    three, one = row["replicated"], row["memory"]
    ratio = three["per_second"] / one["per_second"] if one["per_second"] else 0.0
    aborted = sum(count for outcome, count in three["outcomes"].items() if outcome != "commit")
    left = f"{row['participants']:<16} {row['clients']:>7} | {_figures(three)} {aborted:>7}"
    print(f"{left} | {_figures(one)} | {ratio:>5.2f}", flush=True)


def _figures(row: dict[str, Any]) -> str:
    return f"{row['per_second']:>8.0f} {row['p50_ms']:>8.2f} {row['p99_ms']:>8.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, after a second of warming up")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    # The processes that are started here look for `tests.bench` too.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    print(f"{os.cpu_count()} processors; transfers of two branches, wait=decided")
    print(f"{'':<16} {'':>7} | {'three nodes':^34} | {'one node, in memory':^26} |")
    print(
        f"{'participants':<16} {'clients':>7} | {'tx/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'no':>7} | "
        f"{'tx/s':>8} {'p50 ms':>8} {'p99 ms':>8} | ratio"
    )
    rows = asyncio.run(_measure(arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
