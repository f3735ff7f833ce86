"""TLS: who gets in on each of its ways, who does not, and what attacks lead to. All on loopback."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgpack
import pytest
from aiohttp import web

from cluster.calls import Caller, Unverified
from cluster.replication.door import TlsDoor
from cluster.replication.guard import Message
from cluster.replication.transport import Handlers, SocketTransport, TransportSettings
from coordinator.client import Client, NotAllowed, Unavailable
from coordinator.config import ConfigError, NodeConfig, ParticipantFiles
from coordinator.connections import Connections, PostFailed
from coordinator.protocol.messages import Abort, Acked
from coordinator.tls import Tls, identifier
from participants.manager import Envelope, InDoubt
from participants.null import NullManager
from participants.resolver import Resolver
from participants.server import Participant, start
from participants.settings import ServerSettings, SettingsError
from participants.tls import coordinator_context
from tests.support.certificates import TOKEN, Pair, Pki, acceptor, gullible, long_ago
from tests.support.nodes import running
from tests.support.waiting import eventually

CLUSTER = "test"
SECRET = b"known to all nodes, and to nobody else"
APPEND: Message = {
    "type": "append_entries",
    "term": 3,
    "commit_index": 1,
    "prevLogIdx": 1,
    "prevLogTerm": 0,
    "entries": ((b"\0one", 2, 3),),
}


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki", CLUSTER)


@pytest.fixture
def stranger(tmp_path: Path) -> Pki:
    """Another authority, of a cluster with the same name."""
    return Pki(tmp_path / "stranger", CLUSTER)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the other end closes, however it does that."""
    async with asyncio.timeout(20):
        try:
            return await reader.read()
        except (ConnectionError, ssl.SSLError):
            return b""


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()


# ------------------------------------------------------------------------------------------------ between nodes


class Node:
    """A transport, and what it was told."""

    def __init__(self, transport: SocketTransport) -> None:
        self.transport = transport
        self.heard: list[tuple[str, int, Message]] = []
        self.told: list[tuple[str, str]] = []

    async def start(self) -> None:
        await self.transport.start(
            Handlers(
                message=lambda peer, term, message: self.heard.append((peer, term, message)),
                connected=lambda peer: self.told.append(("connected", peer)),
                disconnected=lambda peer: self.told.append(("disconnected", peer)),
                refused=lambda _: None,
            )
        )


class Wire:
    """Addresses of n1, n2 and n3, and whoever is started on them. The larger id dials."""

    def __init__(self, pki: Pki, addresses: dict[str, tuple[str, int]]) -> None:
        self.pki = pki
        self.addresses = addresses
        self.nodes: dict[str, Node] = {}
        self.settings = TransportSettings(handshake_timeout_s=0.5)

    def transport(self, node: str, pair: Pair | None = None, *, trusts: Pki | None = None) -> SocketTransport:
        """What `node` would listen and dial with if it had `pair`, whatever a node would say to such a file."""
        pair = pair or self.pki.node(node)
        trusts = trusts or self.pki
        server, client = acceptor(pair), trusts.dialer(pair, names=False)
        server.load_verify_locations(trusts.ca)
        server.verify_mode = ssl.CERT_REQUIRED
        return self._plain(node, ssl_server=server, ssl_client=client, identify=identifier(CLUSTER))

    def _plain(self, node: str, **tls: Any) -> SocketTransport:
        return SocketTransport(
            node=node, addresses=self.addresses, cluster=CLUSTER, secret=SECRET, settings=self.settings, **tls
        )

    async def start(self, node: str, pair: Pair | None = None, *, trusts: Pki | None = None) -> Node:
        return await self._start(node, self.transport(node, pair, trusts=trusts))

    async def start_plain(self, node: str) -> Node:
        return await self._start(node, self._plain(node))

    async def _start(self, node: str, transport: SocketTransport) -> Node:
        self.nodes[node] = Node(transport)
        await self.nodes[node].start()
        return self.nodes[node]

    async def stop(self, node: str) -> None:
        await self.nodes.pop(node).transport.stop()

    async def serves(self) -> None:
        """The attack is over, and has changed nothing: a real peer gets in and is heard."""
        one = self.nodes["n1"]
        assert not one.told
        assert not one.heard
        two = await self.start("n2")
        await eventually(lambda: two.transport.connected() and one.transport.connected())
        assert two.transport.send("n1", 3, APPEND)
        await eventually(lambda: one.heard)
        assert one.heard == [("n2", 3, APPEND)]


