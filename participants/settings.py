"""How a participant's server behaves: every limit has a name here, and the relations between them are asserted."""

import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


class SettingsError(ValueError):
    """A setting that cannot work. The text names it, and says what would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of `participants.server`.

    Who may talk to whom:
    coordinators: base URLs of the nodes that are asked for outcomes, in turn. Nobody else is ever believed.
    caller_token: the bearer token that callers must show; None on loopback only.
    older_caller_tokens: accepted too, so that callers can be given a new one.
    coordinator_token: the bearer token shown to coordinators; beyond loopback only to those whose URL is https.

    TLS, files in PEM form (see `participants.tls`):
    certificate, key: what the server shows; both or none, and none on loopback only.
    client_ca: a caller that shows a certificate of this issuer need not show the token.
    coordinator_ca: who issues the coordinators' certificates; None: the issuers that the system trusts.

    Time, in seconds:
    answer_within_s: work that takes longer is answered `Pending`, and goes on.
    stragglers_within_s: once one message of a batch is answered, the others have so long, or as long again as it took.
    in_doubt_after_s: how long a prepared branch waits for its decision before it asks.
    ask_backoff_s, ask_backoff_cap_s: between two questions about one branch, doubling, jittered downwards by half.
    sweep_every_s: between two looks at what the manager has prepared, also by others or before anybody remembers.
    ask_within_s: of one question to one coordinator.
    first_request_within_s: who connects must have sent the head of a request by then, or is cut off.
    idle_within_s: a connection on which no other request comes is closed then; nodes let go of theirs after 30.
    body_within_s: a caller must have sent its body by then.
    stop_within_s: a stop waits so long for open requests; a batch that runs is always finished.

    Limits:
    connections_limit: of callers; one more is told 503, and closed. A node has at most about a hundred.
    body_limit_bytes, batch_items_limit: of one request.
    working_limit: prepares that run or wait; above it a prepare is answered `Pending`.
    waiting_limit: messages of any kind that run or wait; above it commits and aborts are answered `Pending`.
    asks_at_once: questions to coordinators that are open together.
    branches_limit: branches shown by `GET /branches`.
    """

    coordinators: tuple[str, ...] = ()
    caller_token: str | None = field(default=None, repr=False)
    older_caller_tokens: tuple[str, ...] = field(default=(), repr=False)
    coordinator_token: str | None = field(default=None, repr=False)

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    coordinator_ca: Path | None = None

    answer_within_s: float = 1.0
    stragglers_within_s: float = 0.01
    in_doubt_after_s: float = 2.0
    ask_backoff_s: float = 0.1
    ask_backoff_cap_s: float = 2.0
    sweep_every_s: float = 5.0
    ask_within_s: float = 1.0
    first_request_within_s: float = 10.0
    idle_within_s: float = 75.0
    body_within_s: float = 10.0
    stop_within_s: float = 5.0

    connections_limit: int = 512
    body_limit_bytes: int = 32 * 1024 * 1024
    batch_items_limit: int = 1024
    working_limit: int = 2048
    waiting_limit: int = 8192
    asks_at_once: int = 32
    branches_limit: int = 10_000

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not (0 < value < math.inf):
                raise SettingsError(f"{name} must be positive, not {value}")
        if self.ask_backoff_s > self.ask_backoff_cap_s:
            raise SettingsError("ask_backoff_s must not be above ask_backoff_cap_s")
        if self.working_limit > self.waiting_limit:
            raise SettingsError("working_limit must not be above waiting_limit: room is kept for commits and aborts")
        if self.batch_items_limit > self.waiting_limit:
            raise SettingsError("batch_items_limit must not be above waiting_limit: one batch must fit")
        if (self.certificate is None) != (self.key is None):
            raise SettingsError("certificate and key go together")
        if self.client_ca is not None and (self.certificate is None or self.caller_token is None):
            raise SettingsError(
                "client_ca needs a certificate, a key and a caller_token: without them nobody is kept out"
            )
        if self.older_caller_tokens and self.caller_token is None:
            raise SettingsError("older_caller_tokens need a caller_token")
        for token in (self.caller_token, self.coordinator_token, *self.older_caller_tokens):
            if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
                raise SettingsError("a token must be printable ASCII without spaces")
        for url in self.coordinators:
            try:
                parts = urlsplit(url)
                known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # half a pair of brackets, or a port that is none
                known = False
            if not known or parts.query or parts.fragment:
                raise SettingsError(f"a coordinator must be an http URL such as http://127.0.0.1:7401, not {url!r}")
            in_the_clear = parts.scheme == "http" and not is_loopback(parts.hostname or "")
            if in_the_clear and self.coordinator_token is not None:
                raise SettingsError(f"coordinator_token must not go to {url} in plain text: use its https URL")


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
