"""What `cluster/replication/raft.py` leans on inside pysyncobj. When one of these fails, read that file again.

Names and signatures first; then the behaviour that we rely on; then the defects that we guard against: one that has
been mended may be a guard that is no longer needed, or one that now does harm.
"""

import inspect
from importlib.metadata import version
from typing import Any

import pysyncobj.pickle
import pytest
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, syncobj
from pysyncobj.config import SERIALIZER_STATE
from pysyncobj.journal import Journal
from pysyncobj.node import Node
from pysyncobj.serializer import Serializer
from pysyncobj.transport import Transport

from cluster.replication import raft
from cluster.replication.guard import Guard
from cluster.replication.journal import JournalHandlers
from cluster.replication.raft_journal import RaftJournal
from cluster.replication.settings import RaftSettings
from cluster.replication.standing import Marker, Standing
from tests.simulation.pumps import instant_journal

METHODS = {
    "_SyncObj__applyLogEntries": "(self)",
    "_SyncObj__doApplyCommand": "(self, command)",
    "_SyncObj__getCurrentLogIndex": "(self)",
    "_SyncObj__getEntries": "(self, fromIDx, count=None, maxSizeBytes=None)",
    "_SyncObj__onBecomeLeader": "(self)",
    "_SyncObj__onMessageReceived": "(self, node, message)",
    "_SyncObj__onNodeConnected": "(self, node)",
    "_SyncObj__onNodeDisconnected": "(self, node)",
    "_SyncObj__sendAppendEntries": "(self)",
    "_SyncObj__setCurrentTerm": "(self, term, votedForNodeId)",
    "_SyncObj__setState": "(self, newState)",
    "_SyncObj__sendNextNodeIdx": "(self, node, reset=False, nextNodeIdx=None, success=False)",
    "_applyCommand": "(self, command, callback, commandType=None)",
    "_checkCommandsToApply": "(self)",
    "_getLeader": "(self)",
    "_isLeader": "(self)",
    "_onTick": "(self, timeToWait=0.0)",
    "destroy": "(self)",
    "doTick": "(self, timeToWait=0.0)",
    "isNodeConnected": "(self, node)",
    "transferLeadership": "(self, node=None, callback=None)",
}

ATTRIBUTES = {
    "_SyncObj__commandsQueue",
    "_SyncObj__commandsWaitingCommit",
    "_SyncObj__lastResponseTime",
    "_SyncObj__newAppendEntriesTime",
    "_SyncObj__raftCommitIndex",
    "_SyncObj__raftCurrentTerm",
    "_SyncObj__raftElectionDeadline",
    "_SyncObj__raftLastApplied",
    "_SyncObj__raftLeader",
    "_SyncObj__raftMatchIndex",
    "_SyncObj__raftNextIndex",
    "_SyncObj__raftState",
    "_SyncObj__selfNode",
    "_SyncObj__serializer",
    "_SyncObj__transferInProgress",
    "_SyncObj__transport",
    "_poller",
}


class Sent(Transport):
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(None, None, [])
        self.messages: list[tuple[str, dict[str, Any]]] = []

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self.messages.append((node.id, message))
        return True


def stock_node(**conf: Any) -> tuple[SyncObj, Sent, Node, Node]:
    """Its own node, with two others that are connected."""
    sent, two, three = Sent(), Node("n2"), Node("n3")
    node = SyncObj(Node("n1"), [two, three], SyncObjConf(autoTick=False, **conf), nodeClass=Node, transport=sent)
    for other in (two, three):
        node._SyncObj__onNodeConnected(other)
    return node, sent, two, three


def append(previous: int, previous_term: int, entries: list[tuple[bytes, int, int]], commit_index: int = 1) -> Any:
    return {
        "type": "append_entries",
        "term": 2,
        "commit_index": commit_index,
        "prevLogIdx": previous,
        "prevLogTerm": previous_term,
        "entries": entries,
    }


def lead(node: SyncObj, two: Node) -> int:
    """Have it elected; returns the index of its first entry."""
    node._SyncObj__raftElectionDeadline = 0
    node.doTick()
    node._SyncObj__onMessageReceived(two, {"type": "response_vote", "term": node.raftCurrentTerm})
    assert node._isLeader()
    index: int = node._SyncObj__raftLog[-1][1]
    return index


