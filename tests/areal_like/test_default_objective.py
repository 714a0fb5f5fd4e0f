"""`objective=auto`: what it resolves to, where it is written down, and that a run keeps its objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from areal_like.automatic_settings import resolved
from areal_like.config import Config, from_mapping
from areal_like.config.default_objective import (
    MAX_SHORT_ANSWER,
    as_setting,
    default_objective,
)
from areal_like.config.job import _TASKS_OF_ONE_TURN
from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config, load_role_config, role_arguments, save_config
from rollout_server.tasks.base import TASKS, Task
from trainer.step.recipe import StepRecipe, warn_of_products

LONG = "sampling.max_new_tokens=2048"
TURNS = "task._target_=my_module.MyTask"


@pytest.fixture(autouse=True)
def no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in the working directory, such as that of `make run`, would keep its own objective."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("settings", "longest", "limit"),
    [
        ([], 10, "sampling.max_new_tokens=10"),
        (["sampling.max_new_tokens=512"], 512, "sampling.max_new_tokens=512"),
        (["sampling.max_new_tokens=513"], 513, "sampling.max_new_tokens=513"),
        ([LONG, "rollout.max_context=2049"], 2048, "sampling.max_new_tokens=2048"),
        (["task=adding"], 160, "episode.max_turns=16 times sampling.max_new_tokens=10"),
        (["task=adding", "episode.max_turns=1"], 10, "sampling.max_new_tokens=10"),
        (["task=adding", "rollout.max_context=100"], 99, "rollout.max_context=100"),
        (["task=adding", "episode.max_tokens=50"], 49, "episode.max_tokens=50"),
        (["task=adding", "rollout.max_context=100", "episode.max_tokens=150"], 149, "episode.max_tokens=150"),
        (["task=adding", "rollout.max_context=100", "episode.max_tokens=999"], 160, "episode.max_turns=16"),
        (["episode.max_tokens=5"], 10, "sampling.max_new_tokens=10"),
        (["task=adding", LONG], 4095, "trainer.tokens_per_microbatch=4096"),
        ([TURNS, "sampling.max_new_tokens=64"], 1024, "episode.max_turns=16 times"),
        (["task.external=true"], 160, "episode.max_turns=16 times"),
        (["task={name: mixture, tasks: [{name: sort}, {name: data}]}"], 10, "sampling.max_new_tokens=10"),
        (["task={name: mixture, tasks: [{name: sort}, {name: adding}]}"], 160, "episode.max_turns=16 times"),
    ],
)
def test_the_default_names_the_longest_answer(settings: list[str], longest: int, limit: str) -> None:
    config = load_config(settings)
    assert config.objective == {"name": "auto"} and config.resolved_objective == default_objective()
    assert config.longest_answer[0] == longest and config.longest_answer[1].startswith(limit)
    text = config.objective_choice
    assert f"objective=auto is {as_setting(config.resolved_objective)}: its weights are means" in text
    assert f"up to {longest} tokens: {limit}" in text
    assert load_config(
        [*settings, f"objective={as_setting(config.resolved_objective)}"]
    ) == dataclasses.replace(config, objective=config.resolved_objective), "the text is the setting"


def test_the_default_is_the_preset_gspo() -> None:
    assert load_config(["objective=gspo"]).objective == default_objective()
    config = Config(objective=default_objective())
    assert StepRecipe.of(config).objective.takes_parts == (config.overdue == "close") is True


@pytest.mark.parametrize(
    ("objective", "is_warned"),
    [
        ("auto", False),
        ("tis", True),
        ("{name: tis, level: token}", False),
        ("{name: tis, masks: [{name: opsm}]}", True),
        ("vcpo", True),
        ("{name: vcpo, cap: 0}", False),
        ("vespo", True),
        ("reinforce", False),
        ("oapl", False),
    ],
)
def test_products_over_long_answers_are_named(
    objective: str, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for longest in (MAX_SHORT_ANSWER, MAX_SHORT_ANSWER + 1):
        caplog.clear()
        config = load_config([f"objective={objective}", f"sampling.max_new_tokens={longest}"])
        warn_of_products(config, StepRecipe.of(config).objective)
        warned = f"a sample may have {longest} tokens (sampling.max_new_tokens={longest})" in caplog.text
        assert warned == (is_warned and longest > MAX_SHORT_ANSWER)


def test_every_task_is_known_to_have_turns_or_not() -> None:
    for name in set(TASKS.names()) - {"mixture"}:
        task = TASKS._named(name)
        may_have_turns = (
            task.environment is not Task.environment or task.agent is not Task.agent or name == "external"
        )
        assert (name not in _TASKS_OF_ONE_TURN) == may_have_turns, name


def test_all_roles_resolve_the_same_and_see_it() -> None:
    for settings in ([], [LONG]):
        config = load_config(settings)
        assert resolved(config).objective == load_role_config(settings).objective == config.resolved_objective
        assert role_arguments(settings, default_name="buffer")[0] == load_role_config(settings)
        named = dataclasses.replace(config, objective=config.resolved_objective)
        assert config.overdue == named.overdue and StepRecipe.of(config) == StepRecipe.of(named)
        assert named.objective_choice == "" and resolved(named).objective == named.objective


@pytest.mark.parametrize(
    "given",
    [
        ["objective.cap=3"],
        ["objective=auto", "objective.cap=3"],
        ["objective={name: auto, cap: 3}"],
        ["objective.masks=[{name: opsm}]"],
    ],
)
def test_auto_has_no_settings(given: list[str]) -> None:
    key = "masks" if "masks" in given[-1] else "cap"
    for role in (load_role_config, lambda settings: resolved(load_config(settings))):
        with pytest.raises(
            ConfigError, match=rf"objective\.{key}=.*: name the objective to change them\. Auto"
        ) as e:
            role([*given, LONG])
        assert "name: gspo" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="name the objective"):
        StepRecipe.of(from_mapping({"objective": {"name": "auto", "cap": 3}}))


def test_a_role_keeps_the_objective_of_its_run(tmp_path: Path) -> None:
    """A run whose roles are started by hand; an earlier release recorded its default objective."""
    given = [f"runs_dir={tmp_path}", "name=x", LONG]
    assert load_role_config(given).objective == default_objective()
    earlier: dict[str, Any] = {"name": "tis"}
    save_config(dataclasses.replace(load_config(given), objective=earlier), tmp_path / "x" / "config.yaml")
    assert load_role_config(given).objective == earlier
    assert load_role_config([*given, "objective.cap=3"]).objective == {"name": "tis", "cap": 3}
    assert load_role_config([*given, "objective=auto"]).objective == default_objective(), "chosen again"
    assert load_role_config([*given, "objective=ppo"]).objective == {"name": "ppo"}
    (tmp_path / "x" / "config.yaml").write_text("not: [a config")
    assert load_role_config(given).objective == default_objective()
