"""What rank 0 does besides training: talk to the buffer, keep the engines current, evaluate, and keep the run's account."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from areal_like.config import Config
from areal_like.errors import ArealError, RefusedError, UserError
from areal_like.paths import RunPaths
from areal_like.wire.messages.consumer import (
    AllocVersion,
    CloseAdmission,
    CommitStep,
    CompleteStep,
    EvalResult,
    GetRunCounters,
    GetStreamState,
    RequestEval,
    RunCounters,
    SetMaxStaleness,
    StartTraining,
    VersionGranted,
)
from trainer.adaptive_staleness import StalenessController
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.metrics.prometheus import TrainerSeries
from trainer.metrics.run_files import WARM_UP_STEPS, MetricsFile, step_row, write_summary
from trainer.weight_sync.broadcaster import Broadcaster
from trainer.weight_sync.publisher import Publisher, PushReport
from trainer.weight_sync.snapshot import Snapshot

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0


class Leader:
    """Rank 0's duties. Methods run in the training thread unless they say otherwise, and return as soon as the trainer may go on."""

    def __init__(self, config: Config, link: TrainerBufferClient, *, step: int, started_s: float) -> None:
        self._config = config
        self._link = link
        self._step = step
        self._started_s = started_s
        self._training_started_s = started_s
        self._paths = RunPaths.of(config)
        self._metrics = MetricsFile(self._paths.metrics, start_step=step)
        self._series = TrainerSeries(link.runtime.metrics)
        self._staleness: StalenessController | None = None
        if config.max_staleness == "auto":
            self._staleness = StalenessController(cap=config.max_staleness_cap, target=config.ess_target)
        self._eval_before: float | None = None
        self._resumed_from_step = 0
        self._eval: Future[EvalResult] | None = None
        self._warm_books: RunCounters | None = None
        self._last_push: PushReport | None = None
        self._publisher: Publisher

    def claim(self, stream: dict[str, Any]) -> bool:
        """Says where this trainer stands, first of all; when it returns the buffer goes on from there. True: the run is new.

        `stream`: what `stream_state` said when the checkpoint was made; empty for a new run. Raises UserError when the buffer cannot go on
        from here: another start would be refused too.
        """
        try:
            welcome = self._link.call(
                StartTraining(step=self._step, stream=stream.get("stream", {})), timeout_s=_CALL_TIMEOUT_S
            )
        except RefusedError as error:
            raise UserError(str(error)) from error
        # Without a checkpoint the run begins anew, but servers may hold what an earlier trainer pushed.
        return self._step == 0 and bool(welcome.newest_version == 0)

    def begin(
        self, snapshot: Snapshot, *, is_new: bool, stream: dict[str, Any], oldest_kept_step: int
    ) -> None:
        """After `claim`, which says `is_new`: unless the run is new, the engines get this trainer's weights before anything else.

        `stream`: as in `claim`. `oldest_kept_step`: as in `commit`. A drain ends the waiting.
        """
        link = self._link
        if self._step:
            self.commit(self._step - 1, oldest_kept_step=oldest_kept_step)
        if self._staleness is not None:
            if "staleness" in stream:
                self._staleness.restore(stream["staleness"])
            self._tell_bound(self._staleness.bound)
        link.run(self._open_publisher(), name="publisher", timeout_s=10)
        self._publisher_offer(snapshot, loaded=is_new)
        self._eval_before = stream.get("eval_before")
        self._resumed_from_step = self._step
        try:
            self._bring_up(is_new=is_new)
        except StopRequestedError as stop:
            log.info("%s", stop)
        self._training_started_s = time.monotonic()

    def _bring_up(self, *, is_new: bool) -> None:
        config, link = self._config, self._link
        start_timeout_s = config.rollout.start_timeout_s
        if not is_new:
            link.state = "pushing"
            link.run(
                self._publisher.wait_until_active(self._step),
                name="the checkpoint's weights to be active at a server",
                timeout_s=start_timeout_s + config.weights.push_deadline_s,
                may_stop=True,
            )
        if self._step == 0 and config.eval.num_prompts:
            link.state = "evaluating"
            result = self._finish_eval(self._ask_eval(), timeout_s=start_timeout_s + config.eval.timeout_s)
            self._eval_before = result.mean_reward

    def stepped(self, step: int, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        """An optimizer step is done: tell the buffer, offer the weights, write the row, evaluate now and then.

        `snapshot`: None between syncs.
        """
        link = self._link
        bound = self._bound
        self._adapt(metrics)
        link.call(CompleteStep(step=step), timeout_s=_CALL_TIMEOUT_S)
        self._step = step + 1
        if snapshot is not None:
            self._publisher_offer(snapshot, loaded=False)
        row = self._row(step, {**metrics, "max_staleness": bound})
        self._metrics.append(row)
        self._series.stepped(step, {**metrics, **row})
        link.stats = {
            name: row[name]
            for name in ("reward_mean", "loss", "tokens_per_s_trained")
            if math.isfinite(row[name])
        }
        if self._step == WARM_UP_STEPS:
            self._warm_books = link.call(GetRunCounters(), timeout_s=_CALL_TIMEOUT_S)
        is_due = self._step % self._config.eval.interval == 0 and self._step < self._config.trainer.num_steps
        if is_due and self._config.eval.num_prompts and self._eval is None:
            self._eval = self._ask_eval()

    def stream_state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps for `begin`: where the prompts stand after `step`, and how good the policy was at first."""
        state = self._link.call(GetStreamState(step=step), timeout_s=_CALL_TIMEOUT_S).stream
        kept = {"stream": state, "eval_before": self._eval_before}
        return kept if self._staleness is None else kept | {"staleness": self._staleness.dump()}

    def alloc_version(self) -> int:
        """A version for the weights of now, for a checkpoint: whoever loads it has to say what it samples with."""
        granted: VersionGranted = self._link.call(AllocVersion(step=self._step), timeout_s=_CALL_TIMEOUT_S)
        return granted.version

    def commit(self, step: int, *, oldest_kept_step: int) -> None:
        """A checkpoint with steps <= `step` is on disk, the oldest that is kept is of `oldest_kept_step`. From any thread."""
        self._link.call(CommitStep(step=step, oldest_kept_step=oldest_kept_step), timeout_s=_CALL_TIMEOUT_S)

    def end(self, *, finished: bool, hands_over: bool = False) -> None:
        """Closes the stream, lets the last weights arrive, evaluates them (when finished), and writes the summary.

        `hands_over`: another trainer goes on at once, so generation does not stop meanwhile.
        """
        config, link = self._config, self._link
        books = link.call(GetRunCounters(), timeout_s=_CALL_TIMEOUT_S)
        generation_ended = books
        if not hands_over:
            reason = "the run is finished" if finished else "the trainer is draining"
            link.call(CloseAdmission(reason=reason), timeout_s=_CALL_TIMEOUT_S)
        training_seconds = time.monotonic() - self._training_started_s
        eval_after = None
        if finished and self._metrics.num_rows:
            try:
                link.run(
                    self._publisher.wait_until_active(self._step),
                    name="the last weights to be active",
                    timeout_s=config.weights.push_deadline_s,
                )
                if config.eval.num_prompts:
                    link.state = "evaluating"
                    eval_after = self._finish_eval(
                        self._ask_eval(), timeout_s=config.eval.timeout_s
                    ).mean_reward
            except ArealError as error:
                log.warning("the run is trained and saved, but its last evaluation is missing: %s", error)
        link.run(self._publisher.close(), name="weight groups to dissolve", timeout_s=30)
        write_summary(
            self._paths.summary,
            account=self._metrics.account(),
            books=link.call(GetRunCounters(), timeout_s=_CALL_TIMEOUT_S),
            books_after_warm_up=self._warm_books,
            books_at_end=generation_ended,
            eval_before=self._eval_before,
            eval_after=eval_after,
            weights_version=self._publisher.active_version,
            finished=finished,
            resumed_from_step=self._resumed_from_step,
            wall_seconds=time.monotonic() - self._started_s,
            training_seconds=training_seconds,
        )
        self._metrics.close()

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "last": self._metrics.last,
            "last_push": asdict(self._last_push) if self._last_push else {},
            "weights_version": self._publisher.active_version if hasattr(self, "_publisher") else 0,
            "servers": [asdict(server) for server in self._link.directory.servers],
        }

    @property
    def _bound(self) -> int:
        """Largest lag of what is admitted now."""
        return self._config.staleness_cap if self._staleness is None else self._staleness.bound

    def _adapt(self, metrics: dict[str, Any]) -> None:
        """Moves the bound by what this step looked like; a step in which no sequence was run says nothing."""
        if self._staleness is None or not metrics["num_tokens"]:
            return
        before = self._staleness.bound
        if self._staleness.observe(ess_ratio=metrics["ess_ratio"], lag_max=metrics["lag_max"]) != before:
            self._tell_bound(self._staleness.bound)

    def _tell_bound(self, bound: int) -> None:
        self._link.call(SetMaxStaleness(max_staleness=bound), timeout_s=_CALL_TIMEOUT_S)

    def _row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        row = step_row(step, metrics)
        row["weights_version"] = self._publisher.active_version
        row["weights_step"] = self._publisher.active_step
        row["push_s"] = self._last_push.seconds if self._last_push else 0.0
        if self._eval is not None and self._eval.done():
            future, self._eval = self._eval, None
            try:
                row["eval_reward"] = self._finish_eval(future, timeout_s=1.0).mean_reward
            except ArealError as error:
                log.warning("training goes on without an evaluation: %s", error)
        return row

    def _ask_eval(self) -> Future[EvalResult]:
        version = self._publisher.active_version
        request = RequestEval(
            eval_id=self._step, num_prompts=self._config.eval.num_prompts, min_version=version
        )
        return self._link.submit_call(
            request, timeout_s=self._config.rollout.start_timeout_s + self._config.eval.timeout_s
        )

    def _finish_eval(self, future: Future[EvalResult], *, timeout_s: float) -> EvalResult:
        result: EvalResult = self._link.wait(
            future, name="the evaluation", timeout_s=timeout_s, may_stop=True
        )
        if result.num_evaluated == 0:
            raise ArealError(
                f"none of the {result.num_failed} held-out prompts could be evaluated: see the rollout servers' logs"
            )
        log.info(
            "evaluation %d: %.4f over %d prompts", result.eval_id, result.mean_reward, result.num_evaluated
        )
        self._series.evaluated(result.mean_reward)
        return result

    def _publisher_offer(self, snapshot: Snapshot, *, loaded: bool) -> None:
        async def offer() -> None:
            self._publisher.offer(self._step, snapshot, loaded=loaded)

        self._link.submit(offer())

    async def _open_publisher(self) -> None:
        def pushed(report: PushReport) -> None:
            self._last_push = report
            self._series.pushed(report)

        link = self._link
        self._publisher = Publisher(
            Broadcaster(self._config.weights, device=link.device, incarnation=link.incarnation),
            call=link.call_async,
            servers=lambda: link.directory.servers,
            on_push=pushed,
            on_failure=link.fail,
        )
        link.on_directory = self._publisher.directory_changed
