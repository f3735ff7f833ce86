"""Settings of one node: frozen, every limit named, and the relations between them asserted where they are set.

A node reads them from a TOML file (`outlast node --config FILE`); `docs/CONFIGURATION.md` shows one. A wrong file is
refused as a whole, with the name of the setting that is wrong.

Certificates and keys are named here and not opened: `outlast down` must work although a certificate has expired.
`tls.py` opens them, when a node starts. Secrets and tokens may lie in files of their own, and those are read here.
"""

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypeGuard
from urllib.parse import urlsplit

from coordinator.levels import NEWEST
from coordinator.protocol.messages import MAX_CLUSTER_NAME

_NAME: Final = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?", re.ASCII)
MAX_NAME: Final = 64
"""Characters of a node's, participant's or branch's name."""


class ConfigError(ValueError):
    """A setting is missing, unknown, or makes no sense; the text names it."""


def valid_name(text: str) -> bool:
    """Whether `text` can name a node or participant: a letter, then letters, digits and inner hyphens, lower case."""
    return len(text) <= MAX_NAME and _NAME.fullmatch(text) is not None


def valid_url(url: str) -> bool:
    """Whether a participant can be registered at `url`: plain http(s), a host, no user, query or fragment."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and port != 0
        and not parts.query
        and not parts.fragment
        and parts.username is None
        and len(url) <= 1000
        and url.isascii()
        and url.isprintable()
        and " " not in url
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what a client, a participant or time can make a node hold.

    max_connections: of clients and other nodes with the API; one more is told 503, and closed.
    max_body_bytes: of an HTTP request.
    max_branches: of one transaction.
    max_payload_bytes: of one branch, as JSON text.
    max_timeout_s, default_timeout_s: what a client may ask for, and gets when it does not ask.
    max_in_flight: undecided transactions on the leader; above it 429.
    max_owed_per_participant: messages that one participant has not answered; above it new transactions naming that
        participant get 429. Keep it below max_in_flight, or one that is dead uses up what all share.
    max_participants: registered names.
    max_retained: transactions in the ledger, ended ones included; above it 429.
    retention_s: how long an ended transaction, and its idempotency key, are remembered; at least 900.
    max_key_length: characters of an idempotency key.
    max_page: transactions in one answer; max_scan: rows looked at to find them.
    max_answer_bytes: of a participant's answer to one message; a batch may have that times its length.
    max_batch: messages in one request to a participant.
    max_command_bytes: entries are put into one log command up to this size.
    compact_log_bytes: a snapshot takes the place of older log once so much has been logged since the last one.
    max_backups: copies of the ledger that a leader streams at once.
    max_restore_bytes: of a copy that is restored.
    """

    max_connections: int = 4_096
    max_body_bytes: int = 1 << 20
    max_branches: int = 32
    max_payload_bytes: int = 64 << 10
    max_timeout_s: float = 300.0
    default_timeout_s: float = 10.0
    max_in_flight: int = 10_000
    max_owed_per_participant: int = 5_000
    max_participants: int = 1_000
    max_retained: int = 2_000_000
    retention_s: float = 900.0
    max_key_length: int = 255
    max_page: int = 1_000
    max_scan: int = 20_000
    max_answer_bytes: int = 64 << 10
    max_batch: int = 256
    max_command_bytes: int = 2 << 20
    compact_log_bytes: int = 32 << 20
    max_backups: int = 2
    max_restore_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        _require_bounded(self, "limits")
        _require(self.default_timeout_s <= self.max_timeout_s, "limits.default_timeout_s exceeds max_timeout_s")
        _require(self.retention_s >= 900, "limits.retention_s must be at least 900: an idempotency key lives so long")
        _require(self.max_payload_bytes <= self.max_body_bytes, "limits.max_payload_bytes exceeds max_body_bytes")
        _require(self.max_body_bytes <= self.max_command_bytes, "limits.max_body_bytes exceeds max_command_bytes")
        for name in ("max_payload_bytes", "max_answer_bytes"):
            _require(
                self.max_branches * getattr(self, name) <= self.max_command_bytes,
                f"limits.max_branches times {name} exceeds max_command_bytes: such a transaction would not fit the log",
            )
        _require(self.max_in_flight <= self.max_retained, "limits.max_in_flight exceeds max_retained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations, in seconds.

    proposal_timeout_s: until an entry that was proposed counts as unknown; keeps "503 within 3 s".
    participant_timeout_s: until a request to a participant counts as unanswered.
    connect_timeout_s: until connecting to one counts as failed.
    backoff_min_s, backoff_max_s: between tries of a participant that does not answer; doubled each time, jittered.
    first_request_s: until who connects must have sent the head of a request, or is cut off.
    idle_s: until a connection is closed on which no other request comes.
    stop_grace_s: how long a stopping node waits for clients that wait for their decision.
    housekeeping_s: between looks at what may be forgotten.
    copy_stall_s: until a backup or restore on whose connection nothing moves is broken off.
    """

    proposal_timeout_s: float = 2.5
    participant_timeout_s: float = 5.0
    connect_timeout_s: float = 1.0
    backoff_min_s: float = 0.05
    backoff_max_s: float = 2.0
    first_request_s: float = 10.0
    idle_s: float = 75.0
    stop_grace_s: float = 5.0
    housekeeping_s: float = 5.0
    copy_stall_s: float = 30.0

    def __post_init__(self) -> None:
        _require_bounded(self, "timing")
        _require(self.backoff_min_s <= self.backoff_max_s, "timing.backoff_min_s exceeds backoff_max_s")
        _require(self.backoff_max_s <= 2.0, "timing.backoff_max_s must be at most 2: participants count on it")
        _require(self.proposal_timeout_s < 3.0, "timing.proposal_timeout_s must be below 3: clients count on it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compatibility:
    """`[compatibility]`: with the software that a cluster comes from.

    highest_level: this node says that it understands no more than this level, so the cluster does not rise above it,
        and nodes can go back to software of that level. A level that the cluster has reached is not taken back.
    """

    highest_level: int = NEWEST

    def __post_init__(self) -> None:
        _require(self.highest_level >= 1, "compatibility.highest_level must be at least 1")

    @property
    def announced(self) -> int:
        """What this node says that it understands."""
        return min(self.highest_level, NEWEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One node of the cluster. `api` and `raft` are host:port. `https`: its API is served over TLS."""

    id: str
    api: str
    raft: str
    https: bool = False

    def __post_init__(self) -> None:
        _require(valid_name(self.id), f"a node cannot be called {self.id!r}")
        for name in ("api", "raft"):
            split_address(getattr(self, name), f"{name} of node {self.id}")

    @property
    def url(self) -> str:
        """Where its API is."""
        return f"{'https' if self.https else 'http'}://{self.api}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """`[tls]`: the files, PEM, that make a node speak TLS to nodes and clients, and nothing else.

    ca: who issues the certificates of this cluster's nodes, and of nobody else.
    certificate, key: this node's; the certificate names the node, see `tls.node_ids`.
    api_certificate, api_key: shown to clients instead, both or none.
    api_ca: who issues what the other nodes show to clients; None: `ca`, or with `api_certificate` the system's.
    client_ca: whoever shows a certificate of this issuer need not show the token.
    """

    ca: Path
    certificate: Path
    key: Path
    api_certificate: Path | None = None
    api_key: Path | None = None
    api_ca: Path | None = None
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        _require(
            (self.api_certificate is None) == (self.api_key is None), "tls.api_certificate and tls.api_key go together"
        )

    @property
    def trusted(self) -> Path | None:
        """Who issues what nodes show to clients; None: the issuers that the system trusts."""
        return self.api_ca or (self.ca if self.api_certificate is None else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticipantFiles:
    """`[participants]`: how the node speaks TLS to participants whose URL is https.

    ca: who issues their certificates; None: the issuers that the system trusts.
    certificate, key: what this node shows to those that ask; both or none.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        _require(
            (self.certificate is None) == (self.key is None),
            "participants.certificate and participants.key go together",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """All that one node must be told.

    cluster: part of every gid; never give two clusters that share a participant the same name.
    node: this node's id, one of `nodes`.
    data: its folder.
    generation: how often the cluster was made anew from a copy, and once; nodes of another one are not let in.
    secret: shared by the nodes of the cluster; proves a peer before its first message is read.
    token: if set, every API request but the health checks must carry it as a bearer token.
    older_tokens: accepted too, and never sent: so that clients can be given a new token one after the other.
    token_file: where `token` was read from, if it was.
    participant_token: if set, sent to participants as a bearer token.
    tls: None is for loopback only.
    """

    cluster: str
    node: str
    data: Path
    nodes: tuple[Peer, ...]
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    older_tokens: tuple[str, ...] = field(default=(), repr=False)
    token_file: Path | None = None
    participant_token: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None
    participants: ParticipantFiles = field(default_factory=ParticipantFiles)
    generation: int = 1
    limits: Limits = field(default_factory=Limits)
    timing: Timing = field(default_factory=Timing)
    compatibility: Compatibility = field(default_factory=Compatibility)

    def __post_init__(self) -> None:
        _require(
            valid_name(self.cluster) and len(self.cluster) <= MAX_CLUSTER_NAME,
            f"cluster must be at most {MAX_CLUSTER_NAME} lower-case letters, digits and inner hyphens",
        )
        ids = [peer.id for peer in self.nodes]
        _require(len(set(ids)) == len(ids), "two nodes have one id")
        _require(self.node in ids, f"node {self.node!r} is not among nodes: {', '.join(ids)}")
        _require(len(ids) % 2 == 1, f"{len(ids)} nodes: an even number survives no more failures than one less")
        addresses = [address for peer in self.nodes for address in (peer.api, peer.raft)]
        _require(len(set(addresses)) == len(addresses), "two nodes, or two ports of one, share an address")
        _require(1 <= self.generation < 1_000_000, "generation must be a positive number")
        _require(len(self.secret) >= 16, "secret must have at least 16 characters")
        for name, value in (
            ("token", self.token),
            ("participant_token", self.participant_token),
            *(("token", older) for older in self.older_tokens),
        ):
            _require(value is None or len(value) >= 16, f"{name} must have at least 16 characters")
            _require(value is None or _is_token(value), f"{name} must be printable ASCII without spaces")
        _require(self.token is not None or not self.older_tokens, "older tokens need a newer one")
        https = self.tls is not None
        if any(peer.https != https for peer in self.nodes):
            object.__setattr__(self, "nodes", tuple(replace(peer, https=https) for peer in self.nodes))
        self._check_exposure()

    def _check_exposure(self) -> None:
        """Who can be reached from elsewhere must be hard to fool: no plain text, and nobody without a token."""
        for peer in self.nodes:
            for address in (peer.api, peer.raft):
                host, _ = split_address(address, "address")
                _require(
                    self.tls is not None or is_loopback(host),
                    f"{address} is not on loopback: beyond it nodes speak TLS only. Make certificates with "
                    f"`outlast certs DIR --cluster {self.cluster} --node {peer.id}={host} ...` "
                    "and name them: [tls] ca, certificate, key",
                )
        if self.token is None:
            _require(
                is_loopback(split_address(self.me.api, "api")[0]),
                f"{self.me.api} is not on loopback: beyond it the API needs a token. Put one into a file "
                "(`outlast certs` makes one) and name it: token_file",
            )
            _require(
                self.tls is None or self.tls.client_ca is None,
                "tls.client_ca needs a token too, because nodes pass requests on with it: set token_file",
            )

    @property
    def me(self) -> Peer:
        """This node's own row."""
        return self.peer(self.node)

    def peer(self, node: str) -> Peer:
        """The row of node `node`. Raises KeyError."""
        for peer in self.nodes:
            if peer.id == node:
                return peer
        raise KeyError(node)

    @staticmethod
    def load(path: Path) -> "NodeConfig":
        """Read a TOML file, and the files of secrets and tokens that it names. Raises `ConfigError`.

        Relative paths count from the file's folder.
        """
        try:
            plain = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # no TOML, no text, or a number of thousands of digits
            raise ConfigError(f"{path} is not TOML: {error}") from error
        try:
            return NodeConfig.of(plain, base=path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @staticmethod
    def of(plain: Mapping[str, Any], *, base: Path) -> "NodeConfig":
        """Settings from a parsed TOML file. Raises `ConfigError`."""
        values = dict(plain)
        peers = values.pop("nodes", None)
        if not isinstance(peers, list) or not peers:
            raise ConfigError("nodes must be a list of tables: [[nodes]] id = ..., api = ..., raft = ...")
        values["nodes"] = tuple(_build(Peer, item, "nodes") for item in peers)
        values["limits"] = _build(Limits, values.get("limits", {}), "limits")
        values["timing"] = _build(Timing, values.get("timing", {}), "timing")
        values["compatibility"] = _build(Compatibility, values.get("compatibility", {}), "compatibility")
        data = values.get("data")
        if not _is_path(data):
            raise ConfigError("data must name a folder")
        values["data"] = base / data
        if "tls" in values:
            values["tls"] = _build(TlsFiles, _paths(values["tls"], "tls", base), "tls")
        files = _paths(values.get("participants", {}), "participants", base)
        values["participants"] = _build(ParticipantFiles, files, "participants")
        older: list[str] = []
        if "token_file" in values:
            values["token"], *older = _read_beside(values, "token", base)
            values["token_file"] = base / values["token_file"]
        for name in ("secret", "participant_token"):
            if f"{name}_file" in values:
                lines = _read_beside(values, name, base)
                if len(lines) != 1:
                    raise ConfigError(f"{name}_file must hold one line, not {len(lines)}")
                values[name] = lines[0]
                del values[f"{name}_file"]
        config: NodeConfig = _build(NodeConfig, values, "the file")
        return replace(config, older_tokens=tuple(older))


def read_secret_lines(path: Path, what: str) -> list[str]:
    """The lines of a file of tokens, or of a secret; at least one. Raises `ConfigError`, which quotes none of it.

    what: the setting that names the file. A file that everybody can read keeps no secret, and is refused.
    """
    try:
        refuse_readable_by_all(path, what)
        text = path.read_text("ascii")
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{what}: {path} must hold printable ASCII") from None  # the cause holds the text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{what}: {path} is empty")
    return lines


def refuse_readable_by_all(path: Path, what: str) -> None:
    """Raise `ConfigError` when every user of this machine can read or change `path`; OSError when it is not there."""
    if path.stat().st_mode & 0o007:
        raise ConfigError(f"{what}: every user of this machine can read {path}; do `chmod 600 {path}`")


def split_address(address: str, what: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    known = colon and host and port.isascii() and port.isdigit() and len(port) <= 5
    if not known or not 0 < int(port) < 65536:
        raise ConfigError(f"{what} must be host:port, not {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether listening on `host` reaches this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_token(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _is_path(value: object) -> TypeGuard[str]:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    return value.encode(errors="ignore").decode() == value  # and no half characters


def _read_beside(values: Mapping[str, Any], name: str, base: Path) -> list[str]:
    """What the file named by `NAME_file` holds, where `NAME` itself must not be."""
    file = values[f"{name}_file"]
    if not _is_path(file):
        raise ConfigError(f"{name}_file must name a file")
    if name in values:
        raise ConfigError(f"give {name} or {name}_file, not both")
    return read_secret_lines(base / file, f"{name}_file")


def _paths(table: object, where: str, base: Path) -> dict[str, Path]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table")
    for name, value in table.items():
        if not _is_path(value):
            raise ConfigError(f"{name} in {where} must name a file")
    return {name: base / value for name, value in table.items()}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise)


_LONGEST_S: Final = 365 * 86_400
"""Of any duration: timers take no infinite ones."""
_MOST: Final = (1 << 63) - 1


def _require_bounded(section: Limits | Timing, where: str) -> None:
    for item in fields(section):
        value, most = getattr(section, item.name), _LONGEST_S if item.name.endswith("_s") else _MOST
        _require(value > 0, f"{where}.{item.name} must be positive")
        _require(value <= most, f"{where}.{item.name} must be at most {most}")


_SCALARS: Final = (str, int, float)


_NO_SETTINGS: Final = ("https", "older_tokens")
"""Fields that follow from other settings."""


def _build(kind: type, values: object, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table")
    known = {item.name: item for item in fields(kind) if item.name not in _NO_SETTINGS}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{where} has no setting {name!r}; there are {', '.join(known)}")
        wanted = known[name].type
        if wanted in _SCALARS or wanted == str | None:
            accepted = (int, float) if wanted is float else (wanted,) if wanted in _SCALARS else (str,)
            if type(value) not in accepted:
                raise ConfigError(f"{name} in {where} must be of type {accepted[-1].__name__}")
    missing = [
        item.name
        for item in known.values()
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return kind(**values)
