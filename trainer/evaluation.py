"""Evaluations on held-out prompts: trainer rank 0 requests them, rollout servers run them.

All sets are requested together, and the buffer serves them in their order. Imports no torch: a model is also
evaluated without a trainer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from areal_like.config import Config
from areal_like.errors import ArealError, DeadlineError
from areal_like.wire.messages.evaluation import EvalResult, RequestEval
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.metrics.evaluations_file import described, evaluation_row

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Requested:
    """One evaluation of one set that was requested."""

    step: int
    future: Future[EvalResult]
    started_s: float


class Evaluations:
    """Evaluates the sets: `run` waits for its results, while the other methods let training go on.

    Of each set: IDLE -> start_if_due() -> RUNNING -> poll(): the result -> IDLE

    The first set of the configuration stands for the others where there is room for one number
    (`eval_reward`).
    """

    def __init__(
        self,
        config: Config,
        buffer: TrainerBufferClient,
        *,
        on_row: Callable[[dict[str, Any]], None],
    ) -> None:
        """`on_row`: called with the row of every set that was evaluated (`evaluation_row`)."""
        self._buffer = buffer
        self._sets = config.eval.resolved_sets
        self.interval = config.eval.interval
        """In steps; it may change between steps."""
        self._num_steps = config.trainer.num_steps
        self._stall_s = config.stall_s(config.eval.timeout_s)
        self._has_outside_agents = config.has_outside_agents
        self._on_row = on_row
        self._running: dict[str, _Requested] = {}
        """By set."""

    @property
    def is_enabled(self) -> bool:
        """False if `eval.num_prompts` is 0."""
        return bool(self._sets)

    @property
    def set_names(self) -> list[str]:
        """Names of all sets, the first one first."""
        return list(self._sets)

    def run(self, *, step: int, min_version: int) -> float | None:
        """Evaluates weights of `min_version` or later; returns the mean reward of the first set.

        None if that set has no result. Raises StopRequestedError when a drain begins, and ArealError if no
        set could be evaluated, or no rollout server makes progress (`eval.timeout_s`).
        """
        requested = self._request(step, min_version, self._sets)
        rows: dict[str, dict[str, Any]] = {}
        problems: dict[str, ArealError] = {}
        try:
            for name, one in requested.items():
                try:
                    result = self._result(name, one)
                    self.poll()  # an earlier evaluation of this set has ended before, and is recorded before
                    rows[name] = self._recorded(name, one, result)
                except StopRequestedError:
                    raise
                except ArealError as error:
                    problems[name] = error
                    if isinstance(error, DeadlineError):  # the others wait for the same servers
                        break
        finally:
            for one in requested.values():
                one.future.cancel()
        self.poll()
        if not rows:
            raise next(iter(problems.values()))
        for name, problem in problems.items():
            log.warning("the evaluation set %s has no result: %s", name, problem)
        return self._reward_of(rows)

    def start_if_due(
        self, *, step: int, min_version: int, done: Collection[str] = (), is_asked: bool = False
    ) -> None:
        """Between the first and the last step, every `interval` steps: starts an evaluation and returns.

        Also if `is_asked`: an operator wants one now.

        Not of the sets in `done`, and not of those whose evaluation before is still running: the others need
        not wait for a set whose rewards are slow.
        """
        left = [name for name in self._sets if name not in done]
        if not left or not 0 < step < self._num_steps or (step % self.interval and not is_asked):
            return
        if late := [f"{name} (step {self._running[name].step})" for name in left if name in self._running]:
            log.warning(
                "no evaluation after step %d of sets whose evaluation before still runs: %s; raise "
                "eval.interval, or lower num_prompts, num_samples or max_new_tokens of these sets",
                step,
                ", ".join(late),
            )
        self._running |= self._request(
            step, min_version, [name for name in left if name not in self._running]
        )

    def poll(self) -> float | None:
        """Records the sets whose evaluation has ended since the last call.

        Returns the mean reward of the first set; None if it was not among them or failed.
        """
        rows: dict[str, dict[str, Any]] = {}
        for name in [name for name, one in self._running.items() if one.future.done()]:
            try:
                one = self._running.pop(name)
                rows[name] = self._recorded(name, one, self._result(name, one))
            except ArealError as error:
                log.warning("training continues without an evaluation of %s: %s", name, error)
        return self._reward_of(rows)

    def _reward_of(self, rows: dict[str, dict[str, Any]]) -> float | None:
        first = rows.get(next(iter(self._sets), ""))
        return None if first is None else first["avg"]

    def _request(self, step: int, min_version: int, names: Iterable[str]) -> dict[str, _Requested]:
        requested = {}
        for name in names:
            request = RequestEval(
                eval_id=step,
                eval_set=name,
                num_prompts=self._sets[name].num_prompts,
                num_samples=self._sets[name].num_samples,
                min_version=min_version,
            )
            future = self._buffer.submit_call(request, timeout_s=math.inf)  # `_result` bounds the wait
            requested[name] = _Requested(step=step, future=future, started_s=time.monotonic())
        return requested

    def _result(self, name: str, one: _Requested) -> EvalResult:
        result: EvalResult = self._buffer.wait(
            one.future,
            name="the evaluation",
            may_stop=True,
            stall_s=self._stall_s,
            setting="eval.timeout_s",
        )
        if result.num_evaluated == 0:
            problem = (
                f"none of the {len(result.rewards)} samples for the held-out prompts of {name} could be "
                "made: see the rollout servers' logs"
            )
            if not self._has_outside_agents:
                raise ArealError(problem)
            # Broken agents must not end a job before its first step.
            log.error("%s; they count as reward 0", problem)
        return result

    def _recorded(self, name: str, one: _Requested, result: EvalResult) -> dict[str, Any]:
        row = evaluation_row(result, self._sets[name], seconds=time.monotonic() - one.started_s)
        log.info("evaluation %d, set %s: %s", one.step, name, described(row))
        self._on_row(row)
        return row
