"""The results of an offline run, on rank 0: metrics.jsonl, the trackers, summary.json."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from areal_like.config import Config
from areal_like.paths import RunPaths, write_json
from areal_like.spans.recorder import unix_now
from trainer.metrics.run_files import ROW_NAMES, MetricsFile, read_rows
from trainer.trackers.feed import Trackers

_TRACKERS_END_S = 30.0
"""Longest wait for the trackers at the end."""
EVAL = "eval_"
"""Prefix of the metrics of held-out rows."""


class OfflineRecord:
    """The results of one run."""

    def __init__(self, config: Config, *, step: int, started_s: float) -> None:
        """`step`: completed steps, 0 for a new run. `started_s`: start of the process, monotonic clock."""
        self._config = config
        self._paths = RunPaths.of(config)
        self._resumed_from_step = step
        self._started_s = started_s
        self._metrics = MetricsFile(self._paths.metrics, start_step=step)
        self._trackers = Trackers.of(
            config,
            start_step=step,
            is_rewound=self._metrics.num_dropped > 0,
            on_outcome=lambda outcome: None,
        )

    def stepped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the row of a step, from the metrics of `OfflineStep.train` and further columns."""
        row = {"step": step, "time_unix_s": round(unix_now(), 3)}
        row |= {ROW_NAMES.get(name, name): value for name, value in metrics.items()}
        row["tokens_per_s_trained"] = metrics["tokens_trained"] / max(1e-9, metrics["step_s"])
        self._metrics.append({name: value for name, value in row.items() if value is not None})
        self._trackers.stepped(self._metrics.last)

    def summarize(
        self,
        *,
        finished: bool,
        measured: Sequence[str],
        before: Mapping[str, float],
        details: Mapping[str, Any],
        model: str,
    ) -> None:
        """Writes summary.json.

        `measured`: names of metrics of held-out rows; `before`: their values before the first step;
        `details`: further facts of the last measurement. `model`: the newest checkpoint, a Hugging Face
        directory.
        """
        tenth = max(1, self._metrics.num_rows // 10)
        losses_first, losses_last = [], []
        totals = dict.fromkeys(("tokens_trained", "num_tokens"), 0)
        after: dict[str, Any] = dict.fromkeys(measured)
        for at, row in enumerate(read_rows(self._paths.metrics)):
            for name in totals:
                totals[name] += round(row[name])
            if at < tenth:
                losses_first.append(row["loss"])
            if at >= self._metrics.num_rows - tenth:
                losses_last.append(row["loss"])
            after |= {name: row[f"{EVAL}{name}"] for name in measured if f"{EVAL}{name}" in row}
        held_out = {}
        for name in measured:
            held_out[f"{EVAL}{name}_before"] = before.get(name)
            held_out[f"{EVAL}{name}_after"] = after[name]
        summary = {
            "finished": finished,
            "resumed_from_step": self._resumed_from_step,
            "steps": self._metrics.num_rows,
            "num_steps": self._config.trainer.num_steps,
            "loss_first": _mean(losses_first),
            "loss_last": _mean(losses_last),
            **held_out,
            **{f"{EVAL}{name}": value for name, value in details.items()},
            "tokens_trained": totals["tokens_trained"],
            "tokens_read": totals["num_tokens"],
            "wall_seconds": round(time.monotonic() - self._started_s, 3),
            "model": model,
        }
        write_json(self._paths.summary, summary)
        self._close_trackers(summary)

    def close(self) -> None:
        """Closes the files; also after an error."""
        self._metrics.close()
        self._close_trackers(None)

    def _close_trackers(self, summary: dict[str, Any] | None) -> None:
        limit_s = min(_TRACKERS_END_S, self._config.daemon.drain_timeout_s / 3)
        self._trackers.close(summary, limit_s=limit_s, waits=lambda name: contextlib.nullcontext())


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
