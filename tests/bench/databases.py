"""`make bench-databases`: transactions on two databases, per second, against a coordinator that keeps no log.

Outlast commits on three nodes, with a participant in front of each database. The other coordinator
(`tests.bench.naive`) keeps no log: one process in front of the same participants, so over the same connections
and with the same statements. Both do the same work with all of the databases' durability on. They take turns, because
everything shares this machine, and its speed may change from one second to the next: in each round both have two, one
of them first and last. The ratio is the median of those of the rounds.

What would be possible at most is printed beside them: two-phase commit in the client's own process, with no service at
all between it and the databases, and one database alone (`tests.bench.bare`).

    python -m tests.bench.databases --clients 16 64 --rounds 5 --json databases.json
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cluster.databases.mariadb import MariaDbServer
from cluster.databases.postgres import PostgresServer
from cluster.databases.server import server_folder
from cluster.local import LocalCluster
from cluster.ports import HOST, free_ports
from cluster.service import Service
from tests.bench import accounts

_PAIRS = {"postgres": ("postgres", "postgres"), "mariadb": ("mariadb", "mariadb"), "mixed": ("postgres", "mariadb")}
_PAIRED = ("naive", "outlast")
_ALONE = ("bare", "single")
_WAYS = (*_PAIRED, *_ALONE)
_NAMES = ("bank-a", "bank-b")


async def _dsns(stack: contextlib.AsyncExitStack, pair: str) -> list[str]:
    """Two databases with accounts in them, each on its own server, and a third beside the first one.

    The servers go with `stack`.
    """
    dsns = []
    for kind, names in zip(_PAIRS[pair], (("bank_a", "apart"), ("bank_b",)), strict=True):
        folder = server_folder(f"outlast-bench-{kind}-")
        server = PostgresServer(folder) if kind == "postgres" else MariaDbServer(folder)
        stack.callback(server.remove)
        stack.push_async_callback(server.stop)
        await server.start()
        for name in names:
            dsns.append(await server.create_database(name))
            await accounts.fill(dsns[-1])
    return dsns


async def _services(
    stack: contextlib.AsyncExitStack, folder: Path, cluster: LocalCluster, dsns: Sequence[str]
) -> list[Service]:
    """A participant in front of each database."""
    services = []
    for name, dsn, port in zip(_NAMES, dsns, free_ports(len(dsns)), strict=True):
        kind = "postgres" if dsn.startswith("postgresql:") else "mariadb"
        words = [kind, "--dsn", dsn, "--operations", f"tests.bench.accounts:on_{kind}", "--port", str(port)]
        for url in cluster.urls:
            words += ["--coordinator", url]
        service = Service(
            name, module="participants", arguments=words, url=f"http://{HOST}:{port}", folder=folder / name
        )
        stack.push_async_callback(service.stop)
        await service.start()
        await service.register(cluster.urls)
        services.append(service)
    return services


async def _naive(stack: contextlib.AsyncExitStack, folder: Path, services: Sequence[Service]) -> Service:
    """The coordinator without a log, in front of the same participants."""
    (port,) = free_ports(1)
    words = [str(port), *(f"{service.name}={service.url}" for service in services)]
    url = f"http://{HOST}:{port}"
    naive = Service("naive", module="tests.bench.naive", arguments=words, url=url, folder=folder / "naive")
    stack.push_async_callback(naive.stop)
    await naive.start()
    return naive


async def _load(module: str, plan: dict[str, Any]) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, json.dumps(plan), stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), plan["seconds"] + 60)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise SystemExit(f"the load generator failed with exit status {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


async def measure(pair: str, clients: Sequence[int], *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each number of clients: what each way did in each round."""
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="outlast-bench-"))
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        first, apart, second = await _dsns(stack, pair)
        dsns = [first, second]
        cluster = await stack.enter_async_context(LocalCluster(folder / "cluster"))
        services = await _services(stack, folder, cluster, dsns)
        naive = await _naive(stack, folder, services)
        for at_once in clients:
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
            plan = {"clients": at_once, "seconds": seconds}
            for number in range(rounds):
                # A speed that goes up or down all the time does so for both. Who comes first changes, so that neither
                # always meets what the others have left behind.
                one, other = _PAIRED if number % 2 == 0 else reversed(_PAIRED)
                for way in (one, other, other, one, *_ALONE):
                    if way in _PAIRED:
                        url = naive.url if way == "naive" else (await cluster.wait_for_leader()).url
                        runs[way].append(await _load("tests.bench.load", {**plan, **_transfers(url)}))
                    else:
                        where = [apart] if way == "single" else dsns
                        runs[way].append(await _load("tests.bench.bare", {**plan, "way": way, "dsns": where}))
            totals = [await accounts.total(dsn) for dsn in dsns]
            if len(set(totals)) != 1 or totals[0] < sum(
                _commits(each) for way in (*_PAIRED, "bare") for each in runs[way]
            ):
                raise SystemExit(f"the two databases hold {totals}: somebody has lost a transaction, or half of one")
            rows.append({"pair": pair, "clients": at_once, "ratio": round(median(_ratios(runs)), 3), **runs})
            _print_row(rows[-1])
    return rows


