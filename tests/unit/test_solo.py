"""The log of one node on one disk: what a crash leaves, and what a failing disk does."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from cluster.replication import solo
from cluster.replication.log import Leadership, NotProposed, ProposalUnknown
from cluster.replication.solo import SoloLog, SoloLogBroken
from cluster.replication.term import TermFile, TermFileBroken


class Recorder:
    def __init__(self) -> None:
        self.commands: list[bytes] = []

    def apply(self, command: bytes) -> object:
        self.commands.append(command)
        return len(self.commands)

    def snapshot(self) -> Callable[[], Iterator[bytes]]:
        raise NotImplementedError

    def restore(self, pieces: Iterable[bytes]) -> Callable[[], object]:
        raise NotImplementedError


async def lived(folder: Path, *commands: bytes) -> list[bytes]:
    """Start, propose, stop; what had been replayed at the start."""
    log, machine, told = SoloLog(folder), Recorder(), list[Leadership]()
    await log.start(machine, told.append)
    replayed = list(machine.commands)
    await asyncio.gather(*[log.propose(command) for command in commands])
    await log.stop()
    return replayed


async def test_the_term_rises_with_every_start(tmp_path: Path) -> None:
    terms = []
    for _ in range(3):
        log = SoloLog(tmp_path)
        await log.start(Recorder(), lambda now: terms.append(now.term) if now.is_leader else None)
        await asyncio.sleep(0)
        await log.stop()
    assert terms == [1, 2, 3]


@pytest.mark.parametrize("tail", [b"\x07", bytes(7), bytes(300), b"\xff" * 300, b"\x04\x00\x00\x00wronglast"])
async def test_a_torn_tail_is_cut_off_with_a_line(
    tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await lived(tmp_path, b"one", b"", b"three")
    path = tmp_path / "commands.log"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert await lived(tmp_path, b"four") == [b"one", b"", b"three"]
    assert f"a torn tail of {len(tail)} bytes" in caplog.text
    caplog.clear()
    assert await lived(tmp_path) == [b"one", b"", b"three", b"four"]
    assert not caplog.text


async def test_whatever_is_missing_at_the_end_the_rest_is_there(tmp_path: Path) -> None:
    commands = [b"a", b"bb", b"", b"dddd"]
    await lived(tmp_path, *commands)
    path = tmp_path / "commands.log"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = await lived(tmp_path)
        assert kept == commands[: len(kept)]
        assert len(kept) < len(commands)


async def test_a_file_of_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "commands.log"
    path.write_bytes(b"minutes of the last meeting")
    with pytest.raises(SoloLogBroken, match=r"commands\.log"):
        await lived(tmp_path)
    assert path.read_bytes() == b"minutes of the last meeting"


async def test_nothing_is_applied_or_answered_before_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, machine = SoloLog(tmp_path), Recorder()
    await log.start(machine, lambda _now: None)
    applied_at_sync: list[int] = []

    def sync(handle: int) -> None:
        applied_at_sync.append(len(machine.commands))

    monkeypatch.setattr(solo.os, "fdatasync", sync)
    first = log.propose(b"0")
    await asyncio.sleep(0)
    others = [log.propose(b"%d" % number) for number in range(1, 100)]
    assert not first.done()
    assert await first == 1
    assert await asyncio.gather(*others) == list(range(2, 101))
    assert applied_at_sync == [0, 1], "one sync for the first, one for all that waited"
    await log.stop()


async def test_a_failing_disk_stops_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fatal: list[BaseException] = []
    log, machine, told = SoloLog(tmp_path, on_fatal=fatal.append), Recorder(), list[Leadership]()
    await log.start(machine, told.append)

    def fail(handle: int) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(solo.os, "fdatasync", fail)
    first = log.propose(b"first")
    await asyncio.sleep(0)
    second = log.propose(b"second")
    for future in (first, second):
        with pytest.raises(ProposalUnknown):
            await future
    await asyncio.sleep(0)
    assert [type(error) for error in fatal] == [OSError]
    assert not machine.commands
    assert not told[-1].is_leader
    with pytest.raises(NotProposed):
        await log.propose(b"third")
    await log.stop()


async def test_what_waits_at_the_stop_is_unknown(tmp_path: Path) -> None:
    log = SoloLog(tmp_path)
    await log.start(Recorder(), lambda _now: None)
    first = log.propose(b"first")
    await asyncio.sleep(0)
    second = log.propose(b"second")
    await log.stop()
    assert await first == 1
    with pytest.raises(ProposalUnknown):
        await second
    await log.stop()


# The file of the term.


def test_term_and_vote_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "term.json"
    assert TermFile(path).load() == (0, None)
    for term, vote in ((1, None), (7, "n2"), (8, "ü")):
        TermFile(path).store(term, vote)
        assert TermFile(path).load() == (term, vote)
    assert [each.name for each in tmp_path.iterdir()] == ["term.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x00" * 60,
        b"[]",
        b'{"format": 1, "term": 3}',
        b'{"format": 1, "term": 3, "vote": null, "check": 0}',
    ],
)
def test_a_damaged_term_is_not_taken_for_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "term.json"
    path.write_bytes(content)
    with pytest.raises(TermFileBroken, match=r"term\.json"):
        TermFile(path).load()


def test_a_flipped_digit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "term.json"
    TermFile(path).store(31, "n2")
    path.write_bytes(path.read_bytes().replace(b"31", b"30"))
    with pytest.raises(TermFileBroken):
        TermFile(path).load()


def test_a_half_written_new_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "term.json"
    TermFile(path).store(3, "n2")
    (tmp_path / "term.json.new").write_bytes(b"{")
    assert TermFile(path).load() == (3, "n2")
    TermFile(path).store(4, None)
    assert TermFile(path).load() == (4, None)
