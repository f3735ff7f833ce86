"""A certificate authority in a folder, for people who have none: one cluster's own, and good for nothing else.

```
DIR/ca.pem, ca.key                      the authority; the key stays here, and goes to no node
DIR/n1.pem, n1.key                      a node: both ends of the connections between nodes, and the API
DIR/client-NAME.pem, .key               a client that shows it instead of a token
DIR/participant-NAME.pem, .key          a participant's server
DIR/token, secret, participant-token    what clients show to nodes, what nodes share, and what nodes show to
                                        participants; random, for `token_file` and the like
```

Every certificate says in a URI what it is for (`coordinator.tls.urn`), and its extended key usage agrees: no client can
show a participant's, and no node a client's. Keys are P-256, files of keys have mode 0600, and nothing that is there is
written over unless that was asked for.
"""

import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.config import MAX_NAME, ConfigError, valid_name
from coordinator.protocol.messages import MAX_CLUSTER_NAME
from coordinator.tls import check_dates, check_key, read_certificates, urn

CA_DAYS: Final = 3650
DAYS: Final = 825
"""How long a certificate is good for unless told otherwise. Some clients refuse more."""

_EARLIER: Final = timedelta(hours=1)
"""Certificates are valid from a little before they are made: clocks differ."""


class CertificateTrouble(Exception):
    """No certificate was made. The text says why, and what to do."""


class Kind(Enum):
    """What a certificate is for."""

    NODE = "node"
    CLIENT = "client"
    PARTICIPANT = "participant"

    @property
    def usage(self) -> x509.ExtendedKeyUsage:
        """As which end of a connection it may be shown. A node is both."""
        server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
        return x509.ExtendedKeyUsage(
            {Kind.NODE: [server, client], Kind.CLIENT: [client], Kind.PARTICIPANT: [server]}[self]
        )

    def file(self, name: str) -> str:
        """Its files' name, without `.pem` and `.key`."""
        return name if self is Kind.NODE else f"{self.value}-{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A certificate to be made. `hosts`: names and addresses at which its holder is reached."""

    kind: Kind
    name: str
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not valid_name(self.name):
            raise CertificateTrouble(
                f"{self.name!r} is no name: a letter, then lower-case letters, digits, hyphens; at most {MAX_NAME}"
            )
        if self.kind is not Kind.CLIENT and not self.hosts:
            raise CertificateTrouble(f"say where {self.name} is reached: {self.name}=host,address")
        for host in self.hosts:
            _host(host)


