"""Rows and keys: a dict's meaning, for less."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.rows import Keys, Rows, rows_of

STEPS = st.lists(st.tuples(st.sampled_from(["add", "put", "change", "drop", "freeze", "copy"]), st.integers(0, 3000)))


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_rows_are_a_map_and_what_was_frozen_stays(steps: list[tuple[str, int]]) -> None:
    rows, model = Rows(), {}
    frozen = []
    newest = 0
    for what, value in steps:
        if what == "add":
            newest += value + 1
            rows[newest] = model[newest] = b"%d" % value
        elif what == "put":
            # Anywhere, which is rare: what a restored ledger learns of what was lost.
            newest = max(newest, value * 7)
            rows[value * 7] = b"put"
            model = dict(sorted({**model, value * 7: b"put"}.items()))
        elif what == "change" and model:
            number = list(model)[value % len(model)]
            rows[number] = model[number] = None
        elif what == "drop" and model:
            number = list(model)[value % len(model)]
            del rows[number], model[number]
        elif what == "freeze":
            frozen.append((rows.freeze(), dict(model)))
        elif what == "copy":
            frozen.append((rows.copy().freeze(), dict(model)))
        assert list(rows.items()) == list(model.items())
    assert list(rows) == list(model)
    assert list(reversed(rows)) == list(reversed(model))
    assert len(rows) == len(model)
    for number in range(newest + 2):
        assert (number in rows) == (number in model)
        assert rows.get(number) == model.get(number)
    for chunks, then in frozen:
        assert dict(row for place, chunk in chunks for row in rows_of(place, chunk)) == then


def test_what_is_not_there_is_not_found() -> None:
    rows = Rows()
    rows[5] = b"x"
    for number in (4, 6, 5000):
        with pytest.raises(KeyError):
            _ = rows[number]
        with pytest.raises(KeyError):
            del rows[number]
    assert next(reversed(Rows()), None) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.text(max_size=3), st.integers(0, 2**104 - 1)), max_size=50))
def test_keys_are_a_map(steps: list[tuple[bool, str, int]]) -> None:
    keys, model = Keys(), {}
    for add, key, number in steps:
        if add:
            keys[key] = model[key] = number
        elif key in model:
            del keys[key], model[key]
        else:
            with pytest.raises(KeyError):
                del keys[key]
        assert len(keys) == len(model)
    copy = keys.copy()
    assert copy == keys
    for _add, key, _number in steps:
        assert keys.get(key) == model.get(key)
        assert (key in keys) == (key in model)
    keys["one more"] = 1
    assert copy != keys


def test_keys_in_one_bucket_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.rows._digest", lambda key: (b"", key.encode().rjust(14, b"\0")))
    keys = Keys()
    for number in range(300):
        keys[str(number)] = number
    assert [keys.get(str(number)) for number in range(301)] == [*range(300), None]
    for number in range(0, 300, 2):
        del keys[str(number)]
    assert [number for number in range(300) if str(number) in keys] == list(range(1, 300, 2))
