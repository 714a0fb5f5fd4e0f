"""Computes means over the samples of a step under names that tasks choose: parts of the reward, metrics,
labels.

Ranks may have different names, so they first agree on the union, as text in byte tensors. The number of names
is bounded: a task that uses a new name for each sample must not create a series for each.

Shape suffix: C columns of a sum.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.trajectory import GOLD_REWARD, Trajectory
from trainer.distributed.ranks import Ranks

MAX_NAMES = 64
"""Most names of one kind in a step: on a rank the first that occur, over all ranks the first in alphabetical
order."""
MAX_NAME_CHARS = 64
"""Longer names are left out."""
KINDS = ("reward_parts", "sample_metrics", "by_label")
_COLUMNS = ("num_samples", "reward_mean", "truncated_fraction", "response_length_mean", "turns")
"""Columns of a label. The other kinds have only the first two: a count and a sum."""

log = logging.getLogger(__name__)


class NamedMeans:
    """RECORDING: add() -> reduce() -> READABLE: metrics()"""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], NDArray[np.float64]] = {}
        self._num_names: Counter[str] = Counter()
        self._has_left_out = False

    def add(self, trajectory: Trajectory, *, num_targets: int) -> None:
        """Adds a sample; `num_targets`: its tokens that are trained on."""
        for name, value in trajectory.reward_components.items():
            self._add("reward_parts", name, value)
        for name, value in trajectory.metrics.items():
            self._add("sample_metrics", name, value)
        if trajectory.label:
            is_truncated = trajectory.finish_reason.is_truncated
            columns = (trajectory.reward, is_truncated, num_targets, trajectory.num_turns)
            self._add("by_label", trajectory.label, *columns)

    def reduce(self, ranks: Ranks) -> None:
        """Sums over ranks, which then have the same names. Collective; call once."""
        keys = _union(list(self._sums), ranks)
        zeros_C = np.zeros(len(_COLUMNS))
        table = np.array([self._sums.get(key, zeros_C) for key in keys]).reshape(len(keys), len(_COLUMNS))
        totals = ranks.sum(torch.from_numpy(table)).numpy()
        self._sums = dict(zip(keys, totals, strict=True))

    def metrics(self) -> dict[str, Any]:
        """`reward_parts` and `sample_metrics`: means by name; `by_label`: means by label and column;
        `reward_gold_mean`: that of the gold reward.

        A kind without names is left out. A mean is over the samples that have the name; None if it is not
        finite.
        """
        found: dict[str, dict[str, Any]] = {}
        for (kind, name), sum_C in self._sums.items():
            means = [_finite(total / sum_C[0]) for total in sum_C[1:].tolist()]
            if kind == "by_label":
                columns = dict(zip(_COLUMNS, [int(sum_C[0]), *means], strict=True))
                found.setdefault(kind, {})[name] = columns
            else:
                found.setdefault(kind, {})[name] = means[0]
        if GOLD_REWARD in (of_samples := found.get("sample_metrics", {})):
            return {**found, f"{GOLD_REWARD}_mean": of_samples[GOLD_REWARD]}
        return found

    def _add(self, kind: str, name: str, *values: float) -> None:
        sum_C = self._sums.get((kind, name))
        if sum_C is None:
            if len(name) > MAX_NAME_CHARS or self._num_names[kind] >= MAX_NAMES:
                if not self._has_left_out:
                    self._has_left_out = True
                    log.warning(
                        "the metrics leave out names in %s: at most %d of at most %d characters are kept",
                        kind,
                        MAX_NAMES,
                        MAX_NAME_CHARS,
                    )
                return
            self._num_names[kind] += 1
            sum_C = self._sums[kind, name] = np.zeros(len(_COLUMNS))
        with np.errstate(over="ignore", invalid="ignore"):
            sum_C[: 1 + len(values)] += (1.0, *values)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _union(keys: Sequence[tuple[str, str]], ranks: Ranks) -> list[tuple[str, str]]:
    """The keys of all ranks, sorted; at most MAX_NAMES of each kind. Collective."""
    text = json.dumps(sorted(keys)) + "\n"
    data = ranks.gather(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
    lines = data.numpy().tobytes().decode().splitlines()
    merged = sorted({(kind, name) for line in lines for kind, name in json.loads(line)})
    return [key for kind in KINDS for key in [key for key in merged if key[0] == kind][:MAX_NAMES]]
