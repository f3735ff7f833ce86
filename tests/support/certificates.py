"""Certificates for tests: good ones, and every kind of bad one."""

import ssl
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cluster.certificates import Authority, Kind, Wanted
from coordinator.config import NodeConfig, TlsFiles
from tests.support.nodes import configs

HERE = ("127.0.0.1", "localhost")
TOKEN = "a token of sixteen".replace(" ", "-")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Pki:
    """An authority in a folder of its own. Names of nodes, clients and participants are given once."""

    def __init__(self, folder: Path, cluster: str = "test", *, now: datetime | None = None) -> None:
        self.authority = Authority.make(folder, cluster, now=now)
        self.ca = self.authority.file

    def node(self, name: str, *hosts: str, now: datetime | None = None, days: int = 100) -> Pair:
        return self._issue(Kind.NODE, name, hosts or HERE, now, days)

    def client(self, name: str, *, now: datetime | None = None, days: int = 100) -> Pair:
        return self._issue(Kind.CLIENT, name, (), now, days)

    def participant(self, name: str, *hosts: str, now: datetime | None = None, days: int = 100) -> Pair:
        return self._issue(Kind.PARTICIPANT, name, hosts or HERE, now, days)

    def _issue(self, kind: Kind, name: str, hosts: tuple[str, ...], now: datetime | None, days: int) -> Pair:
        (file,) = self.authority.issue([Wanted(kind=kind, name=name, hosts=hosts)], days=days, now=now, renew=True)
        return Pair(file, file.with_suffix(".key"))

    def configured(self, config: NodeConfig, pair: Pair, **more: Path) -> NodeConfig:
        """`config`, with TLS, and a token as beyond loopback."""
        files = TlsFiles(ca=self.ca, certificate=pair.certificate, key=pair.key, **more)
        return replace(config, tls=files, token=config.token or TOKEN)

    def cluster(self, *nodes: str) -> list[NodeConfig]:
        """Every node of a cluster on loopback, certified."""
        return [self.configured(config, self.node(config.node)) for config in configs(nodes or ("n1",))]

    def dialer(self, pair: Pair | None = None, *, names: bool = True) -> ssl.SSLContext:
        """A client that trusts this authority, and shows `pair`. names: it looks at host names."""
        context = ssl.create_default_context(cafile=self.ca)
        context.check_hostname = names
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        return context


def long_ago() -> datetime:
    """So that what is made then for ten days has expired, and its authority has not."""
    return datetime.now(UTC) - timedelta(days=30)


def acceptor(pair: Pair) -> ssl.SSLContext:
    """A server that shows `pair` and asks for nothing: an impostor's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    return context


def gullible(pair: Pair | None = None) -> ssl.SSLContext:
    """A client that believes anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context
