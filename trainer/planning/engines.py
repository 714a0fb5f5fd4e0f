"""The memory of one GPU of an engine: weights, adapters, KV cache, and how many sequences that cache holds.

SGLang's rule (0.5.23, `_profile_available_bytes`): the share `--mem-fraction-static` of the memory that is
free before it loads is for weights, adapters and KV cache, the rest for activations and CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.config.common import require
from areal_like.config.sglang_args import STATIC_MEMORY, option, words_of
from trainer.planning.gpus import GIB
from trainer.planning.trace import PlannedJob

DEFAULT_STATIC_FRACTION = 0.85
"""Assumed if `rollout.sglang.args` names none: SGLang then computes it from the GPU."""
SHARED_OTHER_BYTES = 4 * GIB
"""Assumed activations and CUDA graphs of an engine that shares its GPU with a trainer rank."""
_FUSED = 3
"""The embedded engine multiplies by query, key and value at once, and pads each layer's B to all three."""


def _number(words: list[str], names: tuple[str, ...]) -> float | None:
    """The last value of an option; None if it is absent. Raises ConfigError if it is not a number."""
    if (text := option(words, names)) is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    require(0 < value < float("inf"), f"rollout.sglang.args: {names[0]} {text} is not a number above 0")
    return value


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """One GPU of an engine, in bytes."""

    weights: float
    encoders: float
    """Encoders of other inputs, a vision tower for example, which SGLang loads with the weights."""
    adapters: float
    """Slots for the versions of an adapter; 0 unless pushes carry adapters."""
    kv_cache: float
    """Most memory of keys and values; below zero if the weights alone do not fit."""
    kv_at_least: float
    """Least memory that is left for keys and values."""
    other: float
    """Activations and CUDA graphs (SGLang: the share that is not static)."""
    kv_per_token: float
    """Keys and values of one token on this GPU."""
    state: float = 0.0
    """State of linear attention of one sequence on this GPU, in float32. It is in the memory of the cache."""

    @property
    def total(self) -> float:
        """Memory that the engine takes."""
        return self.weights + self.encoders + self.adapters + max(self.kv_cache, 0.0) + self.other

    @property
    def num_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return max(0, int(self.kv_at_least / self.kv_per_token))

    def num_sequences(self, context: float) -> float:
        """Sequences of `context` tokens that the cache holds."""
        return max(0.0, self.kv_at_least / (context * self.kv_per_token + self.state))


def engine_memory(job: PlannedJob, *, trainer_bytes: float = 0.0) -> EngineMemory:
    """One GPU of an engine. `trainer_bytes`: memory of a trainer rank on the same GPU between steps.

    On a shared GPU the engine may start before the trainer, which gives it the most memory, or after it,
    which leaves the smallest KV cache: `total` is for the first case, `num_tokens` for the second. Raises
    ConfigError for an option in `rollout.sglang.args` that is not a number.
    """
    rollout, shape, gpu_bytes = job.config.rollout, job.shape, job.placement.gpu.memory_bytes
    parallel = rollout.gpus_per_engine
    words = words_of(rollout.sglang.args) if rollout.engine == "sglang" else []
    is_fp8 = (option(words, ("--kv-cache-dtype",)) or "").startswith("fp8")
    value_bytes = 1 if is_fp8 else job.param_bytes
    num_values = shape.kv_values_per_token(engine=rollout.engine, num_gpus=parallel)
    per_token = float(num_values * value_bytes)
    state = 4.0 * shape.state_values / parallel
    weights = job.weights_bytes / parallel
    # Of an adapter some matrices are divided over an engine's GPUs; all are counted whole.
    adapters = (job.config.num_adapters + 1) * job.pushed_bytes if job.config.num_adapters else 0.0
    if rollout.engine == "embedded":
        # A second set of weights receives a push while the first one decodes; of adapters only a slot more.
        rows = rollout.max_running * (job.lengths.context * per_token + state)
        return EngineMemory(
            weights=weights if adapters else 2 * weights,
            encoders=0.0,
            adapters=_FUSED * adapters,
            kv_cache=rows,
            kv_at_least=rows,
            other=1 * GIB,
            kv_per_token=per_token,
            state=state,
        )
    static = _number(words, STATIC_MEMORY) or DEFAULT_STATIC_FRACTION
    limit = _number(words, ("--max-total-tokens",))
    limit_bytes = float("inf") if limit is None else int(limit) * per_token
    encoders = float(shape.num_encoder_params * job.param_bytes) / parallel
    loaded = weights + encoders + adapters
    rest = (1 - static) * gpu_bytes
    return EngineMemory(
        weights=weights,
        encoders=encoders,
        adapters=adapters,
        kv_cache=min(static * gpu_bytes - loaded, limit_bytes),
        kv_at_least=min(static * (gpu_bytes - trainer_bytes) - loaded, limit_bytes),
        other=min(rest, SHARED_OTHER_BYTES) if trainer_bytes else rest,
        kv_per_token=per_token,
        state=state,
    )