@pytest.fixture
async def wire(pki: Pki) -> AsyncIterator[Wire]:
    with contextlib.ExitStack() as stack:
        addresses = {}
        for node in ("n1", "n2", "n3"):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            addresses[node] = holder.getsockname()
        wire = Wire(pki, addresses)
        yield wire
        for node in list(wire.nodes):
            await wire.stop(node)
        # What was accepted in this very moment is closed by tasks that would not begin any more with the loop gone.
        if accepting := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            await asyncio.wait(accepting, timeout=5)


async def test_nodes_speak_tls_and_are_heard(wire: Wire) -> None:
    nodes = [await wire.start(node) for node in ("n1", "n2", "n3")]
    await eventually(lambda: all(len(node.transport.connected()) == 2 for node in nodes))
    large = APPEND | {"entries": ((bytes(4 << 20), 2, 3),)}
    for sender, receiver in (("n3", "n1"), ("n1", "n3")):
        for message in (APPEND, large, APPEND):
            assert wire.nodes[sender].transport.send(receiver, 3, message)
        heard = wire.nodes[receiver].heard
        await eventually(lambda heard=heard: len(heard) == 3)
        assert heard == [(sender, 3, APPEND), (sender, 3, large), (sender, 3, APPEND)]
    await wire.stop("n1")
    await eventually(lambda: ("disconnected", "n1") in nodes[2].told)
    await wire.start("n1")
    await eventually(lambda: nodes[2].transport.connected() == {"n1", "n2"})


