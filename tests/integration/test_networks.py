"""The networks that fault tests stand on do what they say: a cut that cuts nothing would prove everything."""

import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.networks import Network, NoNetworks, why_not

SHORT_S = 0.2
"""Long enough for a packet that is not lost, on a machine that has nothing else to do; what is lost takes all of it."""


@pytest.fixture
def network() -> Iterator[Network]:
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    with Network("a", "b", "c") as made:
        yield made


def listener(network: Network, host: str) -> socket.socket:
    with network.inside(host):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((network.address(host), 7))
    return made


def arrives(network: Network, source: str, target: str, *, within_s: float = SHORT_S) -> bool:
    with listener(network, target) as hears, network.inside(source), socket.socket(type=socket.SOCK_DGRAM) as says:
        hears.settimeout(within_s)
        says.sendto(b"hello", (network.address(target), 7))
        try:
            data, (sender, _) = hears.recvfrom(100)
        except TimeoutError:
            return False
        assert (data, sender) == (b"hello", network.address(source))
        return True


def test_what_is_cut_and_only_that_is_lost_without_a_word(network: Network) -> None:
    pairs = [(source, target) for source in network.hosts for target in network.hosts if source != target]
    assert all(arrives(network, *pair, within_s=5.0) for pair in pairs)
    network.cut("a", "b", both=False)
    network.cut("b", "c")
    lost = {("a", "b"), ("b", "c"), ("c", "b")}
    assert {pair for pair in pairs if not arrives(network, *pair)} == lost
    network.heal()
    assert all(arrives(network, *pair, within_s=5.0) for pair in pairs)
    network.cut_off("a", besides=("here",))
    lost = {("a", "b"), ("a", "c"), ("b", "a"), ("c", "a")}
    assert {pair for pair in pairs if not arrives(network, *pair)} == lost


def test_what_is_slow_arrives_late_and_can_be_cut_too(network: Network) -> None:
    try:
        network.delay("a", "b", 0.05)
    except NoNetworks as error:
        pytest.skip(str(error))
    for pair in (("a", "b"), ("b", "a")):
        began_s = time.monotonic()
        assert arrives(network, *pair, within_s=5.0)
        assert time.monotonic() - began_s >= 0.05
    assert arrives(network, "a", "c", within_s=5.0)
    assert [delay.carried for delay in network._delays.values()] == [1, 1]
    network.cut("a", "b", both=False)
    assert not arrives(network, "a", "b")
    assert arrives(network, "b", "a", within_s=5.0)


def test_a_connection_survives_a_short_cut(network: Network) -> None:
    with network.inside("a"):
        server = socket.create_server((network.address("a"), 80))
    with server, network.inside("b"):
        client = socket.create_connection((network.address("a"), 80), timeout=5.0)
        accepted, _ = server.accept()
        with client, accepted:
            accepted.settimeout(SHORT_S)
            network.cut("a", "b")
            client.sendall(b"kept")
            with pytest.raises(TimeoutError):
                accepted.recv(10)
            network.heal()
            accepted.settimeout(10.0)
            assert accepted.recv(10) == b"kept"


def test_nothing_is_left_behind() -> None:
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    before = [name for _, name in socket.if_nameindex()]
    with Network("a") as network:
        assert network.here == "10.77.2.2"
        assert [name for _, name in socket.if_nameindex()] == ["lo", "eth0"]
    assert [name for _, name in socket.if_nameindex()] == before
