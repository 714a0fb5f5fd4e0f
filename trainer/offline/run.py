"""One rank of an offline run: the loop around the optimizer step.

    rows -> plan -> load -> (resume) -> held-out rows
         -> { step -> held-out rows now and then -> checkpoint now and then } * -> held-out rows -> summary

The run has no other daemons; rank 0 writes the metrics. Before each step the ranks agree on whether to
continue, because a signal reaches them at different times; a drain ends after the current step, with a
checkpoint. A checkpoint has weights, moments and the number of steps; the rows of each step are determined by
the plan.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, model_path, write_json
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.checkpoints.directory import remove_partials
from trainer.distributed.ranks import Ranks
from trainer.offline.kind import OfflineTraining
from trainer.offline.plan import StepPlan
from trainer.offline.record import EVAL, OfflineRecord
from trainer.offline.rows import OfflineRows
from trainer.offline.step import OfflineStep, Unit
from trainer.optimizer import ShardedAdamW

log = logging.getLogger(__name__)

_BEFORE = "_before"


class OfflineRun:
    """Call `run` once, on all ranks. It returns when the run is finished, or after `stopping` is set."""

    def __init__(
        self,
        kind: OfflineTraining,
        config: Config,
        ranks: Ranks,
        *,
        stopping: threading.Event,
        started_s: float,
    ) -> None:
        """Raises ConfigError if rows cannot be read or rendered, or the run cannot be resumed."""
        self._kind, self._ranks, self._stopping = kind, ranks, stopping
        self._settings = settings = kind.settings(config)
        paths, source = RunPaths.of(config), model_path(config)
        if not settings.train:
            name = f"{kind.name}.train"
            raise ConfigError(f"{name} is empty: name a file of rows, e.g. {name}=train.jsonl")
        ranks.place.enter("reading the rows")
        self._rows = kind.rows(config, source, "train", ranks)
        self._held_out = kind.rows(config, source, "eval", ranks) if settings.eval else None
        self._plan = StepPlan.of(
            settings, self._rows.num_tokens_N, seed=config.seed, rows=self._rows.fingerprint
        )
        # The learning rate falls to zero at the last step; the rollout's temperature has no meaning here.
        self._config = config = replace(
            config,
            trainer=replace(config.trainer, num_steps=self._plan.num_steps),
            sampling=replace(config.sampling, temperature=1.0),
        )
        self._checkpoints = Checkpoints.of(config)
        if ranks.rank == 0:
            remove_partials(paths.checkpoints)
        self._checkpoints.open(ranks)
        step = self._checkpoints.resume_step(config.resume, ranks)
        model = kind.model(config, source, ranks, with_weights=step is None)
        self._optimizer = ShardedAdamW.of(config.trainer, model, ranks, lr=config.trainer.lr)
        self._loss = kind.loss(config, model, ranks)
        self._runner = OfflineStep(
            self._loss,
            self._optimizer,
            ranks,
            budget_tokens=config.trainer.tokens_per_microbatch,
            peak_tflops=config.trainer.peak_tflops,
            dropout_seed=config.seed if config.model.lora.dropout else None,
        )
        self._before: dict[str, float] = {}
        """Metrics of the held-out rows before the first step."""
        self._details: dict[str, Any] = {}
        """Further facts of the last measurement."""
        if step is not None:
            self._resume(step)
        self._step = step or 0
        self._record: OfflineRecord | None = None
        if ranks.rank == 0:
            self._checkpoints.set_aside_after(self._step)
            facts: dict[str, Any] = {"command": kind.command}
            facts |= {"num_steps": self._plan.num_steps, "num_epochs": settings.num_epochs}
            facts["rows"] = asdict(self._rows.counts)
            if self._held_out is not None:
                facts["eval_rows"] = asdict(self._held_out.counts)
            write_json(paths.rows, facts)
            self._record = OfflineRecord(config, step=self._step, started_s=started_s)

    @property
    def is_finished(self) -> bool:
        return self._step >= self._plan.num_steps

    def run(self) -> None:
        """Trains until the last step or a drain."""
        record = contextlib.closing(self._record or contextlib.ExitStack())
        with record, contextlib.closing(self._checkpoints):
            if self._step == 0:
                self._before = self._measure()
            while not self.is_finished and not self._ranks.any(self._stopping.is_set()):
                self._train()
            if self._checkpoints.saved_step < self._step:
                self._save()
            self._checkpoints.wait()
            if self._record is not None and self._step:
                self._record.summarize(
                    finished=self.is_finished,
                    measured=self._kind.measured,
                    before=self._before,
                    details=self._details,
                    model=str(self._checkpoints.path(self._step)),
                )
            self._ranks.meet()

    def _resume(self, step: int) -> None:
        """Restores a checkpoint."""
        name = self._kind.name
        extra = self._checkpoints.load(step, self._runner.model, self._optimizer, self._ranks)
        path = self._checkpoints.path(step)
        if name not in extra:
            raise ConfigError(
                f"{path} is a checkpoint of another kind of training than `areal-like {self._kind.command}`: "
                "continue it with the command that started it, or start a new run from it with "
                f"model.path={path}"
            )
        state = extra[name]
        if state["order"] != self._plan.order:
            raise ConfigError(
                f"{path} was trained on other rows, or in another order ({name}.train and its keys, "
                f"{name}.batch_rows, {name}.batch_tokens, seed, the chat template): start a new run from it "
                f"with model.path={path}"
            )
        if step > self._plan.num_steps:
            raise ConfigError(
                f"{path} has more steps than the run ({self._plan.num_steps}): raise {name}.num_epochs or "
                f"{name}.num_steps"
            )
        self._before = {
            key.removeprefix(EVAL).removesuffix(_BEFORE): float(value)
            for key, value in state.items()
            if key.endswith(_BEFORE) and value is not None
        }
        self._details = state.get("details", {})

    def _train(self) -> None:
        step = self._step
        rows = self._plan.rows(step)

        def prepare() -> None:
            self._loss.begin(self._rows, rows, step=step)

        units = self._units(self._rows, rows)
        metrics: dict[str, Any] = dict(self._runner.train(units, step=step, prepare=prepare))
        self._step = step + 1
        is_last = self.is_finished
        if is_last or self._step % self._settings.eval_interval == 0:
            metrics |= {f"{EVAL}{name}": value for name, value in self._measure().items()}
        if self._record is not None:
            self._record.stepped(
                step, metrics | {"num_rows": len(rows), "epoch": self._plan.epoch(self._step)}
            )
        if is_last or self._checkpoints.is_due(self._step, self._config.trainer, self._ranks):
            self._save()

    def _measure(self) -> dict[str, float]:
        """The measured metrics of the held-out rows; empty without such rows. Collective."""
        if self._held_out is None:
            return {}
        self._ranks.place.enter("held-out loss", step=self._step)
        usable = [int(index) for index in self._held_out.num_tokens_N.nonzero()[0]]
        self._loss.begin(self._held_out, usable, step=None)
        metrics, details = self._runner.measure(self._units(self._held_out, usable))
        measured = self._kind.measured
        self._details = {name: value for name, value in details.items() if name not in measured}
        found = {name: float(value) for name, value in (metrics | details).items() if name in measured}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        log.info("held-out rows after step %d: %s", self._step, shown)
        return found

    def _units(self, rows: OfflineRows, indices: list[int]) -> Iterator[Unit]:
        for at in self._ranks.share_of(len(indices)):
            yield from rows.units(indices[at], group=at)

    def _save(self) -> None:
        self._ranks.place.enter("checkpoint", step=self._step)
        before = {f"{EVAL}{name}{_BEFORE}": value for name, value in self._before.items()}
        state = {"order": self._plan.order, **before, "details": self._details}
        extra = {self._kind.name: state}
        self._checkpoints.save(self._step, self._runner.model, self._optimizer, self._ranks, extra=extra)
