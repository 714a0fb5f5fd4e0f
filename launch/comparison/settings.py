"""Compares the settings of two runs: those of the steps, those of rounding, and the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_ROUNDING = (
    "trainer.world_size",
    "trainer.context_parallel",
    "trainer.replicas",
    "trainer.num_hosts",
    "trainer.device",
    "trainer.tokens_per_microbatch",
    "trainer.balance",
    "trainer.logprob_chunk_tokens",
    "model.fp32_head",
    "model.router_dtype",
    "trainer.gradient_checkpointing",
    "trainer.attention",
    "trainer.kernels",
    "trainer.compile",
    "trainer.num_threads",
)
"""Settings that change the order of summation, and so the last bits of the results."""
GENERATION = (
    "buffer.",
    "episode.",
    "eval.",
    "max_staleness",
    "ess_target",
    "rewards.",
    "rollout.",
    "seed",
    "sessions.",
    "scorer.",
    "task",
    "weights.",
)
"""Settings that affect only the trajectories, which are compared directly."""
_WITHOUT_EFFECT = (
    "name",
    "runs_dir",
    "resume",
    "daemon.",
    "metrics.",
    "security.",
    "sft.",
    "reward_model.",
    "preferences.",
    "trackers",
    "model.path",
    "model.warm_start_",
    "trainer.host_index",
    "trainer.rendezvous",
    "trainer.offload_activations",
    "trainer.offload_optimizer",
    "trainer.reshard_after_forward",
    "trainer.checkpoint_",
    "trainer.keep_",
    "trainer.collective_timeout_s",
    "trainer.fetch_timeout_s",
    "trainer.buffer_timeout_s",
    "trainer.peak_tflops",
    "trainer.lr",
    "trainer.num_steps",
)
"""Settings that do not change a result, except the model, the learning rate and the number of steps that its
schedule depends on: the initial weights and the learning rate of each step are compared directly."""
_STEP = ("trainer.lr_schedule",)
"""Exceptions from the prefixes above."""


@dataclass(frozen=True, kw_only=True)
class SettingsDifference:
    """Keys with different values, each as `key=ours / theirs`."""

    of_steps: list[str] = field(default_factory=list)
    """Settings that change what a step computes from its trajectories."""
    of_rounding: list[str] = field(default_factory=list)
    of_generation: list[str] = field(default_factory=list)


def compare_settings(ours: Mapping[str, str], theirs: Mapping[str, str]) -> SettingsDifference:
    """Groups the keys with different values by what they affect."""
    found = SettingsDifference()
    for key in sorted(ours.keys() | theirs.keys()):
        values = ours.get(key, "(none)"), theirs.get(key, "(none)")
        if values[0] == values[1]:
            continue
        text = f"{key}={values[0]} / {values[1]}"
        if key in _ROUNDING:
            found.of_rounding.append(text)
        elif key in _STEP or not key.startswith((*GENERATION, *_WITHOUT_EFFECT)):
            found.of_steps.append(text)
        elif key.startswith(GENERATION):
            found.of_generation.append(text)
    return found
