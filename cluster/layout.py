"""What a local cluster's folder holds, and how it is made and read.

```
DIR/cluster.json     who runs where; kept current, replaced as a whole, read by anyone
DIR/lock             held while the above is being changed
DIR/tls/             with TLS: authority, certificates, keys and tokens; see `certificates.py`
DIR/n1/node.toml     settings of a node, the cluster's secret among them: mode 0600
DIR/n1/data/         what the node remembers
DIR/n1/log.txt       what it said
```

The `node.toml` files say what the cluster *is*, and outlive everything. `cluster.json` only says what runs now.
"""

import asyncio
import fcntl
import json
import os
import reprlib
import secrets
import string
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cluster.certificates import Authority, CertificateTrouble, Kind, Wanted, make_secret
from cluster.ports import HOST, consecutive_ports, free_ports
from cluster.process import Identity, ProcessTrouble
from coordinator.config import ConfigError, NodeConfig, Peer

Settings = Mapping[str, Mapping[str, float | int]]
"""Sections of a node's configuration: `{"limits": {...}, "timing": {...}}`."""

LOOPBACK: Final = (HOST, "localhost")
"""Where nodes and services of a local cluster are reached."""

_LOCK_S: Final = 5.0
"""Nobody holds the lock for longer than it takes to start processes, without waiting for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A process in `cluster.json`. `pid` and `started` are None while it does not run.

    module, arguments: how to start it again; of services only, for nodes all alike are started from their `node.toml`.
    """

    id: str
    url: str
    pid: int | None = None
    started: int | None = None
    module: str | None = None
    arguments: tuple[str, ...] = ()

    @property
    def identity(self) -> Identity | None:
        """The process that ran when this was written."""
        return None if self.pid is None or self.started is None else Identity(self.pid, self.started)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """`cluster.json`.

    owner: the process that the others shall not outlive; None for a detached cluster.
    down: somebody has asked for all of it to stop, and the owner need not keep watch any longer.
    ca, token_file: how to talk to its nodes, where they speak TLS and want a token; paths.
    """

    cluster: str
    nodes: tuple[Row, ...] = ()
    services: tuple[Row, ...] = ()
    owner: Identity | None = None
    down: bool = field(default=False)
    ca: str | None = None
    token_file: str | None = None


