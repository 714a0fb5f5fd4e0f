"""`areal-like replay RUN key=value ...`: trains again on the trajectories of a run, in a new directory.

With the recorded run's settings the weights must be equal to the last bit. This holds even if an operator
changed the learning rate during the run: each step uses its recorded rate, unless trainer.lr=... is given.
The weights are compared, and the result reported, at all steps at which both runs have a checkpoint.

`areal-like replay RUN --against OTHER` writes no run: it finds the first step at which two runs differ, and
trains only that step again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, checkpoint_name, write_json
from areal_like.runtime.process import keep_files_private
from launch.commands.foreground import StopSignals, in_directory
from launch.commands.parser import RUN, SETTINGS, argument, command, flag
from launch.comparison.settings import GENERATION
from launch.comparison.weights import same_files
from launch.local_job.display import View
from launch.local_job.foreground import Foreground
from launch.local_job.specs import ChildSpec
from launch.run_directory.open_run import OpenRun, open_replay
from launch.run_directory.rundir import checkpoints, find_run
from launch.view.lasting import LastingView, output_may_be_gone
from launch.view.plain import PlainView
from launch.view.summary import summary_table


@command(
    "replay",
    "Train again on the trajectories of a run, with the same or other settings, in a new run directory. The "
    "run must have had buffer.retain_trajectories=true. With --against, write no run: print the first step "
    "at which two runs differ and by what, and train only that step of both again; exit code 1 if they "
    "differ.",
    RUN,
    argument("--against", metavar="OTHER", help="compare RUN with this run, step by step"),
    argument(
        "--tolerance",
        metavar="SHARE",
        type=float,
        help="with --against: relative difference that counts as equal, such as 1e-5",
    ),
    flag("--records-only", "with --against: train nothing again"),
    flag("--json", "with --against: print JSON"),
    SETTINGS,
    examples=[
        "replay myrun",
        "replay myrun objective=ppo name=myrun-ppo",
        "replay myrun --against other",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Replays to the end, or compares; returns the exit code."""
    if args.against is not None:
        return _compare_runs(args)
    if args.json or args.records_only or args.tolerance is not None:
        raise ConfigError(
            "replay: --json, --tolerance and --records-only are of a comparison: add --against OTHER"
        )
    if "=" in args.run:
        raise ConfigError(f"replay: put the run before the settings: areal-like replay RUN {args.run}")
    return run_replay(find_run(args.run), args.settings)


def _compare_runs(args: argparse.Namespace) -> int:
    """Prints where RUN and OTHER differ; returns 1 if they do, else 0."""
    if args.settings:
        raise ConfigError("replay --against: two runs are compared as they are; leave settings out")
    if args.tolerance is not None and not 0 <= args.tolerance < 1:
        raise ConfigError(f"--tolerance {args.tolerance:g}: use a share from 0 up to 1, such as 1e-5")
    # Imported here: it reads records with the trainer's code, which no other command needs.
    from launch.comparison.runs import compare_runs

    keep_files_private()
    comparison = compare_runs(
        find_run(args.run),
        find_run(args.against),
        tolerance=args.tolerance,
        replays=not args.records_only,
    )
    print(comparison.dumps() if args.json else "\n".join(comparison.lines()))
    return 0 if comparison.is_equal else 1


def run_replay(recorded: Path, argv: Sequence[str]) -> int:
    """Replays the run in `recorded` with the settings `argv`; returns the exit code.

    Raises ConfigError before it starts the trainer.
    """
    if any(arg.startswith("resume=") for arg in argv):
        raise ConfigError(
            "replay: a replay begins at the first step of the recorded run; resume= is for `areal-like run`"
        )
    if any(arg.startswith("buffer.overdue=") for arg in argv):
        raise ConfigError(
            "replay: leave buffer.overdue= out: whether groups were closed is part of the recorded data, and "
            "the baselines depend on it (staleness.beyond= may be changed)"
        )
    keep_files_private()
    run = open_replay(recorded, argv)
    console = Console()
    view = LastingView(PlainView(run.config, console))
    with in_directory(run):
        for arg in argv:
            if arg.startswith((*GENERATION, "trackers")):
                view.notice(
                    f"{arg} has no effect: the trajectories and their order come from the recorded run"
                )
        view.notice(f"replaying {recorded} into {run.paths.root}")
        own_lr = any(arg.startswith("trainer.lr=") for arg in argv)
        write_json(run.paths.replay, {"recording": str(recorded.resolve()), "own_lr": own_lr})
        code = _train(recorded, run, view=view, options=("--own-lr",) if own_lr else ())
        if code == 0:
            table = summary_table(json.loads(run.paths.summary.read_text()), title=run.config.name)
            with output_may_be_gone():
                console.print(table)
            for line in _compare(RunPaths(recorded), run.paths):
                view.notice(line)
    return code


def _train(recorded: Path, run: OpenRun, *, view: View, options: Sequence[str]) -> int:
    """Runs the replaying trainer to its end; returns the exit code."""
    command = ("trainer.replay", "--recording", str(recorded.resolve()), *options)
    command += ("--config", str(run.paths.config))
    stops = StopSignals()
    foreground = Foreground(run, view=view, num_stops=lambda: stops.count)
    spec = ChildSpec(name="replay", command=command, num_threads=run.config.trainer.least_threads)
    return foreground.run(
        spec,
        phase="replaying",
        notice="stopping: the trainer finishes its step and writes a checkpoint "
        "(Ctrl-C again to stop at once)",
    )


def _compare(recorded: RunPaths, replayed: RunPaths) -> list[str]:
    """Lines for the user: the steps at which the weights of both runs are equal, and those where they
    differ."""
    steps = sorted(set(checkpoints(recorded)) & set(checkpoints(replayed)))
    by_result: dict[bool, list[str]] = {True: [], False: []}
    for step in steps:
        by_result[_are_equal(recorded, replayed, step)].append(str(step))
    texts = {True: "equal to the recorded run's, to the last bit", False: "different from the recorded run's"}
    return [
        f"weights after step {', '.join(by_result[is_equal])}: {text}"
        for is_equal, text in texts.items()
        if by_result[is_equal]
    ]


def _are_equal(recorded: RunPaths, replayed: RunPaths, step: int) -> bool:
    """Compares the weights' files and, if both runs had the same number of ranks, masters and moments."""
    ours, theirs = (paths.checkpoints / checkpoint_name(step) for paths in (recorded, replayed))
    rows = [{file.name for file in folder.glob("rows/policy-*")} for folder in (ours, theirs)]
    return same_files(ours, theirs, "*model*.safetensors") is True and all(
        same_files(ours, theirs, f"rows/{name}") for name in rows[0] & rows[1]
    )