async def test_it_is_not_plain_text(wire: Wire) -> None:
    """A tap on the connection of two nodes sees nothing of what they say, not even who they are in the end."""
    seen = bytearray()
    host, port = wire.addresses["n1"]

    async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, on = await asyncio.open_connection(host, port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    seen.extend(data)
                    sink.write(data)
            await close(sink)

        await asyncio.gather(copy(reader, on), copy(there, writer))

    server = await asyncio.start_server(tap, "127.0.0.1", 0)
    one = await wire.start("n1")
    wire.addresses = wire.addresses | {"n1": server.sockets[0].getsockname()}
    two = await wire.start("n2")
    await eventually(two.transport.connected)
    secret = APPEND | {"entries": ((b"\0a payload nobody else should see", 2, 3),)}
    assert two.transport.send("n1", 3, secret)
    await eventually(lambda: one.heard == [("n2", 3, secret)])
    assert len(seen) > 1000
    assert b"payload nobody" not in seen
    assert b"outlast raft" not in seen
    await wire.stop("n2")
    await wire.stop("n1")
    server.close()
    await server.wait_closed()


def hello(dialer: str) -> bytes:
    body = msgpack.packb(["outlast raft", 1, CLUSTER, dialer, "n1", bytes(32)])
    return len(body).to_bytes(4, "big") + body


class Authorities(NamedTuple):
    pki: Pki
    stranger: Pki


DIALERS: dict[str, Callable[[Authorities], Pair | None]] = {
    "no certificate": lambda _: None,
    "a certificate of another authority": lambda at: at.stranger.node("n2"),
    "an expired certificate": lambda at: at.pki.node("n2", now=long_ago(), days=10),
    "a client's certificate, of one called n2": lambda at: at.pki.client("n2"),
    "a participant's certificate, of one called n2": lambda at: at.pki.participant("n2", "n2"),
    "a node's certificate, of one that there is not": lambda at: at.pki.node("n9"),
    "the acceptor's own certificate": lambda at: at.pki.node("n1"),
    "a certificate of another node": lambda at: at.pki.node("n3"),
}


@pytest.mark.parametrize("attack", DIALERS)
async def test_who_has_not_the_certificate_of_the_peer_is_not_let_in(
    wire: Wire, stranger: Pki, attack: str, caplog: pytest.LogCaptureFixture
) -> None:
    await wire.start("n1")
    context = gullible(DIALERS[attack](Authorities(wire.pki, stranger)))
    caplog.clear()
    reader, writer = await asyncio.open_connection(*wire.addresses["n1"], ssl=context)
    writer.write(hello("n2"))
    assert await until_closed(reader) == b"", "not even a challenge"
    await close(writer)
    await eventually(lambda: [record for record in caplog.records if record.levelno == logging.WARNING])
    await wire.serves()


async def test_a_node_of_another_cluster_under_one_authority(
    wire: Wire, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has put both authorities into one file: the name in the certificate still tells the clusters apart."""
    other = Pki(tmp_path / "other", "other")
    wire.pki.ca = tmp_path / "both.pem"
    wire.pki.ca.write_bytes(wire.pki.authority.file.read_bytes() + other.ca.read_bytes())
    await wire.start("n1")
    reader, writer = await asyncio.open_connection(*wire.addresses["n1"], ssl=gullible(other.node("n2")))
    writer.write(hello("n2"))
    assert await until_closed(reader) == b""
    assert "certificate is not that of" in caplog.text
    await close(writer)
    await wire.serves()


@pytest.mark.parametrize("said", [hello("n2"), b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", bytes(64)])
async def test_plain_text_on_a_tls_port(wire: Wire, said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    await wire.start("n1")
    reader, writer = await asyncio.open_connection(*wire.addresses["n1"])
    writer.write(said)
    left = await until_closed(reader)
    assert len(left) < 64, "an alert at most"
    assert "no TLS with" in caplog.text
    await close(writer)
    await wire.serves()


async def test_tls_on_a_plain_port(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    one = await wire.start_plain("n1")
    two = await wire.start("n2")
    await eventually(lambda: "closed the connection with a stranger" in caplog.text)
    assert not one.told
    assert not two.told


async def test_a_plain_node_does_not_get_into_a_tls_cluster(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    one = await wire.start("n1")
    two = await wire.start_plain("n2")
    await eventually(lambda: "no TLS with" in caplog.text)
    assert not one.told
    assert not two.told


ACCEPTORS: dict[str, Callable[[Authorities], Pair]] = {
    "a certificate of another authority": lambda at: at.stranger.node("n1"),
    "an expired certificate": lambda at: at.pki.node("n1", now=long_ago(), days=10),
    "a certificate of another node": lambda at: at.pki.node("n3"),
    "a participant's certificate, of one called n1": lambda at: at.pki.participant("n1", "n1"),
    "a client's certificate, of one called n1": lambda at: at.pki.client("n1"),
}


@pytest.mark.parametrize("attack", ACCEPTORS)
async def test_nothing_is_said_to_somebody_else_on_the_address_of_a_peer(
    wire: Wire, stranger: Pki, attack: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The man in the middle: he knows no secret, and now he does not even hear a hello."""
    heard = bytearray()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await until_closed(reader))
        await close(writer)

    pair = ACCEPTORS[attack](Authorities(wire.pki, stranger))
    server = await asyncio.start_server(impostor, *wire.addresses["n1"], ssl=acceptor(pair))
    two = await wire.start("n2")
    await eventually(lambda: "no TLS with n1" in caplog.text or "is not that of n1" in caplog.text)
    await wire.stop("n2")
    server.close()
    await server.wait_closed()
    assert not two.told
    assert not heard


async def test_a_refused_certificate_is_told_of_once(
    wire: Wire, stranger: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that was given another authority: who dials it says why in its log, and does not repeat itself."""
    caplog.set_level(logging.DEBUG, logger="cluster.replication.door")
    await wire.start("n1", stranger.node("n1"), trusts=stranger)
    await wire.start("n2")
    await eventually(lambda: caplog.text.count("hung up in the TLS handshake") >= 3)
    assert caplog.text.count("n2: no TLS with n1") == 1


async def test_half_handshakes_have_a_deadline_and_are_counted(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    wire.settings = TransportSettings(handshake_timeout_s=1.0, strangers_max=3)
    await wire.start("n1")
    silent = [await asyncio.open_connection(*wire.addresses["n1"]) for _ in range(3)]
    silent[1][1].write(b"\x16\x03\x01\x02\x00\x01")  # and no more
    reader, writer = await asyncio.open_connection(*wire.addresses["n1"])
    assert await until_closed(reader) == b""
    assert "closed another connection" in caplog.text
    await close(writer)
    for reader, writer in silent:
        assert await until_closed(reader) == b""
        await close(writer)
    await wire.serves()


async def test_who_connects_and_hangs_up_is_no_news(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    await wire.start("n1")
    _reader, writer = await asyncio.open_connection(*wire.addresses["n1"])
    writer.transport.abort()
    await close(writer)
    await wire.serves()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_node_stops_in_the_middle_of_a_handshake(wire: Wire) -> None:
    await wire.start("n1")
    reader, writer = await asyncio.open_connection(*wire.addresses["n1"])
    writer.write(b"\x16\x03\x01")
    door = wire.nodes["n1"].transport._door
    assert door is not None
    await eventually(lambda: door._handshakes)
    await wire.stop("n1")
    assert await until_closed(reader) == b""
    await close(writer)


async def test_the_peer_who_proves_the_secret_must_be_the_one_in_the_certificate(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    """n3 has its own certificate, and the secret; it is still not n2."""
    await wire.start("n1")
    thief = wire.transport("n2", wire.pki.node("n3"))
    node = Node(thief)
    await node.start()
    try:
        await eventually(lambda: "its certificate says otherwise" in caplog.text)
        assert not node.told
    finally:
        await thief.stop()
    await wire.serves()


# ------------------------------------------------------------------------------------------------ the door


async def test_a_door_that_cannot_listen_says_so(pki: Pki) -> None:
    context = acceptor(pki.node("n1"))
    first = TlsDoor(asyncio.Protocol, context, handshakes_max=1, handshake_timeout_s=1)
    await first.start("127.0.0.1", 0)
    port = first.sockets[0].getsockname()[1]
    second = TlsDoor(asyncio.Protocol, context, handshakes_max=1, handshake_timeout_s=1)
    with pytest.raises(OSError, match="in use"):
        await second.start("127.0.0.1", port)
    assert second.sockets == ()
    await first.close()
    await second.start("127.0.0.1", port)
    await second.close()


# ------------------------------------------------------------------------------------------------ the API


@contextlib.asynccontextmanager
async def https(context: ssl.SSLContext, token: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), headers=headers) as session:
        yield session


async def status(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url, timeout=aiohttp.ClientTimeout(total=20)) as response:
        await response.read()
        return response.status


async def test_tokens_over_https(pki: Pki) -> None:
    (config,) = pki.cluster()
    config = replace(config, older_tokens=("an-older-token-of-16",))
    async with running(config) as node:
        for token, expected in (
            (None, 401),
            ("another-token-of-16-characters", 403),
            (TOKEN[:-1], 403),
            (TOKEN + "x", 403),
            (TOKEN, 200),
            ("an-older-token-of-16", 200),
        ):
            async with https(pki.dialer(), token) as session:
                assert await status(session, f"{node.url}/v1/cluster") == expected, token
        async with https(pki.dialer()) as session:
            assert await status(session, f"{node.url}/healthz") == 200


async def test_a_client_certificate_counts_as_the_token(pki: Pki, stranger: Pki) -> None:
    (config,) = pki.cluster()
    assert config.tls is not None
    config = replace(config, tls=replace(config.tls, client_ca=pki.ca))
    async with running(config) as node:
        url = f"{node.url}/v1/cluster"
        async with https(pki.dialer(pki.client("ann"))) as session:
            assert await status(session, url) == 200
        async with https(pki.dialer()) as session:
            assert await status(session, url) == 401
        for pair in (stranger.client("ann"), pki.client("old", now=long_ago(), days=10), pki.participant("stock")):
            async with https(pki.dialer(pair), TOKEN) as session:
                with pytest.raises((aiohttp.ClientError, OSError)):
                    await status(session, url)
        async with https(pki.dialer(), TOKEN) as session:
            assert await status(session, url) == 200


async def test_a_client_certificate_that_nobody_asked_for_counts_for_nothing(pki: Pki) -> None:
    (config,) = pki.cluster()
    async with running(config) as node, https(pki.dialer(pki.client("ann"))) as session:
        assert await status(session, f"{node.url}/v1/cluster") == 401


async def test_plain_http_on_the_https_port(pki: Pki) -> None:
    (config,) = pki.cluster()
    async with running(config) as node, aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await status(session, node.url.replace("https", "http") + "/healthz")
        async with https(pki.dialer()) as good:
            assert await status(good, f"{node.url}/healthz") == 200


async def test_https_on_the_http_port(pki: Pki) -> None:
    async with running() as node, https(pki.dialer()) as session:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await status(session, node.url.replace("http", "https") + "/healthz")


async def test_the_client_believes_nobody_else(pki: Pki, stranger: Pki) -> None:
    """The man in the middle shows a certificate of his own making, or one for another host: no token is told him."""
    heard: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        heard.append(request.headers.get("Authorization", ""))
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    expired = pki.node("n1", now=long_ago(), days=10)
    for pair in (stranger.node("n1"), pki.node("n1", "10.0.0.1"), expired, pki.client("n1")):
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=acceptor(pair))
        await site.start()
        urls = [f"https://127.0.0.1:{runner.addresses[0][1]}"]
        async with Client(urls, token=TOKEN, ca=pki.ca, patience_s=0.2) as client:
            with pytest.raises(Unavailable, match="certificate"):
                await client.cluster()
        await site.stop()
    await runner.cleanup()
    assert heard == []


async def test_the_client_verifies_a_node_and_may_show_a_certificate(pki: Pki) -> None:
    (config,) = pki.cluster()
    assert config.tls is not None
    config = replace(config, tls=replace(config.tls, client_ca=pki.ca))
    ann = pki.client("ann")
    async with running(config) as node:
        async with Client([node.url], token=TOKEN, ca=pki.ca) as client:
            assert (await client.cluster()).leader == "n1"
        async with Client([node.url], ca=pki.ca, certificate=ann.certificate, key=ann.key) as client:
            assert (await client.cluster()).leader == "n1"
        async with Client([node.url], ca=pki.ca) as client:
            with pytest.raises(NotAllowed):
                await client.cluster()
        async with Client(
            [node.url], token=TOKEN, patience_s=0.2
        ) as client:  # the system knows nothing of our authority
            with pytest.raises(Unavailable):
                await client.cluster()
    with pytest.raises(ValueError, match="go together"):
        Client([node.url], certificate=ann.certificate)


async def test_slow_clients_have_a_deadline(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.listening.HANDSHAKE_TIMEOUT_S", 0.3)
    monkeypatch.setattr("coordinator.listening.HANDSHAKES_MAX", 2)
    (config,) = pki.cluster()
    host, port = config.me.api.split(":")
    async with running(config) as node:
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(4)]
        for reader, writer in silent:
            assert await until_closed(reader) == b""
            await close(writer)
        async with https(pki.dialer()) as session:
            assert await status(session, f"{node.url}/healthz") == 200


async def test_connections_are_bounded_behind_tls_too(pki: Pki) -> None:
    (config,) = pki.cluster()
    config = replace(config, limits=replace(config.limits, max_connections=1))
    host, port = config.me.api.split(":")
    async with running(config):
        _, idler = await asyncio.open_connection(host, int(port), ssl=pki.dialer())
        reader, writer = await asyncio.open_connection(host, int(port), ssl=pki.dialer())
        assert b'"code":"too_many_connections"' in await until_closed(reader)
        await close(writer)
        await close(idler)


async def test_old_versions_are_refused(pki: Pki) -> None:
    (config,) = pki.cluster()
    async with running(config) as node:
        for version, works in ((ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)):
            context = pki.dialer()
            context.minimum_version = context.maximum_version = version
            async with https(context) as session:
                assert (await status(session, f"{node.url}/healthz") == 200) is works
    tls = Tls.load(config)
    for each in (tls.raft_server, tls.raft_client, tls.api_server, tls.api_client):
        assert each is not None
        assert each.minimum_version == ssl.TLSVersion.TLSv1_2


# ------------------------------------------------------------------------------------------------ new certificates


async def shown(config: NodeConfig, trusts: ssl.SSLContext) -> int:
    """The serial number of what the API shows."""
    host, port = config.me.api.split(":")
    _reader, writer = await asyncio.open_connection(host, int(port), ssl=trusts)
    serial = writer.get_extra_info("peercert")["serialNumber"]
    await close(writer)
    return int(serial, 16)


async def test_certificates_are_read_anew(pki: Pki) -> None:
    (config,) = pki.cluster()
    tls = Tls.load(config)
    async with running(config) as node:
        node.node._tls.reload()
        before = await shown(config, pki.dialer())
        pki.node("n1")  # in place of the old one
        assert await shown(config, pki.dialer()) == before
        node.node._tls.reload()
        after = await shown(config, pki.dialer())
        assert after != before
        assert config.tls is not None
        config.tls.key.chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            node.node._tls.reload()
        assert await shown(config, pki.dialer()) == after
    assert tls.config is config


# ------------------------------------------------------------------------------------------------ participants


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Participant]:
    participant = await start(NullManager(), settings=ServerSettings(**settings))
    try:
        yield participant
    finally:
        await participant.stop()


@contextlib.contextmanager
def connections(tls: ssl.SSLContext | None, token: str | None = None) -> Any:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    made = Connections(timeout_s=20, connect_timeout_s=20, headers=headers, tls=tls)
    yield made
    made.close()


ABORT = b'{"gid":"test-1-1","branch":"b","epoch":1}'


async def aborted(made: Connections, url: str) -> int:
    code, _, _ = await made.post(url, "/abort", "application/json", ABORT, most=1000)
    return code


async def test_a_participant_serves_https(pki: Pki, stranger: Pki) -> None:
    pair = pki.participant("stock")
    async with serving(
        certificate=pair.certificate, key=pair.key, caller_token=TOKEN, older_caller_tokens=("older-token",)
    ) as participant:
        assert participant.url.startswith("https://127.0.0.1:")
        for token, expected in ((None, 401), ("wrong", 403), (TOKEN, 200), ("older-token", 200)):
            with connections(pki.dialer(), token) as made:
                assert await aborted(made, participant.url) == expected
        for context in (stranger.dialer(), None):
            with connections(context, TOKEN) as made, pytest.raises(PostFailed, match="certificate"):
                await aborted(made, participant.url)
        with connections(pki.dialer(), TOKEN) as made, pytest.raises(PostFailed):
            await aborted(made, participant.url.replace("https", "http"))


async def test_a_coordinator_may_show_a_certificate_instead(pki: Pki, stranger: Pki) -> None:
    pair, nodes = pki.participant("stock"), pki.client("nodes")
    settings = {"certificate": pair.certificate, "key": pair.key, "client_ca": pki.ca, "caller_token": TOKEN}
    (config,) = pki.cluster()
    files = ParticipantFiles(ca=pki.ca, certificate=nodes.certificate, key=nodes.key)
    tls = Tls.load(replace(config, participants=files))
    async with serving(**settings) as participant:
        with connections(tls.participants) as made:
            assert await aborted(made, participant.url) == 200
        with connections(pki.dialer()) as made:
            assert await aborted(made, participant.url) == 401
        with connections(pki.dialer(stranger.client("nodes")), TOKEN) as made, pytest.raises(PostFailed):
            await aborted(made, participant.url)


async def test_the_token_does_not_leave_in_plain_text() -> None:
    with connections(None, TOKEN) as made:
        for url in ("http://192.0.2.1:80", "http://stock.invalid"):
            with pytest.raises(PostFailed, match="only over TLS"):
                await aborted(made, url)


async def test_nor_does_that_of_a_client() -> None:
    for url in ("http://192.0.2.1:80", "http://n1.invalid"):
        with pytest.raises(ValueError, match="only over TLS"):
            Client([url], token=TOKEN)
        async with Caller([url], token=TOKEN) as caller:
            with pytest.raises(Unverified, match="only over TLS"):
                await caller.anywhere("GET", "/v1/cluster", within_s=20)
    Client(["http://127.0.0.1:1", "http://localhost:1", "https://n1.invalid"], token=TOKEN)
    Client(["http://192.0.2.1:80"])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "stock.invalid"])
async def test_a_participant_beyond_loopback_needs_tls_and_a_token(pki: Pki, host: str) -> None:
    pair = pki.participant("stock")
    files = {"certificate": pair.certificate, "key": pair.key}
    for settings, says in (({"caller_token": TOKEN}, "outlast certs"), (files, "a caller_token")):
        with pytest.raises(SettingsError, match=says):
            await start(NullManager(), host=host, settings=ServerSettings(**settings))


async def test_a_participants_certificate_is_read_anew(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    pair = pki.participant("stock")
    async with serving(certificate=pair.certificate, key=pair.key) as participant:

        async def serial() -> str:
            _reader, writer = await asyncio.open_connection("127.0.0.1", participant.port, ssl=pki.dialer())
            found: str = writer.get_extra_info("peercert")["serialNumber"]
            await close(writer)
            return found

        before = await serial()
        pki.participant("stock")
        participant.reload()
        after = await serial()
        assert after != before
        pair.certificate.write_text("nonsense")
        participant.reload()
        assert "stays as it was" in caplog.text
        assert await serial() == after
    async with serving() as plain:
        plain.reload()


async def test_a_silent_caller_of_a_participant_has_a_deadline(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("participants.listening.HANDSHAKE_TIMEOUT_S", 0.2)
    pair = pki.participant("stock")
    async with serving(certificate=pair.certificate, key=pair.key) as participant:
        reader, writer = await asyncio.open_connection("127.0.0.1", participant.port)
        assert await until_closed(reader) == b""
        await close(writer)


# ------------------------------------------------------------------------------------------------ participants in doubt


@contextlib.asynccontextmanager
async def oracle(context: ssl.SSLContext) -> AsyncIterator[tuple[str, list[str | None]]]:
    """Says that everything was aborted, and keeps what it was shown."""
    heard: list[str | None] = []

    async def outcome(request: web.Request) -> web.Response:
        heard.append(request.headers.get("Authorization"))
        return web.json_response({"outcome": "aborted"})

    app = web.Application()
    app.router.add_get("/v1/outcomes/{gid}", outcome)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    yield f"https://127.0.0.1:{runner.addresses[0][1]}", heard
    await runner.cleanup()


Finish = Callable[[Envelope], Awaitable[Acked]]


async def test_a_participant_in_doubt_believes_only_verified_coordinators(
    pki: Pki, stranger: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    finished: list[Envelope] = []

    async def finish(envelope: Envelope) -> Acked:
        finished.append(envelope)
        resolver.hear(envelope, Acked(gid=envelope.message.gid, branch=envelope.message.branch, state="aborted"))
        return Acked(gid=envelope.message.gid, branch=envelope.message.branch, state="aborted")

    found = [InDoubt(gid="test-1-1", branch="b", prepared_at=0.0)]

    async def held() -> list[InDoubt]:
        return found

    async with (
        oracle(acceptor(stranger.node("n1"))) as (false, lied),
        oracle(acceptor(pki.node("n1"))) as (true, heard),
    ):
        settings = ServerSettings(
            coordinators=(false,), coordinator_token=TOKEN, coordinator_ca=pki.ca, ask_backoff_s=0.01
        )
        resolver = Resolver(settings, finish, held=held)
        resolver.start(found, tls=coordinator_context(settings))
        await eventually(lambda: "does not answer" in caplog.text)
        await resolver.stop()
        assert not finished
        assert not lied
        settings = replace(settings, coordinators=(false, true))
        resolver = Resolver(settings, finish, held=held)
        resolver.start(found, tls=coordinator_context(settings))
        await eventually(lambda: finished)
        await resolver.stop()
        assert not lied
        assert heard == [f"Bearer {TOKEN}"]
        assert isinstance(finished[0].message, Abort)


async def test_a_served_participant_asks_with_the_authority_it_was_given(pki: Pki, stranger: Pki) -> None:
    class Doubtful(NullManager):
        async def open(self) -> list[InDoubt]:
            return [InDoubt(gid="test-1-1", branch="b", prepared_at=0.0)]

    async with (
        oracle(acceptor(stranger.node("n1"))) as (false, lied),
        oracle(acceptor(pki.node("n1"))) as (true, heard),
    ):
        settings = ServerSettings(
            coordinators=(false, true), coordinator_token=TOKEN, coordinator_ca=pki.ca, ask_backoff_s=0.01
        )
        participant = await start(Doubtful(), settings=settings)
        await eventually(lambda: heard)
        await participant.stop()
        assert not lied
        assert set(heard) == {f"Bearer {TOKEN}"}
