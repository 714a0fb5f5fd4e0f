"""Writes the results of a run: metrics.jsonl, evaluations.jsonl, Prometheus, the trackers and summary.json.

Used on rank 0 only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from areal_like.config import Config
from areal_like.paths import RunPaths
from areal_like.runtime.metrics import Metrics
from areal_like.spans.recorder import record
from trainer.metrics.prometheus import TrainerSeries
from trainer.metrics.run_files import EvaluationsFile, MetricsFile, finished_summary, write_summary
from trainer.trackers.feed import Trackers
from trainer.weights.publisher import PushReport

log = logging.getLogger(__name__)

_TRACKERS_END_S = 20.0
"""Longest wait for the trackers at the end of the run."""


class RunRecord:
    """The files, series and trackers of a run that starts or continues after `step` completed steps."""

    def __init__(self, config: Config, metrics: Metrics, *, step: int) -> None:
        paths = RunPaths.of(config)
        self.steps = MetricsFile(paths.metrics, start_step=step)
        self.evaluations = EvaluationsFile(paths.evaluations, start_step=step)
        self.series = TrainerSeries(metrics, eval_sets=config.eval.resolved_sets)
        if self.steps.entropy.warning:  # logged before this resume
            self.series.entropy_fell()
        self._trackers = Trackers.of(
            config,
            start_step=step,
            is_rewound=self.steps.num_dropped > 0,
            on_outcome=self.series.tracked,
        )
        self._summary = paths.summary
        self._max_new_tokens = config.sampling.max_new_tokens
        self._first_set = next(iter(config.eval.resolved_sets), "")
        self._trackers_limit_s = min(_TRACKERS_END_S, config.daemon.drain_timeout_s / 3)

    def stepped(self, row: dict[str, Any], *, metrics: Mapping[str, Any]) -> None:
        """Records the row of one step, and logs once in a run that the entropy has fallen.

        `metrics`: everything that the step returned.
        """
        is_known = bool(self.steps.entropy.warning)
        self.steps.append(row)
        if self.steps.entropy.warning and not is_known:
            log.warning("%s", self.steps.entropy.warning)
            self.series.entropy_fell()
        self.series.stepped(row["step"], {**metrics, **row})
        self._trackers.stepped(self.steps.last)

    def evaluated(self, row: dict[str, Any]) -> None:
        """Records the row of an evaluation of one set (`evaluation_row`) that has just ended."""
        start_s = time.monotonic() - row["seconds"]
        record(f"evaluation of {row['set']}", f"step {row['step']}", start_s=start_s, avg=row["avg"])
        self.evaluations.append(row)
        self._trackers.evaluated(row)
        self.series.evaluated(row, is_first=row["set"] == self._first_set)

    def pushed(self, report: PushReport) -> None:
        start_s = time.monotonic() - report.seconds
        failed = sorted(report.failed)
        record("pushes", f"push of v{report.version}", start_s=start_s, step=report.step, failed=failed)
        self.series.pushed(report)

    def summarize(self, **figures: Any) -> dict[str, Any]:
        """Writes and returns the summary, and closes the files. `figures`: see `write_summary`.

        If the run was already finished and no step was trained since, its existing summary stays.
        """
        steps = self.steps
        before = finished_summary(self._summary, num_steps=steps.num_rows)
        if before is not None and steps.num_rows == steps.num_kept and not steps.num_dropped:
            summary = before
        else:
            summary = write_summary(
                self._summary,
                totals=steps.totals(),
                evaluations=self.evaluations.summary(),
                was_restarted=bool(steps.num_kept or steps.num_dropped),
                max_new_tokens=self._max_new_tokens,
                **figures,
            )
        self.steps.close()
        self.evaluations.close()
        return summary

    def status(self) -> dict[str, Any]:
        """The newest rows, and the state of the trackers."""
        return {
            "last": self.steps.last,
            "last_evaluations": self.evaluations.last,
            "trackers": self._trackers.status(),
        }

    def close(
        self,
        summary: Mapping[str, Any] | None = None,
        *,
        waits: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Ends the trackers in a limited time; also called after an error, then without `summary`."""
        self._trackers.close(summary, limit_s=self._trackers_limit_s, waits=waits)
