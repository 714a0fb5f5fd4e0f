"""The options in `rollout.sglang.args` on which other settings depend.

SGLang is not installed where the configuration is read, so its parser cannot be used: the spellings below are
those of SGLang 0.5.23. Other abbreviations that it accepts are detected when the engine reports its options.
"""

from __future__ import annotations

import shlex

from areal_like.config.common import require
from areal_like.errors import ConfigError

TENSOR_PARALLEL = ("--tp-size", "--tensor-parallel-size", "--tp")
FIRST_GPU = ("--base-gpu-id",)
CONTEXT_LENGTH = ("--context-length",)
STATIC_MEMORY = ("--mem-fraction-static",)
_REPLICAS = ("--dp-size", "--data-parallel-size", "--dp")
_STAGES = ("--pp-size", "--pipeline-parallel-size", "--pp")
_ATTENTION_DP = "--enable-dp-attention"
"""With this option, `--dp-size` is not a number of replicas: it divides the attention among the
tensor-parallel ranks, and pushes reach all of them (SGLang's pull requests 6311 and 11669)."""
UNREACHABLE = (
    "SGLang takes pushed weights only in an engine of one data-parallel replica and one pipeline stage: "
    "start one engine for each replica (rollout.num_servers), and use more GPUs for each with "
    "rollout.gpus_per_engine (tensor parallelism), or --dp-size with --enable-dp-attention"
)
_OWN = ("--host", "--port", "--api-key", "--admin-api-key")
"""Options that the rollout server sets and that may not be changed."""


def words_of(args: str) -> list[str]:
    """The arguments of a shell line. Raises ConfigError if quotes do not match."""
    try:
        return shlex.split(args)
    except ValueError as error:
        raise ConfigError(f"rollout.sglang.args={args!r}: {error}") from None


def option(words: list[str], names: tuple[str, ...]) -> str | None:
    """The last value that is given to an option under any of its names; None if it is not given."""
    value = None
    for position, word in enumerate(words):
        name, equals, given = word.partition("=")
        if name in names:
            value = given if equals else " ".join(words[position + 1 : position + 2])
    return value


def number(words: list[str], names: tuple[str, ...]) -> int | None:
    """The last value that is given to an option, as a whole number; None if it is not given.

    Raises ConfigError for anything else.
    """
    value = option(words, names)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"rollout.sglang.args: {names[0]} {value}: give a whole number") from None


def check_args(args: str) -> None:
    """Raises ConfigError for options that the rollout server sets, and for engines that no push can reach."""
    words = words_of(args)
    require(
        not words or words[0].startswith("-"),
        f"rollout.sglang.args={args!r}: begin with an option, e.g. --mem-fraction-static 0.8",
    )
    own = next((word for word in words if word.partition("=")[0] in _OWN), "")
    require(
        not own,
        f"rollout.sglang.args: remove {own.partition('=')[0]}: the rollout server binds its engine to a "
        "free port of 127.0.0.1 and gives it a key that is on no command line",
    )
    for names, is_refused in ((_REPLICAS, _ATTENTION_DP not in words), (_STAGES, True)):
        size = number(words, names)
        require(
            size is None or size == 1 or not is_refused,
            f"rollout.sglang.args: {names[0]} {size}: {UNREACHABLE}",
        )
