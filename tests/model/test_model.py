"""The rules of production hold in every state of every world; every known-bad rule is caught."""

import pytest

from participants.resource import State
from tests.model.explorer import explore
from tests.model.scopes import SCOPES
from tests.model.variants import VARIANTS, HastyLeader
from tests.model.world import Rules, Scope, World


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_every_state_is_sound_and_none_is_stuck(scope):
    report = explore(World(scope))
    assert not report.trace, "\n" + "\n".join(report.trace)
    assert report.settled


@pytest.mark.parametrize("name", VARIANTS)
def test_every_known_bad_rule_is_caught(name):
    variant = VARIANTS[name]
    report = explore(World(variant.scope, variant.rules()), limit=100_000)
    conversation = "\n".join(report.trace)
    print(f"{name}, in {report.steps} steps:\n{conversation}")
    assert report.trace, "the explorer did not notice"
    assert variant.complaint in conversation


def test_a_shortest_conversation_reads_like_one():
    variant = VARIANTS["no tombstone after an abort"]
    assert explore(World(variant.scope, variant.rules())).trace == (
        "n1 takes over",
        "n1 begins m-1-1 with a",
        "n1 sees the deadline pass, decides: abort m-1-1",
        "a receives abort m-1-1 of n1   [unknown -> aborted]",
        "a receives prepare m-1-1 of n1   [aborted -> working]",
        "!! a acknowledged the decision on m-1-1, and holds its locks again",
    )


def test_a_hasty_leader_does_no_harm_because_commit_is_conditional():
    assert explore(World(Scope(2, 1), Rules(protocol=HastyLeader()))).trace == ()


def test_the_walk_meets_every_kind_of_end():
    """A world that never commits, say, would prove little."""
    world = World(Scope(2, 1))
    explore(world)
    states = {part.state for site in world.sites for part in site.parts}
    assert states == set(State)
    assert {outcome for log in world.logs for answers in log.answers for outcome in answers} == {"commit", "abort"}
    assert any(log.ledgers[-1].epoch == 2 and log.settled for log in world.logs)


@pytest.mark.parametrize("scope", [Scope(1, 2), Scope(1, 1, forgetting=True), Scope(2, 0), Scope(2, 1)], ids=str)
def test_repeating_answers_at_once_loses_nothing(scope):
    # Named, because each world has its own idea of who comes first among those it takes for each other.
    hasty, patient = World(scope), World(scope)
    hasty.interchangeable = patient.interchangeable = False
    patient.repeats_at_once = False
    at_once, stepwise = explore(hasty, outlines=True), explore(patient, outlines=True)
    assert at_once.outlines == stepwise.outlines
    assert at_once.states < stepwise.states


def test_taking_participants_for_each_other_loses_nothing():
    reduced = explore(World(Scope(2, 0)))
    world = World(Scope(2, 0))
    world.interchangeable = False
    full = explore(world)
    assert reduced.states < full.states <= 2 * reduced.states
    assert not full.trace
