"""Certificates and keys, damaged as text and as what it holds: used, or refused with a text that names the file."""

import base64
import re
import shutil
import ssl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.calls import trusting
from cluster.certificates import Authority, CertificateTrouble, Kind, Wanted
from coordinator.config import ConfigError, NodeConfig, Peer, TlsFiles
from coordinator.tls import Tls, identifier
from participants.settings import ServerSettings, SettingsError
from participants.tls import coordinator_context, server_context
from tests.fuzz import HUNT, examples
from tests.fuzz.mutations import damaged

CLUSTER = "m"
_PEM = re.compile(rb"(-----BEGIN [A-Z ]+-----\n)(.*?)(-----END [A-Z ]+-----\n)", re.DOTALL)


pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
"""Of what will be refused one day, and must not be taken for a refusal today."""

FILES = {path.name: path.read_bytes() for path in (Path(__file__).parent / "certificates").iterdir()}
"""An authority's and a node's, made once and for long, so that a seed is the same run everywhere; good for nothing."""


def _inner(pem: bytes) -> bytes:
    """What the text holds."""
    found = _PEM.search(pem)
    assert found is not None
    return base64.b64decode(found[2])


def _wrapped(pem: bytes, inner: bytes) -> bytes:
    found = _PEM.search(pem)
    assert found is not None
    return found[1] + base64.encodebytes(inner) + found[3]


EC_KEY, ODD_KEY = bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0202")
"""Kinds of keys; nobody knows the second."""


@st.composite
def bad_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(FILES)))
    if draw(st.integers(0, 3)) == 0:
        return name, draw(damaged(st.just(FILES[name]) | st.sampled_from(sorted(FILES.values()))))
    return name, _wrapped(FILES[name], draw(damaged(st.just(_inner(FILES[name])))))


def _uses(folder: Path) -> Iterator[tuple[Callable[[], object], type[Exception]]]:
    """All that reads such files, and how each of them refuses."""
    ca, certificate, key = folder / "ca.pem", folder / "n1.pem", folder / "n1.key"
    config = NodeConfig(
        cluster=CLUSTER,
        node="n1",
        data=folder / "data",
        nodes=(Peer(id="n1", api="127.0.0.1:1", raft="127.0.0.1:2"),),
        secret="s" * 16,
        token="t" * 16,
        tls=TlsFiles(ca=ca, certificate=certificate, key=key, client_ca=ca),
    )
    served = ServerSettings(certificate=certificate, key=key, client_ca=ca, coordinator_ca=ca, caller_token="t" * 16)
    yield lambda: Tls.load(config), ConfigError
    yield lambda: server_context(served), SettingsError
    yield lambda: coordinator_context(served), SettingsError
    yield lambda: trusting(ca), ConfigError
    yield lambda: Authority.open(folder).cluster, CertificateTrouble
    yield lambda: Authority.open(folder).issue([Wanted(kind=Kind.CLIENT, name="c")]), CertificateTrouble


Uses = Callable[[Path], Iterator[tuple[Callable[[], object], type[Exception]]]]


def uses(name: str, content: bytes, all_uses: Uses = _uses) -> None:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        for other, good in FILES.items():
            path = folder / other
            path.touch(mode=0o600)
            path.write_bytes(content if other == name else good)
        for use, refusal in all_uses(folder):
            try:
                use()
            except refusal as error:
                assert str(folder) in str(error), "it says which file"
                assert len(str(error)) < 2000
                assert "PRIVATE KEY" not in str(error)
        shutil.rmtree(folder / "data", ignore_errors=True)


@examples(30)
@given(bad_files())
@example(("ca.pem", b"\0" + FILES["ca.pem"]))
@example(("ca.pem", _wrapped(FILES["ca.pem"], _inner(FILES["ca.pem"]).replace(EC_KEY, ODD_KEY))))
@example(("n1.pem", _wrapped(FILES["n1.pem"], _inner(FILES["n1.pem"]).replace(b"\x42\0\x04", b"\x42\0\x05"))))
@example(("n1.pem", _wrapped(FILES["n1.pem"], _inner(FILES["n1.pem"]).replace(b"\x55\x1d\x0f", b"\x55\x1d\x11"))))
@example(("ca.pem", _wrapped(FILES["ca.pem"], _inner(FILES["ca.pem"]).replace(b"\x55\x1d\x0e", b"\x55\x1d\x0d"))))
def test_a_damaged_certificate_or_key_is_refused_by_its_name(file: tuple[str, bytes]) -> None:
    uses(*file)


NODE = _inner(FILES["n1.pem"])
Identify = Callable[[bytes], frozenset[str]]


def identifies(der: bytes, identify: Identify) -> None:
    """What comes over the wire."""
    assert all(isinstance(name, str) for name in identify(der))


@examples(100)
@given(damaged(st.just(NODE)))
def test_a_damaged_certificate_names_somebody_or_nobody(der: bytes) -> None:
    identifies(der, identifier(CLUSTER))


def test_the_undamaged_are_used(tmp_path: Path) -> None:
    assert identifier(CLUSTER)(NODE) == {"n1"}
    for name, content in FILES.items():
        path = tmp_path / name
        path.touch(mode=0o600)
        path.write_bytes(content)
    for use, _refusal in _uses(tmp_path):
        use()


# ------------------------------------------------------------------------------------------------ known to be bad


def _first(folder: Path) -> x509.Certificate:
    """What is there is a certificate."""
    try:
        return x509.load_pem_x509_certificates((folder / "n1.pem").read_bytes())[0]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read") from error


def _loaded(folder: Path) -> ssl.SSLContext:
    """What OpenSSL says is for people."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "n1.pem", folder / "n1.key", password=lambda: b"")
    return context


@pytest.mark.parametrize(("careless", "error"), [(_first, ValueError), (_loaded, ssl.SSLError)])
def test_a_careless_reader_of_certificates_is_found(careless: Callable[[Path], object], error: type[Exception]) -> None:
    def one(folder: Path) -> Iterator[tuple[Callable[[], object], type[Exception]]]:
        yield lambda: careless(folder), ConfigError

    @HUNT
    @given(bad_files())
    def hunt(file: tuple[str, bytes]) -> None:
        uses(*file, one)

    with pytest.raises(error) as caught:
        hunt()
    assert not isinstance(caught.value, ConfigError)


def test_a_careless_reader_of_names_is_found() -> None:
    def named(der: bytes) -> frozenset[str]:
        names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return frozenset(names.value.get_values_for_type(x509.DNSName))

    @HUNT
    @given(damaged(st.just(NODE)))
    def hunt(der: bytes) -> None:
        identifies(der, named)

    with pytest.raises((ValueError, x509.ExtensionNotFound)):
        hunt()
