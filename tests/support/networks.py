"""Hosts with a network of their own, on this machine: links can be cut, in one direction too, and made slow.

Each host is a network namespace of the kernel's, with one address. All are joined by a router, which is one more. A cut
is a rule of the router's to lose what goes from one host to another, without a word to either: both see what they would
see if a cable were pulled somewhere between them. Nothing is closed, nobody is refused, what was sent is sent again in
vain, and arrives if the link heals soon enough.

    with Network("n1", "n2", "n3") as network:
        with network.inside("n1"):
            ...                                   # processes and sockets made here are on n1, for as long as they live
        network.cut("n1", "n2")                   # silent both ways
        network.cut("n1", "n3", both=False)       # what n1 says to n3 is lost; n1 hears n3
        network.delay("n2", "n3", 0.05)           # 50 ms each way
        network.heal()

The caller's thread is on a host of its own, which is joined like the others (`Network.here`), until the context ends.

The namespaces have no names: the kernel lets go of them with the last process and the last descriptor that holds them.
So nothing is left behind, however a test ends. It takes root, and `ip` of iproute2.
"""

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

HERE = "here"
"""The host that the caller is on."""

_CLONE_NEWNET = 0x40000000
_LOSE, _SLOW = 100, 200
"""Priorities of the router's rules: a link that is slow may be cut, too."""
_SLOW_TABLE = 200
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 65536
_IDLE_S = 0.5

_libc = ctypes.CDLL(None, use_errno=True)


