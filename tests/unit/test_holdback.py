"""What waits for the disk, and what does not."""

from typing import Any

import pytest

from cluster.replication.guard import Message
from cluster.replication.holdback import HoldBack


class Disk:
    """Nine changes have been made, of which five are durable, and the log is up to entry 3."""

    position = 9
    term_position = 2
    durable_position = 5
    durable_index = 3
    full: str | None = None


class Node:
    def __init__(self) -> None:
        self.disk = Disk()
        self.term = 4
        self.said: list[tuple[str, int, Message]] = []
        self.held = HoldBack(journal=self.disk, term=lambda: self.term, send=self._send)

    def _send(self, peer: str, term: int, message: Message) -> bool:
        self.said.append((peer, term, message))
        return True

    def sync(self, position: int) -> None:
        self.disk.durable_position = position
        self.held.release()

    def kinds(self) -> list[str]:
        return [message["type"] for _peer, _term, message in self.said]


def holds(index: int, **changed: Any) -> Message:
    return {"type": "next_node_idx", "next_node_idx": index + 1, "reset": False, "success": True} | changed


@pytest.mark.parametrize("kind", ["append_entries", "timeout_now", "install_snapshot"])
def test_what_is_no_promise_waits_for_nothing(kind: str) -> None:
    node = Node()
    assert node.held.send("n2", {"type": kind})
    assert node.kinds() == [kind]


@pytest.mark.parametrize("kind", ["request_vote", "response_vote"])
def test_a_vote_waits_for_all_that_was_changed_before_it(kind: str) -> None:
    node = Node()
    node.held.send("n2", {"type": kind})
    node.sync(8)
    assert node.said == []
    node.sync(9)
    assert node.kinds() == [kind]


def test_an_acknowledgement_waits() -> None:
    node = Node()
    node.held.send("n2", holds(4))
    assert node.said == []
    node.sync(9)
    assert node.said == [("n2", 4, holds(4))]
    assert len(node.held) == 0


def test_a_leader_that_speaks_meanwhile_hears_that_this_node_lives() -> None:
    node = Node()
    node.held.send("n2", holds(4))
    node.held.send("n2", holds(4))
    assert node.said == [("n2", 4, holds(4, success=False))]
    node.sync(9)
    assert node.said[1:] == [("n2", 4, holds(4))]


def test_an_acknowledgement_of_what_is_durable_goes_at_once() -> None:
    node = Node()
    node.held.send("n2", holds(3))
    assert node.said == [("n2", 4, holds(3))]


def test_but_not_before_its_term_is() -> None:
    node = Node()
    node.disk.term_position = 6
    node.held.send("n2", holds(3))
    assert node.said == []
    node.sync(6)
    assert node.said == [("n2", 4, holds(3))]


def test_a_denial_goes_at_once() -> None:
    node = Node()
    node.held.send("n2", holds(9, success=False, reset=True))
    assert node.said == [("n2", 4, holds(9, success=False, reset=True))]


def test_words_go_in_order_and_each_when_its_change_is_durable() -> None:
    node = Node()
    node.disk.position = 6
    node.held.send("n2", holds(4))
    node.disk.position = 7
    node.held.send("n2", holds(5))
    node.said.clear()
    node.sync(6)
    assert [message["next_node_idx"] for _peer, _term, message in node.said] == [5]
    node.sync(7)
    assert [message["next_node_idx"] for _peer, _term, message in node.said] == [5, 6]


def test_what_an_acknowledgement_that_waits_says_already_is_not_kept_again() -> None:
    node = Node()
    for _ in range(100):
        node.held.send("n2", holds(5))
    assert len(node.held) == 1


def test_words_of_an_earlier_term_are_never_said() -> None:
    node = Node()
    node.held.send("n2", {"type": "response_vote", "term": 4})
    node.held.send("n3", {"type": "request_vote", "term": 4})
    node.term = 5
    node.disk.position = 10
    node.held.send("n2", {"type": "response_vote", "term": 5})
    assert len(node.held) == 2, "one of them is forgotten already"
    node.sync(10)
    assert [(peer, message["term"]) for peer, _term, message in node.said] == [("n2", 5)]


def test_words_to_who_is_gone_are_forgotten() -> None:
    node = Node()
    node.held.send("n2", holds(4))
    node.said.clear()
    node.held.forget("n2")
    node.sync(9)
    assert node.said == []


def test_a_node_whose_disk_is_full_does_not_even_say_that_it_lives() -> None:
    node = Node()
    node.disk.full = "no room"
    node.held.send("n2", holds(4))
    node.held.send("n2", holds(4))
    assert node.said == []
