"""Certificates and keys: from files to what a node speaks TLS with, every mistake named before anything listens.

A node has up to four ways of speaking TLS, and each has its own idea of whom it trusts:

| with            | shows                               | wants to see                                              |
|-----------------|-------------------------------------|-----------------------------------------------------------|
| other nodes     | `tls.certificate`                   | a certificate of `tls.ca` that names a node of this cluster |
| its clients     | `tls.api_certificate` or the same   | nothing; or, if offered, a certificate of `tls.client_ca`   |
| the leader's API | nothing, but the token             | a certificate for its host name or address, of `tls.trusted` |
| participants    | `participants.certificate`, if any  | the same, of `participants.ca` or the system's issuers      |

Between nodes the host does not matter and the name does: `node_ids` says how a certificate names a node. Whoever may
sign for `tls.ca` can therefore make nodes; give it to nobody else, and use it for nothing else.
"""

import ipaddress
import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from coordinator.config import (
    ConfigError,
    NodeConfig,
    ParticipantFiles,
    TlsFiles,
    refuse_readable_by_all,
    split_address,
)

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

URN: Final = "urn:outlast:"
"""How `outlast certs` begins the name of what a certificate is for: `urn:outlast:CLUSTER:node:n1`."""

EXPIRES_SOON: Final = timedelta(days=30)
"""A certificate with less than this left is warned of at every start."""


# ------------------------------------------------------------------------------------------------ who is who


def urn(cluster: str, kind: str, name: str) -> str:
    """What a certificate made by `outlast certs` is for. kind: node, client or participant."""
    return f"{URN}{cluster}:{kind}:{name}"


_UNREADABLE: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""A certificate is taken apart when its parts are asked for, so each of these may come as late as that."""


def node_ids(certificate: x509.Certificate, cluster: str) -> frozenset[str]:
    """The nodes of `cluster` that a certificate names. Raises ValueError for one that cannot be read.

    One that says what it is for, by URIs that begin with `urn:outlast:`, names the nodes in them and no others: a
    client called n1 is not the node n1. Any other certificate names by its DNS names, or by its common name when it has
    no alternative names at all.
    """
    names = _alternative_names(certificate)
    if names is None:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return frozenset(str(each.value) for each in common)
    ours = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith(URN)]
    if ours:
        wanted = urn(cluster, "node", "")
        return frozenset(uri.removeprefix(wanted) for uri in ours if uri.startswith(wanted))
    return frozenset(names.get_values_for_type(x509.DNSName))


def identifier(cluster: str) -> Callable[[bytes], frozenset[str]]:
    """`node_ids` for a certificate as it comes over the wire (DER); what cannot be read names nobody."""

    def identify(der: bytes) -> frozenset[str]:
        try:
            return node_ids(x509.load_der_x509_certificate(der), cluster)
        except _UNREADABLE:
            return frozenset()

    return identify


def covers_host(certificate: x509.Certificate, host: str) -> bool:
    """Whether clients that look for `host`, a name or an address, will take this certificate for its.

    Raises ValueError for one that cannot be read.
    """
    names = _alternative_names(certificate)
    if names is None:
        return False
    try:
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    except ValueError:
        wanted = host.lower()
    for name in names.get_values_for_type(x509.DNSName):
        label, _, domain = name.lower().partition(".")
        if name.lower() == wanted or (label == "*" and domain == wanted.partition(".")[2] != ""):
            return True
    return False


def _alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    except _UNREADABLE as error:
        raise ValueError(f"its extensions cannot be read: {error}") from error


# ------------------------------------------------------------------------------------------------ reading files


def read_certificates(path: Path, what: str) -> list[x509.Certificate]:
    """The certificates in a PEM file, at least one. Raises `ConfigError` naming the setting `what` and the file."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error.strerror}") from error
    except _UNREADABLE as error:
        raise ConfigError(f"{what}: {path} holds no certificate in PEM form") from error


