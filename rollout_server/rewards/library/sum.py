"""The rewards that `task.reward` describes, and their weighted sum.

A description is a name (`exact`), the path of a function (`my_rewards.score`), a mapping with one of these as
`name` and settings, or a list of descriptions whose weighted values are added up. Rewards are imported on
use: an optional package is needed only by its own reward.

Parts of the sum include their weights, so the parts of a sample add up to its reward. A reward of weight 0 is
a metric instead. Synchronous rewards are computed one after the other; asynchronous ones run concurrently. If
one reward fails, the sample fails, because a partial sum is not a valid reward. Only the failure of a metric
(weight 0) is merely counted, as `<part>/failed`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np

from areal_like.errors import ConfigError, RewardError
from areal_like.registry import Registry
from areal_like.trajectory import GOLD_REWARD
from rollout_server.rewards.library.base import RewardFunction
from rollout_server.rewards.scores import as_score
from rollout_server.tasks.base import Completion, Example, Rewarded, Score

_LIBRARY = "rollout_server.rewards.library"
_FUNCTION = f"{_LIBRARY}.function.UserFunction"
REWARDS = Registry[RewardFunction](
    "task.reward",
    RewardFunction,  # type: ignore[type-abstract]
    elsewhere={
        "exact": f"{_LIBRARY}.matching.Exact",
        "regex": f"{_LIBRARY}.matching.Regex",
        "math": f"{_LIBRARY}.mathematics.Mathematics",
        "code": f"{_LIBRARY}.code.Code",
        "judge": f"{_LIBRARY}.judge.Judge",
        "model": f"{_LIBRARY}.model.ModelReward",
    },
)
_OWN_SETTINGS = frozenset(field.name for field in dataclasses.fields(RewardFunction))


def make_rewards(spec: Any, *, gold: Any = None, sandbox: str = "bwrap") -> Rewards:
    """Creates the rewards described by `spec`, the value of `task.reward`; `sandbox`: `rewards.sandbox`.

    `gold`: the description of one more reward, or nothing; its value is recorded as the metric
    `reward_gold`, and its failure does not fail the sample. Raises ConfigError for an unknown name or
    setting, and for a function that cannot be imported.
    """
    is_list = isinstance(spec, Sequence) and not isinstance(spec, str)
    entries = list(spec) if is_list else [spec]
    if not entries:
        raise ConfigError("task.reward is an empty list: name at least one reward")
    functions = [_make(entry, sandbox=sandbox) for entry in entries]
    if all(function.weight == 0 for function in functions):
        raise ConfigError("task.reward: every weight is 0, so all rewards would be 0: give one a weight")
    if gold:
        functions.append(_make_gold(gold, sandbox=sandbox))
    return Rewards(functions)


def _make_gold(spec: Any, *, sandbox: str) -> RewardFunction:
    """Creates the reward that is recorded and not trained on. Raises ConfigError."""
    entry = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(entry, Mapping) or not {"weight", "part"}.isdisjoint(entry):
        raise ConfigError(
            f"task.gold_reward={spec!r}: want one reward, a name or a mapping with settings, without "
            "`weight` and `part`"
        )
    try:
        return _make({**entry, "weight": 0.0, "part": GOLD_REWARD}, sandbox=sandbox)
    except ConfigError as error:
        raise ConfigError(f"task.gold_reward: {error}") from error


def _make(entry: Any, *, sandbox: str) -> RewardFunction:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
        raise ConfigError(
            f"task.reward: want a name ({', '.join(REWARDS.names())}), the path of a function "
            f"(my_rewards.score), a mapping with `name` and settings, or a list of these; got {entry!r}"
        )
    name = entry.get("name")
    if isinstance(name, str) and "." in name:
        own = {key: value for key, value in entry.items() if key in _OWN_SETTINGS}
        settings = {key: value for key, value in entry.items() if key not in own and key != "name"}
        return REWARDS.build({**own, "_target_": _FUNCTION, "path": name, "settings": settings})
    if isinstance(name, str) and name not in REWARDS.names():
        raise ConfigError(
            f"task.reward={name}: choose one of {', '.join(REWARDS.names())}; for your own function write "
            "task.reward=my_module.my_function"
        )
    return REWARDS.build(entry, job={"sandbox": sandbox})


class Rewards:
    """Scores completions with one or several rewards."""

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        """`functions`: at least one. Several with the same name get numbers: `judge`, `judge_2`."""
        self.functions: dict[str, RewardFunction] = {}
        """The rewards by the names of their parts, in the order of the configuration."""
        for function in functions:
            name = stem = function.part or function.own_name
            number = 1
            while name in self.functions:
                number += 1
                name = f"{stem}_{number}"
            self.functions[name] = function
        self.is_async = any(function.is_async for function in functions)
        """True if `score` returns a coroutine: one of the rewards is asynchronous."""

    def check(self) -> None:
        """Raises ConfigError if this machine lacks what a reward needs."""
        for function in self.functions.values():
            function.check()

    def score(self, example: Example, completion: Completion) -> Score | Coroutine[Any, Any, Score]:
        """Returns the reward of a completion, or a coroutine that returns it (`is_async`).

        Raises the exceptions of rewards, and RewardError for a value that is not a finite number.
        """
        if self.is_async:
            return self._score_async(example, completion)
        scores = {}
        for name, function in self.functions.items():
            try:
                scores[name] = _checked(name, function.score(example, completion), completion)
            except Exception as error:  # a user's function may raise anything
                scores[name] = _failed_metric(function, error)
        return _sum(self.functions, scores)

    async def _score_async(self, example: Example, completion: Completion) -> Score:
        async def one(name: str, function: RewardFunction) -> Score:
            try:
                scored = function.score(example, completion)
                if function.is_async and isinstance(scored, Awaitable):
                    scored = await scored
                return _checked(name, scored, completion)
            except Exception as error:  # a user's function may raise anything
                return _failed_metric(function, error)

        # Synchronous rewards first: if one of them fails, no service is called in vain.
        items = sorted(self.functions.items(), key=lambda item: item[1].is_async)
        scores = {name: await one(name, function) for name, function in items if not function.is_async}
        waiting = {
            name: asyncio.ensure_future(one(name, function)) for name, function in items if function.is_async
        }
        try:
            scores |= dict(zip(waiting, await asyncio.gather(*waiting.values()), strict=True))
        finally:
            for future in waiting.values():
                future.cancel()
        return _sum(self.functions, scores)


def _checked(name: str, returned: Rewarded | Awaitable[Rewarded], completion: Completion) -> Score:
    try:
        return as_score(returned, completion)
    except RewardError as error:
        raise RewardError(f"reward {name}: {error}") from None


def _failed_metric(function: RewardFunction, error: Exception) -> Score:
    if function.weight:
        raise error
    return Score(value=0.0, metrics={"failed": 1.0})


def _sum(functions: Mapping[str, RewardFunction], scores: Mapping[str, Score]) -> Score:
    """Returns the weighted sum of checked scores."""
    values: list[float] = []
    parts: dict[str, float] = {}
    metrics: dict[str, float] = {}
    turns, tokens = np.zeros(0), np.zeros(0, np.float32)
    steps: dict[int | str, float] = {}
    for name, function in functions.items():
        score, weight = scores[name], function.weight
        metrics |= {f"{name}/{key}": value for key, value in score.metrics.items()}
        if weight == 0:
            of_steps = [reward for _, reward in score.steps]
            total = math.fsum((score.value, *score.turns, *score.tokens, *of_steps))
            metrics |= {name: total} if "failed" not in score.metrics else {}
            metrics |= {f"{name}/{key}": value for key, value in score.parts.items()}
            continue
        values.append(weight * score.value)
        if score.parts:
            # The parts of a single reward keep their own names.
            prefix = "" if len(functions) == 1 else f"{name}/"
            parts |= {f"{prefix}{key}": weight * value for key, value in score.parts.items()}
        else:
            parts[name] = weight * score.value
        turns = _added(turns, weight * np.asarray(score.turns, np.float64))
        tokens = _added(tokens, np.asarray(score.tokens, np.float32) * np.float32(weight))
        for end, reward in score.steps:
            steps[end] = steps.get(end, 0.0) + weight * reward
    return Score(
        value=math.fsum(values),
        parts=parts,
        metrics=metrics,
        turns=tuple(turns.tolist()),
        tokens=tokens,  # type: ignore[arg-type]  # an array is as good as a sequence
        steps=tuple(sorted(steps.items())),
    )


def _added(sums: Any, more: Any) -> Any:
    """Returns the sum of two arrays of equal length, or the one that is not empty."""
    return sums + more if len(sums) and len(more) else sums if len(sums) else more
