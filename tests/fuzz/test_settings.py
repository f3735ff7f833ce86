"""Files that operators write: read, or refused with a text that says what is wrong."""

import json
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.layout import Row, Running, read_running
from cluster.process import Identity, ProcessTrouble
from coordinator.config import ConfigError, NodeConfig
from coordinator.levels import NEWEST
from participants.arguments import read_dsn, read_tokens
from participants.settings import ServerSettings, SettingsError
from tests.fuzz import HUNT, examples
from tests.fuzz.mutations import altered, as_json, damaged

TOML = b"""cluster = "shop"
node = "n2"
data = "state"
secret = "0123456789abcdef"
nodes = [
  { id = "n1", api = "127.0.0.1:7001", raft = "127.0.0.1:8001" },
  { id = "n2", api = "127.0.0.1:7002", raft = "127.0.0.1:8002" },
  { id = "n3", api = "127.0.0.1:7003", raft = "127.0.0.1:8003" },
]
[limits]
max_branches = 8
[timing]
backoff_min_s = 1
"""
FULL = {
    **tomllib.loads(TOML.decode()),
    "participant_token_file": "token",
    "generation": 2,
    "timing": {"backoff_min_s": 1, "idle_s": 75.0},
    "compatibility": {"highest_level": 2},
    "participants": {"ca": "ca.pem"},
    "tls": {"ca": "ca.pem", "certificate": "n2.pem", "key": "n2.key"},
}
DEEP = [TOML + b"\ndeep = " + b"[" * 2000, b"[" * 2000, b"a." * 2000, b"\xff", b""]
LONG_NUMBER = b"1" + b"0" * 5000
TOMLS = damaged(st.just(TOML)) | st.sampled_from(DEEP)
ROW = {"id": "n1", "url": "http://127.0.0.1:1", "pid": 1, "started": 5, "module": None, "arguments": ["a"]}
RUNNING = {
    "cluster": "m",
    "nodes": [ROW],
    "services": [{**ROW, "id": "stock"}],
    "owner": {"pid": 1, "started": 5},
    "down": False,
    "ca": None,
    "token_file": "token",
}
Load = Callable[[Path], NodeConfig]


def loads(content: bytes, load: Load = NodeConfig.load) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.toml"
        path.write_bytes(content)
        try:
            config = load(path)
        except ConfigError as error:
            assert str(path) in str(error)
            return
        check_sound(config)


def makes(plain: dict[str, Any], of: Callable[..., NodeConfig] = NodeConfig.of) -> None:
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder) / "token"
        token.write_text("t" * 20)
        token.chmod(0o600)
        try:
            config = of(plain, base=Path(folder))
        except ConfigError as error:
            assert str(error)
            return
        check_sound(config)


def check_sound(config: NodeConfig) -> None:
    """All is of its type, and can be counted with."""
    assert config.me.id == config.node
    assert 1 <= config.compatibility.announced <= NEWEST
    for section in (config.limits, config.timing):
        for name, value in asdict(section).items():
            assert type(value) in (int, float), name
            assert 0 < value < 2**63, name
    assert all(
        type(text) is str for text in (config.secret, config.cluster, config.node, *(p.api for p in config.nodes))
    )
    assert isinstance(config.data, Path)
    assert b"\0" not in str(config.data).encode(), "it can be looked for, at least"


@examples(60)
@given(TOMLS)
@example(TOML.replace(b"= 1\n", b"= " + LONG_NUMBER))
@example(TOML.replace(b"127.0.0.1:7002", b"127.0.0.1:" + LONG_NUMBER))
@example(TOML.replace(b'"state"', rb'"a\u0000b"'))
@example(TOML.replace(b"secret", b"secret_file").replace(b"0123", rb"\u0000"))
@example(TOML + b"idle_s = inf\n")
def test_a_damaged_configuration_is_refused_by_what_is_wrong(content: bytes) -> None:
    loads(content)


@examples(100)
@given(altered(st.just(FULL)))
@example({**FULL, "participant_token_file": "\ud800"})
def test_settings_of_other_types_are_refused(plain: Any) -> None:
    if isinstance(plain, dict):
        makes(plain)


RUNNINGS = (
    damaged(st.just(json.dumps(RUNNING).encode()))
    | altered(st.just(RUNNING)).map(as_json)
    | st.sampled_from([b"", b"[]", b"7", b"null", b"\xff", b"[" * 2000])
)


def finds(content: bytes, read: Callable[[Path], Running | None] = read_running) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cluster.json").write_bytes(content)
        try:
            running = read(Path(folder))
        except ProcessTrouble as error:
            assert "cluster.json" in str(error)
            assert len(str(error)) < 1000
            return
        assert running is not None
        for text in (running.cluster, *(row.url for row in running.nodes), running.ca or "", running.token_file or ""):
            assert type(text) is str
            text.encode()
        for row in (*running.nodes, *running.services):
            assert type(row) is Row
            assert all(type(argument) is str for argument in (row.id, *row.arguments))
            assert row.identity is None or row.identity.alive in (True, False)
        assert running.owner is None or type(running.owner) is Identity


