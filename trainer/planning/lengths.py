"""Lengths of a job's sequences: the limits from its settings, the means as assumptions.

The memory of a step is traced at the limits, time is estimated at the means.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_like import sorting
from areal_like.config import Config
from areal_like.errors import ConfigError

_DEFAULT_PROMPT = 1024
"""`task.max_prompt_tokens` of a task that does not set it."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of prompts and responses."""

    context: int
    """Longest sequence: prompt and response."""
    max_response: int
    prompt: float
    """Assumed mean."""
    response: float
    """Assumed mean."""

    @property
    def mean(self) -> float:
        """Mean length of a sequence."""
        return self.prompt + self.response


def lengths_of(
    config: Config, *, max_positions: int, prompt: float | None = None, response: float | None = None
) -> Lengths:
    """`prompt`, `response`: means; None: a quarter of the longest prompt, half of the longest response.

    `max_positions`: the model's limit. Raises ConfigError for sequences that no micro-batch has room for.
    """
    max_response = config.sampling.max_new_tokens
    default = sorting.MAX_DIGITS + 2 if config.task.get("name") == "sort" else _DEFAULT_PROMPT
    max_prompt = int(config.task.get("max_prompt_tokens", default))
    context = min(config.rollout.max_context or max_prompt + max_response, max_positions)
    budget = config.trainer.tokens_per_microbatch
    if context > budget:
        raise ConfigError(
            f"a sequence may have {context} tokens (task.max_prompt_tokens, sampling.max_new_tokens), "
            f"which does not fit into trainer.tokens_per_microbatch={budget}: raise it"
        )
    if context <= max_response:
        raise ConfigError(
            f"sampling.max_new_tokens={max_response} leaves no room for a prompt in a context of {context} "
            f"tokens (rollout.max_context; the model's limit is {max_positions}): lower it"
        )
    max_prompt = max(1, min(max_prompt, context - 1))
    return Lengths(
        context=context,
        max_response=max_response,
        prompt=max_prompt / 4 if prompt is None else prompt,
        response=max_response / 2 if response is None else response,
    )


def worst_lengths(lengths: Lengths, *, budget_tokens: int) -> tuple[int, ...]:
    """The sequences of the full micro-batch whose attention pads most.

    Sequences of different lengths share one rectangle if padding at most doubles their tokens
    (`trainer/attention/packed_attention.py`). So one is as long as possible and as many others share the rest
    as fit into such a rectangle.
    """
    longest = lengths.context
    num_others = 2 * budget_tokens // longest - 1
    rest = budget_tokens - longest
    if num_others < 1 or rest < 2 * num_others:
        return (longest,)
    each, extra = divmod(rest, num_others)
    return (longest, *(each + (index < extra) for index in range(num_others)))
