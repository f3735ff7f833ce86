"""Certificates: what is made, what is never written over, and every file that a node refuses to start with."""

import json
import logging
import os
import ssl
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.certificates import Authority, CertificateTrouble, Kind, Wanted, make_secret
from cluster.cli import main
from coordinator.config import ConfigError, NodeConfig, ParticipantFiles, TlsFiles
from coordinator.tls import Tls, covers_host, identifier, node_ids, read_certificates
from participants.settings import ServerSettings, SettingsError
from participants.tls import coordinator_context, server_context
from tests.support.certificates import TOKEN, Pki, long_ago
from tests.support.nodes import configs


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def parsed(path: Path) -> x509.Certificate:
    (certificate,) = read_certificates(path, "test")
    return certificate


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------------------------------------ what is made


def test_a_node_is_both_ends_and_says_which_node_it_is(pki: Pki) -> None:
    certificate = parsed(pki.node("n1", "host1", "10.0.0.1", "::1").certificate)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert node_ids(certificate, "test") == {"n1"}
    assert node_ids(certificate, "other") == frozenset()
    assert all(covers_host(certificate, host) for host in ("host1", "HOST1", "10.0.0.1", "::1"))
    assert not any(covers_host(certificate, host) for host in ("host2", "10.0.0.2", "n1", "1.host1"))


def test_what_is_for_one_thing_is_for_no_other(pki: Pki) -> None:
    for pair, usage in (
        (pki.client("n1"), ExtendedKeyUsageOID.CLIENT_AUTH),
        (pki.participant("n1", "n1"), ExtendedKeyUsageOID.SERVER_AUTH),
    ):
        certificate = parsed(pair.certificate)
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert node_ids(certificate, "test") == frozenset(), (
            "a client called n1, at a host called n1, is not the node n1"
        )


def test_keys_are_for_their_owner_only(pki: Pki) -> None:
    pair = pki.node("n1")
    assert mode(pair.key) == mode(pki.ca.with_suffix(".key")) == 0o600
    assert mode(pki.authority.folder) == 0o700
    make_secret(pki.authority.folder / "token")
    assert mode(pki.authority.folder / "token") == 0o600


def test_the_authority_signs_nodes_and_no_authorities(pki: Pki) -> None:
    constraints = parsed(pki.ca).extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    node = parsed(pki.node("n1").certificate)
    assert not node.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    node.verify_directly_issued_by(parsed(pki.ca))


def test_nothing_outlives_its_authority(pki: Pki) -> None:
    certificate = parsed(pki.node("n1", days=100_000).certificate)
    assert certificate.not_valid_after_utc == parsed(pki.ca).not_valid_after_utc


def test_an_authority_is_opened_again(pki: Pki) -> None:
    again = Authority.open(pki.authority.folder)
    assert again.cluster == "test"
    (file,) = again.issue([Wanted(kind=Kind.NODE, name="n9", hosts=("h",))])
    parsed(file).verify_directly_issued_by(parsed(pki.ca))


def test_nothing_is_written_over_unasked(pki: Pki) -> None:
    pair = pki.node("n1")
    before = pair.key.read_bytes(), pair.certificate.read_bytes()
    wanted = [Wanted(kind=Kind.NODE, name=name, hosts=("h",)) for name in ("n2", "n1")]
    with pytest.raises(CertificateTrouble, match=r"n1\.pem.*n1\.key.*nothing was made"):
        pki.authority.issue(wanted)
    assert (pair.key.read_bytes(), pair.certificate.read_bytes()) == before
    assert not (pki.authority.folder / "n2.pem").exists()
    pki.authority.issue(wanted, renew=True)
    assert pair.key.read_bytes() != before[0]
    assert mode(pair.key) == 0o600
    with pytest.raises(CertificateTrouble, match="already"):
        Authority.make(pki.authority.folder, "test")
    token = pki.authority.folder / "token"
    assert make_secret(token)
    first = token.read_text()
    assert not make_secret(token)
    assert token.read_text() == first
    assert not list(pki.authority.folder.glob(".*")), "drafts are cleared away"


