"""The local cluster with real processes: what is started runs, what is ended is gone, and nobody else is harmed."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.layout import read_layout, read_running
from cluster.local import AlreadyRunning, LocalCluster, NotRunning, ProcessTrouble, Service
from cluster.ports import free_ports
from cluster.process import Identity
from participants.shop.audit import audit
from tests.support.waiting import wait_until

pytestmark = pytest.mark.processes

OUTLAST = [sys.executable, "-P", "-m", "cluster.cli"]


def outlast(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*OUTLAST, *map(str, words)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def identities(data: Path) -> list[Identity]:
    running = read_running(data)
    assert running is not None
    return [row.identity for row in (*running.nodes, *running.services) if row.identity is not None]


class Up:
    """`outlast up` in the foreground, in a process of its own."""

    def __init__(self, data: Path, *words: str) -> None:
        self.data = data
        self.process = subprocess.Popen(
            [*OUTLAST, "up", "--data", str(data), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def wait_for_nodes(self) -> list[Identity]:
        """Until all are started, long before one leads."""
        return wait_until(lambda: (self.data / "cluster.json").exists() and identities(self.data), "nodes")

    def wait_for_leader(self) -> list[Identity]:
        assert self.process.stdout is not None
        line = ""
        while "Ctrl-C" not in line:
            line = self.process.stdout.readline()
            assert line, f"ended early: {self.process.communicate()[1]}"
        return identities(self.data)

    def ends(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*words: str) -> Up:
        started.append(Up(tmp_path / "c", *words))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def gone(processes: list[Identity]) -> None:
    assert processes
    wait_until(lambda: not any(process.alive for process in processes), "processes ended")


# ------------------------------------------------------------------------------------------------ as a library


async def test_a_cluster_survives_its_leader_and_takes_it_back(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path / "c") as cluster:
        assert cluster.nodes == cluster.running == ("n1", "n2", "n3")
        processes = identities(cluster.data)
        before = await cluster.wait_for_leader()
        assert await cluster.kill_leader() == before.node
        assert before.node not in cluster.running
        after = await cluster.wait_for_leader(besides=before.node, newer_than=before.epoch)
        assert after.node != before.node
        with pytest.raises(ProcessTrouble, match="already running"):
            await cluster.start_node(after.node)
        await cluster.start_node(before.node)
        assert cluster.running == cluster.nodes
        processes += identities(cluster.data)
        status = await cluster.status(before.node)
        assert status is not None
        assert status["node"] == before.node
    assert not any(process.alive for process in processes)
    assert identities(cluster.data) == []


async def test_a_paused_node_is_deposed(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path / "c") as cluster:
        before = await cluster.wait_for_leader()
        assert cluster.pause(before.node)
        assert cluster.process(before.node).alive
        after = await cluster.wait_for_leader(newer_than=before.epoch)
        assert after.node != before.node
        assert cluster.resume(before.node)
        assert not cluster.process(before.node).paused


async def test_a_paused_node_can_be_stopped(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path / "c", nodes=1) as cluster:
        cluster.pause("n1")
        await cluster.stop_node("n1")
        assert cluster.running == ()


async def test_the_secret_is_for_the_owner_only(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "c")
    cluster.lay_out()
    for config in read_layout(cluster.data):
        path = cluster.data / config.node / "node.toml"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(config.secret) >= 32
    assert len({config.secret for config in read_layout(cluster.data)}) == 1
    other = LocalCluster(tmp_path / "d")
    other.lay_out()
    assert read_layout(other.data)[0].secret != read_layout(cluster.data)[0].secret
    assert other.name != cluster.name


async def test_a_second_start_harms_nothing(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path / "c", nodes=1) as cluster:
        (process,) = identities(cluster.data)
        with pytest.raises(AlreadyRunning, match="already running"):
            await LocalCluster(cluster.data, nodes=1, tethered=False).start()
        with pytest.raises(AlreadyRunning):
            async with LocalCluster(cluster.data, nodes=1):
                pytest.fail("there are two of it")
        assert process.alive
        assert identities(cluster.data) == [process]


async def test_a_stale_folder_is_taken_up_with_its_data(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path / "c", nodes=1) as cluster:
        urls, first = cluster.urls, await cluster.wait_for_leader()
        row = json.loads((cluster.data / "cluster.json").read_text())
        await cluster.kill("n1")
    # As a power cut would leave it; and the pid, meanwhile, is somebody else's.
    row["nodes"][0]["pid"] = os.getpid()
    (cluster.data / "cluster.json").write_text(json.dumps(row))
    async with LocalCluster(cluster.data, nodes=1) as again:
        assert again.urls == urls
        assert (await again.wait_for_leader()).epoch > first.epoch
    # This process was not taken for a node.
    assert Identity.mine().alive


@pytest.mark.parametrize("kind", ["api", "raft"])
async def test_a_port_in_use_is_named(tmp_path: Path, kind: str) -> None:
    cluster = LocalCluster(tmp_path / "c")
    cluster.lay_out()
    address = getattr(read_layout(cluster.data)[1].me, kind)
    port = int(address.rpartition(":")[2])
    complaint = f"port {port}, which n2's .* is in use"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ProcessTrouble, match=complaint):
        await cluster.start()
    assert cluster.running == ()


async def test_an_existing_cluster_keeps_its_shape(tmp_path: Path) -> None:
    LocalCluster(tmp_path / "c", nodes=1).lay_out()
    for other, complaint in (
        (LocalCluster(tmp_path / "c", nodes=3), "a cluster of 1, not 3"),
        (LocalCluster(tmp_path / "c", nodes=1, port=free_ports(1)[0]), "a cluster keeps its ports"),
        (LocalCluster(tmp_path / "c", nodes=1, name="other"), "holds the cluster local-"),
    ):
        with pytest.raises(ProcessTrouble, match=complaint):
            other.lay_out()
    with pytest.raises(NotRunning, match="outlast up"):
        LocalCluster.open(tmp_path / "nowhere")


async def test_a_node_that_ends_at_once_is_reported(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "c", nodes=1)
    cluster.lay_out()
    (cluster.data / "n1" / "data").write_text("in the way")
    with pytest.raises(ProcessTrouble, match=r"n1 ended before it listened: .*log\.txt"):
        async with cluster:
            pytest.fail("it started")
    assert cluster.running == ()


async def test_a_start_that_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "c")

    async def enter() -> None:
        async with cluster:
            pytest.fail("it was not cut short")

    task = asyncio.create_task(enter())
    async with asyncio.timeout(30):
        while not (cluster.data / "cluster.json").exists():  # noqa: ASYNC110  # another process would look so too
            await asyncio.sleep(0.001)
    processes = identities(cluster.data)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(processes) == 3
    assert not any(process.alive for process in processes)


async def test_a_service_has_the_same_verbs(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    service = Service(
        "echo",
        module="participants",
        arguments=["null", "--port", str(port)],
        url=f"http://127.0.0.1:{port}",
        folder=tmp_path / "echo",
    )
    await service.start()
    assert service.pause()
    assert service.resume()
    assert await service.kill()
    assert not await service.kill()
    await service.start()
    async with LocalCluster(tmp_path / "c", nodes=1) as cluster:
        await service.register(cluster.urls)
    assert await service.stop()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ProcessTrouble, match=f"port {port}, which echo"):
        await service.start()


# ------------------------------------------------------------------------------------------------ as a command


def test_up_detached_kill_start_down(tmp_path: Path) -> None:
    data = tmp_path / "c"
    document = json.loads(outlast("up", "--data", data, "--detach", "--json").stdout)
    processes = identities(data)
    try:
        assert [node["pid"] for node in document["nodes"]] == [process.pid for process in processes]
        assert all(process.alive for process in processes)
        assert "already running" in outlast("up", "--data", data, status=1).stderr
        assert all(process.alive for process in processes)
        leader = document["leader"]
        assert outlast("status", "--data", data).stdout.startswith(f"cluster {document['cluster']}, {leader} leads")
        assert leader in outlast("kill", "leader", "--data", data).stdout
        assert "not running" in outlast("kill", leader, "--data", data, status=1).stderr
        rows = json.loads((data / "cluster.json").read_text())["nodes"]
        assert [row["id"] for row in rows if row["pid"] is None] == [leader]
        started = json.loads(outlast("start", leader, "--data", data, "--json").stdout)
        assert started["pid"] in [process.pid for process in identities(data)]
        assert "there is no n9" in outlast("kill", "n9", "--data", data, status=1).stderr
        processes += identities(data)
    finally:
        outlast("down", "--data", data)
    assert not any(process.alive for process in processes)
    assert outlast("down", "--data", data).stdout == "nothing was running\n"
    assert "no node runs" in outlast("status", "--data", data, status=1).stderr


def test_the_example_that_up_prints_works(tmp_path: Path) -> None:
    data = tmp_path / "a shop"
    printed = outlast("up", "--data", data, "--shop", "--detach").stdout
    try:
        example = printed[printed.index("  outlast tx submit") : printed.index("  outlast kill leader")]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for example_or_rest in (example, printed[printed.index("  outlast kill leader") :]):
            done = subprocess.run(
                example_or_rest, check=False, shell=True, env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
        report = audit(data / "shop")
        assert report.ok
        assert report.orders == 1
    finally:
        outlast("down", "--data", data)


def test_a_minority_is_no_success(tmp_path: Path) -> None:
    data = tmp_path / "c"
    outlast("up", "--data", data, "--detach")
    try:
        outlast("kill", "n1", "--data", data)
        outlast("kill", "n2", "--data", data)
        assert "2 of 3 nodes are needed" in outlast("status", "--data", data, status=1).stderr
        # It returns although there is no majority until it has joined.
        outlast("start", "n2", "--data", data)
    finally:
        outlast("down", "--data", data)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_everything(up: Callable[..., Up], number: signal.Signals) -> None:
    one = up("--nodes", "1")
    processes = one.wait_for_leader()
    os.kill(one.process.pid, number)
    assert one.ends()[0] == 0
    assert not any(process.alive for process in processes)


def test_a_second_ctrl_c_is_answered_with_kill(up: Callable[..., Up]) -> None:
    one = up()
    processes = one.wait_for_leader()
    assert one.process.stderr is not None
    one.process.send_signal(signal.SIGINT)
    while "stopping" not in (line := one.process.stderr.readline()):
        assert line
    one.process.send_signal(signal.SIGINT)
    assert one.ends()[0] in (0, 130)
    assert not any(process.alive for process in processes)


def test_ctrl_c_during_the_start_stops_everything(up: Callable[..., Up]) -> None:
    one = up()
    processes = one.wait_for_nodes()
    one.process.send_signal(signal.SIGINT)
    status, stderr = one.ends()
    assert status == 130
    assert "interrupted" in stderr
    assert len(processes) == 3
    assert not any(process.alive for process in processes)


def test_no_orphans_when_the_command_itself_is_killed(up: Callable[..., Up]) -> None:
    one = up()
    processes = one.wait_for_leader()
    # One that is paused, and one that was started by another command, are no exceptions.
    outlast("kill", "n1", "--data", one.data)
    outlast("start", "n1", "--data", one.data)
    processes += identities(one.data)
    processes[1].signal(signal.SIGSTOP)
    wait_until(lambda: processes[1].paused, "it stands still")
    one.process.kill()
    gone(processes)
    # And the folder is free at once.
    outlast("up", "--data", one.data, "--detach")
    outlast("down", "--data", one.data)


def test_up_keeps_the_file_current_and_ends_with_down(up: Callable[..., Up]) -> None:
    one = up()
    processes = one.wait_for_leader()
    processes[2].signal(signal.SIGKILL)
    wait_until(lambda: len(identities(one.data)) == 2, "the death is noted")
    outlast("start", "n3", "--data", one.data)
    processes += identities(one.data)
    outlast("down", "--data", one.data)
    status, stderr = one.ends()
    assert status == 0
    assert "n3 has ended" in stderr
    assert "outlast down" in stderr
    assert not any(process.alive for process in processes)
