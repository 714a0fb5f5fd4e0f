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
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from areal_like.chat.token_row import TokenRow
from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, model_path, write_json
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.checkpoints.directory import remove_partials
from trainer.distributed.ranks import Ranks
from trainer.models.policy import build_policy
from trainer.optimizer import ShardedAdamW
from trainer.sft.plan import StepPlan
from trainer.sft.record import SftRecord
from trainer.sft.rows import SftRows, build_tokens
from trainer.sft.step import SupervisedStep

log = logging.getLogger(__name__)


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
        for index in indices[self._ranks.rank :: self._ranks.world_size]:
            yield from rows.sequences(index)

    def _save(self) -> None:
        self._ranks.place.enter("checkpoint", step=self._step)
        extra = {"sft": {"order": self._plan.order, "eval_loss_before": self._eval_before}}
        self._checkpoints.save(self._step, self._runner.policy, self._optimizer, self._ranks, extra=extra)
