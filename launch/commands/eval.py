"""`areal-like eval MODEL`: evaluates a model on the sets of a configuration, without training.

It runs a job of a buffer and rollout servers, with an evaluator (`python -m trainer.evaluate`) in place of
the trainer. The results are in a run directory of their own, with every sample.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from areal_like.errors import ConfigError
from areal_like.runtime.process import keep_files_private
from areal_like.runtime.signals import request_reopen
from launch.commands.configuration import CONFIG_FILE, file_and_settings
from launch.commands.foreground import StopSignals, in_directory, print_lines
from launch.commands.parser import SETTINGS, argument, command, flag
from launch.local_job.job import LocalJob
from launch.local_job.specs import EvaluationSpecs
from launch.run_directory.open_evaluation import EvaluatedModel, find_model, open_evaluation
from launch.run_directory.open_run import OpenRun
from launch.run_files import read_object
from launch.view.lasting import LastingView, output_may_be_gone
from launch.view.plain import PlainView, evaluation_line
from launch.view.summary import evaluation_table

_WIDTH = 110
"""Width of the table in a file or a pipe, in characters."""


@command(
    "eval",
    "Evaluate a model on the sets of a configuration (eval.sets), without training. The results and every "
    "sample are in a run directory of their own; resume=latest continues an evaluation that was stopped. "
    "Exit code 1 if a set has no result.",
    argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face directory, a checkpoint, a run (its newest checkpoint, with its configuration) "
        "or an owner/name",
    ),
    CONFIG_FILE,
    flag("--json", "print the results as JSON; progress to stderr"),
    SETTINGS,
    examples=[
        "eval myrun",
        "eval Qwen/Qwen3-1.7B --config job.yaml name=before",
        "eval runs/myrun/checkpoints/step_000500 --json",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Evaluates; returns 0 if every set has a result, 1 if not. Raises ConfigError."""
    if "=" in args.model:
        raise ConfigError(f"eval: put the model before the settings: areal-like eval MODEL {args.model}")
    return evaluate(find_model(args.model), file_and_settings(args), as_json=args.json)


def evaluate(model: EvaluatedModel, argv: Sequence[str], *, as_json: bool) -> int:
    """Evaluates the model with the configuration that `argv` describes; returns the exit code."""
    keep_files_private()
    run = open_evaluation(model, argv)
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = _WIDTH
    with in_directory(run):
        print_lines(console, run.announcement)
        code = 0 if run.is_finished else _run_job(run, model, console)
    if code == 2:
        return code
    with output_may_be_gone():
        return max(code, _show(run, console, as_json=as_json))
    return 1


def _run_job(run: OpenRun, model: EvaluatedModel, console: Console) -> int:
    """Runs the daemons to their end; returns the exit code."""
    stops = StopSignals(on_hangup=request_reopen)
    view = LastingView(PlainView(run.config, console, line=evaluation_line))
    with contextlib.closing(view):
        specs = EvaluationSpecs(run.config, config_path=run.config_file, step=model.step)
        job = LocalJob(run, view=view, num_stops=lambda: stops.count, specs=specs)
        code = job.run()
        if code == 2 and not job.has_begun:
            run.remove_if_created()
    with output_may_be_gone():
        for line in job.failure:
            sys.stderr.write(f"{line}\n")
    return code


def _show(run: OpenRun, console: Console, *, as_json: bool) -> int:
    """Prints the results; returns 1 if a set has none."""
    summary = read_object(run.paths.summary)
    sets = summary.get("sets", {})
    missing = [name for name in run.config.eval.resolved_sets if "avg" not in sets.get(name, {})]
    if as_json:
        print(json.dumps(summary | {"directory": str(run.paths.root)}, indent=2))
    elif sets:
        console.print(evaluation_table(sets, title=run.config.name))
    lines = [f"{run.paths.root}: evaluations.jsonl, summary.json, config.yaml, logs/"] if sets else []
    if missing:
        lines += [
            f"no result for {', '.join(missing)}; the finished samples are kept, the same command with "
            f"name={run.config.name} resume=latest continues"
        ]
    print_lines(console, lines)
    return int(bool(missing))