@examples(100)
@given(RUNNINGS)
@example(as_json({**RUNNING, "nodes": [{**ROW, "[" * 2000: 1}]}))
def test_a_damaged_note_of_what_runs_is_refused(content: bytes) -> None:
    finds(content)


# ------------------------------------------------------------------------------------------------ tokens

TOKENS = b"first-token-0123456789\nsecond-token-0123456789\n"


def gives(content: bytes, read: Callable[[Path], list[str]] = read_tokens) -> None:
    """To a participant's server, and from one file as the name of a database."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "token"
        path.touch(mode=0o600)
        path.write_bytes(content)
        try:
            tokens = read(path)
            ServerSettings(caller_token=tokens[0], older_caller_tokens=tuple(tokens[1:]))
            assert all(token.encode() in content for token in tokens)
        except SettingsError as error:
            assert not any(word.decode("latin-1") in str(error) for word in content.split() if len(word) > 8)
        try:
            assert read_dsn(None, path)
        except SettingsError as error:
            assert str(path) in str(error)


@examples(60)
@given(damaged(st.just(TOKENS)))
def test_a_damaged_file_of_tokens_is_refused_and_not_quoted(content: bytes) -> None:
    gives(content)


def test_the_undamaged_are_read(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_bytes(TOML)
    assert NodeConfig.load(tmp_path / "node.toml").limits.max_branches == 8
    makes(FULL)
    (tmp_path / "cluster.json").write_text(json.dumps(RUNNING))
    running = read_running(tmp_path)
    assert running is not None
    assert running.cluster == "m"
    assert running.services[0].identity == Identity(1, 5)
    gives(TOKENS)


# ------------------------------------------------------------------------------------------------ known to be bad


def _half_handled(path: Path) -> NodeConfig:
    """What is no TOML is all that can be wrong with TOML."""
    try:
        plain = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML") from error
    assert isinstance(plain, dict)
    return NodeConfig.load(path)


def _first_node(path: Path) -> NodeConfig:
    """Whatever parses is a configuration."""
    text = path.read_bytes()
    try:
        plain = tomllib.loads(text.decode())
    except (ValueError, RecursionError):
        return NodeConfig.load(path)
    assert plain["nodes"][0]["id"]
    return NodeConfig.load(path)


@pytest.mark.parametrize(
    ("load", "error"), [(_half_handled, (UnicodeDecodeError, RecursionError)), (_first_node, (KeyError, TypeError))]
)
def test_a_careless_reader_of_settings_is_found(load: Load, error: Any) -> None:
    @HUNT
    @given(TOMLS)
    def hunt(content: bytes) -> None:
        loads(content, load)

    with pytest.raises(error):
        hunt()


def _untyped(plain: dict[str, Any], *, base: Path) -> NodeConfig:
    """Numbers are numbers."""
    timing = plain.get("timing")
    if isinstance(timing, dict) and timing.get("idle_s", 1) < 0:
        raise ConfigError("timing.idle_s must be positive")
    return NodeConfig.of(plain, base=base)


def _unlimited(plain: dict[str, Any], *, base: Path) -> NodeConfig:
    """Anything that is not negative is a duration."""
    config = NodeConfig.of(plain, base=base)
    timing = plain.get("timing")
    object.__setattr__(config.timing, "idle_s", timing.get("idle_s") if isinstance(timing, dict) else None)
    return config


@pytest.mark.parametrize(("of", "error"), [(_untyped, TypeError), (_unlimited, AssertionError)])
def test_careless_settings_are_found(of: Callable[..., NodeConfig], error: type[Exception]) -> None:
    @HUNT
    @given(altered(st.just(FULL)))
    def hunt(plain: Any) -> None:
        if isinstance(plain, dict):
            makes(plain, of)

    with pytest.raises(error):
        hunt()


def _as_it_comes(data: Path) -> Running:
    """What is there is what was written."""
    running = read_running(data)
    plain = json.loads((data / "cluster.json").read_text())
    assert running is not None
    return Running(cluster=plain["cluster"], ca=plain["ca"], nodes=tuple(Row(**row) for row in plain["nodes"]))


def test_a_careless_reader_of_what_runs_is_found() -> None:
    @HUNT
    @given(RUNNINGS)
    def hunt(content: bytes) -> None:
        finds(content, _as_it_comes)

    with pytest.raises((AssertionError, KeyError, TypeError)):
        hunt()


def _quoting(path: Path) -> list[str]:
    """Says what it found."""
    content = path.read_bytes()
    try:
        return read_tokens(path)
    except SettingsError as error:
        raise SettingsError(f"{error}: {content.decode('latin-1')}") from None


def _decoding(path: Path) -> list[str]:
    """A token is ASCII."""
    return path.read_text("ascii").split()


@pytest.mark.parametrize(("read", "error"), [(_quoting, AssertionError), (_decoding, (UnicodeDecodeError, IndexError))])
def test_a_careless_reader_of_tokens_is_found(read: Callable[[Path], list[str]], error: Any) -> None:
    @HUNT
    @given(damaged(st.just(TOKENS)))
    def hunt(content: bytes) -> None:
        gives(content, read)

    with pytest.raises(error):
        hunt()