def check_key(certificate: x509.Certificate, key: Path, what: str, certificate_file: Path) -> None:
    """Raise `ConfigError` unless `key` holds the private key of `certificate`, in the clear, and not for everybody."""
    try:
        refuse_readable_by_all(key, what)
        raw = key.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what}: {key} cannot be read: {error.strerror}") from error
    try:
        loaded = load_pem_private_key(raw, password=None)
    except TypeError:
        raise ConfigError(f"{what}: {key} is encrypted, and nobody is there to type its password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{what}: {key} holds no private key in PEM form") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        public = certificate.public_key().public_bytes(*form)
    except _UNREADABLE as error:
        raise ConfigError(f"{what}: the certificate in {certificate_file} is for a key that cannot be read") from error
    if loaded.public_key().public_bytes(*form) != public:
        raise ConfigError(f"{what}: {key} does not belong to the certificate in {certificate_file}")


def check_dates(certificate: x509.Certificate, path: Path, what: str, now: datetime) -> None:
    """Raise `ConfigError` for a certificate that is not valid `now`; warn of one that will not be for long."""
    ends = certificate.not_valid_after_utc
    if ends <= now:
        raise ConfigError(f"{what}: {path} expired on {ends:%Y-%m-%d %H:%M} UTC; put a new one in its place")
    if certificate.not_valid_before_utc > now:
        begins = certificate.not_valid_before_utc
        raise ConfigError(
            f"{what}: {path} is valid from {begins:%Y-%m-%d %H:%M} UTC on; is this machine's clock right?"
        )
    if ends - now < EXPIRES_SOON:
        _log.warning("%s: %s expires on %s UTC; put a new one in its place", what, path, f"{ends:%Y-%m-%d %H:%M}")


def _check_issuer(chain: Sequence[x509.Certificate], issuers: Path, what: str, path: Path, issuers_what: str) -> None:
    """Raise `ConfigError` unless something in the file `path` was issued by something in `issuers`."""
    for authority in read_certificates(issuers, issuers_what):
        for certificate in chain:
            try:
                certificate.verify_directly_issued_by(authority)
            except (*_UNREADABLE, TypeError, InvalidSignature):
                continue
            return
    raise ConfigError(f"{what}: {path} was not issued by the authority in {issuers} ({issuers_what})")


def _check_authority(path: Path, what: str, now: datetime) -> None:
    certificates = read_certificates(path, what)
    # Of several, which is what a change of authority looks like, one must be good.
    newest = max(certificates, key=lambda each: each.not_valid_after_utc)
    check_dates(newest, path, what, now)


