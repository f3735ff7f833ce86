"""A journal on a real disk: its process is killed, its disk fills up."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.replication.disk import FolderLocked
from cluster.replication.journal import JournalHandlers, open_journal
from cluster.replication.pump import ThreadPump
from tests.support.journal_process import SETTINGS, command, votes

KILLS = 8
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.journal_process", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.processes
def test_kill_under_load_loses_nothing_durable(tmp_path: Path) -> None:
    rng = random.Random(1)
    durable = term = 0
    kept_from = 1
    for _ in range(KILLS):
        with started(tmp_path) as process:
            assert process.stdout is not None
            first, last, opened_term = map(int, process.stdout.readline().split())
            assert last >= durable
            assert opened_term >= term
            for _line in range(rng.randrange(1, 60)):
                durable, term = map(int, process.stdout.readline().split())
            process.kill()
            # What it said before it died counts too; the last line may be cut short.
            for line in process.stdout:
                if line.endswith("\n"):
                    durable, term = map(int, line.split())
        journal = open_journal(tmp_path, SETTINGS)
        assert journal.last_index >= durable
        assert journal.term >= term
        assert journal.vote == votes(journal.term)
        assert journal.first_index >= first
        assert [entry[0] for entry in journal] == [command(index, term_) for _command, index, term_ in journal]
        assert [entry[1] for entry in journal] == list(range(journal.first_index, journal.last_index + 1))
        assert journal.oldest_index <= max(journal.first_index - 200, 1)
        kept_from = journal.oldest_index
        journal.close()
    assert durable > 3000
    assert kept_from > 1, "it never compacted"


@pytest.mark.processes
def test_two_processes_cannot_open_one_journal(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(FolderLocked, match="another process"):
            open_journal(tmp_path, SETTINGS)
    open_journal(tmp_path, SETTINGS).close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KiB, and no more."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system of 64 KiB cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def test_a_disk_of_64_kib_fills_up_and_has_room_again(tiny_disk: Path) -> None:
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(16 * 1024))
    folder = tiny_disk / "journal"
    journal = open_journal(folder)
    loop = asyncio.get_running_loop()
    full: asyncio.Future[str] = loop.create_future()
    room: asyncio.Future[None] = loop.create_future()
    fatal: list[BaseException] = []
    journal.start(
        ThreadPump(loop, "journal"),
        JournalHandlers(
            durable=lambda _position: None,
            full=full.set_result,
            room=lambda: room.set_result(None),
            fatal=fatal.append,
        ),
    )
    index = 0
    while not full.done():
        index += 1
        assert index < 1000, "64 KiB are never full"
        journal.append(os.urandom(300), index, 1)
        arrived = loop.create_future()
        journal.after(journal.position, lambda arrived=arrived: arrived.set_result(None))  # type: ignore[misc]
        await asyncio.wait([arrived, full], return_when=asyncio.FIRST_COMPLETED)
    assert str(folder) in full.result()
    durable = journal.durable_index
    assert durable == index - 1
    assert durable * 300 > 20 * 1024, "most of the room was of use"
    journal.set_vote(5, "n1")
    assert journal.durable_index == durable

    ballast.unlink()
    await room
    await arrived
    assert journal.durable_index == index
    assert not fatal
    journal.close()
    journal = open_journal(folder)
    assert (journal.last_index, journal.term, journal.vote) == (index, 5, "n1")
    journal.close()


def test_what_was_durable_on_a_full_disk_is_there_after_it(tiny_disk: Path) -> None:
    folder = tiny_disk / "journal"
    journal = open_journal(folder)
    index = 0
    while journal.full is None:
        index += 1
        assert index < 1000
        journal.append(bytes([index % 256]) * 500, index, 1)
        journal._round()
    journal.close()
    journal = open_journal(folder)
    assert journal.last_index == index - 1
    assert [entry[0] for entry in journal] == [bytes([at % 256]) * 500 for at in range(1, index)]
    journal.close()
