"""`outlast up`, `status`, `kill`, `start`, `down`: the processes of a local cluster."""

import argparse
import asyncio
import contextlib
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from cluster.cli import DEFAULT_DATA, FAILED, INTERRUPTED, OK, complain, print_json
from cluster.layout import Running, certify_services, read_layout, read_running
from cluster.local import Leader, LocalCluster, NotRunning, ProcessTrouble, Service
from cluster.ports import free_ports
from cluster.process import Identity, Process

_SHOP: Final = ("inventory", "payments", "orders")
_LOOK_S: Final = 0.3


def interruptible(work: Callable[[], Awaitable[int]]) -> int:
    """Run a command that starts processes; SIGINT, SIGTERM and SIGHUP cancel it, so that it cleans up.

    A second signal cuts the cleaning up short: what is still there is killed.
    """

    async def run() -> int:
        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            return complain("interrupted; everything that was started has been stopped", INTERRUPTED)

    return asyncio.run(run())


# ------------------------------------------------------------------------------------------------ up


def up(arguments: argparse.Namespace) -> int:
    """Start a cluster; stay until Ctrl-C, or leave it running."""
    return interruptible(lambda: _up(arguments))


async def _up(arguments: argparse.Namespace) -> int:
    data: Path = arguments.data
    nodes = arguments.nodes or len(read_layout(data)) or 3
    cluster = LocalCluster(data, nodes=nodes, port=arguments.port, tls=arguments.tls, tethered=not arguments.detach)
    if not arguments.json:
        print(f"starting {nodes} node{'s' * (nodes > 1)} in {data} ...", flush=True)
    async with cluster:
        if arguments.shop:
            await _start_shop(cluster, arguments.port, tethered=not arguments.detach)
        await _announce(cluster, arguments)
        if arguments.detach:
            cluster.leave()
            return OK
        try:
            await _keep(cluster)
        except asyncio.CancelledError:
            # Ctrl-C is how this command ends: leaving the context stops everything, and that is success.
            print("\nstopping", file=sys.stderr, flush=True)
    return OK


async def _start_shop(cluster: LocalCluster, port: int | None, *, tethered: bool) -> None:
    """The example's services, on the ports after the nodes' or, on a folder that has them already, on their own."""
    from participants.shop import inventory, orders, payments

    data = cluster.data / "shop"
    inventory.seed(data, {"tea": 1000, "vase": 3})
    payments.seed(data, {"ann": 10_000_00, "bob": 50_00})
    orders.seed(data)
    first = None if port is None else port + 2 * len(cluster.nodes)
    ports = free_ports(len(_SHOP)) if first is None else list(range(first, first + len(_SHOP)))
    # With TLS the nodes know a folder of certificates, and so shall the services; DIR/tls is there then.
    tls = cluster.data / "tls" if (cluster.data / "tls" / "participant-token").exists() else None
    if tls is not None:
        certify_services(cluster.data, _SHOP)
    for name, chosen in zip(_SHOP, ports, strict=True):
        known = cluster.services.get(name)
        service = Service.shop(
            name,
            data=data,
            folder=cluster.data / name,
            port=chosen if known is None else known.port,
            coordinators=cluster.urls,
            tls=tls,
            tethered=tethered,
        )
        await cluster.start_service(service)
        await service.register(cluster.urls, token=cluster.token, ca=cluster.ca)


async def _announce(cluster: LocalCluster, arguments: argparse.Namespace) -> None:
    leader = await cluster.wait_for_leader()
    if arguments.json:
        running = read_running(cluster.data)
        assert running is not None, "a cluster that was started has written who runs"
        print_json(_document(running, leader.node))
        return
    print(f"{leader.node} leads the cluster {cluster.name}:")
    for node in cluster.nodes:
        print(f"  {node:<12}{cluster.url(node)}   pid {cluster.process(node).pid}")
    for name, service in cluster.services.items():
        print(f"  {name:<12}{service.url}   pid {service.pid}")
    where = "" if str(arguments.data) == DEFAULT_DATA else f" --data {shlex.quote(str(arguments.data))}"
    print("\nTry it" + ("" if arguments.detach else ", in another shell") + ":")
    if arguments.shop:
        print(f"  outlast tx submit{where} \\")
        for line in _example_branches():
            print(f"    {line}")
    else:
        print(f"  outlast participant null --name echo --register {leader.url}{_trust(cluster)} &")
        print(f"""  outlast tx submit{where} --branch echo='{{"hello":"world"}}'""")
    print(f"  outlast kill leader{where} && outlast status{where}")
    if arguments.detach:
        print(f"  outlast down{where}")
    else:
        print("\nCtrl-C stops it; the data stays.", flush=True)


