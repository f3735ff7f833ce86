"""Records are values, and the type checker lets nobody change one."""

import sys
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest

from coordinator.protocol.record import record
from coordinator.protocol.transaction import Branch, Transaction


@record
class Account:
    name: str
    cents: int = 0


def test_records_of_equal_fields_are_equal_and_hash_alike():
    assert Account(name="a") == Account(name="a", cents=0)
    assert hash(Account(name="a")) == hash(Account(name="a"))
    assert replace(Account(name="a"), cents=1) == Account(name="a", cents=1) != Account(name="a")


def test_a_record_has_no_room_for_what_it_was_not_given():
    with pytest.raises(AttributeError):
        Account(name="a").owner = "b"


@pytest.mark.parametrize("kind", [Branch, Transaction])
def test_those_of_the_core_are_records(kind):
    assert kind.__slots__ == tuple(kind.__dataclass_fields__)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("branch.vote = None", 'Property "vote" defined in "Branch" is read-only'),
        ("branch.votes = None", "has no attribute"),
        ('Branch("a", "b")', "Too many positional arguments"),
        ('Branch(name="a", participant="b")', None),
    ],
)
def test_the_type_checker_lets_nobody_change_one(line, complaint, tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        f'from coordinator.protocol.transaction import Branch\n\nbranch = Branch(name="a", participant="a")\n{line}\n'
    )
    checker = run(
        [sys.executable, "-m", "mypy", "--strict", str(module)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (checker.returncode == 0) is (complaint is None), checker.stdout
    assert complaint is None or complaint in checker.stdout
