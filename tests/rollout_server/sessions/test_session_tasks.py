"""Tasks for agents: which settings fit together."""

from __future__ import annotations

from typing import Any

import pytest

from areal_like.errors import ConfigError
from rollout_server.tasks.base import make_task

AGENTS = {"_target_": "tests.support.agent_tasks.AgentTask"}
ENVIRONMENTS = {"_target_": "tests.support.environment_tasks.EchoTask"}
SORT = {"name": "sort"}


def mixture(*parts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"name": "mixture", "tasks": list(parts), **settings}


def test_who_makes_the_samples() -> None:
    cases: list[tuple[dict[str, Any], bool, bool]] = [
        (SORT, False, False),
        (SORT | {"external": True}, False, True),
        ({"name": "external"}, False, True),
        (AGENTS, True, True),
        (mixture(AGENTS, SORT), True, True),
        (mixture(SORT, SORT, external=True), False, True),
        (mixture({"name": "external"}, SORT, external=True), False, True),
    ]
    for settings, has_agent, uses_sessions in cases:
        task = make_task(settings, seed=0)
        assert (task.has_agent, task.uses_sessions) == (has_agent, uses_sessions), settings
        assert task.fingerprint()
    plain, outside = (make_task(settings, seed=0) for settings in (SORT, SORT | {"external": True}))
    assert plain.fingerprint() == outside.fingerprint(), "the examples are the same"


def test_which_examples_of_a_mixture_have_a_reward() -> None:
    # An agent that returns no reward fails its sample, also next to a task that computes one.
    task = make_task(mixture(AGENTS | {"num_train": 5}, SORT), seed=0)
    assert task.has_reward
    assert [task.is_rewarded(task.example("train", index)) for index in (4, 5)] == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "external", "external": False}, "leave the setting out"),
        (ENVIRONMENTS | {"external": True}, "has an environment"),
        (mixture(AGENTS, ENVIRONMENTS), "environments or agents"),
        (mixture(SORT, ENVIRONMENTS, external=True), "environments or agents"),
        (mixture(SORT, SORT | {"external": True}), "external=true of the mixture itself"),
        (mixture({"name": "external"}, SORT), "external=true of the mixture itself"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(settings, seed=0)
