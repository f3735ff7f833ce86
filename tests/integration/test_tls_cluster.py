"""A cluster that speaks TLS everywhere, of real processes: it works, fails over, and is shut to everybody else."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from cluster.certificates import Authority, Kind, Wanted
from cluster.layout import read_layout, read_running
from cluster.local import LocalCluster
from coordinator.client import Client, NotAllowed, Unavailable
from coordinator.config import split_address
from tests.support.certificates import Pair, Pki, gullible
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

OUTLAST = [sys.executable, "-P", "-m", "cluster.cli"]
CHECKOUT = [
    {"participant": "inventory", "payload": {"op": "reserve", "sku": "tea", "quantity": 1}},
    {"participant": "payments", "payload": {"op": "charge", "account": "ann", "amount_cents": 450}},
]


def outlast(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*OUTLAST, *map(str, words)], check=False, capture_output=True, text=True, timeout=90)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Path]:
    """`outlast up --tls --shop`, in the background."""
    data = tmp_path / "c"
    outlast("up", "--tls", "--shop", "--detach", "--data", data)
    try:
        yield data
    finally:
        outlast("down", "--data", data)
        running = read_running(data)
        assert running is not None
        assert not any(row.identity is not None and row.identity.alive for row in (*running.nodes, *running.services))


def client(data: Path, **changed: object) -> Client:
    cluster = LocalCluster.open(data)
    named = {"token": cluster.token, "ca": cluster.ca, "patience_s": 30.0} | changed
    return Client(cluster.urls, **named)  # type: ignore[arg-type]


async def test_it_outlasts_its_leader_over_tls(up: Path) -> None:
    running = read_running(up)
    assert running is not None
    assert all(row.url.startswith("https://") for row in (*running.nodes, *running.services))
    branches = ["--branch", f"inventory={json.dumps(CHECKOUT[0]['payload'])}"]
    txn = json.loads(outlast("tx", "submit", *branches, "--wait", "ended", "--json", "--data", up).stdout)
    assert txn["state"] == "committed"
    async with client(up) as shop:
        assert (await shop.submit(CHECKOUT, wait="ended")).committed
        leader = json.loads(outlast("kill", "leader", "--json", "--data", up).stdout)["id"]
        survivors = [url for url in shop._nodes if url != LocalCluster.open(up).url(leader)]
        for url in survivors:
            # One of them passes it on to the other.
            async with Client([url], token=LocalCluster.open(up).token, ca=LocalCluster.open(up).ca) as one:
                assert (await one.submit(CHECKOUT, wait="ended")).committed
        outlast("start", leader, "--data", up)
        assert (await shop.submit(CHECKOUT, wait="ended")).committed
        assert all(not each.trouble for each in await shop.participants())
    status = json.loads(outlast("status", "--json", "--data", up).stdout)
    assert [row["state"] for row in status["nodes"]] == ["running"] * 3
    outlast("kill", "inventory", "--data", up)
    outlast("start", "inventory", "--data", up)
    async with client(up) as shop:
        assert (await shop.submit(CHECKOUT, wait="ended")).committed


async def test_it_is_shut_to_everybody_else(up: Path, tmp_path: Path) -> None:
    stranger = Pki(tmp_path / "stranger")
    configs = read_layout(up)
    for token in (None, "another-token-of-sixteen"):
        async with client(up, token=token) as shop:
            with pytest.raises(NotAllowed):
                await shop.submit(CHECKOUT)
    async with client(up, ca=stranger.ca, patience_s=0.5) as shop:
        with pytest.raises(Unavailable, match="certificate"):
            await shop.cluster()
    for config in configs:
        async with aiohttp.ClientSession() as session:
            with pytest.raises((aiohttp.ClientError, OSError)):
                await session.get(f"http://{config.me.api}/healthz")
        await knock(*split_address(config.me.raft, "raft"), stranger.node("n3"))
    # Nobody whom the system trusts issued this.
    assert "--ca" in outlast("tx", "list", "--url", configs[0].me.url, "--json", status=1).stderr
    words = ["--url", configs[0].me.url, "--ca", up / "tls" / "ca.pem"]
    assert "token" in outlast("tx", "list", *words, status=1).stderr
    outlast("tx", "list", *words, "--token-file", up / "tls" / "token")
    outlast("tx", "list", "--data", up)
    token = LocalCluster.open(up).token
    assert token is not None
    for config in configs:
        assert token not in (up / config.node / "log.txt").read_text()


async def knock(host: str, port: int, pair: Pair) -> None:
    """On a raft port: plain text, nothing at all, and a certificate of another authority. Nobody is answered."""
    for context, said in ((None, b"GET / HTTP/1.1\r\n\r\n"), (gullible(), b"hello"), (gullible(pair), b"hello")):
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            writer.write(said)
            async with asyncio.timeout(30):
                assert len(await reader.read()) < 64
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def test_a_running_node_takes_its_new_certificate(up: Path) -> None:
    config, *_ = read_layout(up)
    host, port = split_address(config.me.api, "api")

    def serial() -> str:
        context = ssl.create_default_context(cafile=up / "tls" / "ca.pem")
        with socket.create_connection((host, port)) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            shown = tls.getpeercert()
            assert shown is not None
            return str(shown["serialNumber"])

    before = serial()
    outlast("certs", up / "tls", "--node", "n1=127.0.0.1,localhost", "--renew")
    running = read_running(up)
    assert running is not None
    (pid,) = [row.pid for row in running.nodes if row.id == "n1"]
    assert pid is not None
    assert serial() == before
    os.kill(pid, signal.SIGHUP)
    await eventually(lambda: serial() != before, "the new certificate is shown")
    async with client(up) as shop:
        assert (await shop.submit(CHECKOUT, wait="ended")).committed


def test_a_node_whose_files_will_not_do_says_so_and_does_not_start(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "c", tls=True)
    cluster.lay_out()
    toml, tls = cluster.data / "n1" / "node.toml", cluster.data / "tls"
    (tls / "n1.key").chmod(0o644)
    assert f"chmod 600 {cluster.data}/n1/../tls/n1.key" in outlast("node", "--config", toml, status=2).stderr
    (tls / "n1.key").chmod(0o600)
    (tls / "n1.pem").write_bytes((tls / "n2.pem").read_bytes())
    assert "tls.key: " in outlast("node", "--config", toml, status=2).stderr
    Authority.open(tls).issue([Wanted(kind=Kind.NODE, name="n1", hosts=("10.0.0.1",))], renew=True)
    assert "is not for 127.0.0.1" in outlast("node", "--config", toml, status=2).stderr
    text = toml.read_text()
    toml.write_text(text[: text.index("[tls]")] + text[text.index("[[nodes]]") :].replace("127.0.0.1", "10.0.0.1"))
    assert "outlast certs" in outlast("node", "--config", toml, status=2).stderr
    done = outlast("participant", "null", "--host", "10.0.0.1", status=2)
    assert "beyond loopback" in done.stderr


def test_a_folder_without_tls_is_not_given_any(tmp_path: Path) -> None:
    LocalCluster(tmp_path / "c").lay_out()
    assert "without TLS" in outlast("up", "--tls", "--data", tmp_path / "c", status=1).stderr
    LocalCluster(tmp_path / "d", tls=True).lay_out()
    # Interrupted before anything ran: the authority is kept, and the nodes are certified anew.
    (tmp_path / "d" / "n2" / "node.toml").unlink()
    again = LocalCluster(tmp_path / "d", tls=True)
    again.lay_out()
    assert again.name == Authority.open(tmp_path / "d" / "tls").cluster
