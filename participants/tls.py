"""TLS of a participant's server: its files, checked before anything listens, and the contexts made of them.

The coordinator has its own, larger version of this: participants share nothing with it but the vocabulary.
"""

import logging
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from participants.settings import ServerSettings, SettingsError

_log = logging.getLogger(__name__)

EXPIRES_SOON: Final = timedelta(days=30)
"""A certificate with less than this left is warned of at every start."""


def server_context(settings: ServerSettings, *, now: datetime | None = None) -> ssl.SSLContext | None:
    """What callers are shown and asked for; None: plain text. Raises `SettingsError` naming setting and file."""
    if settings.certificate is None or settings.key is None:
        return None
    _check(settings.certificate, "certificate", now or datetime.now(UTC))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Connections are kept, so resumption saves nothing; and what is not resumed is verified anew each time.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    _show(context, settings.certificate, settings.key)
    if settings.client_ca is not None:
        _trust(context, settings.client_ca, "client_ca")
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def coordinator_context(settings: ServerSettings) -> ssl.SSLContext | bool:
    """How coordinators are verified: by `coordinator_ca`, or True: by the system's issuers. Raises `SettingsError`."""
    if settings.coordinator_ca is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _trust(context, settings.coordinator_ca, "coordinator_ca")
    return context


def reload(context: ssl.SSLContext, settings: ServerSettings) -> None:
    """Show what the files hold now, on connections from now on. Raises `SettingsError`, and changes nothing then."""
    server_context(settings)
    assert settings.certificate is not None, "without files there is no context"
    assert settings.key is not None
    _show(context, settings.certificate, settings.key)
    if settings.client_ca is not None:
        _trust(context, settings.client_ca, "client_ca")


def _show(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        if key.stat().st_mode & 0o007:
            raise SettingsError(f"key: every user of this machine can read {key}; do `chmod 600 {key}`")
        key.read_bytes()
    except OSError as error:
        raise SettingsError(f"key: {key} cannot be read: {error.strerror}") from error
    try:
        # The password is not asked for at a terminal: a server has none.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except OSError as error:  # an SSLError is one; a key that is encrypted, or of another certificate
        raise SettingsError(f"key: {key} does not fit {certificate}, or is no key in the clear ({error})") from error


def _trust(context: ssl.SSLContext, ca: Path, what: str) -> None:
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise SettingsError(f"{what}: {ca} cannot be used: {error.strerror or error}") from error


def _check(path: Path, what: str, now: datetime) -> None:
    """Raise `SettingsError` unless `path` holds a certificate that is valid now; warn of its end."""
    try:
        certificate, *_ = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{what}: {path} cannot be read: {error.strerror}") from error
    except (ValueError, x509.InvalidVersion) as error:
        raise SettingsError(f"{what}: {path} holds no certificate in PEM form") from error
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begins <= now < ends:
        raise SettingsError(f"{what}: {path} is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d %H:%M} UTC, not now")
    if ends - now < EXPIRES_SOON:
        _log.warning("%s: %s expires on %s UTC; put a new one in its place", what, path, f"{ends:%Y-%m-%d %H:%M}")
