"""Files that operators write, and answers of participants: refused with a text that says what is wrong."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.layout import read_running
from cluster.process import ProcessTrouble
from coordinator.codec import JSON_TYPE, MSGPACK_TYPE, Malformed, answer_from_wire, batch_from_bytes
from coordinator.config import ConfigError, NodeConfig
from coordinator.protocol.messages import Abort, Commit, Prepare
from tests.fuzz import examples
from tests.fuzz.mutations import altered, damaged, pack

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
MESSAGES = [
    Prepare(gid="m-1-1", branch="a", payload=b"1"),
    Commit(gid="m-1-1", branch="a"),
    Abort(gid="m-1-1", branch="a"),
]
ANSWERS: list[Any] = [
    [{"status": 200, "vote": "prepared", "result": {"a": [1]}}],
    [{"status": 200, "vote": "refused", "reason": "no", "retryable": True}],
    [{"status": 200, "state": "committed"}, {"status": 409, "state": "aborted"}],
    [{"status": 409, "code": "stale_epoch", "epoch": 5}, {"status": 503, "code": "pending"}],
]


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


@examples(120)
@given(
    st.sampled_from(MESSAGES),
    altered(st.sampled_from(ANSWERS)).map(pack) | damaged(st.sampled_from(ANSWERS).map(pack)),
    st.sampled_from([MSGPACK_TYPE, JSON_TYPE]),
)
def test_a_participant_s_answers_are_understood_or_malformed(message: Any, body: bytes, content_type: str) -> None:
    try:
        items = batch_from_bytes(content_type, body)
    except Malformed:
        return
    for item in items:
        status = item.get("status") if isinstance(item, dict) else 0
        try:
            answer = answer_from_wire(message, status if type(status) is int else 0, item)
        except Malformed as error:
            assert len(str(error)) < 500
        else:
            assert (answer.gid, answer.branch) == ("m-1-1", "a")


def test_the_undamaged_are_read(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_bytes(TOML)
    assert NodeConfig.load(tmp_path / "node.toml").limits.max_branches == 8
    (tmp_path / "cluster.json").write_text(json.dumps(RUNNING))
    running = read_running(tmp_path)
    assert running is not None
    assert running.cluster == "m"
