"""Computes the longest sequence that a job can produce and checks that trainer and buffer accept it.

For a task with an environment and without `rollout.max_context`, the length is the prompt plus
`episode.max_turns` turns of `sampling.max_new_tokens`. The environment's messages share this room: turns
rarely all have full length, and an episode that runs out of room becomes a truncated sample. For the same
reason the length is capped at what the model and a micro-batch of the trainer can hold. For a single-turn
task, a sequence that does not fit is an error instead.
"""

from __future__ import annotations

from areal_like.config import Config, EvalSetConfig
from areal_like.errors import ConfigError
from areal_like.wire.records import BYTES_PER_TOKEN
from rollout_server.tasks.base import Task

_SAMPLE_OVERHEAD_BYTES = 4096
"""Bytes of a sample's message in addition to its tokens: numbers, names, reward components and version
ranges."""
_BYTES_PER_EPISODE_TOKEN = BYTES_PER_TOKEN + 4
"""Bytes per token if each token has a reward."""
_BYTES_PER_TEACHER_LOGPROB = 4
_BYTES_PER_TURN = 32
"""Bytes per turn: the length of a segment, and the end and reward of the turn."""


def longest_sequence(config: Config, task: Task, *, max_positions: int) -> int:
    """Returns the longest sequence that the engine has to hold (prompt and output), in tokens.

    `max_positions`: the model's limit. Raises ConfigError if no room is left for a prompt, or if sequences of
    this length do not fit into a micro-batch of the trainer or into a message.
    """
    most, max_new_tokens = config.trainer.tokens_per_microbatch, config.sampling.max_new_tokens
    context = _context(config, task, most, max_new_tokens=max_new_tokens, max_positions=max_positions)
    if context > most:
        raise ConfigError(
            f"sequences may have {context} tokens (task.max_prompt_tokens, sampling.max_new_tokens), which "
            f"does not fit into trainer.tokens_per_microbatch={most}: raise it, or lower rollout.max_context"
        )
    if context <= max_new_tokens:
        raise _no_room(config, f"sampling.max_new_tokens={max_new_tokens}", context, max_positions)
    num_samples = config.sampling.group_size + config.sampling.greedy_baseline
    num_tokens, num_bytes = context, BYTES_PER_TOKEN * context
    if task.has_environment:
        num_tokens = max(context, config.episode.max_tokens)
        num_bytes = _BYTES_PER_EPISODE_TOKEN * num_tokens + _BYTES_PER_TURN * config.episode.max_turns
    if config.distill.servers:
        num_bytes += _BYTES_PER_TEACHER_LOGPROB * num_tokens
    num_bytes = num_samples * (num_bytes + _SAMPLE_OVERHEAD_BYTES)
    _check_message(config, num_bytes, f"a group of {num_samples} samples of up to {num_tokens} tokens may")
    return context


def longest_evaluation(config: Config, one: EvalSetConfig, task: Task, *, max_positions: int) -> int:
    """Returns the longest sequence of an evaluation set, in tokens. It need not fit into a micro-batch.

    Raises ConfigError if no room is left for a prompt, or if a sample does not fit into a message.
    """
    max_new_tokens = one.max_new_tokens or config.sampling.max_new_tokens
    context = _context(
        config, task, max_positions, max_new_tokens=max_new_tokens, max_positions=max_positions
    )
    if context <= max_new_tokens:
        setting = f"an evaluation set with max_new_tokens={max_new_tokens} (eval.sets)"
        raise _no_room(config, setting, context, max_positions)
    num_tokens = max(context, config.episode.max_tokens) if task.has_environment else context
    num_bytes = _BYTES_PER_EPISODE_TOKEN * num_tokens + _SAMPLE_OVERHEAD_BYTES
    num_bytes += _BYTES_PER_TURN * config.episode.max_turns
    _check_message(config, num_bytes, f"a sample of an evaluation set may have {num_tokens} tokens and")
    return context


def _context(config: Config, task: Task, most: int, *, max_new_tokens: int, max_positions: int) -> int:
    """`most`: limit for a task with an environment if `rollout.max_context` is not set."""
    num_turns = config.episode.max_turns if task.has_environment else 1
    wanted = config.rollout.max_context or task.max_prompt_tokens + num_turns * max_new_tokens
    context = min(wanted, max_positions)
    if task.has_environment and not config.rollout.max_context:
        context = min(context, most, config.episode.max_tokens or context)
    return context


def _no_room(config: Config, setting: str, context: int, max_positions: int) -> ConfigError:
    return ConfigError(
        f"{setting} leaves no room for a prompt in a context of {context} tokens "
        f"(rollout.max_context={config.rollout.max_context}, the model's limit is {max_positions}): lower it"
    )


def _check_message(config: Config, num_bytes: int, what: str) -> None:
    if num_bytes > config.buffer.max_message_bytes:
        raise ConfigError(
            f"{what} take {num_bytes} bytes, and one message at most "
            f"buffer.max_message_bytes={config.buffer.max_message_bytes}: raise it"
        )
