"""What fuzzing finds is not lost when the time is over, and nothing is called clean that was not tried."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import FOUND, Kept
from tests.fuzz.__main__ import main


def test_a_failure_is_noted_before_it_is_made_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tmp_path / "found"
    monkeypatch.setenv(FOUND, str(found))
    failed: list[bool] = []

    @settings(database=Kept(tmp_path / "kept"), derandomize=False, deadline=None)
    @given(st.integers(0, 1 << 40))
    def target(number: int) -> None:
        if number > 1000:
            failed.append(found.exists())
            raise ValueError(str(number))

    def notes() -> set[str]:
        return set(found.read_text().splitlines())

    with pytest.raises(ValueError, match=r"^1001\b"):
        target()
    assert failed[0] is False
    assert all(failed[1:])
    assert len(failed) > 5, "there was something to make small"
    here = "tests/unit/test_fuzzing.py::test_a_failure_is_noted_before_it_is_made_small"
    assert notes() == {here}
    # What failed in an earlier round is in the database already.
    found.unlink()
    with pytest.raises(ValueError, match=r"^1001\b"):
        target()
    assert notes() == {here}


def test_what_does_not_fail_is_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOUND, str(tmp_path / "found"))

    @settings(database=Kept(tmp_path / "kept"), derandomize=False, deadline=None, max_examples=30)
    @given(st.integers())
    def target(number: int) -> None:
        pass

    target()
    assert not (tmp_path / "found").exists()


class Rounds:
    """What pytest does, round by round: it passes, it notes a failure, or the time is over."""

    def __init__(self, *rounds: str) -> None:
        self._rounds = list(rounds)

    def __call__(self, command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert not any("hypothesis-seed" in word for word in command), "with a seed nothing is kept"
        for word in self._rounds.pop(0).split():
            if word == "found":
                Path(env[FOUND]).write_text("tests/fuzz/test_files.py::test_x\n" * 3)
            elif word == "over":
                raise subprocess.TimeoutExpired(command, 1.0)
            elif word == "fails":
                return subprocess.CompletedProcess(command, 3, "1 failed")
        said = "tests/fuzz/test_files.py::test_x:\n\n  - 100 passing, 0 failing, and 0 invalid\n"
        return subprocess.CompletedProcess(command, 0, said)


@pytest.mark.parametrize(
    ("rounds", "status", "says"),
    [
        (["passes", "over"], 0, "nothing was found in 100 examples"),
        (["passes", "found over"], 1, "failed: tests/fuzz/test_files.py::test_x\n"),
        (["found over"], 1, "failed: tests/fuzz/test_files.py::test_x\n"),
        (["over"], 1, "not a single round was finished"),
        (["passes", "fails"], 3, "1 failed"),
    ],
)
def test_only_what_was_tried_and_did_not_fail_is_good(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rounds: list[str], status: int, says: str
) -> None:
    monkeypatch.setattr(subprocess, "run", Rounds(*rounds))
    assert main(["--minutes", "60"]) == status
    out = capsys.readouterr().out
    assert says in out
    assert ("nothing was found" in out) == (status == 0)
    assert ("again: OUTLAST_FUZZ_EXAMPLES=" in out) == (status != 0 and "single" not in says)
