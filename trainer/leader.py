"""The duties of trainer rank 0 around the optimizer steps.

It reports steps and commits to the buffer, publishes the weights, has the policy evaluated, adapts the
staleness bound, and writes metrics and summary. It also gets an operator's changes for the next step, and
passes the relevant part on to the other ranks (`shared`, `received`) with the vote that takes place before
each step.
"""

from __future__ import annotations

import logging
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from areal_like.automatic_settings import compute_dtype, start_limit_s
from areal_like.config import Config
from areal_like.errors import ArealError, EvaluationError, RefusedError, UserError
from areal_like.wire.messages.consumer import (
    AllocVersion,
    CloseAdmission,
    CommitStep,
    CompleteStep,
    FinishRun,
    GetRunCounters,
    GetStepSettings,
    GetStreamState,
    RunCounters,
    SetMaxStaleness,
    StartTraining,
    StepSettings,
    VersionGranted,
)
from trainer.adaptive_staleness import StalenessController
from trainer.batching.packing import PackedBatch
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.evaluate import Evaluations
from trainer.metrics.run_files import WARM_UP_STEPS, step_row
from trainer.run_record import RunRecord
from trainer.weights.broadcaster import Broadcaster
from trainer.weights.checks import MERGED_HINT, NOISE, CheckReport, check_tokens
from trainer.weights.publisher import Publisher, PushReport
from trainer.weights.senders import SenderLink
from trainer.weights.snapshot import Snapshot

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0
_COUNTS_INTERVAL_S = 5.0
"""Shortest time between two requests for `_COUNTED`: one per step would slow down short steps."""
_COUNTED = ("tokens_generated", "generation_busy_s", "generation_idle_s")
"""The buffer's counters in the rows of steps."""
NUM_SHARED = 2
_REPORTED = (
    "reward_mean",
    "eval_reward",
    "loss",
    "lag_mean",
    "lag_max",
    "ess_ratio",
    "mfu",
    "response_length_mean",
    "tokens_per_s_trained",
)
"""Columns of the newest step in rank 0's heartbeats, for a view that does not see metrics.jsonl."""


