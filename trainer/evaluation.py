"""Evaluations on held-out prompts: trainer rank 0 requests them, rollout servers run them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future

from areal_like.config import Config
from areal_like.errors import ArealError
from areal_like.wire.messages.consumer import EvalResult, RequestEval
from trainer.buffer_client.client import TrainerBufferClient

log = logging.getLogger(__name__)


class Evaluations:
    """Runs one evaluation at a time: `run` waits for its result, `start` and `poll` let training continue.

    IDLE -> start() -> RUNNING -> poll(): None ... -> poll(): mean reward -> IDLE
    """

    def __init__(
        self, config: Config, buffer: TrainerBufferClient, *, on_reward: Callable[[float], None]
    ) -> None:
        """`on_reward`: called with the mean reward of every evaluation that succeeded."""
        self._buffer = buffer
        self._num_prompts = config.eval.num_prompts
        self._stall_s = config.stall_s(config.eval.timeout_s)
        self._on_reward = on_reward
        self._running: Future[EvalResult] | None = None

    @property
    def is_enabled(self) -> bool:
        """False if `eval.num_prompts` is 0."""
        return self._num_prompts > 0

    def run(self, *, step: int, min_version: int) -> float:
        """Evaluates weights of `min_version` or later and returns the mean reward.

        Raises StopRequestedError when a drain begins, and ArealError when no prompt could be evaluated or no
        rollout server makes progress (`eval.timeout_s`).
        """
        return self._result(self._request(step, min_version))

    def start(self, *, step: int, min_version: int) -> None:
        """Starts an evaluation and returns, unless one is running."""
        if self._running is None:
            self._running = self._request(step, min_version)

    def poll(self) -> float | None:
        """The mean reward of the evaluation that ended since the last call; None if none did or it failed."""
        if self._running is None or not self._running.done():
            return None
        ended, self._running = self._running, None
        try:
            return self._result(ended)
        except ArealError as error:
            log.warning("training continues without an evaluation: %s", error)
            return None

    def _request(self, step: int, min_version: int) -> Future[EvalResult]:
        request = RequestEval(eval_id=step, num_prompts=self._num_prompts, min_version=min_version)
        return self._buffer.submit_call(request, timeout_s=math.inf)  # `_result` bounds the wait

    def _result(self, future: Future[EvalResult]) -> float:
        result: EvalResult = self._buffer.wait(
            future,
            name="the evaluation",
            may_stop=True,
            stall_s=self._stall_s,
            setting="eval.timeout_s",
        )
        if result.num_evaluated == 0:
            raise ArealError(
                f"none of the {result.num_failed} held-out prompts could be evaluated: "
                "see the rollout servers' logs"
            )
        reward = result.mean_reward
        failed = f", {result.num_failed} of which failed and count 0" if result.num_failed else ""
        num_prompts = result.num_evaluated + result.num_failed
        log.info("evaluation %d: %.4f over %d prompts%s", result.eval_id, reward, num_prompts, failed)
        self._on_reward(reward)
        return reward
