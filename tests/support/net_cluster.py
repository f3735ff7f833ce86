"""A local cluster whose nodes each have a network of their own, with TLS and a token, as beyond loopback."""

import secrets
from pathlib import Path
from typing import Final

from cluster.certificates import Authority, Kind, Wanted, make_secret
from cluster.layout import Settings
from cluster.local import LocalCluster
from cluster.process import Identity, Process, Program, arguments
from tests.support.networks import Network

API_PORT: Final = 7001
RAFT_PORT: Final = 7101


class _Hosted(Process):
    """A process on a host of its own."""

    network: Network

    def spawn(self) -> Identity:
        with self.network.inside(self.name):
            return super().spawn()


class NetCluster(LocalCluster):
    """One node on each host of `network`, under the host's name; whoever asks is on the caller's host.

    slow_disks: whether `slow_disk` can be used; `PYTHONPATH` must then lead the nodes to the tests.
    """

    def __init__(
        self, data: Path, network: Network, *, settings: Settings | None = None, slow_disks: bool = False
    ) -> None:
        self.network = network
        self._slow_disks = slow_disks
        self._hosts = network.hosts[:-1]
        super().__init__(data, nodes=len(self._hosts), settings=settings, tls=True)

    def lay_out(self) -> None:
        if not self._configs and not (self.data / "tls").exists():
            self._write()
        super().lay_out()
        for node, process in self._nodes.items():
            program = process.program
            if self._slow_disks:
                words = arguments(self._delay(node), program.module, *program.arguments)
                program = Program(module="tests.support.slow_disk", arguments=words, log=program.log)
                self.slow_disk(node, 0.0)
            hosted = _Hosted(node, program, tether=process._tether)
            hosted.network = self.network
            self._nodes[node] = hosted

    def _delay(self, node: str) -> Path:
        return self.data / node / "sync_takes"

    def slow_disk(self, node: str, seconds: float) -> None:
        """From now on a sync of this node takes so much longer."""
        draft = self._delay(node).with_suffix(".new")
        draft.write_text(str(seconds))
        draft.replace(self._delay(node))

    def _write(self) -> None:
        tls = self.data / "tls"
        authority = Authority.make(tls, f"net-{secrets.token_hex(2)}")
        authority.issue(
            [Wanted(kind=Kind.NODE, name=host, hosts=(self.network.address(host),)) for host in self._hosts]
        )
        make_secret(tls / "token")
        make_secret(tls / "secret")
        for host in self._hosts:
            path = self.data / host / "node.toml"
            path.parent.mkdir()
            path.write_text(self._toml(authority.cluster, host))
            path.chmod(0o600)

    def _toml(self, cluster: str, node: str) -> str:
        # Without a participant token, for participants here stand behind taps, and those speak no TLS.
        lines = [f'cluster = "{cluster}"', f'node = "{node}"', 'data = "data"']
        lines += ['token_file = "../tls/token"', 'secret_file = "../tls/secret"']
        lines += ["[tls]", 'ca = "../tls/ca.pem"', f'certificate = "../tls/{node}.pem"', f'key = "../tls/{node}.key"']
        for section, values in (self._settings or {}).items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
        for host in self._hosts:
            address = self.network.address(host)
            lines += ["[[nodes]]", f'id = "{host}"', f'api = "{address}:{API_PORT}"', f'raft = "{address}:{RAFT_PORT}"']
        return "\n".join(lines) + "\n"
