"""Records are values that nobody can change, and the type checker says so."""

import sys
from pathlib import Path
from subprocess import run

import pytest
from msgspec import structs

from coordinator.protocol.entries import Ended
from coordinator.protocol.record import Record, replace
from coordinator.protocol.transaction import Branch


class Account(Record, frozen=True):
    name: str
    cents: int = 0


def test_records_of_equal_fields_are_equal_and_hash_alike():
    assert Account(name="a") == Account(name="a", cents=0)
    assert hash(Account(name="a")) == hash(Account(name="a"))
    assert replace(Account(name="a"), cents=1) == Account(name="a", cents=1) != Account(name="a")


@pytest.mark.parametrize(
    ("of", "changes"),
    [
        (Account(name="a"), {"cents": 1}),
        (Account(name="a", cents=2), {"cents": 1, "name": "b"}),
        (Account(name="a"), {}),
        (Ended(gid="m-1-1"), {"gid": "m-1-2"}),
        (Branch(name="a", participant="b", payload=b"x"), {"payload": None, "retryable": True}),
    ],
)
def test_a_record_is_replaced_by_one_that_differs_in_the_changes_alone(of, changes):
    before = structs.asdict(of)
    after = replace(of, **changes)
    assert structs.asdict(after) == {**before, **changes}
    assert type(after) is type(of)
    assert structs.asdict(of) == before
    assert after is not of


def test_a_record_is_not_given_a_field_that_it_lacks():
    with pytest.raises(TypeError, match="owner"):
        replace(Account(name="a"), owner="b")


@pytest.mark.parametrize("name", ["name", "owner"])
def test_a_record_can_neither_be_changed_nor_be_given_more(name):
    with pytest.raises(AttributeError):
        setattr(Account(name="a"), name, "b")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("branch.vote = None", 'Property "vote" defined in "Branch" is read-only'),
        ("branch.votes = None", "has no attribute"),
        ('Branch("a", b"b")', 'has incompatible type "bytes"'),
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
