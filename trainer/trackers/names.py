"""Names of a run's numbers in trackers: our own groups, and verl's names for the same quantities.

TensorBoard and Weights & Biases show names with the same text before the first slash in one section, so the
groups are the overview that a user sees. docs/reference/metrics-verl.md explains each alias; a test
compares it with `VERL`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

EVALUATION = "eval"
"""Group of evaluations; the second part of a name is the set's."""
_STABILITY = (
    *("grad_norm", "critic_grad_norm", "prm_grad_norm", "ess_ratio", "log_w_mean", "log_w_std"),
    *("kl_k3", "kl_ref", "kl_coef", "reverse_kl", "teacher_share"),
    *("clipped_fraction", "kept_fraction", "mismatch_abs", "weight_check_abs"),
    *("mismatch_abs_p99", "mismatch_abs_max", "mismatch_k3", "lora_lost_updates"),
    *("router_disagreement", "unrouted_share", "routes_missing", "routes_malformed"),
    *("lag_mean", "lag_max", "max_staleness", "weights_version", "weights_step"),
)
_PERFORMANCE = (
    *("tokens_per_s_trained", "wait_data_s", "compute_s", "reduce_s", "update_s", "step_s", "freeze_s"),
    *("push_s", "sample_generation_s", "sample_reward_s"),
    *(f"{phase}_s_{end}" for phase in ("wait_data", "compute", "reduce", "update") for end in ("min", "max")),
    *("tokens_per_s", "tokens_per_s_per_gpu", "compute_tokens_per_s_per_gpu", "model_tflops_per_s"),
    *("shared_share", "mfu", "mfu_compute", "memory_peak_gb", "memory_reserved_peak_gb"),
)
_GROUP_OF = dict.fromkeys(_STABILITY, "stability") | dict.fromkeys(_PERFORMANCE, "performance")
_OTHER_GROUP = "train"
_NOT_TRACKED = ("step", "time_unix_s", "eval_reward")
"""Columns that are not numbers of the step: evaluations have separate rows."""
_OF_EVALUATION = ("ci_low", "ci_high", "truncated_fraction", "mean_tokens", "num_failed", "seconds")

VERL: dict[str, tuple[str, ...]] = {
    "step": ("training/global_step",),
    "loss": ("actor/loss",),
    "grad_norm": ("actor/grad_norm",),
    "lr": ("actor/lr",),
    "entropy": ("actor/entropy",),
    "clipped_fraction": ("actor/pg_clipfrac",),
    "kl_ref": ("actor/kl_loss",),
    "reward_mean": ("critic/score/mean",),
    "shaped_reward": ("critic/rewards/mean",),
    "value_loss": ("critic/vf_loss",),
    "value_mean": ("critic/values/mean",),
    "explained_variance": ("critic/vf_explained_var",),
    "critic_grad_norm": ("critic/grad_norm",),
    "response_length_mean": ("response_length/mean",),
    "prompt_tokens": ("prompt_length/mean",),
    "response_length_max": ("response_length/max",),
    "prompt_tokens_max": ("prompt_length/max",),
    "truncated_fraction": ("response_length/clip_ratio",),
    "kl_k3": ("rollout_corr/k3_kl",),
    "lag_mean": ("training/off_policy/trajectory_staleness_worst/mean",),
    "lag_max": ("training/off_policy/trajectory_staleness_worst/max",),
    "step_s": ("perf/time_per_step", "timing_s/step"),
    "wait_data_s": ("timing_s/gen",),
}
"""Column of metrics.jsonl -> its names in verl 0.9.1."""
VERL_EVALUATION = {
    "avg": "val-core/<set>/reward/mean@<n>",
    "pass_at_k": "val-core/<set>/reward/best@<k>/mean",
}
"""Field of evaluations.jsonl -> its name in verl; n is `num_samples`."""


def step_numbers(row: Mapping[str, Any], *, aliases: str = "none") -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by their names in a tracker.

    `loss` is `train/loss`, a number of a mapping such as `reward_parts` is `reward_parts/NAME`. Values that
    are not finite numbers are left out. `aliases`: `verl` adds verl's names.
    """
    numbers: dict[str, float] = {}
    for column, value in row.items():
        if column in _NOT_TRACKED:
            continue
        if column.startswith("eval_"):  # of training on rows
            name = f"{EVALUATION}/{column.removeprefix('eval_')}"
        else:
            name = column if isinstance(value, Mapping) else f"{_GROUP_OF.get(column, _OTHER_GROUP)}/{column}"
        numbers.update(_numbers(name, value))
    if row.get("step_s"):
        numbers.update(_numbers("performance/idle_fraction", row["wait_data_s"] / row["step_s"]))
    if aliases == "verl":
        for column, names in VERL.items():
            for name in names:
                numbers.update(_numbers(name, row.get(column)))
    return numbers


def evaluation_numbers(row: Mapping[str, Any], *, aliases: str = "none") -> dict[str, float]:
    """The numbers of a row of evaluations.jsonl: `eval/SET/avg@N` of N completions, `eval/SET/pass@K`, ..."""
    group = f"{EVALUATION}/{row['set']}"
    named = {f"{group}/avg@{row['num_samples']}": row["avg"]}
    named |= {f"{group}/pass@{k}": share for k, share in row["pass_at_k"].items()}
    if aliases == "verl":
        verl = {field: name.replace("<set>", row["set"]) for field, name in VERL_EVALUATION.items()}
        named[verl["avg"].replace("<n>", str(row["num_samples"]))] = row["avg"]
        named |= {verl["pass_at_k"].replace("<k>", k): share for k, share in row["pass_at_k"].items()}
    numbers: dict[str, float] = {}
    for name, value in named.items():
        numbers.update(_numbers(name, value))
    for column in _OF_EVALUATION:
        numbers.update(_numbers(f"{group}/{column}", row[column]))
    return numbers


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """(name, number) of a number, or of each number in nested mappings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{printable(str(key))}", item)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield name, float(value)


def printable(text: str) -> str:
    """A name that a task has chosen, without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)
