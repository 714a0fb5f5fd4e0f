"""`python -m trainer.evaluate --step N [--config FILE] [key=value ...]`: evaluates a model without training.

What `areal-like eval` starts in the trainer's place. It is a trainer whose run has no step left: it starts
behind the last step, so the buffer issues no prompt to train on, requests the evaluation of every set, writes
the results and finishes the run. The weights are those that the engines load at their start; nothing is ever
pushed. Imports no torch.

A killed evaluator or buffer costs nothing that was sampled: the same request waits for the same evaluation.
Exit codes are those of a daemon: `daemon.exit_code_on_drain` after a stop signal.
"""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError, RefusedError, RunFinishedError, UserError
from areal_like.paths import RunPaths, model_path, write_json
from areal_like.runtime.command_line import OneValue, Options, load_config, shows_help
from areal_like.runtime.daemon import DrainSignals, exit_code_of
from areal_like.runtime.logs import configure_logging
from areal_like.runtime.process import die_with_launcher, early_signals, keep_files_private
from areal_like.runtime.signals import handle_log_signals
from areal_like.wire.messages.consumer import CloseAdmission, FinishRun, StartTraining
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.evaluation import Evaluations

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0
_NAME = "trainer-0"
"""The launcher waits for the endpoint of this name."""


def evaluate(config: Config, buffer: TrainerBufferClient, *, step: int) -> None:
    """Evaluates every set and writes the results. Raises StopRequestedError when a drain begins."""
    paths, started_s = RunPaths.of(config), time.monotonic()
    start = StartTraining(step=config.trainer.num_steps)
    try:
        buffer.call(start, timeout_s=_CALL_TIMEOUT_S)
    except RefusedError as error:
        raise UserError(str(error)) from error
    except RunFinishedError:
        log.info("the evaluation is finished")
        return
    buffer.runtime.ready()
    buffer.state = "evaluating"
    evaluations = Evaluations(config, buffer, on_reward=lambda _: None)
    sets: dict[str, Any] = {}
    try:
        sets["eval"] = {"avg": evaluations.run(step=step, min_version=0)}
    except StopRequestedError:
        raise
    except ArealError as error:
        log.warning("no result: %s", error)
        sets["eval"] = {"error": str(error)}
    write_json(
        paths.summary,
        {
            "finished": True,
            "model": model_path(config),
            "step": step,
            "sets": sets,
            "wall_seconds": round(time.monotonic() - started_s, 3),
        },
    )
    buffer.call(CloseAdmission(reason="the evaluation is finished"), timeout_s=_CALL_TIMEOUT_S)
    buffer.call(FinishRun(), timeout_s=_CALL_TIMEOUT_S)


def main(argv: Sequence[str]) -> int:
    """See the module's docstring."""
    if shows_help(list(argv), __doc__):
        return 0
    early_signals()
    try:
        options = Options()
        options.add_argument("--step", action=OneValue, missing="give the model's optimizer steps, or 0")
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
