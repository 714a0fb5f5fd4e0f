"""Tells what `areal-like run` would do: which settings change, and whether the job's parts and the checkpoint
accept them.

The parts are those that a job makes without a model: objective and advantages, trackers, tasks with their
rows and rewards. A checkpoint is checked by the formats and sizes of its files, and by its state. The trainer
checks the shapes of its tensors, because that needs the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import checkpoint_name
from areal_like.weights.snapshots_on_disk import FORMAT, OLD_FORMAT, STATE_FILE
from launch.run_directory.kept_settings import change_lines, changes, stored
from launch.run_directory.open_run import OpenRun
from launch.run_files import tail

_MAX_ROW_BYTES = 1 << 20
_OF_RECORDED_GROUPS = (
    "trainer.groups_per_step",
    "sampling.group_size",
    "sampling.greedy_baseline",
    "weights.sync_interval",
    "max_staleness",
    "seed",
    "task",
)
"""Prefixes of settings with which recorded groups cannot be trained any more."""


def described(run: OpenRun, *, is_sft: bool = False) -> Iterator[str]:
    """Lines for the user about a run that was opened dry. Raises ConfigError for settings that a part of the
    job refuses, and for an unusable checkpoint."""
    yield from run.announcement
    if not is_sft:
        check_parts(run.config)
        yield "objective, trackers and tasks accept the settings"
    if run.is_resumed and not run.is_finished:
        yield from _resumed(run, is_sft=is_sft)
    yield "dry run: nothing was written or started"


def _resumed(run: OpenRun, *, is_sft: bool) -> Iterator[str]:
    paths, step = run.paths, run.first_step
    before = stored(paths)
    changed = changes(before, run.config) if before is not None else {}
    if not changed:
        yield "no setting changes" if before is not None else "the previous settings cannot be read"
    yield from change_lines(changed)
    if step:
        check_checkpoint(paths.checkpoints / checkpoint_name(step), run.config, step=step, is_sft=is_sft)
        yield f"the checkpoint of step {step} accepts these settings"
    if restarting := [key for key in changed if key.startswith(_OF_RECORDED_GROUPS)]:
        yield (
            f"with another {', '.join(restarting)}, groups that are recorded from step {step} on "
            "are cancelled, and their prompts are issued again"
        )
    if (last := _last_step(paths.metrics)) >= step:
        yield f"steps {step} to {last} are undone and trained again"


def check_parts(config: Config) -> None:
    """Makes the parts of a job that need no model, as its daemons do. Raises ConfigError."""
    # Imported here, because torch takes seconds to import.
    from rollout_server.rewards.library.model.scorers import tell_workers
    from rollout_server.sources import make_tasks
    from trainer.step.recipe import StepRecipe
    from trainer.trackers import build_trackers

    StepRecipe.of(config)
    build_trackers(config.trackers)
    tell_workers(config)
    make_tasks(config)


def _last_step(metrics: Path) -> int:
    """The step of the last complete row; -1 without one."""
    line = tail(metrics, max_bytes=_MAX_ROW_BYTES).rpartition("\n")[0].rpartition("\n")[2]
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def check_checkpoint(folder: Path, config: Config, *, step: int, is_sft: bool) -> None:
    """Raises ConfigError if a run with this configuration cannot continue from the checkpoint."""
    state = _object(folder / STATE_FILE)
    if state.get("format") not in (OLD_FORMAT, FORMAT):
        raise ConfigError(f"{folder} has format {state.get('format')}, this release reads up to {FORMAT}")
    extra = state.get("extra")
    stream = extra.get("stream") if isinstance(extra, dict) else None
    if (stream is None) != is_sft:
        of = "supervised training" if stream is None else "training with rewards"
        raise ConfigError(f"{folder} is a checkpoint of {of}: continue it with the command that started it")
    saved = stream.get("stream") if isinstance(stream, dict) else None
    num_shards = saved.get("num_shards", 1) if saved else config.buffer.num_shards
    if num_shards != config.buffer.num_shards:
        raise ConfigError(f"{folder} was made with buffer.num_shards={num_shards}: set that again")
    if not is_sft and step > config.trainer.num_steps:
        raise ConfigError(
            f"trainer.num_steps={config.trainer.num_steps}: {folder} has {step} steps: raise it, or "
            "resume at an earlier step"
        )
    for path in sorted(folder.glob("*.json")):
        _object(path)
    index = folder / "rows" / "index.json"
    named = _object(index)["models"].values() if index.exists() else ()
    files = {folder / "rows" / name for model in named for name in model["files"]}
    files |= {folder / name for model in named for name in model["masters"]}
    for path in sorted({*files, *folder.glob("*.safetensors"), *folder.glob("rows/*.safetensors")}):
        _check_tensors(path)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): resume from another step") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not contain a JSON object: resume from another step")
    return value


def _check_tensors(path: Path) -> None:
    """Raises ConfigError if a safetensors file does not have the length that its header states."""
    try:
        safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): resume from another step") from None