def _trust(cluster: LocalCluster) -> str:
    """Options of a command that is told a node's URL, and not the cluster's folder."""
    if cluster.ca is None:
        return ""
    tls = cluster.data / "tls"
    words = ["--ca", cluster.ca, "--token-file", tls / "token", "--caller-token-file", tls / "participant-token"]
    return " " + shlex.join(map(str, words))


def _example_branches() -> list[str]:
    """Options of `outlast tx submit` for one checkout of the shop."""
    checkout = {
        "inventory": '{"op":"reserve","sku":"tea","quantity":1}',
        "payments": '{"op":"charge","account":"ann","amount_cents":450}',
        "orders": '{"op":"place","account":"ann","sku":"tea","quantity":1,"amount_cents":450}',
    }
    lines = [f"--branch {name}={shlex.quote(text)}" for name, text in checkout.items()]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


async def _keep(cluster: LocalCluster) -> None:
    """Return when the cluster has been ended by `outlast down`; say so when a process ends by itself."""
    # All were started: one that has ended since then is news too.
    alive = {*cluster.nodes, *cluster.services}
    mine = Identity.mine()
    while True:
        await asyncio.sleep(_LOOK_S)
        running = await cluster.note_deaths()
        if running is None or running.down or running.owner != mine:
            print("stopped by `outlast down`", file=sys.stderr, flush=True)
            return
        now = _alive(cluster)
        for name in sorted(alive - now):
            print(f"{name} has ended; start it again with `outlast start {name}`", file=sys.stderr, flush=True)
        for name in sorted(now - alive):
            print(f"{name} runs again", file=sys.stderr, flush=True)
        alive = now


def _alive(cluster: LocalCluster) -> set[str]:
    return {*cluster.running, *(name for name, service in cluster.services.items() if service.alive)}


# ------------------------------------------------------------------------------------------------ status


def status(arguments: argparse.Namespace) -> int:
    """Who runs and who leads."""
    return asyncio.run(_status(arguments))


async def _status(arguments: argparse.Namespace) -> int:
    cluster = LocalCluster.open(arguments.data)
    leader = await _leader(cluster, arguments.wait)
    answers = await asyncio.gather(*(_ask(cluster, node) for node in cluster.nodes))
    level = max((answer.get("level", 1) for answer in answers if answer is not None), default=None)
    rows: list[dict[str, Any]] = []
    for node, answer in zip(cluster.nodes, answers, strict=True):
        process = cluster.process(node)
        rows.append(
            {
                "id": node,
                "url": cluster.url(node),
                "pid": process.pid,
                "state": "stopped" if not process.alive else "paused" if process.paused else "running",
                "role": None if answer is None else answer.get("role"),
                "epoch": None if answer is None else answer.get("epoch"),
                "in_flight": None if answer is None else answer.get("in_flight"),
                "understands": None if answer is None else _understands(answer),
                "trouble": None if answer is None else answer.get("trouble"),
            }
        )
    services = [
        {"id": name, "url": service.url, "pid": service.pid, "state": "running" if service.alive else "stopped"}
        for name, service in cluster.services.items()
    ]
    if arguments.json:
        print_json(
            {
                "cluster": cluster.name,
                "leader": None if leader is None else leader.node,
                "level": level,
                "nodes": rows,
                "services": services,
            }
        )
    else:
        print(f"cluster {cluster.name}, " + ("no leader" if leader is None else f"{leader.node} leads"))
        for row in rows:
            role = row["role"] or ("does not answer" if row["state"] == "running" else "")
            detail = f"epoch {row['epoch']}, {row['in_flight']} in flight" if row["role"] else ""
            detail += f"; {row['trouble']}" if row["trouble"] else ""
            print(f"  {row['id']:<12}{row['url']:<24}{_state(row):<22} {role:<10}{detail}".rstrip())
        for row in services:
            print(f"  {row['id']:<12}{row['url']:<24}{_state(row)}")
        said = {row["id"]: row["understands"] for row in rows if row["understands"] is not None}
        if len({level, *said.values()}) > 1:
            each = ", ".join(f"{node} understands {understood}" for node, understood in said.items())
            print(f"  the cluster works at level {level}; {each}")
    return _judge(cluster, leader, arguments.data)


def _understands(answer: dict[str, Any]) -> int:
    """The level that a node says it understands; older software says nothing."""
    own: dict[str, Any] = next((row for row in answer["nodes"] if row["id"] == answer["node"]), {})
    return int(own.get("understands") or 1)


