"""Settings of evaluations: when they happen, and on which sets of held-out prompts.

Without `eval.sets` there is one set, named `eval`: the task's held-out prompts, one greedy completion each.
The names of sets become names of metrics and rows, so their number and length are bounded.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from areal_like.config.common import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, Section, require

DEFAULT_SET = "eval"
"""Name of the only set if `eval.sets` is empty."""
MAX_SETS = 32
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
MAX_EVAL_PROMPTS = 1 << 17
MAX_EVAL_SAMPLES = 1 << 18
"""Maximum number of samples of one set in one evaluation. Each takes a few hundred bytes of the buffer's
memory."""
MAX_SAMPLES_PER_PROMPT = 1 << 12
EVAL_BYTES_PER_SAMPLE = 16
"""Bytes of one sample in a result: reward, tokens and flags, with room for the padding of the arrays."""


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig(Section, key="eval.sets"):
    """One set of held-out prompts, and how completions are sampled.

    The filters top_p, top_k and min_p are for evaluation only: training never samples with them.
    """

    task: dict[str, Any] = field(default_factory=dict)
    """A separate task (`name` or `_target_`, and that task's settings) whose held-out prompts are used;
    empty: the job's task."""
    num_prompts: int = 0
    """Held-out prompts 0 .. num_prompts-1; 0: `eval.num_prompts`."""
    num_samples: int = 1
    """Completions of each prompt."""
    temperature: float = 0.0
    """Softmax temperature of sampling; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: the most likely tokens whose total probability reaches this value; 1: all."""
    top_k: int = 0
    """The k most likely tokens; 0: all."""
    min_p: float = 0.0
    """Tokens with at least this share of the probability of the most likely one; 0: all."""
    max_new_tokens: int = 0
    """Limit of sampled tokens in one turn; 0: `sampling.max_new_tokens`."""
    k: tuple[int, ...] = ()
    """The k of pass@k, each at most `num_samples`; empty: 1 and `num_samples`."""
    solved_reward: float = 1.0
    """Minimum reward of a solved completion, for pass@k."""

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k, ascending."""
        return tuple(sorted(set(self.k or (1, self.num_samples))))

    def check_as(self, name: str) -> None:
        """Checks the set, which is named `name`. Raises ConfigError."""
        key = f"eval.sets.{name}"
        require(
            SET_NAME.fullmatch(name) is not None,
            f"{key}: a name of a set has 1 to 32 of the characters A-Z a-z 0-9 _ -, and begins with a "
            "letter or a digit",
        )
        require(
            0 <= self.num_prompts <= MAX_EVAL_PROMPTS,
            f"{key}.num_prompts={self.num_prompts}: use 0 (eval.num_prompts) to {MAX_EVAL_PROMPTS}",
        )
        require(
            1 <= self.num_samples <= MAX_SAMPLES_PER_PROMPT,
            f"{key}.num_samples={self.num_samples}: use 1..{MAX_SAMPLES_PER_PROMPT}",
        )
        require(0 <= self.temperature <= 100, f"{key}.temperature={self.temperature:g}: use 0 to 100")
        require(
            self.num_samples == 1 or self.temperature > 0,
            f"{key}.num_samples={self.num_samples} with temperature=0: greedy completions of a prompt are "
            "all the same; set a temperature above 0, or num_samples=1",
        )
        require(0 < self.top_p <= 1, f"{key}.top_p={self.top_p:g}: use a number above 0 up to 1")
        require(self.top_k >= 0, f"{key}.top_k={self.top_k}: use 0 (all tokens) or more")
        require(0 <= self.min_p <= 1, f"{key}.min_p={self.min_p:g}: use 0 to 1")
        require(
            self.temperature > 0 or (self.top_p, self.top_k, self.min_p) == (1, 0, 0),
            f"{key}: top_p, top_k and min_p change nothing at temperature=0: remove them, or set a "
            "temperature",
        )
        require(self.max_new_tokens >= 0, f"{key}.max_new_tokens must be at least 0")
        require(
            len(self.k) <= 16 and all(1 <= k <= self.num_samples for k in self.k),
            f"{key}.k={list(self.k)}: give at most 16 numbers from 1 to num_samples={self.num_samples} "
            "(pass@k needs k completions of a prompt)",
        )
        require(
            not self.task or ("name" in self.task) != ("_target_" in self.task),
            f"{key}.task: give either `name` or `_target_`",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section, key="eval"):
    """Held-out evaluation on the same servers while training continues."""

    num_prompts: Annotated[int, Bounds(0, MAX_EVAL_PROMPTS)] = 128
    """Held-out prompts of each set that does not state its own number; 0 turns evaluation off."""
    interval: PositiveInt = 100
    """Steps between evaluations; there is always one before the first and after the last step."""
    timeout_s: PositiveFloat = 120.0
    """Longest time, in seconds, that the trainer waits for an evaluation while no rollout server makes
    progress. It starts when `rollout.generate_timeout_s` has passed, because a server first replaces an
    engine that does not respond."""
    keep: NonNegativeInt = 4
    """Number of evaluations of each set whose samples the ledger keeps; the samples of older ones are
    deleted, unless `buffer.retain_trajectories` keeps everything. The results stay in evaluations.jsonl."""
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Sets of prompts by name, with their own sampling; empty: one set, `eval`, with the task's held-out
    prompts and one greedy completion of each."""

    @property
    def is_enabled(self) -> bool:
        """False if `num_prompts` is 0."""
        return self.num_prompts > 0

    @property
    def resolved_sets(self) -> dict[str, EvalSetConfig]:
        """The sets with `num_prompts` filled in; none if evaluation is off."""
        if not self.is_enabled:
            return {}
        sets = self.sets or {DEFAULT_SET: EvalSetConfig()}
        return {name: self._resolved(one) for name, one in sets.items()}

    def _resolved(self, one: EvalSetConfig) -> EvalSetConfig:
        return dataclasses.replace(one, num_prompts=one.num_prompts or self.num_prompts)

    def check(self) -> None:
        require(len(self.sets) <= MAX_SETS, f"eval.sets has {len(self.sets)} sets: at most {MAX_SETS}")
        for name, one in self.sets.items():
            one.check_as(name)
        for name, one in self.resolved_sets.items():
            num_samples = one.num_prompts * one.num_samples
            require(
                num_samples <= MAX_EVAL_SAMPLES,
                f"eval.sets.{name} has {num_samples} samples (num_prompts times num_samples): "
                f"at most {MAX_EVAL_SAMPLES}",
            )
