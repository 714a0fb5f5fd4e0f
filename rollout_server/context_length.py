"""Computes the longest sequence that a job can produce and checks that trainer and buffer accept it."""

from __future__ import annotations

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.wire.records import BYTES_PER_TOKEN
from rollout_server.tasks.base import Task

_SAMPLE_OVERHEAD_BYTES = 4096
"""Bytes of a sample's message besides its tokens: numbers, names, reward components and version ranges."""


def longest_sequence(config: Config, task: Task, *, max_positions: int) -> int:
    """Longest sequence that the engine has to hold (prompt and output), in tokens.

    `max_positions`: the model's limit. Raises ConfigError if no room is left for a prompt, or if sequences of
    this length do not fit into a micro-batch of the trainer or into a message.
    """
    wanted = config.rollout.max_context or task.max_prompt_tokens + config.sampling.max_new_tokens
    context = min(wanted, max_positions)
    if context > config.trainer.tokens_per_microbatch:
        raise ConfigError(
            f"sequences may have {context} tokens (task.max_prompt_tokens, sampling.max_new_tokens), which "
            f"does not fit into trainer.tokens_per_microbatch={config.trainer.tokens_per_microbatch}: "
            "raise it, or lower rollout.max_context"
        )
    if context <= config.sampling.max_new_tokens:
        raise ConfigError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} leaves no room for a prompt in a "
            f"context of {context} tokens (rollout.max_context={config.rollout.max_context}, "
            f"the model's limit is {max_positions}): lower it"
        )
    num_samples = config.sampling.group_size + config.sampling.greedy_baseline
    num_bytes = num_samples * (BYTES_PER_TOKEN * context + _SAMPLE_OVERHEAD_BYTES)
    if num_bytes > config.buffer.max_message_bytes:
        raise ConfigError(
            f"a group of {num_samples} samples of up to {context} tokens may take {num_bytes} bytes, and one "
            f"message may have at most buffer.max_message_bytes={config.buffer.max_message_bytes}: raise it"
        )
    return context