def read_running(data: Path) -> Running | None:
    """What `cluster.json` says; None when there is none. Raises `ProcessTrouble` when it is not one of ours."""
    path = data / "cluster.json"
    try:
        plain = json.loads(path.read_text())
        owner, ca, token_file = plain.get("owner"), plain.get("ca"), plain.get("token_file")
        return Running(
            cluster=_text(plain["cluster"]),
            nodes=tuple(_row(row) for row in plain["nodes"]),
            services=tuple(_row(row) for row in plain.get("services", ())),
            owner=None if owner is None else Identity(_number(owner["pid"]), _number(owner["started"])),
            down=plain.get("down", False) is True,
            ca=None if ca is None else _text(ca),
            token_file=None if token_file is None else _text(token_file),
        )
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise ProcessTrouble(f"{data} is not a folder; name another with --data") from error
    except OSError as error:
        raise ProcessTrouble(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProcessTrouble(
            f"{path} is damaged ({type(error).__name__}: {error!s:.200}); end what still runs and remove that file, "
            "the nodes' data stays"
        ) from error


def _row(plain: Mapping[str, Any]) -> Row:
    row = Row(**{**plain, "arguments": tuple(plain.get("arguments", ()))})
    for text in (row.id, row.url, *row.arguments, *(() if row.module is None else (row.module,))):
        _text(text)
    for number in (row.pid, row.started):
        if number is not None:
            _number(number)
    urlsplit(row.url)
    return row


def _text(value: object) -> str:
    """Raises TypeError and ValueError for what is no text, or cannot be a path or a word of a command."""
    if type(value) is not str or "\0" in value:
        raise TypeError(f"{reprlib.repr(value)} where a text should be")
    value.encode()
    return value


def _number(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{reprlib.repr(value)} where a number should be")
    return value


def write_running(data: Path, running: Running) -> None:
    """Replace `cluster.json` as a whole: whoever reads it sees the old or the new."""
    plain = asdict(running)
    plain["owner"] = None if running.owner is None else running.owner._asdict()
    for row in plain["nodes"]:
        del row["module"], row["arguments"]
    draft = data / f".cluster.json.{os.getpid()}"
    draft.write_text(json.dumps(plain, indent=1) + "\n")
    draft.replace(data / "cluster.json")


@asynccontextmanager
async def locked(data: Path) -> AsyncIterator[None]:
    """Hold the folder's lock. Raises `ProcessTrouble` when somebody else keeps it too long.

    The lock is the kernel's, and goes with its holder however that ends; the file only gives it a place.
    """
    handle = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline_s:
                    raise ProcessTrouble(f"another `outlast` command is at work on {data}; try again") from error
                await asyncio.sleep(0.02)
        yield
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------ node.toml


def lay_out(
    data: Path,
    *,
    nodes: int,
    port: int | None,
    name: str | None,
    settings: Settings | None,
    tls: bool = False,
) -> tuple[NodeConfig, ...]:
    """The configuration of every node: what is in the folder already, or else a new one. `tls`: a new one speaks TLS.

    Raises `ProcessTrouble` when the folder holds something else than what was asked for.
    """
    found = read_layout(data)
    if not found:
        return _make_layout(data, nodes=nodes, port=port, name=name, settings=settings or {}, tls=tls)
    first = found[0]
    if tls and first.tls is None:
        raise ProcessTrouble(f"{data} holds a cluster without TLS; leave --tls away, or use another --data")
    if len(first.nodes) != nodes:
        raise ProcessTrouble(f"{data} holds a cluster of {len(first.nodes)}, not {nodes}; use another --data")
    if name is not None and name != first.cluster:
        raise ProcessTrouble(f"{data} holds the cluster {first.cluster}, not {name}; use another --data")
    ports = [int(peer.api.rpartition(":")[2]) for peer in first.nodes]
    if port is not None and ports != consecutive_ports(port, nodes):
        raise ProcessTrouble(
            f"{data} holds a cluster on ports {', '.join(map(str, ports))}, and a cluster keeps its ports; "
            "leave --port away, or use another --data"
        )
    return found


def read_layout(data: Path) -> tuple[NodeConfig, ...]:
    """The configuration of every node in the folder; empty when there is no cluster. Raises `ProcessTrouble`."""
    files = sorted(data.glob("*/node.toml"))
    try:
        configs = {config.node: config for config in map(NodeConfig.load, files)}
    except ConfigError as error:
        raise ProcessTrouble(f"{error}; repair it, or use another --data") from error
    if not configs:
        return ()
    peers = next(iter(configs.values())).nodes
    missing = [peer.id for peer in peers if peer.id not in configs]
    if missing and not any((file.parent / "data").exists() for file in files):
        return ()  # whoever made it was interrupted, and no node has ever run on it
    if missing or len(configs) != len(peers):
        raise ProcessTrouble(f"{data} should hold {', '.join(f'{peer.id}/node.toml' for peer in peers)}, and does not")
    return tuple(configs[peer.id] for peer in peers)


def _make_layout(
    data: Path, *, nodes: int, port: int | None, name: str | None, settings: Settings, tls: bool
) -> tuple[NodeConfig, ...]:
    if tls:
        name = _make_certificates(data / "tls", nodes, name)
    # A gid begins with the cluster's name, and participants may outlive a cluster: two clusters need two names.
    cluster = name or _new_name()
    ports = free_ports(2 * nodes) if port is None else consecutive_ports(port, 2 * nodes)
    peers = [
        Peer(id=f"n{index + 1}", api=f"{HOST}:{ports[index]}", raft=f"{HOST}:{ports[nodes + index]}")
        for index in range(nodes)
    ]
    secret = secrets.token_urlsafe(32)
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        for peer in peers:
            path = data / peer.id / "node.toml"
            path.parent.mkdir(exist_ok=True, mode=0o700)
            path.unlink(missing_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(_toml(cluster, peer, peers, secret, settings, tls=tls))
    except (FileExistsError, NotADirectoryError) as error:
        raise ProcessTrouble(f"{error.filename} is in the way; name another folder with --data") from error
    except OSError as error:
        raise ProcessTrouble(f"{error.filename} cannot be written: {error.strerror}") from error
    found = read_layout(data)
    assert found, "what was just written is a whole layout"
    return found


def _new_name() -> str:
    return "local-" + "".join(secrets.choice(string.ascii_lowercase) for _ in range(4))


def _make_certificates(folder: Path, nodes: int, name: str | None) -> str:
    """Authority, certificates and tokens for nodes on loopback; the cluster's name. Raises `ProcessTrouble`."""
    try:
        # An authority without nodes is what an interrupted start has left.
        there = Authority.there(folder)
        authority = Authority.open(folder) if there else Authority.make(folder, name or _new_name())
        if name not in (None, authority.cluster):
            raise ProcessTrouble(f"{folder} holds the authority of {authority.cluster}, not {name}; use another --data")
        wanted = [Wanted(kind=Kind.NODE, name=f"n{index + 1}", hosts=LOOPBACK) for index in range(nodes)]
        authority.issue(wanted, renew=there)
        for file in ("token", "participant-token"):
            make_secret(folder / file)
    except CertificateTrouble as error:
        raise ProcessTrouble(str(error)) from error
    return authority.cluster


def certify_services(data: Path, names: Sequence[str]) -> None:
    """Certificates for participants on loopback that have none yet. Raises `ProcessTrouble`."""
    folder = data / "tls"
    wanted = [
        Wanted(kind=Kind.PARTICIPANT, name=name, hosts=LOOPBACK)
        for name in names
        if not (folder / f"{Kind.PARTICIPANT.file(name)}.pem").exists()
    ]
    try:
        Authority.open(folder).issue(wanted)
    except CertificateTrouble as error:
        raise ProcessTrouble(str(error)) from error


def _toml(cluster: str, node: Peer, peers: list[Peer], secret: str, settings: Settings, *, tls: bool) -> str:
    lines = [
        f'cluster = "{cluster}"',
        f'node = "{node.id}"',
        'data = "data"',
        f'secret = "{secret}"',
    ]
    if tls:
        lines += [
            'token_file = "../tls/token"',
            'participant_token_file = "../tls/participant-token"',
            "",
            "[tls]",
            'ca = "../tls/ca.pem"',
            f'certificate = "../tls/{node.id}.pem"',
            f'key = "../tls/{node.id}.key"',
            "",
            "[participants]",
            'ca = "../tls/ca.pem"',
        ]
    for section, values in settings.items():
        lines += ["", f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
    for peer in peers:
        lines += ["", "[[nodes]]", f'id = "{peer.id}"', f'api = "{peer.api}"', f'raft = "{peer.raft}"']
    return "\n".join(lines) + "\n"
