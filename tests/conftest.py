"""Fixtures for all tests; what they are made of is in `tests.support`."""

from collections.abc import AsyncIterator

import pytest

from participants.null import NullManager
from participants.server import Participant, start
from tests.support.nodes import RunningNode, running
from tests.support.participants import ScriptedParticipant


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
