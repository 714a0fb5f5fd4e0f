"""Reward functions written for verl or TRL, unchanged: `rollout_server/rewards/library/conventions.py`."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library import make_rewards
from rollout_server.tasks.base import Completion, Example, Score

HERE = __name__


def scored(
    spec: Any, text: str, *, prompt: Any = "2+2=", answer: Any = "4", messages: Any = (), **row: Any
) -> Score:
    completion = Completion(text, token_ids=[1, 2, 3], turn_lengths=[3], messages=messages)
    score = make_rewards(spec).score(Example(prompt=prompt, answer=answer, metadata={"row": row}), completion)
    return score if isinstance(score, Score) else asyncio.run(score)


def correct(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """TRL's documented form, for texts."""
    assert set(kwargs) == {"prompts", "completion_ids", "log_metric", "log_extra", "level"}
    assert kwargs["prompts"] == ["2+2="] and kwargs["completion_ids"] == [[1, 2, 3]]
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def of_messages(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """TRL's form for conversations, as `trl.rewards.think_format_reward`."""
    return [float(completion[0]["content"] == "4") for completion in completions]


async def waited(completions: list[str], solution: list[str], log_metric: Any, log_extra: Any) -> list[Any]:
    await asyncio.sleep(0)
    log_metric("length", len(completions[0]))
    log_extra("solution", solution)
    return [None if right == "unparsable" else 0.5 for right in solution]


def count_turns(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    return [float(len(messages)) for messages in completions]


def misbehaves(completions: list[str], **kwargs: Any) -> Any:
    return {"number": 1.0, "none": [], "two": [1.0, 2.0], "word": ["good"]}[completions[0]]


def with_state(completions: list[str], trainer_state: Any) -> list[float]:
    return [0.0]


def with_optional_state(completions: list[str], trainer_state: Any = None, bonus: float = 0) -> list[float]:
    return [1.0 + bonus]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> Any:
    """verl's form, with a dict as result."""
    return {
        "score": float(solution_str == ground_truth),
        "acc": solution_str == "4",
        "pred": "x",
        **extra_info,
    }


async def compute_later(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> dict[str, Any]:
    return {"score": -1.0, "chars": len(solution_str), "empty": extra_info == {}}


def test_trl_functions_get_lists_of_one() -> None:
    score = scored(f"{HERE}.correct", "4", level=3, completion="a column that is not passed")
    assert score.parts == {"correct": 1.0} and score.value == 1.0
    assert scored(f"{HERE}.correct", "5", level=3).value == 0.0
    weighted = [{"name": f"{HERE}.correct", "weight": 2.0}, {"name": f"{HERE}.of_messages", "weight": 0.5}]
    user = [{"role": "user", "content": "2+2="}]
    assert scored(weighted[1:], "4", prompt=user).value == 0.5
    assert scored(f"{HERE}.with_optional_state", "4").value == 1.0
    assert scored({"name": f"{HERE}.with_optional_state", "bonus": 2}, "4").value == 3.0


def test_trl_functions_get_the_messages_after_the_prompt() -> None:
    prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}]
    turns = [
        {"role": "assistant", "content": "Let me count."},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    found = scored(f"{HERE}.count_turns", "4", prompt=prompt, messages=[*prompt, *turns])
    assert found.value == 3.0
    assert scored(f"{HERE}.count_turns", "4", prompt=prompt).value == 1.0


def test_trl_functions_may_be_async_log_and_not_apply() -> None:
    assert make_rewards(f"{HERE}.waited").is_async
    score = scored(f"{HERE}.waited", "four", solution="4")
    assert score.value == 0.5 and score.metrics == {"waited/length": 4.0}
    both = [f"{HERE}.with_optional_state", f"{HERE}.waited"]
    score = scored(both, "four", solution="unparsable")
    assert score.value == 1.0 and score.metrics == {"waited/length": 4.0, "waited/skipped": 1.0}


@pytest.mark.parametrize("kind", ["number", "none", "two", "word"])
def test_results_of_trl_functions_are_checked(kind: str) -> None:
    with pytest.raises(RewardError, match=r"must return a list with one number|must be a number, got str"):
        scored(f"{HERE}.misbehaves", kind)


def test_arguments_that_a_server_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"with_state needs TRL's `trainer_state`, which a rollout server"):
        make_rewards(f"{HERE}.with_state")
    with pytest.raises(RewardError, match=r"waited needs solution, which"):
        scored(f"{HERE}.waited", "4")


def test_the_score_of_a_verl_function_is_its_reward() -> None:
    spec = [f"{HERE}.compute_score", {"name": f"{HERE}.compute_later", "weight": 2.0}]
    score = scored(spec, "4", data_source="sums", extra_info={"turns": 2})
    assert score.parts == {"compute_score": 1.0, "compute_later": -2.0} and score.value == -1.0
    assert score.metrics == {
        "compute_score/acc": 1.0,
        "compute_score/turns": 2.0,
        "compute_later/chars": 1.0,
        "compute_later/empty": 0.0,
    }
    assert scored(spec, "4", data_source="sums").metrics["compute_later/empty"] == 1.0


def odd_extras(solution_str: str, ground_truth: str) -> dict[str, Any]:
    return {
        "score": 1.0,
        "nan": float("nan"),
        "infinite": np.inf,
        "huge": 10**400,
        "list": [1.0],
        "array": np.ones(2),
        "flag": np.bool_(True),
        "scalar": np.array(0.5),
    }


def test_extra_values_of_a_verl_function_fail_no_sample() -> None:
    score = scored(f"{HERE}.odd_extras", "4")
    assert score.value == 1.0 and score.metrics == {"odd_extras/flag": 1.0, "odd_extras/scalar": 0.5}


def echo(completions: list[Any], answer: list[Any], bonus: float = 0, **kwargs: Any) -> list[float]:
    assert answer == ["a setting"] and kwargs["prompts"] == ["2+2="]
    return [float(completions == ["4"]) + bonus]


def test_settings_replace_columns_but_not_the_completion() -> None:
    settings = {"completions": ["5"], "prompts": [], "answer": ["a setting"], "bonus": 2}
    assert scored({"name": f"{HERE}.echo", **settings}, "4").value == 3.0


def test_a_conversation_that_does_not_start_with_the_prompt() -> None:
    prompt = [{"role": "user", "content": "2+2="}]
    system = [{"role": "system", "content": "Add."}]
    turns = [{"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
    spec = f"{HERE}.count_turns"
    assert scored(spec, "4", prompt=prompt, messages=[*system, *prompt, *turns]).value == 2.0
    assert scored(spec, "4", prompt=[*system, *prompt, *prompt], messages=turns).value == 2.0
    assert scored(spec, "4", prompt=prompt, messages=system).value == 1.0
