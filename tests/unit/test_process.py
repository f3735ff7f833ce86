"""What is told of a process that has ended."""

import pytest

from cluster.process import Process, Program

AT = "2026-11-22 01:47:41,356"
REASON = f"{AT} CRITICAL coordinator: node n2 stops: its log is not here"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        (f"{AT} INFO a: it listens\n{REASON}\n{AT} INFO b: lost the connection to n1\n", REASON),
        (f"{REASON}\nKeyError: 'x'\n", "KeyError: 'x'"),
        (f"{AT} INFO a: it begins\n", f"{AT} INFO a: it begins"),
    ],
    ids=["nothing", "a connection is closed after it", "a defect", "killed"],
)
def test_its_last_words(tmp_path, log, words):
    (tmp_path / "log.txt").write_text(log)
    assert Process("n2", Program(module="m", arguments=(), log=tmp_path / "log.txt"), tether=None).last_words() == words
