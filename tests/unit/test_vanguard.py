"""Who is sent entries at once."""

import pytest

from cluster.replication.vanguard import Vanguard

EVERYBODY = ("n2", "n3", "n4", "n5")


def among(vanguard: Vanguard, ids: tuple[str, ...] = EVERYBODY) -> set[str]:
    return {id_ for id_ in ids if id_ in vanguard}


@pytest.mark.parametrize(("followers", "size"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)])
def test_with_the_leader_it_is_a_majority(followers, size):
    ids = EVERYBODY[:followers]
    assert len(among(Vanguard(ids, 0.02))) == size
    assert 2 * (size + 1) > followers + 1


def test_it_begins_with_who_would_campaign_first():
    assert among(Vanguard(EVERYBODY, 0.02)) == {"n2", "n3"}


def test_who_is_not_able_loses_its_place_and_does_not_take_it_back():
    vanguard = Vanguard(EVERYBODY, 0.02)
    vanguard.choose(["n3", "n4", "n5"])
    assert among(vanguard) == {"n3", "n4"}
    vanguard.choose(EVERYBODY)
    assert among(vanguard) == {"n3", "n4"}


def test_where_too_few_are_able_it_is_filled_up():
    vanguard = Vanguard(EVERYBODY, 0.02)
    vanguard.choose(["n5"])
    assert among(vanguard) == {"n5", "n2"}


def test_who_answers_twice_as_fast_takes_a_place():
    vanguard = Vanguard(("n2", "n3"), 0.02)
    for _ in range(100):
        vanguard.answered("n2", 0.008)
        vanguard.answered("n3", 0.005)
    vanguard.choose(["n2", "n3"])
    assert "n2" in vanguard
    for _ in range(100):
        vanguard.answered("n3", 0.003)
    vanguard.choose(["n2", "n3"])
    assert "n3" in vanguard
    assert "n2" not in vanguard


def test_one_slow_answer_takes_nobodys_place():
    vanguard = Vanguard(("n2", "n3"), 0.02)
    for _ in range(100):
        vanguard.answered("n2", 0.003)
        vanguard.answered("n3", 0.003)
    vanguard.answered("n2", 0.04)
    vanguard.choose(["n2", "n3"])
    assert "n2" in vanguard


def test_it_is_time_for_those_that_trail_once_in_each_period():
    vanguard = Vanguard(("n2", "n3"), 0.02)
    assert vanguard.is_over(1.0)
    assert vanguard.trailing_due
    vanguard.trailing_due = False
    assert not vanguard.is_over(1.01)
    assert not vanguard.trailing_due
    assert vanguard.is_over(1.02)
    assert vanguard.trailing_due


def test_a_new_reign_knows_nothing_of_the_last():
    vanguard = Vanguard(("n2", "n3"), 0.02)
    vanguard.answered("n3", 0.001)
    vanguard.choose(["n3"])
    assert vanguard.is_over(1.0)
    vanguard.begin()
    assert among(vanguard) == {"n2"}
    assert not vanguard.trailing_due
    assert vanguard.is_over(0.0)
