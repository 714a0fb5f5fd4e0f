"""`python -m trainer.evaluate --step N [--config FILE] [key=value ...]`: evaluates a model without training.

What `areal-like eval` starts in the trainer's place. It requests the evaluation of every set, writes the
results, then starts as a trainer whose run has no step left, and finishes the run: so the buffer never issues
a prompt to train on. The weights are those that the engines load at their start; nothing is ever pushed.
Imports no torch.

    requests -> results -> summary.json -> StartTraining(last step) -> FinishRun

A killed evaluator, buffer or server costs no finished sample: a request that is repeated waits for the same
evaluation, of which the ledger has the samples. A trainer that starts would cancel it, hence the order.
Exit codes are those of a daemon: `daemon.exit_code_on_drain` after a stop signal.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from areal_like.automatic_settings import start_limit_s
from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.paths import RunPaths, model_path, write_json
from areal_like.runtime.command_line import OneValue, Options, load_config, shows_help
from areal_like.runtime.daemon import DrainSignals, exit_code_of
from areal_like.runtime.logs import configure_logging
from areal_like.runtime.process import die_with_launcher, early_signals, keep_files_private
from areal_like.runtime.signals import handle_log_signals
from areal_like.wire.messages.consumer import FinishRun, StartTraining
from areal_like.wire.messages.producer import ServerState
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.evaluation import Evaluations
from trainer.metrics.evaluations_file import EvaluationsFile

log = logging.getLogger(__name__)

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
    if not paths.summary.exists():  # else an earlier evaluator was killed at its end
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
    """The start of an engine counts neither as time of the evaluation nor as its silence."""
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
    """See the module's docstring."""
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
    return _run(config, step=int(values.step or 0))


def _run(config: Config, *, step: int) -> int:
    is_finished = False

    def body() -> None:
        nonlocal is_finished
        client = TrainerBufferClient(
            config, rank=0, world_size=1, device="cpu", process=secrets.token_hex(16)
        )
        DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=client.stop_requested.set)
        try:
            with client as buffer:
                evaluate(config, buffer, step=step)
            is_finished = True
        except StopRequestedError as stop:
            log.info("%s", stop)

    keep_files_private(RunPaths.of(config).root)
    configure_logging(config, _NAME)
    handle_log_signals()
    code = exit_code_of(_NAME, body)
    return code if code or is_finished else config.daemon.exit_code_on_drain


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