@pytest.mark.parametrize(
    ("name", "hosts"), [("N1", ("h",)), ("", ("h",)), ("../n1", ("h",)), ("n1", ()), ("n1", ("a b",)), ("n1", ("a/b",))]
)
def test_names_and_hosts_are_checked(name: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(CertificateTrouble):
        Wanted(kind=Kind.NODE, name=name, hosts=hosts)


def test_one_name_is_given_once(pki: Pki) -> None:
    for names in (("n1", "n1"), ("ca",)):
        with pytest.raises(CertificateTrouble, match="a name of its own"):
            pki.authority.issue([Wanted(kind=Kind.NODE, name=name, hosts=("h",)) for name in names])


def test_an_expired_or_foreign_authority_makes_nothing(tmp_path: Path) -> None:
    Authority.make(tmp_path / "old", "test", days=1, now=long_ago())
    with pytest.raises(CertificateTrouble, match="expired on"):
        Authority.open(tmp_path / "old")
    with pytest.raises(CertificateTrouble, match="cannot be read"):
        Authority.open(tmp_path / "none")
    with pytest.raises(CertificateTrouble, match="names no cluster"):
        Authority.make(tmp_path / "new", "No Cluster")


# ------------------------------------------------------------------------------------------------ the command


def run(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    assert main(["certs", *map(str, words)]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


def test_the_command_makes_a_cluster_and_says_what_to_put_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "tls"
    said = run(capsys, folder, "--cluster", "shop", "--node", "n1=10.0.0.1,host1", "--node", "n2=host2")
    for part in ("ca.key", 'certificate = "n1.pem"', 'token_file = "token"', "--ca ca.pem"):
        assert part in said
    for name in ("token", "secret"):
        assert (folder / name).read_text().strip() not in said
    made = {path.name for path in folder.iterdir()}
    assert made == {"ca.pem", "ca.key", "n1.pem", "n1.key", "n2.pem", "n2.key", "token", "secret"}
    answer = json.loads(run(capsys, folder, "--add-node", "n3=host3", "--client", "ann", "--json"))
    assert answer["cluster"] == "shop"
    assert [Path(each["certificate"]).name for each in answer["certificates"]] == ["n3.pem", "client-ann.pem"]
    said = run(capsys, folder, "--participant", "stock=s.example", "--client", "bob", "--days", 7)
    assert "participant-stock.pem" in said
    assert (folder / "participant-token").exists()
    assert "client_ca" in said
    left = parsed(folder / "client-bob.pem").not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=6) < left <= timedelta(days=7)
    assert "in place of" in run(capsys, folder, "--node", "n1=host1", "--renew")


def test_the_command_explains_what_it_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    for words, says in (
        ([], "say for whom"),
        (["--node", "n1=h"], "holds no authority"),
        (["--cluster", "shop", "--add-node", "n1=h"], "holds no authority"),
        (["--cluster", "shop", "--node", "n1"], "say where n1 is reached"),
    ):
        assert says in run(capsys, folder, *words, status=1)
        assert not folder.exists()
    run(capsys, folder, "--cluster", "shop", "--node", "n1=h")
    assert "would be written over" in run(capsys, folder, "--node", "n1=h", status=1)
    assert "of cluster shop, not other" in run(capsys, folder, "--cluster", "other", "--node", "n2=h", status=1)
    (tmp_path / "file").write_text("")
    assert "outlast: " in run(capsys, tmp_path / "file", "--cluster", "shop", "--node", "n1=h", status=1)


# ------------------------------------------------------------------------------------------------ who is who


def by_hand(cluster_names: list[x509.GeneralName] | None, *, common: str = "n1") -> x509.Certificate:
    """A certificate as somebody's own tools would make it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if cluster_names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(cluster_names), critical=False)
    return builder.sign(key, hashes.SHA256())


def test_certificates_of_other_tools_name_nodes_by_dns_name_or_else_common_name() -> None:
    assert node_ids(by_hand(None), "test") == {"n1"}
    assert node_ids(by_hand([x509.DNSName("n2")]), "test") == {"n2"}, "the common name counts only without others"
    assert node_ids(by_hand([x509.UniformResourceIdentifier("urn:other:n1")]), "test") == frozenset()
    assert not covers_host(by_hand(None, common="host1"), "host1")


@pytest.mark.parametrize(
    ("name", "host", "covers"),
    [
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", False),
        ("*.example.com", "example.com", False),
        ("*", "host", False),
        ("host", "host", True),
    ],
)
def test_wildcards_stand_for_one_label(name: str, host: str, covers: bool) -> None:
    assert covers_host(by_hand([x509.DNSName(name)]), host) is covers


def test_bytes_that_are_no_certificate_name_nobody() -> None:
    assert identifier("test")(b"") == identifier("test")(os.urandom(300)) == frozenset()


# ------------------------------------------------------------------------------------------------ what a node refuses


@pytest.fixture
def good(pki: Pki) -> NodeConfig:
    return pki.cluster("n1", "n2", "n3")[0]


def with_files(config: NodeConfig, **changed: Any) -> NodeConfig:
    assert config.tls is not None
    return replace(config, tls=replace(config.tls, **changed))


def test_good_files_are_opened(pki: Pki, good: NodeConfig) -> None:
    tls = Tls.load(good)
    assert tls.raft_server is not None
    assert tls.raft_client is not None
    assert tls.api_server is not None
    assert tls.raft_server.verify_mode is tls.raft_client.verify_mode is ssl.CERT_REQUIRED
    assert tls.api_server.verify_mode is ssl.CERT_NONE
    assert {tls.raft_server.minimum_version, tls.api_server.minimum_version} == {ssl.TLSVersion.TLSv1_2}
    assert tls.participants is None
    asks = Tls.load(with_files(good, client_ca=pki.ca))
    assert asks.api_server is not None
    assert asks.api_server.verify_mode is ssl.CERT_OPTIONAL
    plain = Tls.load(configs()[0])
    assert (plain.raft_server, plain.api_server, plain.api_client) == (None, None, None)


def refusal(config: NodeConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        Tls.load(config)
    return str(caught.value)


def test_files_that_are_missing_or_something_else(tmp_path: Path, good: NodeConfig) -> None:
    nothing, something = tmp_path / "none.pem", tmp_path / "some.pem"
    something.write_text("something else")
    something.chmod(0o600)
    for setting in ("ca", "certificate", "key", "client_ca"):
        for path, says in ((nothing, "cannot be read"), (something, "in PEM form")):
            said = refusal(with_files(good, **{setting: path}))
            assert said.startswith(f"tls.{setting}: {path}")
            assert says in said


def test_a_key_that_everybody_can_read(good: NodeConfig) -> None:
    assert good.tls is not None
    for bits in (0o604, 0o602, 0o644):
        good.tls.key.chmod(bits)
        said = refusal(good)
        assert said.startswith("tls.key: ")
        assert f"chmod 600 {good.tls.key}" in said
    good.tls.key.chmod(0o640)
    Tls.load(good)


def test_a_key_of_another_certificate(pki: Pki, good: NodeConfig) -> None:
    assert "does not belong to the certificate in" in refusal(with_files(good, key=pki.node("n7").key))


def test_a_key_that_is_encrypted_is_not_asked_for(good: NodeConfig) -> None:
    assert good.tls is not None
    key = load_pem_private_key(good.tls.key.read_bytes(), password=None)
    good.tls.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    assert "is encrypted" in refusal(good)


def test_dates(pki: Pki, good: NodeConfig, caplog: pytest.LogCaptureFixture) -> None:
    old = pki.node("n1", now=long_ago(), days=10)
    said = refusal(with_files(good, certificate=old.certificate, key=old.key))
    assert "tls.certificate: " in said
    assert f"expired on {long_ago() + timedelta(days=10):%Y-%m-%d}" in said
    early = pki.node("n1", now=datetime.now(UTC) + timedelta(days=2))
    assert "clock" in refusal(with_files(good, certificate=early.certificate, key=early.key))
    caplog.clear()
    soon = pki.node("n1", days=10)
    Tls.load(with_files(good, certificate=soon.certificate, key=soon.key))
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"expires on {datetime.now(UTC) + timedelta(days=10):%Y-%m-%d}" in line.getMessage()


def test_an_authority_that_has_expired(tmp_path: Path, good: NodeConfig) -> None:
    authority = Authority.make(tmp_path / "old", "test", days=1, now=long_ago())
    assert "tls.ca: " in (said := refusal(with_files(good, ca=authority.file)))
    assert "expired" in said


def test_a_certificate_of_another_authority(tmp_path: Path, good: NodeConfig) -> None:
    other = Pki(tmp_path / "other")
    assert "was not issued by" in refusal(with_files(good, ca=other.ca))
    both = tmp_path / "both.pem"
    assert good.tls is not None
    both.write_bytes(other.ca.read_bytes() + good.tls.ca.read_bytes())
    Tls.load(with_files(good, ca=both))


def test_a_certificate_that_is_not_for_this_node(pki: Pki, good: NodeConfig) -> None:
    other, client = pki.node("n2"), pki.client("n1")
    said = refusal(with_files(good, certificate=other.certificate, key=other.key))
    assert "is not for node n1 of cluster test (it names n2)" in said
    assert "URI:urn:outlast:test:node:n1" in said
    said = refusal(with_files(good, certificate=client.certificate, key=client.key))
    assert "names no node of it" in said
    assert "is not for node n1 of cluster shop" in refusal(replace(good, cluster="shop"))


def test_a_certificate_that_is_not_for_this_address(pki: Pki, good: NodeConfig) -> None:
    elsewhere = pki.node("n1", "10.0.0.1")
    said = refusal(with_files(good, certificate=elsewhere.certificate, key=elsewhere.key))
    assert "is not for 127.0.0.1, where the API listens" in said


def test_clients_may_be_shown_another_certificate(tmp_path: Path, pki: Pki, good: NodeConfig) -> None:
    public = Pki(tmp_path / "public")
    pair = public.participant("api")
    shown = {"api_certificate": pair.certificate, "api_key": pair.key}
    Tls.load(with_files(good, **shown, api_ca=public.ca))
    Tls.load(with_files(good, **shown))  # issued by somebody whom the system trusts, one hopes
    assert "tls.api_certificate: " in refusal(with_files(good, **shown, api_ca=pki.ca))
    assert "tls.api_key: " in refusal(with_files(good, **shown | {"api_key": pki.node("n2").key}))
    with pytest.raises(ConfigError, match="go together"):
        with_files(good, api_certificate=pair.certificate)


def test_what_is_shown_to_participants_is_checked_too(tmp_path: Path, pki: Pki, good: NodeConfig) -> None:
    client = pki.client("nodes")
    files = ParticipantFiles(ca=pki.ca, certificate=client.certificate, key=client.key)
    assert Tls.load(replace(good, participants=files)).participants is not None
    assert "participants.key: " in refusal(replace(good, participants=replace(files, key=tmp_path / "none")))
    assert "participants.ca: " in refusal(replace(good, participants=replace(files, ca=tmp_path / "none")))
    with pytest.raises(ConfigError, match="go together"):
        replace(files, key=None)


# ------------------------------------------------------------------------------------------------ settings


def node_toml(*, top: str = "", tls: str = "", api: str = "127.0.0.1:7001", raft: str = "127.0.0.1:8001") -> str:
    secret = "" if "secret" in top else 'secret = "0123456789abcdef"'
    return f"""
cluster = "test"
node = "n1"
data = "data"
{secret}
{top}
{tls}
[[nodes]]
id = "n1"
api = "{api}"
raft = "{raft}"
"""


FILES = '[tls]\nca = "ca.pem"\ncertificate = "n1.pem"\nkey = "n1.key"\n'


def load(tmp_path: Path, **parts: str) -> NodeConfig:
    path = tmp_path / "node.toml"
    path.write_text(node_toml(**parts))
    return NodeConfig.load(path)


def keep(path: Path, text: str, bits: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(bits)


def test_files_count_from_the_settings_folder_and_urls_become_https(tmp_path: Path) -> None:
    config = load(tmp_path, tls=FILES)
    assert config.tls == TlsFiles(ca=tmp_path / "ca.pem", certificate=tmp_path / "n1.pem", key=tmp_path / "n1.key")
    assert config.tls.trusted == tmp_path / "ca.pem"
    assert config.me.url == "https://127.0.0.1:7001"
    assert load(tmp_path).me.url == "http://127.0.0.1:7001"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"tls": '[tls]\nca = "ca.pem"'}, "tls lacks certificate, key"),
        ({"tls": FILES + 'cert = "x"'}, "tls has no setting 'cert'"),
        ({"tls": FILES + "api_ca = 5"}, "api_ca in tls must name a file"),
        ({"tls": FILES + 'api_key = "x"'}, "go together"),
        ({"tls": FILES + 'client_ca = "x"'}, "client_ca needs a token"),
        ({"top": "tls = 5"}, "tls must be a table"),
        ({"tls": "[participants]\nurl = 'x'"}, "participants has no setting 'url'"),
        ({"top": 'token_file = ""'}, "token_file must name a file"),
        ({"top": 'token_file = "none"'}, "cannot be read"),
        ({"top": 'token = "0123456789abcdef"\ntoken_file = "x"'}, "not both"),
        ({"top": 'older_tokens = ["x"]'}, "no setting 'older_tokens'"),
        ({"top": 'token = "0123456789 abcdef"'}, "printable ASCII without spaces"),
        ({"api": "10.0.0.1:7001"}, "10.0.0.1:7001 is not on loopback"),
        ({"raft": "10.0.0.1:8001"}, "outlast certs DIR --cluster test --node n1=10.0.0.1"),
        ({"api": "0.0.0.0:7001", "tls": FILES}, "the API needs a token"),
        ({"api": "10.0.0.1:7001", "top": f'token = "{TOKEN}"'}, "nodes speak TLS only"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, parts: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **parts)
    assert says in str(caught.value)


def test_beyond_loopback_with_tls_and_a_token(tmp_path: Path) -> None:
    load(tmp_path, raft="10.0.0.1:8001", tls=FILES)
    keep(tmp_path / "token", TOKEN)
    config = load(tmp_path, api="10.0.0.1:7001", raft="10.0.0.1:8001", top='token_file = "token"', tls=FILES)
    assert config.token == TOKEN


def test_secrets_from_files_are_never_shown(tmp_path: Path) -> None:
    secret, older, participant = "s" * 20, "o" * 20, "p" * 20
    keep(tmp_path / "token", f"{TOKEN}\n\n{older}\n")
    keep(tmp_path / "secret", f" {secret}\n")
    keep(tmp_path / "participant", participant, 0o640)
    top = 'token_file = "token"\nsecret_file = "secret"\nparticipant_token_file = "participant"'
    config = load(tmp_path, top=top)
    assert (config.token, config.older_tokens, config.secret) == (TOKEN, (older,), secret)
    assert (config.participant_token, config.token_file) == (participant, tmp_path / "token")
    assert not any(text in repr(config) for text in (TOKEN, older, secret, participant))
    for text in ("short", "two words of a token", "too much of\na secret", "t\u00f6ken-of-sixteen", "\n"):
        keep(tmp_path / "secret", text)
        keep(tmp_path / "token", text)
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, top=top)
        assert text.strip() == "" or text not in str(caught.value)
        assert caught.value.__cause__ is None or text not in repr(caught.value.__cause__.__cause__)
    keep(tmp_path / "secret", secret, 0o644)
    keep(tmp_path / "token", TOKEN)
    with pytest.raises(ConfigError, match=r"secret_file: .*chmod 600"):
        load(tmp_path, top=top)


# ------------------------------------------------------------------------------------------------ participants


def test_a_participants_files_are_checked(tmp_path: Path, pki: Pki) -> None:
    pair = pki.participant("stock")
    good = ServerSettings(certificate=pair.certificate, key=pair.key)
    assert server_context(good) is not None
    assert server_context(ServerSettings()) is None
    assert coordinator_context(ServerSettings()) is True
    junk = tmp_path / "junk"
    keep(junk, "junk")
    expired = pki.participant("old", now=long_ago(), days=10)
    for changed, says in (
        ({"certificate": tmp_path / "none"}, "certificate: .* cannot be read"),
        ({"certificate": junk}, "certificate: .* no certificate"),
        ({"certificate": expired.certificate, "key": expired.key}, "valid from .* not now"),
        ({"key": tmp_path / "none"}, "key: .* cannot be read"),
        ({"key": junk}, "key: .* does not fit"),
        ({"key": pki.node("n1").key}, "key: .* does not fit"),
        ({"client_ca": junk, "caller_token": TOKEN}, "client_ca: .* cannot be used"),
    ):
        with pytest.raises(SettingsError, match=says):
            server_context(replace(good, **changed))
    with pytest.raises(SettingsError, match=r"coordinator_ca: .* cannot be used"):
        coordinator_context(ServerSettings(coordinator_ca=junk))
    pair.key.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        server_context(good)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"certificate": Path("x")}, "go together"),
        ({"client_ca": Path("x")}, "client_ca needs"),
        ({"older_caller_tokens": ("x",)}, "need a caller_token"),
        ({"coordinator_token": "t", "coordinators": ("http://10.0.0.1:1",)}, "in plain text"),
        ({"coordinator_token": "t", "coordinators": ("http://n1:1",)}, "in plain text"),
    ],
)
def test_a_participants_settings_keep_their_secrets(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        ServerSettings(**settings)


def test_a_participants_token_may_go_where_nobody_listens() -> None:
    ServerSettings(coordinator_token="t", coordinators=("http://127.0.0.1:1", "http://localhost:1", "https://n1:1"))
    ServerSettings(coordinators=("http://10.0.0.1:1",))
