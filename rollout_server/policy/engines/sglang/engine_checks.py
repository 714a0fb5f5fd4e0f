"""What an SGLang engine must be able to do for this job, checked before it gets any work.

An engine whose ranks no push can reach, or in which one sequence does not fit, would fail much later: at the
first push, or by answers that end too early.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from areal_like.config.sglang_args import CONTEXT_LENGTH, UNREACHABLE, number, words_of
from areal_like.errors import ConfigError

UNUSABLE_TOKENS = 8
"""Of N tokens (`--context-length`, or the KV cache if that is smaller) SGLang 0.5.23 uses N - 2 for prompt
and answer, and takes prompts of less than N - 6."""
_BEYOND_PROMPT = 6
"""The difference between the N tokens and SGLang's `max_req_input_len`."""


def check_context_option(args: str, *, context_tokens: int) -> None:
    """Raises ConfigError if `rollout.sglang.args` makes the context too short for the job's sequences."""
    given = number(words_of(args), CONTEXT_LENGTH)
    if given is not None and given < context_tokens:
        raise ConfigError(
            f"rollout.sglang.args: {CONTEXT_LENGTH[0]} {given} is shorter than the job's sequences of up to "
            f"{context_tokens} tokens (task.max_prompt_tokens, sampling.max_new_tokens, "
            "rollout.max_context): leave the option out, the rollout server sets it"
        )


def check_server_info(info: Mapping[str, Any], *, name: str, context_tokens: int) -> None:
    """Raises ConfigError if pushes cannot reach all of the engine, or if a sequence does not fit into it.

    `info`: the answer of `/server_info`; what it does not contain is not checked.
    """
    for key in ("dp_size", "pp_size"):
        if int(info.get(key) or 1) > 1:
            raise ConfigError(f"{name} runs with {key}={info[key]}: {UNREACHABLE}")
    longest_prompt = info.get("max_req_input_len")
    if longest_prompt is None:
        return
    num_tokens = int(longest_prompt) + _BEYOND_PROMPT
    if num_tokens < context_tokens:
        raise ConfigError(
            f"{name} holds sequences of {num_tokens} tokens, and those of this job have up to "
            f"{context_tokens} (task.max_prompt_tokens, sampling.max_new_tokens, rollout.max_context): "
            "give it more memory for KV (--mem-fraction-static, --max-total-tokens), a longer "
            "--context-length, or the job shorter sequences"
        )
