"""The longest sequence of a job, with and without an environment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from areal_like.config import Config, EvalSetConfig, from_mapping
from areal_like.errors import ConfigError
from rollout_server.context_length import longest_evaluation, longest_sequence
from rollout_server.environments.base import Environment
from rollout_server.sources import _check_first
from rollout_server.tasks.base import Completion, Example, Split, Task


class OneAnswer(Task):
    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="", answer="")

    def reward(self, example: Example, completion: Completion) -> float:
        return 0.0


class ManyTurns(OneAnswer):
    def environment(self, example: Example) -> Environment | None:
        raise NotImplementedError


def config_of(**sections: Any) -> Config:
    trainer = {"tokens_per_microbatch": 1000} | sections.pop("trainer", {})
    return from_mapping({"trainer": trainer, "sampling": {"max_new_tokens": 50}} | sections)


@pytest.mark.parametrize(
    ("sections", "max_positions", "of_one", "of_many"),
    [
        ({}, 5000, 150, 900),  # 16 turns
        ({"episode": {"max_turns": 3}}, 5000, 150, 250),
        ({"episode": {"max_turns": 100}}, 5000, 150, 1000),
        ({}, 500, 150, 500),
        ({"episode": {"max_tokens": 400}}, 5000, 150, 400),
        ({"rollout": {"max_context": 700}, "episode": {"max_tokens": 400}}, 5000, 700, 700),
    ],
)
def test_longest_sequence(sections: dict[str, Any], max_positions: int, of_one: int, of_many: int) -> None:
    config = config_of(**sections)
    for task, want in (
        (OneAnswer(max_prompt_tokens=100), of_one),
        (ManyTurns(max_prompt_tokens=100), of_many),
    ):
        assert longest_sequence(config, task, max_positions=max_positions) == want


def test_a_single_turn_that_fits_no_microbatch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not fit into trainer\.tokens_per_microbatch=1000"):
        longest_sequence(config_of(), OneAnswer(max_prompt_tokens=951), max_positions=5000)
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        longest_sequence(config_of(), ManyTurns(), max_positions=50)


def test_a_group_of_episodes_must_fit_into_a_message() -> None:
    config = config_of(episode={"max_tokens": 100_000}, buffer={"max_message_bytes": 1 << 22})
    assert longest_sequence(config, OneAnswer(max_prompt_tokens=100), max_positions=5000) == 150
    with pytest.raises(ConfigError, match=r"up to 100000 tokens .* buffer\.max_message_bytes=4194304: raise"):
        longest_sequence(config, ManyTurns(max_prompt_tokens=100), max_positions=5000)


@pytest.mark.parametrize(
    ("one", "sections", "of_one", "of_many"),
    [
        ({}, {}, 150, 900),
        ({"max_new_tokens": 3000}, {}, 3100, 5000),  # more than a micro-batch of 1,000 tokens
        ({"max_new_tokens": 400}, {"episode": {"max_tokens": 700}}, 500, 700),
        ({"max_new_tokens": 400}, {"rollout": {"max_context": 700}}, 700, 700),
    ],
)
def test_evaluations_need_not_fit_into_a_microbatch(
    one: dict[str, Any], sections: dict[str, Any], of_one: int, of_many: int
) -> None:
    config, settings = config_of(**sections), EvalSetConfig(**one)
    found = [
        longest_evaluation(config, settings, task, max_positions=5000)
        for task in (OneAnswer(max_prompt_tokens=100), ManyTurns(max_prompt_tokens=100))
    ]
    assert found == [of_one, of_many]


def test_an_evaluation_without_room_is_refused() -> None:
    task = OneAnswer(max_prompt_tokens=100)
    with pytest.raises(ConfigError, match=r"max_new_tokens=500 .* no room .* the model's limit is 500"):
        longest_evaluation(config_of(), EvalSetConfig(max_new_tokens=500), task, max_positions=500)
    small = config_of(buffer={"max_message_bytes": 1 << 16})
    with pytest.raises(ConfigError, match=r"buffer\.max_message_bytes=65536: raise it"):
        longest_evaluation(small, EvalSetConfig(max_new_tokens=9000), task, max_positions=20_000)


@pytest.mark.parametrize(
    ("max_positions", "advice"),
    [(512, "the model's limit, so use another"), (513, "raise rollout.max_context")],
)
def test_a_first_message_without_room(max_positions: int, advice: str) -> None:
    chat = SimpleNamespace(supports_tools=True, render=lambda messages, tools: [0] * 512)
    renderer: Any = SimpleNamespace(chat=chat, max_positions=max_positions)
    with pytest.raises(ConfigError, match=f"have 512 tokens, and a sequence at most 512: .*{advice}"):
        _check_first(renderer, ([], []), context_tokens=512)