def _transfers(url: str) -> dict[str, Any]:
    payload = {"op": "add", "account": "{n}", "cents": 1}
    return {
        "urls": [url],
        "spread": accounts.ACCOUNTS,
        "branches": [{"participant": name, "payload": payload} for name in _NAMES],
    }


def _commits(run: dict[str, Any]) -> int:
    return int(run["outcomes"].get("commit", 0))


def _per_second(runs: Sequence[dict[str, Any]]) -> float:
    return median(each["per_second"] for each in runs)


def _ratios(runs: dict[str, Any]) -> list[float]:
    """Of each round, in which both have had two turns; in ascending order."""
    naive, outlast = (
        [one["per_second"] + other["per_second"] for one, other in zip(runs[way][::2], runs[way][1::2], strict=True)]
        for way in _PAIRED
    )
    return sorted(ours / theirs if theirs else 0.0 for ours, theirs in zip(outlast, naive, strict=True))


def _print_row(row: dict[str, Any]) -> None:
    parts = [f"{row['pair']:<10} {row['clients']:>7}"]
    for way in _WAYS:
        runs = row[way]
        p50_ms, p99_ms = (median(each[name] for each in runs) for name in ("p50_ms", "p99_ms"))
        parts.append(f"{_per_second(runs):>7.0f} {p50_ms:>8.2f} {p99_ms:>8.2f}")
    refused = sum(sum(each["outcomes"].values()) - _commits(each) for each in row["outlast"])
    each_round = _ratios(row)
    print(
        f"{' | '.join(parts)} | {refused:>4} | {row['ratio']:>5.2f} ({each_round[0]:.2f}-{each_round[-1]:.2f})",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=_PAIRS, default=list(_PAIRS))
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=5, help="in each of which both coordinators have two turns")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each turn, after a second of warming up")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    # The processes that are started here look for `tests.bench` too.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    print(f"{os.cpu_count()} processors; medians of {arguments.rounds} rounds, turns of {arguments.seconds:g} s each")
    titles = ("no log", "Outlast, three nodes", "no service at all", "one database alone")
    print(f"{'':<18} | {' | '.join(f'{title:^25}' for title in titles)} |")
    figures = f"{'tx/s':>7} {'p50 ms':>8} {'p99 ms':>8}"
    print(f"{'databases':<10} {'clients':>7} | {' | '.join([figures] * len(titles))} |  {'no':>3} | ratio")
    rows = []
    for pair in arguments.pairs:
        rows += asyncio.run(measure(pair, arguments.clients, rounds=arguments.rounds, seconds=arguments.seconds))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