def _judge(cluster: LocalCluster, leader: Leader | None, data: Path) -> int:
    """The exit status: success when transactions can be decided."""
    running, needed = cluster.running, len(cluster.nodes) // 2 + 1
    if not running:
        raise NotRunning(f"no node runs; start them with `outlast up --data {data}`")
    if len(running) < needed:
        # Whoever led may not have noticed yet.
        down = next(node for node in cluster.nodes if node not in running)
        hint = f"start one with `outlast start {down} --data {data}`"
        return complain(f"{needed} of {len(cluster.nodes)} nodes are needed, {len(running)} runs; {hint}", FAILED)
    return OK if leader is not None else complain("there is no leader yet; ask again in a second", FAILED)


async def _leader(cluster: LocalCluster, wait_s: float) -> Leader | None:
    """Who leads, or will within `wait_s`: right after a kill the others still have to agree on somebody."""
    if len(cluster.running) <= len(cluster.nodes) // 2:
        return await cluster.leader()
    with contextlib.suppress(ProcessTrouble):  # that there is none is told in the answer
        return await cluster.wait_for_leader(within_s=wait_s)
    return None


async def _ask(cluster: LocalCluster, node: str) -> dict[str, Any] | None:
    process = cluster.process(node)
    return await cluster.status(node) if process.alive and not process.paused else None


def _state(row: dict[str, Any]) -> str:
    return str(row["state"]) if row["pid"] is None else f"{row['state']}, pid {row['pid']}"


def _document(running: Running, leader: str | None) -> dict[str, Any]:
    return {
        "cluster": running.cluster,
        "leader": leader,
        "nodes": [{"id": row.id, "url": row.url, "pid": row.pid} for row in running.nodes],
        "services": [{"id": row.id, "url": row.url, "pid": row.pid} for row in running.services],
    }


# ------------------------------------------------------------------------------------------------ kill, start, down


def kill(arguments: argparse.Namespace) -> int:
    """SIGKILL one process."""
    return asyncio.run(_kill(arguments))


async def _kill(arguments: argparse.Namespace) -> int:
    cluster = LocalCluster.open(arguments.data)
    name: str = arguments.name
    if name == "leader":
        leader = await cluster.leader()
        if leader is None:
            raise ProcessTrouble("there is no leader to kill; `outlast status` shows who runs")
        name = leader.node
    service = cluster.services.get(name)
    pid = (_node(cluster, name) if service is None else service.process).pid
    ran = await (cluster.kill(name) if service is None else cluster.kill_service(name))
    if not ran:
        raise ProcessTrouble(f"{name} is not running; start it with `outlast start {name}`")
    if arguments.json:
        print_json({"id": name, "pid": pid})
    else:
        print(f"killed {name} (pid {pid})")
    return OK


def start(arguments: argparse.Namespace) -> int:
    """Start one process again."""
    return asyncio.run(_start(arguments))


async def _start(arguments: argparse.Namespace) -> int:
    cluster = LocalCluster.open(arguments.data)
    name: str = arguments.name
    if name in cluster.services:
        if arguments.rejoin:
            raise ProcessTrouble(f"--rejoin is for nodes, and {name} is a service")
        await cluster.start_service(name)
        url, pid = cluster.services[name].url, cluster.services[name].pid
    else:
        process = _node(cluster, name)
        await cluster.start_node(name, rejoin=arguments.rejoin)
        url, pid = cluster.url(name), process.pid
    if arguments.json:
        print_json({"id": name, "url": url, "pid": pid})
    else:
        print(f"{name} listens at {url} (pid {pid})")
        if arguments.rejoin:
            print("it counts again once the others have caught it up: see `outlast status`")
    return OK


def down(arguments: argparse.Namespace) -> int:
    """Stop everything."""
    return asyncio.run(_down(arguments))


async def _down(arguments: argparse.Namespace) -> int:
    cluster = LocalCluster.open(arguments.data)
    alive = sorted(_alive(cluster))
    await cluster.stop()
    if arguments.json:
        print_json({"stopped": alive})
    else:
        print(f"stopped {', '.join(alive)}; the data stays in {arguments.data}" if alive else "nothing was running")
    return OK


def _node(cluster: LocalCluster, name: str) -> Process:
    if name not in cluster.nodes:
        names = ", ".join([*cluster.nodes, *cluster.services])
        raise ProcessTrouble(f"there is no {name} here; there are {names}")
    return cluster.process(name)
