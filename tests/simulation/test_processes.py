"""Processes that run together end together."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.processes import EndedBadly, outputs_of

ROOT = Path(__file__).parents[2]
SAYS_SO_AND_STAYS = "import sys, time; print('up', file=sys.stderr, flush=True); time.sleep(600)"
WAITS_FOR_IT = """
import pathlib, sys, time
until = time.monotonic() + 60
while not pathlib.Path(sys.argv[1]).exists() and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(3)
"""
LEAVES_A_MARK = """
import os, pathlib, sys, time
mark = pathlib.Path(sys.argv[1])
(mark.parent / "new").write_text(str(os.getpid()))
(mark.parent / "new").rename(mark)
time.sleep(600)
"""
RUNS_ONE = """
import signal, sys
from tests.simulation.processes import leave, outputs_of
signal.signal(signal.SIGTERM, leave)
outputs_of([[sys.executable, "-c", sys.argv[1]]])
"""


def test_what_all_have_printed() -> None:
    commands = [[sys.executable, "-c", f"print({number})"] for number in range(3)]
    assert outputs_of(commands) == ["0\n", "1\n", "2\n"]


def test_when_one_ends_badly_none_is_left(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(EndedBadly, match="ended with 3: "):
        outputs_of([[sys.executable, "-c", script, str(mark)] for script in (LEAVES_A_MARK, WAITS_FOR_IT)])
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_when_one_cannot_start_none_is_left(tmp_path: Path) -> None:
    began = [[sys.executable, "-c", LEAVES_A_MARK, str(tmp_path / "mark")], [str(tmp_path / "no such program")]]
    with pytest.raises(FileNotFoundError):
        outputs_of(began)  # which waits for the first one, and that would take minutes


def test_whoever_is_told_to_end_leaves_none_behind() -> None:
    command = [sys.executable, "-c", RUNS_ONE, SAYS_SO_AND_STAYS]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)  # to the end of what its child, too, could write to
        assert process.returncode == 1
    finally:
        process.kill()
        process.wait()
