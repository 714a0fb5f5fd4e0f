"""One rank of a supervised run: the loop around the optimizer step.

    rows -> plan -> load -> (resume) -> held-out loss
         -> { step -> held-out loss now and then -> checkpoint now and then } * -> held-out loss -> summary

The run has no other daemons; rank 0 writes the metrics. Before each step the ranks agree on whether to
continue, because a signal reaches them at different times; a drain ends after the current step, with a
checkpoint. A checkpoint has weights, moments and the number of steps; the rows of each step are determined by
the plan.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from areal_like.chat.token_row import TokenRow
from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, model_path, write_json
from areal_like.spans.recorder import unix_now
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.checkpoints.directory import remove_partials
from trainer.distributed.ranks import Ranks
from trainer.metrics.run_files import ROW_NAMES, MetricsFile, read_rows
from trainer.models.policy import build_policy
from trainer.optimizer import ShardedAdamW
from trainer.sft.plan import StepPlan
from trainer.sft.rows import SftRows, build_tokens
from trainer.sft.step import SupervisedStep
from trainer.trackers.feed import Trackers

log = logging.getLogger(__name__)

_TRACKERS_END_S = 30.0
"""Longest wait for the trackers at the end."""


class SftRecord:
    """The results of one run, on rank 0: metrics.jsonl, the trackers, summary.json."""

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
        """Appends the row of a step, from the metrics of `SupervisedStep.train` and further columns."""
        row = {"step": step, "time_unix_s": round(unix_now(), 3)}
        row |= {ROW_NAMES.get(name, name): value for name, value in metrics.items()}
        row["tokens_per_s_trained"] = metrics["tokens_trained"] / max(1e-9, metrics["step_s"])
        self._metrics.append({name: value for name, value in row.items() if value is not None})
        self._trackers.stepped(self._metrics.last)

    def summarize(self, *, finished: bool, eval_before: float | None, model: str) -> None:
        """Writes summary.json. `eval_before`: held-out loss before the first step; `model`: the newest
        checkpoint, a Hugging Face directory."""
        tenth = max(1, self._metrics.num_rows // 10)
        losses_first, losses_last = [], []
        totals = dict.fromkeys(("tokens_trained", "num_tokens"), 0)
        eval_after = None
        for at, row in enumerate(read_rows(self._paths.metrics)):
            for name in totals:
                totals[name] += round(row[name])
            if at < tenth:
                losses_first.append(row["loss"])
            if at >= self._metrics.num_rows - tenth:
                losses_last.append(row["loss"])
            eval_after = row.get("eval_loss", eval_after)
        summary = {
            "finished": finished,
            "resumed_from_step": self._resumed_from_step,
            "steps": self._metrics.num_rows,
            "num_steps": self._config.trainer.num_steps,
            "loss_first": _mean(losses_first),
            "loss_last": _mean(losses_last),
            "eval_loss_before": eval_before,
            "eval_loss_after": eval_after,
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


class SupervisedRun:
    """Call `run` once, on all ranks. It returns when the run is finished, or after `stopping` is set."""

    def __init__(self, config: Config, ranks: Ranks, *, stopping: threading.Event, started_s: float) -> None:
        """Raises ConfigError if rows cannot be read or rendered, or the run cannot be resumed."""
        self._ranks, self._stopping = ranks, stopping
        paths, source = RunPaths.of(config), model_path(config)
        if not config.sft.train:
            raise ConfigError("sft.train is empty: name a file of rows, e.g. sft.train=train.jsonl")
        tokens, longest = build_tokens(config, source)
        ranks.place.enter("reading the rows")
        read = functools.partial(SftRows, config, tokens=tokens, longest=longest, ranks=ranks)
        self._rows = read(config.sft.train, key="sft.train")
        self._held_out: SftRows | None = None
        if config.sft.eval:
            self._held_out = read(config.sft.eval, key="sft.eval")
            if not self._held_out.counts.num_learned:
                raise ConfigError("sft.eval: no row is left whose loss could be measured")
        self._plan = StepPlan.of(
            config.sft, self._rows.num_tokens_N, seed=config.seed, rows=self._rows.fingerprint
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
        policy = build_policy(config, source, ranks, with_weights=step is None)
        self._optimizer = ShardedAdamW.of(config.trainer, policy, ranks, lr=config.trainer.lr)
        self._runner = SupervisedStep(
            policy,
            self._optimizer,
            ranks,
            budget_tokens=config.trainer.tokens_per_microbatch,
            peak_tflops=config.trainer.peak_tflops,
            dropout_seed=config.seed if config.model.lora.dropout else None,
        )
        self._eval_before = self._resume(step) if step is not None else None
        self._step = step or 0
        self._record: SftRecord | None = None
        if ranks.rank == 0:
            self._checkpoints.set_aside_after(self._step)
            facts: dict[str, Any] = {"num_steps": self._plan.num_steps, "num_epochs": config.sft.num_epochs}
            facts["rows"] = asdict(self._rows.counts)
            if self._held_out is not None:
                facts["eval_rows"] = asdict(self._held_out.counts)
            write_json(paths.rows, facts)
            self._record = SftRecord(config, step=self._step, started_s=started_s)

    @property
    def is_finished(self) -> bool:
        return self._step >= self._plan.num_steps

    def run(self) -> None:
        """Trains until the last step or a drain."""
        record = contextlib.closing(self._record or contextlib.ExitStack())
        with record, contextlib.closing(self._checkpoints):
            if self._step == 0:
                self._eval_before = self._evaluate()
            while not self.is_finished and not self._ranks.any(self._stopping.is_set()):
                self._train()
            if self._checkpoints.saved_step < self._step:
                self._save()
            self._checkpoints.wait()
            if self._record is not None and self._step:
                newest = str(self._checkpoints.path(self._step))
                self._record.summarize(finished=self.is_finished, eval_before=self._eval_before, model=newest)
            self._ranks.meet()

    def _resume(self, step: int) -> float | None:
        """Restores a checkpoint; returns the held-out loss before the first step."""
        extra = self._checkpoints.load(step, self._runner.policy, self._optimizer, self._ranks)
        path = self._checkpoints.path(step)
        if "sft" not in extra:
            raise ConfigError(
                f"{path} is a checkpoint of reinforcement learning: continue it with `areal-like run`"
            )
        if extra["sft"]["order"] != self._plan.order:
            raise ConfigError(
                f"{path} was trained on other rows, or in another order (sft.train and its keys, "
                "sft.batch_rows, sft.batch_tokens, seed, the chat template): start a new run from it with "
                f"model.path={path}"
            )
        if step > self._plan.num_steps:
            raise ConfigError(
                f"{path} has more steps than the run ({self._plan.num_steps}): raise sft.num_epochs or "
                "sft.num_steps"
            )
        before = extra["sft"]["eval_loss_before"]
        return None if before is None else float(before)

    def _train(self) -> None:
        trainer, settings, step = self._config.trainer, self._config.sft, self._step
        rows = self._plan.rows(step)
        metrics: dict[str, Any] = dict(self._runner.train(self._sequences(self._rows, rows), step=step))
        self._step = step + 1
        is_last = self.is_finished
        if is_last or self._step % settings.eval_interval == 0:
            metrics["eval_loss"] = self._evaluate()
        if self._record is not None:
            self._record.stepped(
                step, metrics | {"num_rows": len(rows), "epoch": self._plan.epoch(self._step)}
            )
        if is_last or self._checkpoints.is_due(self._step, trainer, self._ranks):
            self._save()

    def _evaluate(self) -> float | None:
        """The loss of the held-out rows; None without such rows. Collective."""
        if self._held_out is None:
            return None
        self._ranks.place.enter("held-out loss", step=self._step)
        usable = [int(index) for index in self._held_out.num_tokens_N.nonzero()[0]]
        loss = self._runner.loss(self._sequences(self._held_out, usable))
        log.info("held-out loss after step %d: %.4f", self._step, loss)
        return loss

    def _sequences(self, rows: SftRows, indices: list[int]) -> Iterator[TokenRow]:
        for at in self._ranks.share_of(len(indices)):
            yield from rows.sequences(indices[at])

    def _save(self) -> None:
        self._ranks.place.enter("checkpoint", step=self._step)
        extra = {"sft": {"order": self._plan.order, "eval_loss_before": self._eval_before}}
        self._checkpoints.save(self._step, self._runner.policy, self._optimizer, self._ranks, extra=extra)
