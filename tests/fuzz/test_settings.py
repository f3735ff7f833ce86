"""Files that operators write: read, or refused with a text that says what is wrong."""

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cluster.layout import read_running
from cluster.process import ProcessTrouble
from coordinator.config import ConfigError, NodeConfig
from tests.fuzz import examples
from tests.fuzz.mutations import damaged

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
RUNNING = {"cluster": "m", "nodes": [], "services": [], "owner": {"pid": 1, "started": 5.0}, "down": False, "ca": None}
DEEP = [TOML + b"\ndeep = " + b"[" * 2000, b"[" * 2000, b"a." * 2000, b"\xff", b""]


@examples(60)
@given(damaged(st.just(TOML)) | st.sampled_from(DEEP))
def test_a_damaged_configuration_is_refused_by_what_is_wrong(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.toml"
        path.write_bytes(content)
        try:
            config = NodeConfig.load(path)
        except ConfigError as error:
            assert str(path) in str(error)
            return
        assert config.me.id == config.node


@examples(60)
@given(
    damaged(st.just(json.dumps(RUNNING).encode())) | st.sampled_from([b"", b"[]", b"7", b"null", b"\xff", b"[" * 2000])
)
def test_a_damaged_note_of_what_runs_is_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cluster.json").write_bytes(content)
        try:
            read_running(Path(folder))
        except ProcessTrouble as error:
            assert "cluster.json" in str(error)


def test_the_undamaged_are_read(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_bytes(TOML)
    assert NodeConfig.load(tmp_path / "node.toml").limits.max_branches == 8
    (tmp_path / "cluster.json").write_text(json.dumps(RUNNING))
    running = read_running(tmp_path)
    assert running is not None
    assert running.cluster == "m"
