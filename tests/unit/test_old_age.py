"""What says that memory and disk have levelled off would notice if they had not."""

import pytest

from tests.bench.old_age import Look, complaints

MIB = 1 << 20


def looks(size: object) -> list[Look]:
    return [Look(float(at), size(at) * MIB, size(at) * MIB) for at in range(300)]  # type: ignore[operator]


def test_what_goes_up_and_down_has_levelled_off() -> None:
    assert complaints("n1", looks(lambda at: 100 + at % 30)) == []
    assert complaints("n1", looks(lambda at: min(at, 150))) == []


@pytest.mark.parametrize("rate", [1, 0.2])
def test_what_grows_has_not(rate: float) -> None:
    found = complaints("n1", looks(lambda at: int(100 + rate * at)))
    assert len(found) == 2, found
    assert "n1's memory still grows" in found[0]
    assert "n1's disk still grows" in found[1]
