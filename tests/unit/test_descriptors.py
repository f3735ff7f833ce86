"""Descriptors: a node takes what the system gives, and no more clients than leave enough for the rest."""

import logging
import resource

import pytest

from coordinator.descriptors import SPARE, make_room

NO_LIMIT = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "then", "room"),
    [
        (NO_LIMIT, NO_LIMIT, None, 4096),
        (4096 + SPARE, 4096 + SPARE, None, 4096),
        (1024, 1 << 20, (1 << 20, 1 << 20), 4096),
        (1024, NO_LIMIT, (4096 + SPARE, NO_LIMIT), 4096),
        (1024, 4096, (4096, 4096), 4096 - SPARE),
        (1024, 1024, (1024, 1024), 512),
        (1, 1, (1, 1), 1),
    ],
)
def test_the_limit_is_raised_as_far_as_it_goes(monkeypatch, caplog, soft, hard, then, room):
    done = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: done.append(limits))
    caplog.set_level(logging.INFO)
    assert make_room(4096) == room
    assert done == ([] if then is None else [then])
    assert ("max_connections" in caplog.text) == (room < 4096)


def test_a_system_that_refuses_is_told_of(monkeypatch, caplog):
    def refuse(*_):
        raise ValueError("not so many")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (2000, NO_LIMIT))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert make_room(4096) == 1000
    assert "not so many" in caplog.text
