"""`areal-like replay RUN key=value ...`: the trainer's step on what a run was trained on, in a run directory of its own.

With the run's own settings the weights must come out as they did there; where both have a checkpoint of the same step this is looked at
and said.
"""

from __future__ import annotations

import filecmp
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, checkpoint_name
from launch.commands.run import StopSignals
from launch.local_job.child import Child, ChildSpec, describe_exit, kill_marked
from launch.local_job.observe import MetricsTail, Observation
from launch.local_job.rundir import OpenRun, checkpoints, open_replay
from launch.view.report import summary_table
from launch.view.view import LastingView, PlainView, View, unless_seen_by_nobody

_TICK_S = 0.1
_IGNORED = (
    "buffer.",
    "rollout.",
    "weights.",
    "eval.",
    "sampling.",
    "task",
    "max_staleness",
    "max_staleness_cap",
    "ess_target",
    "seed",
)


def run_replay(recorded: Path, argv: Sequence[str]) -> int:
    """Replays to the end; returns the exit code. Raises ConfigError before anything was started."""
    if any(arg.startswith("resume=") for arg in argv):
        raise ConfigError(
            "replay: a replay begins at the recording's first step (resume= is for `areal-like run`)"
        )
    run = open_replay(recorded, argv)
    console = Console()
    say = LastingView(PlainView(run.config, console))
    for arg in argv:
        if arg.startswith(_IGNORED):
            say.notice(f"{arg} has no effect: what was generated, and when, is what the recording says")
    say.notice(f"replaying {recorded} into {run.paths.root}")
    try:
        code = _watch(recorded, run, view=say)
        if code == 0:
            table = summary_table(json.loads(run.paths.summary.read_text()), title=run.config.name)
            with unless_seen_by_nobody():
                console.print(table)
            for line in _compared(RunPaths(recorded), run.paths):
                say.notice(line)
        return code
    finally:
        run.close()


def _watch(recorded: Path, run: OpenRun, *, view: View) -> int:
    stops = StopSignals()
    command = ("trainer.replay", "--recording", str(recorded.resolve()), "--config", str(run.paths.config))
    marker = f"{run.paths.root}:{os.getpid()}:{time.time_ns()}"
    spec = ChildSpec(name="replay", command=command, num_threads=run.config.trainer.num_threads)
    child = Child(spec, paths=run.paths, marker=marker, lock_fd=run.lock_fd)
    tail = MetricsTail(run.paths.metrics)
    num_obeyed = 0
    try:
        while (code := child.exit_code()) is None:
            if stops.count > num_obeyed:
                num_obeyed = stops.count
                if num_obeyed > 1:
                    break
                view.notice(
                    "stopping: the step at hand is finished and a checkpoint written (Ctrl-C again to stop at once)"
                )
                child.terminate()
            view.update(Observation(progress=tail.read()), phase="replaying", detail="")
            time.sleep(_TICK_S)
    finally:
        child.kill()
        kill_marked(marker)
    if code is None:
        return 1
    if code == 2:
        raise ConfigError(child.complaint())
    if code != 0:
        sys.stderr.write(
            "\n".join([f"replay failed ({describe_exit(code)}); its last lines:", *child.last_words(), ""])
        )
        return 1
    return 0


def _compared(recorded: RunPaths, replayed: RunPaths) -> list[str]:
    """What can be said of the steps at which both have a checkpoint."""
    steps = sorted(set(checkpoints(recorded)) & set(checkpoints(replayed)))
    same = [
        step
        for step in steps
        if filecmp.cmp(_weights_at(recorded, step), _weights_at(replayed, step), shallow=False)
    ]
    lines = (
        [f"weights after step {', '.join(map(str, same))}: equal to those of the run, to the last bit"]
        if same
        else []
    )
    if others := [step for step in steps if step not in same]:
        lines.append(f"weights after step {', '.join(map(str, others))}: not those of the run")
    return lines


def _weights_at(paths: RunPaths, step: int) -> Path:
    return paths.checkpoints / checkpoint_name(step) / "model.safetensors"
