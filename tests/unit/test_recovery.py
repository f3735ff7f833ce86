"""What is left of a cluster: read, judged, kept; and old data is told from new."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.process import ProcessTrouble
from cluster.recovery import Remains, choose, copy_name, examine, note_generation, save_copy, set_aside
from cluster.replication.clock import SystemClock
from cluster.replication.log import CannotStart, Leadership
from cluster.replication.offline import Offline
from cluster.replication.raft_journal import file_journal
from cluster.replication.raft_log import RaftLog
from cluster.replication.transport import SocketTransport
from coordinator.config import NodeConfig, split_address
from coordinator.copies import CopyReader
from coordinator.generation import claim, identity
from coordinator.ledger import Ledger
from coordinator.node import Node
from tests.support.nodes import configs
from tests.support.waiting import eventually

TOML = """cluster = "test"
node = "n1"
data = "data"
secret = "0123456789abcdef"

[[nodes]]
id = "n1"
api = "127.0.0.1:7001"
raft = "127.0.0.1:7101"

[[nodes]]
id = "n2"
api = "127.0.0.1:7002"
raft = "127.0.0.1:7102"

[[nodes]]
id = "n3"
api = "127.0.0.1:7003"
raft = "127.0.0.1:7103"
"""


def real_log(config: NodeConfig) -> RaftLog:
    transport = SocketTransport(
        node=config.node,
        addresses={peer.id: split_address(peer.raft, "raft") for peer in config.nodes},
        cluster=identity(config),
        secret=config.secret.encode(),
    )
    peers = [peer.id for peer in config.nodes if peer.id != config.node]
    return RaftLog(
        node=config.node, peers=peers, transport=transport, journal=file_journal(config.data / "log"), understands=2
    )


@pytest.fixture
async def folders(tmp_path: Path) -> list[NodeConfig]:
    """Three nodes that have registered ten participants, and are stopped."""
    found = [replace(config, data=tmp_path / config.node) for config in configs(("n1", "n2", "n3"))]
    nodes = [Node(config, real_log(config), SystemClock()) for config in found]
    for node in nodes:
        await node.start()
    await eventually(lambda: any(node.driver.leading for node in nodes))
    (leader,) = (node for node in nodes if node.driver.leading)
    for number in range(10):
        await leader.driver.register(f"p{number}", f"http://127.0.0.1:{number + 1}", batch=False)
    await eventually(lambda: all(len(node.ledger.participants) == 10 for node in nodes))
    for node in nodes:
        await node.stop()
    return found


async def test_what_is_known_to_be_committed_is_read_and_nothing_changes(
    folders: list[NodeConfig], tmp_path: Path
) -> None:
    remains = [await asyncio.to_thread(examine, config) for config in folders]
    for each in remains:
        assert each.ledger is not None
        assert each.log is not None
        assert each.log.committed <= each.log.last
        assert len(each.ledger.participants) == 10, "a graceful stop leaves a mark of all that is committed"
        assert each.log.voter
    assert "transactions, 0 undecided" in remains[0].describe()
    with pytest.raises(ProcessTrouble, match="3 of 3 nodes have their logs, which is a majority"):
        choose(remains, 3)
    lost = Remains(config=folders[1], trouble="gone")
    assert choose([remains[0], lost, lost], 3) is remains[0]
    file = copy_name(tmp_path, 0)
    header = save_copy(remains[0], file, now_ms=5)
    assert not header.certain
    reader = CopyReader()
    copy = Ledger("test")
    copy.restore(reader.feed(file.read_bytes()))()
    assert reader.end()[0] == header
    assert len(copy.participants) == 10
    with pytest.raises(ProcessTrouble, match="cannot be written"):
        save_copy(remains[0], file, now_ms=5)


async def test_a_node_that_runs_is_left_alone(folders: list[NodeConfig]) -> None:
    log = real_log(folders[0])
    await log.start(Ledger("test"), lambda _: None)
    try:
        with pytest.raises(ProcessTrouble, match="n1 runs"):
            await asyncio.to_thread(examine, folders[0])
    finally:
        await log.stop()


async def test_a_damaged_folder_counts_as_lost(folders: list[NodeConfig]) -> None:
    for segment in (folders[0].data / "log").glob("*.segment"):
        raw = bytearray(segment.read_bytes())
        raw[20] ^= 255
        segment.write_bytes(raw)
    remains = await asyncio.to_thread(examine, folders[0])
    assert remains.ledger is None
    assert "cannot be read" in str(remains.trouble)
    with pytest.raises(ProcessTrouble, match="there is nothing to recover from"):
        choose([remains], 3)


async def test_a_folder_of_an_older_generation_is_not_gone_on_from(folders: list[NodeConfig]) -> None:
    """Its history may be longer, and what was told since would be lost."""
    old = await asyncio.to_thread(examine, replace(folders[0], generation=2))
    assert "of generation 1" in old.describe()
    assert old.log is not None
    new = replace(old, log=replace(old.log, committed=old.log.committed - 1), generation=2)
    assert choose([old, new], 3) is new
    assert choose([replace(old, config=folders[0])], 3) is not None, "as when recovering was interrupted"


async def test_a_node_that_waited_for_its_copy_is_not_gone_on_from(folders: list[NodeConfig]) -> None:
    """It is no history: of all that it does not know it would be said that it is aborted."""
    (folders[0].data / "generation").write_text("2\n")
    remains = await asyncio.to_thread(examine, replace(folders[0], generation=2))
    assert remains.log is None
    assert "still waited for its copy" in remains.describe()
    with pytest.raises(ProcessTrouble, match="there is nothing to recover from"):
        choose([remains], 3)


def test_the_one_that_knows_most_is_taken(tmp_path: Path) -> None:
    found = [
        Remains(
            config=replace(config, data=tmp_path),
            ledger=Ledger("test"),
            log=Offline(committed=committed, last=90, term=1, voter=voter),
        )
        for config, committed, voter in zip(
            configs(("n1", "n2", "n3", "n4", "n5")), (5, 9, 7), (True, True, False), strict=False
        )
    ]
    assert choose(found, 5) is found[1], "one of the three was coming back empty, and made no majority"
    with pytest.raises(ProcessTrouble, match="majority"):
        choose(found, 3)


# ------------------------------------------------------------------------------------------------ generations


def test_generations_do_not_mix(tmp_path: Path) -> None:
    (config,) = configs()
    first = replace(config, data=tmp_path / "data")
    second = replace(first, generation=2)
    first.data.mkdir()
    claim(first)
    claim(second)  # it is empty
    claim(second)
    (first.data / "log").mkdir()
    (first.data / "log" / "0.segment").write_text("")
    with pytest.raises(
        CannotStart, match="is of generation 2 of the cluster test, and this node is configured for gen"
    ):
        claim(first)
    claim(second)
    (first.data / "generation").unlink()
    claim(first)  # as older software has left it
    with pytest.raises(CannotStart, match="is of generation 1"):
        claim(second)
    (first.data / "generation").write_text("many")
    with pytest.raises(CannotStart, match="should hold the generation"):
        claim(second)
    assert identity(first) == "test"
    assert identity(second) != identity(first)


async def test_nodes_of_another_generation_are_not_let_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = (replace(config, data=tmp_path / config.node) for config in configs(("n1", "n2", "n3"))[:2])
    logs = [real_log(one), real_log(replace(other, generation=2))]
    heard: list[Leadership] = []
    for log in logs:
        await log.start(Ledger("test"), heard.append)
    try:
        await eventually(lambda: "it is of cluster 'test, generation 2', this node of 'test'" in caplog.text)
        assert all(not log.reachable() for log in logs)
    finally:
        for log in logs:
            await log.stop()


def test_folders_are_set_aside_and_files_keep_what_else_they_say(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(TOML)
    file.chmod(0o600)
    before = NodeConfig.load(file)
    for generation in (2, 3):
        note_generation(file, generation)
        assert NodeConfig.load(file) == replace(before, generation=generation)
        assert file.stat().st_mode & 0o777 == 0o600
    assert set_aside(before) is None
    for number in (1, 2):
        before.data.mkdir()
        (before.data / "x").write_text(str(number))
        aside = set_aside(before)
        assert aside is not None
        assert (aside / "x").read_text() == str(number)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data.generation-1", "data.generation-1.2", "node.toml"]


async def test_by_hand(folders: list[NodeConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "node.toml"
    file.write_text(TOML)
    folders[0].data.rename(tmp_path / "data")
    words = ["recover", "--config", str(file)]
    assert await asyncio.to_thread(main, words) == 1
    said = capsys.readouterr()
    assert "n1: committed up to entry" in said.out
    assert "nothing was changed; with --force" in said.err
    assert (tmp_path / "data").exists()
    assert await asyncio.to_thread(main, [*words, "--force"]) == 0
    said = capsys.readouterr()
    assert "generation = 2" in said.out
    assert "outlast restore" in said.out
    assert (tmp_path / "data.generation-1" / "log").is_dir()
    (copy,) = (name for name in os.listdir(tmp_path) if name.startswith("recovered-"))
    assert main(["backup", "--verify", str(tmp_path / copy)]) == 0
    assert await asyncio.to_thread(main, words) == 1
    assert "nothing to recover from" in capsys.readouterr().err
