"""Reward functions written for verl or TRL, unchanged: how they are called, and what their results mean.

    verl   def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...
    TRL    def correct(completions, answer, **kwargs): ...

The argument `solution_str` marks verl's convention, `completions` TRL's (`function.py`).

verl: of a returned dict the key `score` is the reward, and its other finite numbers are metrics. (In this
project's own convention a dict has the parts of the reward, which are summed.) A row without `extra_info` has
an empty one.

TRL: a function is called for a batch, so `prompts`, `completions`, `completion_ids` and each column of the
rows are lists, and it returns one number for each completion. Here a reward is computed as soon as its own
completion is finished, so all lists have one item, and a function that compares completions with each other
does not work. None means that the function does not apply to the row: it adds nothing to the sum, and the
metric `skipped` is 1. `log_metric` makes metrics. `log_extra` is accepted and ignored. `trainer_state` and
`environments` do not exist here, because rollout servers compute the rewards and have neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from areal_like.errors import RewardError
from areal_like.trajectory import LARGEST_METRIC
from rollout_server.rewards.scores import number_of
from rollout_server.tasks.base import Completion, Example, Score

VERL = "solution_str"
TRL = "completions"
ABSENT = ("trainer_state", "environments")
"""Arguments of TRL's reward functions that have no counterpart here."""
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that TRL does not pass: the arguments in the plural contain them."""


def verl_score(returned: Any) -> Any:
    """Returns a dict with a `score` as a Score, and any other result unchanged."""
    if not isinstance(returned, Mapping) or "score" not in returned:
        return returned
    metrics: dict[str, float] = {}
    for key, value in returned.items():
        if key != "score":
            with contextlib.suppress(RewardError):  # verl only logs it
                metrics[str(key)] = number_of(value, of=str(key), largest=LARGEST_METRIC)
    return Score(value=returned["score"], metrics=metrics)


def trl_arguments(
    example: Example,
    completion: Completion,
    row: Mapping[str, Any],
    settings: Mapping[str, Any],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Returns the arguments of a call for one completion; the function's `log_metric` fills `metrics`.

    As in TRL, a completion is a text if the prompt is one, else the list of messages after the prompt. If the
    conversation does not start with the prompt, because an agent changed it, the list starts with the first
    message of the assistant.
    """

    def log_metric(name: str, value: Any) -> None:
        metrics[str(name)] = value

    said: Any = completion
    if not isinstance(example.prompt, str):
        said, num_before = list(completion.messages), len(example.prompt)
        if said[:num_before] != list(example.prompt):
            roles = [message.get("role") for message in said]
            num_before = roles.index("assistant") if "assistant" in roles else len(said)
        said = said[num_before:] or [{"role": "assistant", "content": str(completion)}]
    columns = {name: [value] for name, value in row.items() if name not in _NOT_COLUMNS}
    return {
        "answer": [example.answer],
        **columns,
        **settings,
        "prompts": [example.prompt],
        "completions": [said],
        "completion_ids": [list(completion.token_ids)],
        "log_metric": log_metric,
        "log_extra": _ignored,
    }


def trl_score(returned: Any, metrics: Mapping[str, float], *, path: str) -> Score:
    """Returns the reward of the only completion. Raises RewardError for anything but a list of one item.

    `path`: the function's, for the message.
    """
    try:
        (value,) = returned
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{path} must return a list with one number for each of `completions`: {error}"
        ) from None
    if value is None:
        return Score(metrics={**metrics, "skipped": 1.0})
    return Score(value=value, metrics=metrics)


def _ignored(column: str, values: Any) -> None:
    """TRL's `log_extra`."""