class NoNetworks(Exception):
    """This machine, or this user, cannot make any. The text says why."""


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _done(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _enter(namespace: int) -> None:
    """The calling thread, and what it starts from now on, is in there."""
    _done(_libc.setns(namespace, _CLONE_NEWNET), "setns")


def why_not() -> str | None:
    """Why there can be no networks here; None: there can."""
    try:
        with Network("a"):
            return None
    except NoNetworks as error:
        return str(error)


class Network:
    """See the module's text."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = (*hosts, HERE)
        self._namespaces: dict[str, int] = {}
        self._router = -1
        self._home = -1
        self._cuts: set[tuple[str, str]] = set()
        self._delays: dict[tuple[str, str], _Delay] = {}

    def address(self, host: str) -> str:
        """Where the others find `host`."""
        return f"10.77.{self.hosts.index(host) + 1}.2"

    @property
    def here(self) -> str:
        """Where the hosts find the caller."""
        return self.address(HERE)

    # -------------------------------------------------------------------------------------------- life

    def __enter__(self) -> "Network":
        self._home = _current()
        try:
            self._router = self._new()
            for host in self.hosts:
                self._namespaces[host] = self._new()
            self._join()
        except (OSError, NoNetworks) as error:
            self._end()
            raise NoNetworks(f"no network of our own can be made here: {error}") from error
        except BaseException:
            self._end()
            raise
        _enter(self._namespaces[HERE])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        _enter(self._home)
        for delay in self._delays.values():
            delay.stop()
        for namespace in (*self._namespaces.values(), self._router, self._home):
            if namespace >= 0:
                os.close(namespace)
        self._namespaces, self._delays = {}, {}
        self._router = self._home = -1

    def _new(self) -> int:
        try:
            _done(_libc.unshare(_CLONE_NEWNET), "unshare")
            return _current()
        finally:
            _enter(self._home)

    def _join(self) -> None:
        with self._in(self._router):
            for name in ("ip_forward", "conf/all/forwarding"):
                Path(f"/proc/sys/net/ipv4/{name}").write_text("1")
            for name in ("all", "default"):
                # A packet that was slow comes in where no answer to it would go out.
                Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
        for number, (host, namespace) in enumerate(self._namespaces.items(), 1):
            peer = f"/proc/{os.getpid()}/fd/{namespace}"
            self._ip(
                self._router,
                f"link add v{number} type veth peer name eth0 netns {peer}",
                f"addr add 10.77.{number}.1/24 dev v{number}",
                f"link set v{number} up",
            )
            self._ip(
                namespace,
                "link set lo up",
                f"addr add {self.address(host)}/24 dev eth0",
                "link set eth0 up",
                f"route add default via 10.77.{number}.1",
            )

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """What is started within the block, by this thread, is on `host`."""
        with self._in(self._namespaces[host]):
            yield

    @contextmanager
    def _in(self, namespace: int) -> Iterator[None]:
        before = _current()
        try:
            _enter(namespace)
            yield
        finally:
            _enter(before)
            os.close(before)

    def _ip(self, namespace: int, *lines: str) -> None:
        """Commands of `ip`, in order."""
        with self._in(namespace):
            try:
                done = subprocess.run(
                    ["ip", "-batch", "-"],
                    input="".join(f"{line}\n" for line in lines),
                    capture_output=True,
                    text=True,
                    check=False,
                    env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
                )
            except FileNotFoundError as error:
                raise NoNetworks("there is no `ip`: install iproute2") from error
        if done.returncode != 0:
            raise NoNetworks(f"ip {'; '.join(lines)}: {done.stderr.strip()}")

    # -------------------------------------------------------------------------------------------- faults

    def _rule(self, source: str, target: str) -> str:
        return f"from {self.address(source)} to {self.address(target)}"

    def cut(self, source: str, target: str, *, both: bool = True) -> None:
        """Lose what `source` sends to `target`; and what comes back, unless `both` is False."""
        self._lose({(source, target), (target, source)} if both else {(source, target)})

    def cut_off(self, host: str, *, besides: Sequence[str] = ()) -> None:
        """Lose all that `host` sends and all that is sent to it, but for what concerns `besides`."""
        others = [other for other in self.hosts if other != host and other not in besides]
        self._lose({way for other in others for way in ((host, other), (other, host))})

    def _lose(self, ways: AbstractSet[tuple[str, str]]) -> None:
        new = sorted(ways - self._cuts)
        self._cuts |= ways
        if new:
            self._ip(self._router, *(f"rule add {self._rule(*way)} pref {_LOSE} blackhole" for way in new))

    def heal(self) -> None:
        """Lose nothing any more; what is slow stays so."""
        cuts, self._cuts = sorted(self._cuts), set()
        if cuts:
            self._ip(self._router, *(f"rule del {self._rule(*way)} pref {_LOSE} blackhole" for way in cuts))

    def delay(self, one: str, other: str, each_way_s: float) -> None:
        """Hold back for so long what these two send to each other. Once for each pair. Raises `NoNetworks`."""
        for way in ((one, other), (other, one)):
            assert way not in self._delays, f"{way} is slow already"
            name, table = f"slow{len(self._delays)}", _SLOW_TABLE + len(self._delays)
            try:
                with self._in(self._router):
                    delay = _Delay(name, each_way_s)
            except OSError as error:
                raise NoNetworks(f"no link can be made slow here: {error}") from error
            self._delays[way] = delay
            interface = f"v{self.hosts.index(way[0]) + 1}"
            self._ip(
                self._router,
                f"link set {name} up",
                f"route add default dev {name} table {table}",
                # Only what comes from the host itself: what comes back from our own hands goes on.
                f"rule add {self._rule(*way)} iif {interface} pref {_SLOW} lookup {table}",
            )
            delay.start()


class _Delay(threading.Thread):
    """Takes packets out of the kernel's hands, and gives them back in order and later."""

    def __init__(self, name: str, delay_s: float) -> None:
        super().__init__(name=name, daemon=True)
        self._delay_s = delay_s
        self._over = False
        self.carried = 0
        self._device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(self._device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))

    def stop(self) -> None:
        self._over = True
        if self.is_alive():
            self.join()
        os.close(self._device)

    def run(self) -> None:
        waiting: deque[tuple[float, bytes]] = deque()
        while not self._over:
            left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else _IDLE_S
            readable, _, _ = select.select([self._device], [], [], left_s)
            if readable:
                packet = os.read(self._device, _PACKET_BYTES)
                if packet[0] >> 4 == 4:  # the kernel itself says something in IPv6 to a new device
                    waiting.append((time.monotonic() + self._delay_s, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                self.carried += 1  # first: whoever has received it may look at once
                os.write(self._device, waiting.popleft()[1])