# Names.


def test_the_version_is_the_one_that_was_read() -> None:
    assert version("pysyncobj") == "0.3.17"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_as_it_was(name: str) -> None:
    assert str(inspect.signature(getattr(SyncObj, name))) == METHODS[name]


def test_the_attributes_are_there() -> None:
    node, *_ = stock_node()
    assert {name for name in ATTRIBUTES if name not in vars(node)} == set()
    assert len(node._SyncObj__commandsQueue._FastQueue__queue) == 0
    node.destroy()


def test_a_leader_has_all_others_in_its_tables() -> None:
    node, _sent, two, three = stock_node()
    lead(node, two)
    for table in ("lastResponseTime", "raftMatchIndex", "raftNextIndex"):
        assert set(getattr(node, f"_SyncObj__{table}")) == {two, three}
    node.destroy()


def test_the_module_names_are_there() -> None:
    assert callable(syncobj.monotonicTime)
    assert callable(syncobj.random.random)
    assert isinstance(syncobj.PIPE_NOTIFIER_ENABLED, bool)
    assert syncobj._COMMAND_TYPE.REGULAR == raft._REGULAR
    assert syncobj._COMMAND_TYPE.NO_OP == raft._NO_OP


def test_reasons_are_numbered_as_before() -> None:
    reasons = {name: number for name, number in vars(FAIL_REASON).items() if name.isupper()}
    assert reasons == {
        "SUCCESS": 0,
        "QUEUE_FULL": 1,
        "MISSING_LEADER": 2,
        "DISCARDED": 3,
        "NOT_LEADER": 4,
        "LEADER_CHANGED": 5,
        "REQUEST_DENIED": 6,
        "UNKNOWN_OUTCOME": 7,
    }
    assert SERIALIZER_STATE.NOT_SERIALIZING == 0


def test_a_journal_has_the_methods_of_our_protocol() -> None:
    def of(kind: type) -> set[str]:
        return {name for name in vars(kind) if inspect.isfunction(vars(kind)[name]) and name != "__init__"}

    assert of(Journal) <= of(RaftJournal)
    assert of(Serializer) == {
        "checkSerializing",
        "serialize",
        "deserialize",
        "getTransmissionData",
        "setTransmissionData",
        "cancelTransmisstion",
    }
    assert of(Serializer) <= of(raft._NoSnapshots) | {"getPath"}


# Behaviour.


class NoTransport:
    """Ours, connected to nobody."""

    frame_bytes_max = 2**30

    def __init__(self) -> None:
        self.messages: list[tuple[str, int, dict[str, Any]]] = []

    def send(self, peer: str, term: int, message: dict[str, Any]) -> bool:
        self.messages.append((peer, term, message))
        return True


class NoCatchUp:
    """Nobody is far behind."""

    def lead_no_more(self) -> None:
        pass


def _nothing(*_: object) -> None:
    pass


def replica(journal: Any) -> tuple[raft.Replica, NoTransport, list[bytes]]:
    transport, applied = NoTransport(), []
    peers = [raft.Peer("n2", 1), raft.Peer("n3", 2)]
    node = raft.Replica(
        node=raft.Peer("n1", 0),
        peers=peers,
        transport=transport,  # type: ignore[arg-type]
        journal=journal,
        guard=Guard(),
        apply=applied.append,
        settings=RaftSettings(),
        standing=Standing("n1", ("n2", "n3"), Marker(node="n1", voter=True)),
        joined=_nothing,
    )
    node.catch_up = NoCatchUp()  # type: ignore[assignment]
    journal.start(JournalHandlers(durable=_nothing, full=_nothing, room=_nothing, fatal=_nothing))
    for peer in peers:
        node.connect(peer)
    return node, transport, applied


def test_its_constructor_takes_the_journal_it_is_given() -> None:
    journal = instant_journal()
    journal.add(b"\1", 1, 0)
    journal.add(b"\0command", 2, 3)
    journal.setCurrentTerm(5, "n2")
    node, *_ = replica(journal)
    assert node._SyncObj__raftLog is journal
    assert node.term == 5
    assert node._SyncObj__votedForNodeId == "n2"
    assert node.last_index == 2
    assert len(journal) == 2
    node.destroy()


