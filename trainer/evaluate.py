"""`python -m trainer.evaluate --step N [--config FILE] [key=value ...]`: evaluates a model without training.

`areal-like eval` starts it in the trainer's place. It requests the evaluation of every set, writes the
results, then starts as a trainer whose run has no step left, and finishes the run, so that the buffer never
issues a prompt to train on. The weights are those that the engines load at their start; nothing is ever
pushed. Imports no torch.

    requests -> results -> summary.json -> StartTraining(last step) -> FinishRun

If the evaluator, the buffer or a server is killed, no finished sample is lost: a repeated request waits for
the same evaluation, whose samples are in the ledger. The start of a trainer would cancel it, hence the order.
Exit codes are those of a daemon: `daemon.exit_code_on_drain` after a stop signal.

`Evaluations` serves trainer rank 0 too: it requests evaluations on held-out prompts, and rollout servers run
them. All sets are requested together, and the buffer serves them in their order.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from areal_like.automatic_settings import start_limit_s
from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError, DeadlineError, EvaluationError, UserError
from areal_like.paths import RunPaths, model_path, write_json
from areal_like.runtime.command_line import OneValue, Options, load_config, shows_help
from areal_like.runtime.daemon import DrainSignals
from areal_like.runtime.process import die_with_launcher, early_signals
from areal_like.wire.messages.consumer import FinishRun, StartTraining
from areal_like.wire.messages.evaluation import EvalResult, RequestEval
from areal_like.wire.messages.producer import ServerState
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.metrics.run_files import EvaluationsFile, described, evaluation_row
from trainer.start import run_to_end

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Requested:
    """One evaluation of one set that was requested."""

    step: int
    future: Future[EvalResult]
    started_s: float


class Evaluations:
    """Evaluates the sets: `run` waits for its results, while the other methods let training continue.

    Each set: IDLE -> start_if_due() -> RUNNING -> poll(): the result -> IDLE

    Where there is room for only one number (`eval_reward`), it is that of the first set of the configuration.
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
        """Steps between two evaluations; it may change between steps."""
        self._num_steps = config.trainer.num_steps
        self._stall_s = config.stall_s(config.eval.timeout_s)
        self._has_outside_agents = config.has_outside_agents
        self._on_row = on_row
        self._running: dict[str, _Requested] = {}
        """Set -> its running evaluation."""

    @property
    def is_enabled(self) -> bool:
        """False if `eval.num_prompts` is 0."""
        return bool(self._sets)

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
                    self.poll()  # record an earlier evaluation of this set first
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

        It also starts one if `is_asked`: an operator requested it.

        Sets in `done` are left out, and sets whose previous evaluation is still running: the other sets do
        not wait for a set with slow rewards.
        """
        left = [name for name in self._sets if name not in done]
        if not left or not 0 < step < self._num_steps or (step % self.interval and not is_asked):
            return
        if late := [f"{name} (step {self._running[name].step})" for name in left if name in self._running]:
            log.warning(
                "no evaluation after step %d of sets whose previous evaluation is still running: %s; raise "
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
                "made: `areal-like why RUN` and the rollout servers' logs name the failures"
            )
            if not self._has_outside_agents:
                raise EvaluationError(problem)
            # Agents that fail must not end a job before its first step.
            log.error("%s; they count as reward 0", problem)
        return result

    def _recorded(self, name: str, one: _Requested, result: EvalResult) -> dict[str, Any]:
        row = evaluation_row(result, self._sets[name], seconds=time.monotonic() - one.started_s)
        log.info("evaluation %d, set %s: %s", one.step, name, described(row))
        self._on_row(row)
        return row


_CALL_TIMEOUT_S = 60.0
_SERVING = ServerState.SERVING.value
_NAME = "trainer-0"
"""The launcher waits for the endpoint of this name."""


def evaluate(config: Config, buffer: TrainerBufferClient, *, step: int) -> None:
    """Evaluates every set, writes the results and finishes the run.

    Raises StopRequestedError when a drain begins.
    """
    paths = RunPaths.of(config)
    buffer.runtime.ready()
    if not paths.summary.exists():  # otherwise an earlier evaluator was killed just before its end
        started_s = time.monotonic()
        buffer.run(
            _any_server_serves(buffer),
            name="a rollout server that serves",
            may_stop=True,
            stall_s=config.stall_s(start_limit_s(config)),
            setting="rollout.start_timeout_s",
        )
        buffer.state = "evaluating"
        sets = _results(config, buffer, step=step)
        summary = {
            "finished": True,
            "model": model_path(config),
            "step": step,
            "sets": sets,
            "wall_seconds": round(time.monotonic() - started_s, 3),
        }
        write_json(paths.summary, summary)
    buffer.call(StartTraining(step=config.trainer.num_steps), timeout_s=_CALL_TIMEOUT_S)
    buffer.call(FinishRun(), timeout_s=_CALL_TIMEOUT_S)


async def _any_server_serves(buffer: TrainerBufferClient) -> None:
    """Waits until a server serves: starting an engine does not count towards the evaluation's time limits."""
    serves = asyncio.Event()

    def look() -> None:
        if any(server.state == _SERVING for server in buffer.directory.servers):
            serves.set()

    buffer.on_directory = look
    look()
    await serves.wait()


def _results(config: Config, buffer: TrainerBufferClient, *, step: int) -> dict[str, Any]:
    """The row of each set (`evaluation_row`), or `error`: the reason why there is none."""
    sets: dict[str, Any] = {name: {"error": "see logs/trainer-0.log"} for name in config.eval.resolved_sets}
    with closing(EvaluationsFile(RunPaths.of(config).evaluations, start_step=0)) as file:

        def record(row: dict[str, Any]) -> None:
            sets[row["set"]] = row
            file.append(row)

        try:
            Evaluations(config, buffer, on_row=record).run(step=step, min_version=0)
        except StopRequestedError:
            raise
        except ArealError as error:
            log.warning("no set has a result: %s", error)
            sets = {name: {"error": str(error)} for name in sets}
    return sets


def main(argv: Sequence[str]) -> int:
    if shows_help(list(argv), __doc__):
        return 0
    early_signals()
    try:
        options = Options()
        options.add_argument("--step", action=OneValue)
        values, rest = options.parse_known_args(list(argv))
        if not (values.step or "0").isdecimal():
            raise ConfigError(f"--step {values.step}: give a number of optimizer steps")
        config = load_config(rest)
        early_signals(config.daemon.exit_code_on_drain)
    except UserError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return 2
    die_with_launcher()
    step = int(values.step or 0)
    return run_to_end(config, _NAME, lambda config: _run(config, step=step))


def _run(config: Config, *, step: int) -> bool:
    """Returns True if the run is finished, False after a drain."""
    client = TrainerBufferClient(config, rank=0, world_size=1, device="cpu", process=secrets.token_hex(16))
    DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=client.stop_requested.set)
    try:
        with client as buffer:
            evaluate(config, buffer, step=step)
        return True
    except StopRequestedError as stop:
        log.info("%s", stop)
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
