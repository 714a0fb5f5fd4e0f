"""Trains again on the recorded data of a run.

    python -m trainer.replay --recording RUN [--own-lr] --config FILE key=value ...

    read the recording -> { recorded groups -> step -> checkpoint now and then } * -> summary

The steps are run by the trainer's `StepRunner`, with the recorded groups at their positions. With the run's
own settings every parameter ends up bitwise equal (on a CPU, with the same number of ranks). With another
objective the same data become more and more off-policy: such a replay is a study of an estimator, not a run
that could have happened.

Each step has the learning rate that it had in the run, even if an operator changed it; with --own-lr it has
the configured one.

SIGTERM and SIGINT end the replay after the current step, with a checkpoint. Left out: resuming a stopped
replay, which would take as long as reading the recording up to that step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import UserError
from areal_like.runtime.command_line import Options, load_config
from areal_like.runtime.daemon import exit_code_of
from areal_like.runtime.imports import uncollected
from areal_like.runtime.logs import configure_logging
from areal_like.runtime.process import die_with_launcher, die_with_parent, keep_files_private
from areal_like.runtime.signals import handle_log_signals
from trainer.distributed.spawn import start_ranks


def _run(config: Config, root: Path, *, follows_changes: bool) -> None:
    with uncollected():
        # Imported here, because torch and transformers take seconds to import.
        from trainer.replay.run import run

    run(config, root, follows_changes=follows_changes)


def main(argv: Sequence[str]) -> int:
    """Runs one rank (under torchrun), or starts all ranks; returns the exit code."""
    options = Options()
    options.add_argument("--recording", type=Path, required=True)
    options.add_argument("--own-lr", action="store_true")
    try:
        values, settings = options.parse_known_args(list(argv))
        config = load_config(settings)
    except UserError as error:
        sys.stderr.write(f"replay: {error}\n")
        return 2
    if "RANK" in os.environ:
        die_with_parent()
    else:
        die_with_launcher()
        if config.trainer.world_size > 1:
            return start_ranks(argv, world_size=config.trainer.world_size, module="trainer.replay")
    name = f"replay-{os.environ['RANK']}" if "RANK" in os.environ else "replay"
    keep_files_private()

    def body() -> None:
        configure_logging(config, name)
        handle_log_signals()
        _run(config, values.recording, follows_changes=not values.own_lr)

    return exit_code_of(name, body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