class Authority:
    """The authority in a folder, opened or made."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.folder = folder
        self._certificate = certificate
        self._key = key

    @property
    def cluster(self) -> str:
        """Whose authority it is."""
        (organization,) = self._certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        return str(organization.value)

    @property
    def file(self) -> Path:
        """The certificate that everybody is to trust."""
        return self.folder / "ca.pem"

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether the folder holds one, or part of one."""
        return (folder / "ca.pem").exists() or (folder / "ca.key").exists()

    @staticmethod
    def make(folder: Path, cluster: str, *, days: int = CA_DAYS, now: datetime | None = None) -> "Authority":
        """A new one. Raises `CertificateTrouble`, also when there is one already."""
        if not valid_name(cluster) or len(cluster) > MAX_CLUSTER_NAME:
            raise CertificateTrouble(
                f"{cluster!r} names no cluster: lower-case letters, digits, inner hyphens; at most {MAX_CLUSTER_NAME}"
            )
        if Authority.there(folder):
            raise CertificateTrouble(f"{folder} holds an authority already, and it was left alone")
        now = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        # The random part keeps two authorities of one name apart, for people who look at certificates.
        common = f"outlast {cluster} {secrets.token_hex(4)}"
        name = x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster), x509.NameAttribute(NameOID.COMMON_NAME, common)]
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLIER)
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(folder, "ca", certificate, key, renew=False)
        return Authority(folder, certificate, key)

    @staticmethod
    def open(folder: Path, *, now: datetime | None = None) -> "Authority":
        """The one that is there. Raises `CertificateTrouble`, also when it has expired."""
        try:
            certificate, *_ = read_certificates(folder / "ca.pem", "the authority")
            check_dates(certificate, folder / "ca.pem", "the authority", now or datetime.now(UTC))
            check_key(certificate, folder / "ca.key", "the authority's key", folder / "ca.pem")
        except ConfigError as error:
            raise CertificateTrouble(str(error)) from error
        key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not _is_ours(certificate):
            raise CertificateTrouble(f"{folder}/ca.pem was not made by `outlast certs`; use another folder")
        return Authority(folder, certificate, key)

    def issue(
        self, wanted: Sequence[Wanted], *, days: int = DAYS, renew: bool = False, now: datetime | None = None
    ) -> list[Path]:
        """Make certificates and keys; the files of the certificates. All or, when one is in the way, none.

        renew: replace what is there. Raises `CertificateTrouble`.
        """
        check_room(self.folder, wanted, renew=renew)
        made = []
        for each in wanted:
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._sign(each, key.public_key(), days, now or datetime.now(UTC))
            made.append(_write(self.folder, each.kind.file(each.name), certificate, key, renew=renew))
        return made

    def _sign(
        self, wanted: Wanted, public_key: ec.EllipticCurvePublicKey, days: int, now: datetime
    ) -> x509.Certificate:
        purpose = x509.UniformResourceIdentifier(urn(self.cluster, wanted.kind.value, wanted.name))
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.cluster),
                x509.NameAttribute(NameOID.COMMON_NAME, wanted.name),
            ]
        )
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLIER)
            .not_valid_after(min(now + timedelta(days=days), self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(wanted.kind.usage, critical=False)
            .add_extension(
                x509.SubjectAlternativeName([purpose, *(_host(host) for host in wanted.hosts)]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def check_room(folder: Path, wanted: Sequence[Wanted], *, renew: bool) -> None:
    """Raise `CertificateTrouble` when two certificates want one name, or files that are there would be written over."""
    names = [each.kind.file(each.name) for each in wanted]
    if len(set(names)) != len(names) or "ca" in names:
        raise CertificateTrouble("every certificate needs a name of its own, and none may be called ca")
    there = [path for name in names for path in _files(folder, name) if path.exists()]
    if there and not renew:
        listed = ", ".join(map(str, there))
        raise CertificateTrouble(f"{listed} would be written over; nothing was made. --renew replaces them")


def make_secret(path: Path) -> bool:
    """A random text in a file of its own; False: there was one, and it stays. Raises `CertificateTrouble`."""
    if path.exists():
        return False
    _write_file(path, f"{secrets.token_urlsafe(32)}\n".encode(), 0o600, renew=False)
    return True


# ------------------------------------------------------------------------------------------------ parts


def _is_ours(certificate: x509.Certificate) -> bool:
    """Whether it holds what is asked of an authority's certificate later."""
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return len(certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)) == 1
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return False


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    plain = host.removeprefix("*.").replace("-", "").replace(".", "").replace("_", "")
    if not plain.isalnum() or not host.isascii() or len(host) > 253:
        raise CertificateTrouble(f"{host!r} is neither a host name nor an address") from None
    return x509.DNSName(host.lower())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.pem", folder / f"{name}.key"


def _write(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, *, renew: bool
) -> Path:
    public, private = _files(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CertificateTrouble(f"{folder} cannot be made: {error.strerror}") from error
    _write_file(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600, renew=renew)
    _write_file(public, certificate.public_bytes(Encoding.PEM), 0o644, renew=renew)
    return public


def _write_file(path: Path, content: bytes, mode: int, *, renew: bool) -> None:
    """A whole file or none; without `renew` one that was not there.

    Its mode is right from its first moment: a key is never readable for others, not even briefly.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            if renew:
                draft.replace(path)
            else:
                os.link(draft, path)  # unlike a rename this fails when somebody was faster
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise CertificateTrouble(f"{path} cannot be written: {error.strerror}") from error