def test_an_empty_journal_gets_the_first_entry_of_every_log() -> None:
    journal = instant_journal()
    replica(journal)[0].destroy()
    assert journal[:] == [(b"\1", 1, 0)]


def test_it_opens_neither_pipe_nor_thread_nor_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PipeNotifier", "TCPTransport"):
        monkeypatch.setattr(syncobj, name, None)
    monkeypatch.setattr(syncobj.threading, "Thread", None)
    node, *_ = replica(instant_journal())
    assert not hasattr(node, "_SyncObj__pipeNotifier")
    node.doTick()
    node.destroy()


def test_what_is_in_the_log_is_never_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the four types of command, one is ours and one is empty. The others would be unpickled."""

    def loads(data: object) -> None:
        raise AssertionError(f"unpickled {data!r}")

    monkeypatch.setattr(pysyncobj.pickle, "loads", loads)
    node, _transport, applied = replica(instant_journal())
    entries = [(bytes([kind]) + b"x", 2 + kind, 2) for kind in range(6)]
    node.receive(node._peers[0], 2, append(1, 0, entries, commit_index=7))
    node.doTick()
    assert node.applied_index == 7
    assert applied == [b"x"]
    node.destroy()


def test_pieces_of_snapshots_go_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    node, _transport, _applied = replica(instant_journal())
    message = {"type": "append_entries", "term": 2, "commit_index": 9, "serialized": (b"x", True, True)}
    node.receive(node._peers[0], 2, message)
    assert "refused a piece of a snapshot" in caplog.text
    assert node.commit_index == 1
    node.destroy()


def test_a_command_waits_in_its_queue_until_a_turn_and_is_sent_by_us() -> None:
    node, transport, applied = replica(instant_journal())
    peer = node._peers[0]
    lead(node, peer)
    transport.messages.clear()
    node.receive(peer, node.term, {"type": "next_node_idx", "next_node_idx": 3, "reset": False, "success": True})
    results: list[tuple[object, int]] = []
    node._applyCommand(b"x", lambda result, reason: results.append((result, reason)), raft._REGULAR)
    assert node.last_index == 2
    node.doTick()
    assert node.last_index == 3
    assert not transport.messages, "its own tick does not send what it took"
    node.turn()
    assert [(to, message["entries"]) for to, _term, message in transport.messages] == [("n2", [(b"\0x", 3, 1)])]
    node.turn()
    assert len(transport.messages) == 1, "one is outstanding"
    node.receive(peer, node.term, {"type": "next_node_idx", "next_node_idx": 4, "reset": False, "success": True})
    node.turn()
    assert applied == [b"x"]
    assert results == [(None, FAIL_REASON.SUCCESS)]
    node.destroy()


@pytest.mark.parametrize(
    ("terms", "held", "commits"),
    [
        ([1, 1, 2, 2], [0, 0], 1),
        ([1, 1, 2, 2], [3, 0], 1),  # a majority holds 3, but that is of an earlier term: it may yet be replaced
        ([1, 1, 2, 2], [4, 0], 4),
        ([1, 1, 2, 2], [5, 0], 5),
        ([1, 1, 2, 2], [5, 4], 5),
        ([1, 1, 2, 2], [4, 4], 4),
    ],
)
def test_a_leader_commits_what_a_majority_holds(terms: list[int], held: list[int], commits: int) -> None:
    """And in the same ticks as pysyncobj would; it counts entry by entry."""
    outcomes = []
    for counting in (raft.Replica.turn, raft.Replica.doTick):
        journal = instant_journal()
        node, _transport, _applied = replica(journal)
        for index, term in enumerate(terms, start=2):
            journal.add(b"\1", index, term)
        journal.setCurrentTerm(1, None)
        node._SyncObj__raftCurrentTerm = 2
        node._SyncObj__raftState = syncobj._RAFT_STATE.LEADER
        for peer, match in zip(node._peers, held, strict=True):
            node._SyncObj__raftMatchIndex[peer] = match
            node._SyncObj__raftNextIndex[peer] = 6
            node._SyncObj__lastResponseTime[peer] = syncobj.monotonicTime()
        counting(node)
        assert [node.match_index(peer) for peer in node._peers] == held
        outcomes.append(node.commit_index)
        node.destroy()
    assert outcomes == [commits, commits]


@pytest.mark.parametrize(("silent_s", "leads"), [((0, 0), True), ((0, 2), True), ((2, 0), True), ((2, 2), False)])
def test_a_leader_whom_no_majority_answers_steps_down(silent_s: tuple[float, float], leads: bool) -> None:
    """And in the same ticks as pysyncobj would."""
    for counting in (raft.Replica.turn, raft.Replica.doTick):
        node, _transport, _applied = replica(instant_journal())
        lead(node, node._peers[0])
        for peer, ago_s in zip(node._peers, silent_s, strict=True):
            node._SyncObj__lastResponseTime[peer] -= ago_s
        counting(node)
        assert node.leads() is leads
        assert node.leader() == ("n1" if leads else None)
        node.destroy()


def test_what_waits_when_leadership_is_lost_is_not_forwarded() -> None:
    node, transport, _applied = replica(instant_journal())
    lead(node, node._peers[0])
    reasons: list[int] = []
    node._applyCommand(b"x", lambda _result, reason: reasons.append(reason), raft._REGULAR)
    node.receive(node._peers[1], 7, append(1, 0, []) | {"term": 7})
    transport.messages.clear()
    node.doTick()
    assert reasons == [FAIL_REASON.MISSING_LEADER]
    assert not transport.messages
    assert node.last_index == 2
    node.destroy()


# Defects.


def test_it_truncates_where_nothing_conflicts() -> None:
    node, _sent, two, _three = stock_node()
    node._SyncObj__onMessageReceived(two, append(1, 0, [(b"\1", index, 2) for index in range(2, 6)]))
    node._SyncObj__onMessageReceived(two, append(1, 0, [(b"\1", 2, 2)]))
    assert node._SyncObj__raftLog[-1][1] == 2
    node.destroy()


def test_it_raises_the_commit_index_without_comparing() -> None:
    node, _sent, two, _three = stock_node()
    node._SyncObj__onMessageReceived(two, append(1, 0, [(b"\1", index, 2) for index in range(2, 6)]))
    node._SyncObj__onMessageReceived(two, {"type": "append_entries", "term": 2, "commit_index": 5, "serialized": None})
    assert node.raftCommitIndex == 5
    node.destroy()


def test_it_counts_acknowledgements_of_other_terms_and_sends_again_what_is_under_way() -> None:
    node, _sent, two, _three = stock_node()
    first = lead(node, two)
    node._SyncObj__raftNextIndex[two] = first + 10
    node._SyncObj__onMessageReceived(
        two, {"type": "next_node_idx", "next_node_idx": first + 1, "reset": False, "success": True}
    )
    assert node._SyncObj__raftMatchIndex[two] == first
    assert node._SyncObj__raftNextIndex[two] == first + 1
    node.destroy()


def test_it_counts_one_vote_twice() -> None:
    sent, others = Sent(), [Node(f"n{number}") for number in range(2, 6)]
    node = SyncObj(Node("n1"), others, SyncObjConf(autoTick=False), nodeClass=Node, transport=sent)
    node._SyncObj__onNodeConnected(others[0])
    node._SyncObj__raftElectionDeadline = 0
    node.doTick()
    for _ in range(2):
        node._SyncObj__onMessageReceived(others[0], {"type": "response_vote", "term": 1})
    assert node._isLeader()
    node.destroy()


def test_it_forwards_what_was_proposed() -> None:
    node, sent, two, _three = stock_node()
    node._SyncObj__onMessageReceived(two, append(1, 0, []))
    node._applyCommand(b"x", lambda _result, _reason: None, 0)
    node.doTick()
    assert "apply_command" in [message["type"] for _to, message in sent.messages]
    node.destroy()


def test_an_exception_of_apply_stops_its_applying_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the node must end then: the entry is never applied, and its proposer never told."""
    node = SyncObj(Node("n1"), [], SyncObjConf(autoTick=False), nodeClass=Node, transport=Sent())
    node._SyncObj__raftElectionDeadline = 0
    node.doTick()

    def fail(command: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(node, "_SyncObj__doApplyCommand", fail)
    told: list[int] = []
    node._applyCommand(b"x", lambda _result, reason: told.append(reason), 0)
    node.doTick()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            node.doTick()
    assert not told
    node.destroy()
