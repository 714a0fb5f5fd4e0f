"""Compares the rows of two runs' metrics.jsonl, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from launch.comparison.result import Difference

Row = Mapping[str, Any]

_NAMES = {
    "settings": ("lr_base",),
    "rewards": ("reward_mean", "reward_std", "shaped_reward"),
    "prompts": ("prompt_tokens",),
    "tokens": ("response_length_mean",),
    "versions": ("lag_mean", "lag_max"),
    "policy's log-probs": (
        *("entropy", "kl_k3", "log_w_mean", "log_w_std", "mismatch_abs"),
        *("reverse_kl", "teacher_share"),
        *("ess_ratio", "ess_ratio_geometric", "ess_ratio_token", "ess_weights"),
    ),
    "advantages": ("zero_advantage_groups",),
    "weights of the loss": ("clipped_fraction", "kept_fraction", "lr_scale", "rho_ref"),
    "loss": ("loss",),
    "gradient norm": ("grad_norm",),
}
"""Kind -> names of its metrics. Names that are not listed are of the kind `other metrics`."""
_KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names}
SCALED = ("grad_norm", "lr", "lr_base", "lr_scale")
"""Numbers that are not sums of positive and negative terms, so their rounding is relative to themselves."""
_OF_TIME = ("_s", "_s_min", "_s_max")
_OF_MACHINE = (
    "time_",
    "tokens_per_s",
    "compute_tokens_per_s",
    "mfu",
    "gpu_",
    "memory_",
    "model_tflops_per_s",
    "balance",
    "num_microbatches",
    "shared_share",
    "router_disagreement",
    "weight_check",
    "weights_version",
    "weights_step",
    "max_staleness",
    "mismatch_abs_p99",
    "step",
)
"""Names of numbers that depend on time, machine or number of ranks, or that a replay does not have."""


def compare_rows(ours: Row, theirs: Row, *, tolerance: float) -> tuple[set[str], list[Difference]]:
    """(kinds that both rows have, differences); numbers that only one row has are left out."""
    kinds: set[str] = set()
    found: dict[str, Difference] = {}
    for name in _KIND_OF.keys() | (ours.keys() & theirs.keys()):
        if name not in ours or name not in theirs or _is_of_machine(name):
            continue
        kind = _KIND_OF.get(name, "other metrics")
        kinds.add(kind)
        for path, one, another in _numbers(name, ours[name], theirs[name]):
            if not are_close(one, another, tolerance=tolerance, is_scaled=name in SCALED):
                text = f"{path}: {one} / {another}"
                known = found.get(kind)
                if known is None or _rank(text) < _rank(known.text):
                    found[kind] = Difference(kind=kind, text=text, run=one, other=another)
    return kinds, list(found.values())


def are_close(ours: Any, theirs: Any, *, tolerance: float, is_scaled: bool = False) -> bool:
    """True for equal values, and for numbers that differ by at most `tolerance` times their size, or 1 if
    larger.

    `is_scaled`: times their size only.
    """
    if ours == theirs:
        return True
    both = isinstance(ours, int | float) and isinstance(theirs, int | float)
    return both and math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=0.0 if is_scaled else tolerance)


def _rank(text: str) -> tuple[int, str]:
    """The first name of a kind in the table above ranks first."""
    name = text.partition(":")[0]
    return (list(_KIND_OF).index(name) if name in _KIND_OF else len(_KIND_OF), name)


def _is_of_machine(name: str) -> bool:
    return name.endswith(_OF_TIME) or name.startswith(_OF_MACHINE)


def _numbers(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """The numbers below a name, which may be a table."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() & theirs.keys()):
            if not _is_of_machine(key):
                yield from _numbers(f"{name}.{key}", ours[key], theirs[key])
    elif ours is None or theirs is None or isinstance(ours, int | float):
        yield name, ours, theirs
