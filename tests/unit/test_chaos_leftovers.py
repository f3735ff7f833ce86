"""After a run that was killed its folders go, as soon as nobody uses them, and not before."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.chaos.leftovers import tethered, users
from cluster.process import Identity
from tests.support.waiting import wait_until

GONE = Identity(pid=1, started=1)
"""There is a process of that number, and it is another one."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "outlast-chaos-x"
    (made / "cluster" / "n1").mkdir(parents=True)
    (made / "cluster" / "n1" / "log.txt").touch()
    return made


@contextmanager
def user(folder: Path, how: str) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody who uses it, until its stdin is closed."""
    words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    inside = folder / "cluster" / "n1"
    with (inside / "log.txt").open("wb") as log:
        one = subprocess.Popen(
            [*words, f"--data={inside}"] if how == "was told of it" else words,
            stdin=subprocess.PIPE,
            stdout=log if how == "has opened a file in it" else subprocess.DEVNULL,
            cwd=inside if how == "works in it" else None,
        )
    with one:
        yield one


@pytest.mark.parametrize("how", ["was told of it", "works in it", "has opened a file in it"])
def test_who_uses_a_folder_is_found(folder: Path, how: str) -> None:
    assert users(folder) == []
    with user(folder, how) as one:
        assert users(folder) == [one.pid]
        assert users(folder.parent / "another") == []
        one.communicate()
    assert users(folder) == []


def test_a_folder_goes_when_its_last_user_has_gone(folder: Path) -> None:
    other = folder.parent / "outlast-chaos-y"
    other.mkdir()
    words = [f"{GONE.pid}:{GONE.started}", "--", str(folder), str(other)]
    with (
        user(folder, "works in it") as one,
        subprocess.Popen([sys.executable, "-P", "-m", "cluster.chaos.leftovers", *words]) as watch,
    ):
        # It looks at both of them, and at this one last.
        wait_until(lambda: not other.exists(), "the one that nobody uses has gone")
        assert folder.exists()
        one.communicate()
        assert watch.wait(timeout=30) == 0
    assert not folder.exists()


def test_what_is_paused_is_woken_to_end(folder: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with owner:
        known = Identity.of(owner.pid)
        assert known is not None
        word = f"{known.pid}:{known.started}"
        # In a session of its own: the system does not wake it.
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "cluster.tether", word, "http.server", "--bind", "127.0.0.1", "0"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as paused:
            try:
                identity = Identity.of(paused.pid)
                assert identity is not None
                wait_until(lambda: tethered(known) == [identity], "it is found")
                assert tethered(GONE) == []
                assert identity.signal(signal.SIGSTOP)
                wait_until(lambda: identity.paused, "it stands still")
                owner.communicate()
                tidy = [sys.executable, "-P", "-m", "cluster.chaos.leftovers", word, "--", str(folder)]
                assert subprocess.call(tidy) == 0
                assert not identity.alive
            finally:
                paused.kill()
    assert not folder.exists()


def test_nothing_is_touched_while_the_owner_is_there(folder: Path) -> None:
    mine = Identity.mine()
    words = [f"{mine.pid}:{mine.started}", "--", str(folder)]
    with subprocess.Popen([sys.executable, "-P", "-m", "cluster.chaos.leftovers", *words]) as watch:
        with pytest.raises(subprocess.TimeoutExpired):
            watch.wait(timeout=1.0)
        assert folder.exists()
        watch.kill()
    assert os.listdir(folder) == ["cluster"]