# ------------------------------------------------------------------------------------------------ contexts


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For a server that asks for no certificate. Raises `ConfigError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Connections are kept, so resumption saves nothing; and what is not resumed is verified anew each time.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    _show(context, certificate, key)
    return context


def client_context(ca: Path | None) -> ssl.SSLContext:
    """For a client that verifies host name and issuer: `ca`, or those that the system trusts. Raises `ConfigError`."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:  # an SSLError is one
        raise ConfigError(f"{ca} holds no certificate authority: {error.strerror or error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except OSError as error:  # an SSLError is one
        raise ConfigError(f"{ca} holds no certificate authority: {error.strerror or error}") from error


def _show(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        # The password is not asked for at a terminal: a server has none.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except OSError as error:
        raise ConfigError(f"{certificate} and {key} cannot be used: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What one node speaks TLS with, and None where it does not. `participants`: None is the system's issuers."""

    config: NodeConfig
    raft_server: ssl.SSLContext | None = None
    raft_client: ssl.SSLContext | None = None
    api_server: ssl.SSLContext | None = None
    api_client: ssl.SSLContext | None = None
    participants: ssl.SSLContext | None = None

    @staticmethod
    def load(config: NodeConfig, *, now: datetime | None = None) -> "Tls":
        """Open every file that the settings name. Raises `ConfigError` naming the setting, the file and the remedy."""
        now = now or datetime.now(UTC)
        participants = _participants(config.participants, now)
        files = config.tls
        if files is None:
            return Tls(config=config, participants=participants)
        _check(config, files, now)
        raft_server = server_context(files.certificate, files.key)
        _trust(raft_server, files.ca)
        raft_server.verify_mode = ssl.CERT_REQUIRED
        raft_client = client_context(files.ca)
        # Nodes are known by their ids, wherever they are: the transport checks `node_ids` instead.
        raft_client.check_hostname = False
        _show(raft_client, files.certificate, files.key)
        api_server = server_context(files.api_certificate or files.certificate, files.api_key or files.key)
        if files.client_ca is not None:
            _trust(api_server, files.client_ca)
            api_server.verify_mode = ssl.CERT_OPTIONAL
        return Tls(
            config=config,
            raft_server=raft_server,
            raft_client=raft_client,
            api_server=api_server,
            api_client=client_context(files.trusted),
            participants=participants,
        )

    def reload(self) -> None:
        """Show and trust what the files hold now, on connections from now on. Raises `ConfigError`; nothing is changed.

        Issuers are added, never taken away: that needs a restart.
        """
        Tls.load(self.config)
        files, ours = self.config.tls, self.config.participants
        if files is not None:
            for context in (self.raft_server, self.raft_client):
                assert context is not None, "with files there are contexts"
                _show(context, files.certificate, files.key)
                _trust(context, files.ca)
            assert self.api_server is not None
            assert self.api_client is not None
            _show(self.api_server, files.api_certificate or files.certificate, files.api_key or files.key)
            if files.client_ca is not None:
                _trust(self.api_server, files.client_ca)
            if files.trusted is not None:
                _trust(self.api_client, files.trusted)
        if self.participants is not None:
            if ours.ca is not None:
                _trust(self.participants, ours.ca)
            if ours.certificate is not None and ours.key is not None:
                _show(self.participants, ours.certificate, ours.key)


def _check(config: NodeConfig, files: TlsFiles, now: datetime) -> None:
    """Everything about `[tls]` that would otherwise come to light as a handshake that fails, somewhere, some day."""
    _check_authority(files.ca, "tls.ca", now)
    chain = read_certificates(files.certificate, "tls.certificate")
    check_dates(chain[0], files.certificate, "tls.certificate", now)
    check_key(chain[0], files.key, "tls.key", files.certificate)
    _check_issuer(chain, files.ca, "tls.certificate", files.certificate, "tls.ca")
    named = _named(node_ids, chain[0], config.cluster, "tls.certificate", files.certificate)
    if config.node not in named:
        raise ConfigError(
            f"tls.certificate: {files.certificate} is not for node {config.node} of cluster {config.cluster}"
            f" (it names {', '.join(sorted(named)) or 'no node of it'}); its subject alternative names must hold "
            f"URI:{urn(config.cluster, 'node', config.node)}, as `outlast certs` makes them, or DNS:{config.node}"
        )
    what, path = "tls.certificate", files.certificate
    if files.api_certificate is not None and files.api_key is not None:
        what, path = "tls.api_certificate", files.api_certificate
        chain = read_certificates(path, what)
        check_dates(chain[0], path, what, now)
        check_key(chain[0], files.api_key, "tls.api_key", path)
        if files.trusted is not None:
            _check_authority(files.trusted, "tls.api_ca", now)
            _check_issuer(chain, files.trusted, what, path, "tls.api_ca")
    host, _ = split_address(config.me.api, "api")
    if not _named(covers_host, chain[0], host, what, path):
        raise ConfigError(
            f"{what}: {path} is not for {host}, where the API listens: clients and the other nodes would not believe it"
        )
    if files.client_ca is not None:
        _check_authority(files.client_ca, "tls.client_ca", now)


def _named(
    look: Callable[[x509.Certificate, str], _T], certificate: x509.Certificate, about: str, what: str, path: Path
) -> _T:
    try:
        return look(certificate, about)
    except ValueError as error:
        raise ConfigError(f"{what}: {path} does not say whom it names: {error}") from error


def _participants(files: ParticipantFiles, now: datetime) -> ssl.SSLContext | None:
    if files == ParticipantFiles():
        return None
    if files.ca is not None:
        _check_authority(files.ca, "participants.ca", now)
    context = client_context(files.ca)
    if files.certificate is not None and files.key is not None:
        chain = read_certificates(files.certificate, "participants.certificate")
        check_dates(chain[0], files.certificate, "participants.certificate", now)
        check_key(chain[0], files.key, "participants.key", files.certificate)
        _show(context, files.certificate, files.key)
    return context
