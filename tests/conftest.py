"""Fixtures for all tests; what they are made of is in `tests.support`. And which tests must be asked for."""

import os
from collections.abc import AsyncIterator
from typing import Final

import pytest

from participants.null import NullManager
from participants.server import Participant, start
from tests.support.nodes import RunningNode, running
from tests.support.participants import ScriptedParticipant

ASKED_FOR_BY: Final = {"long": "OUTLAST_LONG", "older": "OUTLAST_OLDER"}
"""Markers of tests that run only if a variable is set. Others are left out: to skip is to say that something lacks."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unasked = {mark for mark, variable in ASKED_FOR_BY.items() if not os.environ.get(variable)}
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
async def node() -> AsyncIterator[RunningNode]:
    """A node alone on a log in memory."""
    async with running() as node:
        yield node


@pytest.fixture
async def null() -> AsyncIterator[Participant]:
    """A real participant server that votes prepared on everything."""
    participant = await start(NullManager())
    yield participant
    await participant.stop()


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedParticipant]:
    """A participant that does as it is told."""
    async with ScriptedParticipant() as participant:
        yield participant