class Leader:
    """Methods run in the training thread unless they say otherwise. They are called in this order:

    begin() -> { finish_step() -> (stream_state(), alloc_version(), commit()) } * -> end()
    """

    def __init__(
        self,
        config: Config,
        buffer: TrainerBufferClient,
        *,
        step: int,
        stream: dict[str, Any],
        push_bytes: int,
        links: Sequence[SenderLink] = (),
        routes_shape: Sequence[int] = (),
        started_s: float,
    ) -> None:
        """Sends the buffer the step at which training starts.

        `step`: completed steps, 0 for a new run. `stream`: the `stream_state` in the checkpoint; empty for a
        new run. `push_bytes`: size of one push of the weights. `links`: to the other senders.
        `routes_shape`: `RoutesShape` of the model with `model.router_replay`. `started_s`: start of the
        process, monotonic clock.

        Raises UserError if the buffer cannot continue from this step: a restart would be refused too.
        Raises RunFinishedError if the run is finished and this is its last step.
        """
        self._config = config
        self._buffer = buffer
        self._stream = stream
        self._step = step
        self._resumed_from_step = step
        self._started_s = self._training_started_s = started_s
        self._busy_s = 0.0
        self._staleness: StalenessController | None = None
        if config.max_staleness == "auto":
            self._staleness = StalenessController(cap=config.max_staleness_cap, target=config.ess_target)
        self._eval_before: float | None = stream.get("eval_before")
        self._counters_after_warm_up: RunCounters | None = None
        self._counts_due_s = 0.0
        self._last_push: PushReport | None = None
        self._last_checks: dict[str, CheckReport] = {}
        """Server of the directory -> its last check. Never changed in place: the training thread reads it,
        and the client's loop replaces it."""
        self._links = links
        self._push_limit_s = 2 * config.weights.deadline_s(push_bytes)  # staging and broadcast
        start = StartTraining(
            step=step,
            stream=stream.get("stream", {}),
            settings=configured(config),
            routes_shape=list(routes_shape),
        )
        try:
            welcome = buffer.call(start, timeout_s=_CALL_TIMEOUT_S)
        except RefusedError as error:
            raise UserError(str(error)) from error
        self._is_new = step == 0 and bool(welcome.newest_version == 0) and not config.model.lora.path
        """True if the servers have started with this trainer's weights. False even for a run that starts over
        without a checkpoint: its servers may still hold weights that an earlier trainer pushed. With
        `model.lora.path` they hold the base alone, and take no leases before the first push."""
        self.settings: StepSettings = buffer.call(GetStepSettings(step=step), timeout_s=_CALL_TIMEOUT_S)
        """Settings of the current step, which is about to begin or in progress."""
        self._counters_at_start, self._counted_from_s = self._get_counters(), time.monotonic()
        self._publisher: Publisher = buffer.run(self._open_publisher(), name="publisher", timeout_s=10)
        # Created last: from now on `close` has to end its trackers.
        self._record = RunRecord(config, buffer.runtime.metrics, step=step)
        self._evaluations = Evaluations(config, buffer, on_row=self._record.evaluated)

    def begin(self, snapshot: Snapshot, *, oldest_kept_step: int) -> None:
        """Publishes the first weights and evaluates them.

        Unless the run is new, it waits until an engine has this trainer's weights. A drain ends the wait.
        `oldest_kept_step`: as in `commit`.
        """
        if self._step:
            self.commit(self._step - 1, oldest_kept_step=oldest_kept_step)
        if self._staleness is not None:
            if "staleness" in self._stream:
                self._staleness.restore(self._stream["staleness"])
            self._send_staleness_bound(self._staleness.bound)
        self._offer(snapshot, loaded=self._is_new)
        self._evaluations.interval = max(1, self.settings.eval_interval)
        try:
            if not self._is_new:
                self._wait_for_checkpoint_weights()
            if self._step == 0 and self._evaluations.is_enabled:
                self._buffer.state = "evaluating"
                self._eval_before = self._first_evaluation()
            else:  # the sets that an earlier trainer has not finished
                self._evaluations.start_if_due(
                    step=self._step,
                    min_version=self._publisher.active_version,
                    done=self._record.evaluations.sets_of(self._step),
                    is_asked=self.settings.evaluate,
                )
        except StopRequestedError as stop:
            log.info("%s", stop)
        self._training_started_s = time.monotonic()

    def _first_evaluation(self) -> float | None:
        """The mean held-out reward of the first set; None if no sample of any set could be made.

        The job continues: if the samples for training fail too, the buffer ends it and names the cause.
        """
        try:
            return self._evaluations.run(step=0, min_version=self._publisher.active_version)
        except EvaluationError as error:
            log.error("training starts without an evaluation of the initial weights: %s", error)
            return None

    def check_weights(self, batch: PackedBatch, logp_S: Tensor) -> None:
        """Offers a step's first log-probs [S] as the reference for a check of the engines' weights."""
        checks = self._publisher.checks
        if checks is None or time.monotonic() < checks.next_due_s:
            return
        if (tokens := check_tokens(batch, logp_S, step=self._step)) is not None:

            async def offer() -> None:
                checks.scored_by_trainer(tokens)

            self._buffer.submit(offer())

    def finish_step(self, step: int, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        """Reports step `step` to the buffer, offers the new weights and records the metrics.

        `snapshot`: the new weights; None between weight syncs.
        """
        staleness_bound = self._staleness_bound
        self._adapt_staleness(metrics)
        self._buffer.call(CompleteStep(step=step), timeout_s=_CALL_TIMEOUT_S)
        self._step = step + 1
        settings = self._buffer.submit_call(GetStepSettings(step=step + 1), timeout_s=_CALL_TIMEOUT_S)
        if snapshot is not None:
            self._offer(snapshot, loaded=False)
        self._record_row(step, metrics | {"max_staleness": staleness_bound} | self._counts())
        if self._step == WARM_UP_STEPS:
            self._counters_after_warm_up = self._get_counters()
        self.settings = self._buffer.wait(settings, name="settings", timeout_s=_CALL_TIMEOUT_S + 5)
        self._evaluations.interval = max(1, self.settings.eval_interval)
        self._evaluations.start_if_due(
            step=self._step,
            min_version=self._publisher.active_version,
            is_asked=self.settings.evaluate,
        )

    def stream_state(self, step: int) -> dict[str, Any]:
        """The state after `step` that a checkpoint keeps for the next trainer's `stream`."""
        state = self._buffer.call(GetStreamState(step=step), timeout_s=_CALL_TIMEOUT_S).stream
        kept = {"stream": state, "eval_before": self._eval_before}
        return kept if self._staleness is None else kept | {"staleness": self._staleness.dump()}

    def alloc_version(self) -> int:
        """A version for a checkpoint's weights: a server that loads the checkpoint samples under it."""
        granted: VersionGranted = self._buffer.call(AllocVersion(step=self._step), timeout_s=_CALL_TIMEOUT_S)
        return granted.version

    def commit(self, step: int, *, oldest_kept_step: int) -> None:
        """Reports to the buffer that a checkpoint with all steps up to `step` is on disk. From any thread.

        `oldest_kept_step`: step of the oldest checkpoint that is kept.
        """
        request = CommitStep(step=step, oldest_kept_step=oldest_kept_step)
        self._buffer.call(request, timeout_s=_CALL_TIMEOUT_S)

    def end(self, *, finished: bool, hands_over: bool = False) -> None:
        """Closes the stream, evaluates the last weights (if `finished`) and writes the summary.

        Then, if `finished`, the buffers tell every role to end.
        `hands_over`: another trainer takes over at once, so the stream stays open and generation continues.
        """
        counters_at_close = self._get_counters()
        if not hands_over:
            reason = "the run is finished" if finished else "the trainer is draining"
            self._buffer.call(CloseAdmission(reason=reason), timeout_s=_CALL_TIMEOUT_S)
        training_seconds = time.monotonic() - self._training_started_s
        self._evaluations.poll()  # records evaluations that have ended since the last step
        eval_after = self._evaluate_last_weights() if finished and self._record.steps.num_rows else None
        self._buffer.run(self._publisher.close(), name="weight groups to dissolve", timeout_s=30)
        summary = self._record.summarize(
            counters_at_start=self._counters_at_start,
            counters_after_warm_up=self._counters_after_warm_up,
            counters_at_close=counters_at_close,
            counters_at_end=self._get_counters(),
            counted_seconds=time.monotonic() - self._counted_from_s,
            eval_before=self._eval_before,
            eval_after=eval_after,
            weights_version=self._publisher.active_version,
            finished=finished,
            resumed_from_step=self._resumed_from_step,
            wall_seconds=time.monotonic() - self._started_s,
            training_seconds=training_seconds,
        )
        self.close(summary)
        if finished:
            self._buffer.call(FinishRun(), timeout_s=_CALL_TIMEOUT_S)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Ends the trackers in a limited time; also called after an error, then without `summary`."""
        self._record.close(summary, waits=self._buffer.runtime.waits)

    def status(self) -> dict[str, Any]:
        """Rank 0's part of the trainer's /status."""
        return self._record.status() | {
            "last_push": asdict(self._last_push) if self._last_push else {},
            "last_checks": {name: asdict(report) for name, report in self._checks_of_present().items()},
            "weights_version": self._publisher.active_version,
            "servers": [asdict(server) for server in self._buffer.directory.servers],
        }

    def _wait_for_checkpoint_weights(self) -> None:
        self._buffer.state = "pushing"
        self._buffer.run(
            self._publisher.wait_until_active(self._step),
            name="the checkpoint's weights to be active at a server",
            may_stop=True,
            stall_s=self._config.stall_s(start_limit_s(self._config) + self._push_limit_s),
            setting="rollout.start_timeout_s + weights.push_deadline_s",
        )

    def _evaluate_last_weights(self) -> float | None:
        """Also waits for the last push if evaluations are off, so that servers end with the last weights."""
        try:
            self._buffer.run(
                self._publisher.wait_until_active(self._step),
                name="the last weights to be active",
                timeout_s=self._push_limit_s,
            )
            if not self._evaluations.is_enabled:
                return None
            self._buffer.state = "evaluating"
            return self._evaluations.run(
                step=self._step,
                min_version=self._publisher.active_version,
            )
        except ArealError as error:
            log.warning("the run is trained and saved, but its last evaluation is missing: %s", error)
            return None

    @property
    def _staleness_bound(self) -> int:
        """Largest lag, in steps, of samples that are admitted in this step."""
        return self.settings.max_staleness if self._staleness is None else self._staleness.bound

    def _adapt_staleness(self, metrics: dict[str, Any]) -> None:
        """With `max_staleness=auto`: moves the bound.

        A step in which no sequence was run has no ESS and is skipped.
        """
        if self._staleness is None or not metrics["num_tokens"]:
            return
        before = self._staleness.bound
        if self._staleness.observe(ess_ratio=metrics["ess_weights"], lag_max=metrics["lag_max"]) != before:
            self._send_staleness_bound(self._staleness.bound)

    def _send_staleness_bound(self, bound: int) -> None:
        self._buffer.call(SetMaxStaleness(max_staleness=bound), timeout_s=_CALL_TIMEOUT_S)

    def _record_row(self, step: int, metrics: dict[str, Any]) -> None:
        row = step_row(step, metrics)
        row["weights_version"] = self._publisher.active_version
        row["weights_step"] = self._publisher.active_step
        row["push_s"] = self._last_push.seconds if self._last_push else 0.0
        if checks := self._checks_of_present():
            row["weight_check_abs"] = max(report.difference for report in checks.values())
        if (eval_reward := self._evaluations.poll()) is not None:
            row["eval_reward"] = eval_reward
        self._record.stepped(row, metrics=metrics)
        self._busy_s += max(0.0, row["step_s"] - row["wait_data_s"])
        self._buffer.stats = {"row_step": float(step), "busy_s": self._busy_s} | {
            name: float(row[name]) for name in _REPORTED if name in row and math.isfinite(row[name])
        }

    def _checked(self, report: CheckReport) -> None:
        """Notes a check of an engine's weights. Runs in the client's loop."""
        self._last_checks = {**self._checks_of_present(), report.server: report}
        self._record.series.checked(report)

    def _checks_of_present(self) -> dict[str, CheckReport]:
        """The last checks of servers that still exist: the difference of one that was replaced is over."""
        present = {server.name for server in self._buffer.directory.servers}
        return {name: report for name, report in self._last_checks.items() if name in present}

    def _get_counters(self) -> RunCounters:
        counters: RunCounters = self._buffer.call(GetRunCounters(), timeout_s=_CALL_TIMEOUT_S)
        return counters

    def _counts(self) -> dict[str, float]:
        """Columns for the row of the step that ends now; empty if the buffer was asked a short while ago."""
        if time.monotonic() < self._counts_due_s:
            return {}
        self._counts_due_s = time.monotonic() + _COUNTS_INTERVAL_S
        counters = self._get_counters().counters
        return {name: counters.get(name, 0.0) for name in _COUNTED}

    def _offer(self, snapshot: Snapshot, *, loaded: bool) -> None:
        async def offer() -> None:
            self._publisher.offer(self._step, snapshot, loaded=loaded)

        self._buffer.submit(offer())

    async def _open_publisher(self) -> Publisher:
        def on_push(report: PushReport) -> None:
            self._last_push = report
            self._record.pushed(report)

        buffer, dtype = self._buffer, compute_dtype(self._config)
        weights = replace(self._config.weights, update_mode=self._config.update_mode)
        # An engine scores given tokens at temperature 1 only.
        is_checked = weights.check_interval_s is not None and self._config.sampling.temperature == 1
        is_merged = self._config.model.lora.is_on and weights.lora == "merged"
        publisher = Publisher(
            Broadcaster(
                weights,
                device=buffer.device,
                keyring=buffer.runtime.keyring,
                waits=buffer.waits,
                links=self._links,
            ),
            call=buffer.call_async,
            servers=lambda: buffer.directory.servers,
            on_push=on_push,
            on_failure=buffer.fail,
            on_check=self._checked,
            check_interval_s=weights.check_interval_s if is_checked else None,
            check_noise=NOISE[dtype],
            check_hint=MERGED_HINT.format(dtype=dtype) if is_merged else "",
            waits=buffer.waits,
        )
        buffer.on_directory = publisher.directory_changed
        return publisher


def configured(config: Config) -> dict[str, str]:
    """This trainer's values of the settings that an operator may change, for `StartTraining.settings`."""
    return {
        "trainer.lr": repr(config.trainer.lr),
        "eval.interval": str(config.eval.interval if config.eval.resolved_sets else 0),
        "daemon.log_level": config.daemon.log_level,
    }


def shared(settings: StepSettings | None) -> list[int]:
    """The part of a step's settings that all ranks need: the learning rate's bits, and whether to save a
    checkpoint.

    Zeros on ranks without settings.
    """
    if settings is None:
        return [0] * NUM_SHARED
    (bits,) = struct.unpack("<q", struct.pack("<d", settings.lr))
    return [bits, int(settings.checkpoint)]


def received(numbers: Sequence[int]) -> tuple[float, bool]:
    """The learning rate and whether to save a checkpoint, of rank 0's `shared`."""
    bits, saves = numbers
    (lr,) = struct.unpack("<d", struct.pack("<q", bits))
    return lr, bool(saves)
