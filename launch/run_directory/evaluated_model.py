"""The model that `areal-like eval MODEL` names: a Hugging Face directory, a checkpoint, a run, or a name.

tiny, smollm2              models that are built for the evaluation
runs/x/checkpoints/step_N  a checkpoint of a run: also a Hugging Face directory
directory with config.json any other model
x, runs/x                  a run: its newest checkpoint
owner/name                 a model of the hub
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import BUILT_MODELS, RunPaths, find_checkpoints
from launch.run_directory.rundir import find_run

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model to evaluate."""

    path: str
    """Value of `model.path`."""
    label: str
    """What results are called after."""
    step: int = 0
    """Optimizer steps of its run; 0 for a model that is no checkpoint."""
    run: Path | None = None
    """Directory of its run."""


def find_model(word: str) -> EvaluatedModel:
    """The model that a word of the command line names. Raises ConfigError."""
    if word in BUILT_MODELS:
        return EvaluatedModel(path=word, label=word)
    folder = Path(word).expanduser()
    if (folder / "config.json").is_file():
        return _of_directory(folder.resolve())
    if (folder / "config.yaml").is_file() or (Path("runs") / word / "config.yaml").is_file():
        run = find_run(str(folder)).resolve()
        found = find_checkpoints(RunPaths(run).checkpoints)
        if not found:
            raise ConfigError(
                f"eval {word}: the run has no checkpoint yet; evaluate a model's directory, or wait for "
                "trainer.checkpoint_interval steps"
            )
        return _of_directory(found[max(found)])
    if _HUB_NAME.fullmatch(word) and not folder.exists():
        return EvaluatedModel(path=word, label=word.rpartition("/")[2])
    raise ConfigError(
        f"eval {word}: give a directory with config.json, a run with a checkpoint, "
        f"{', '.join(BUILT_MODELS)}, or an owner/name"
    )


def _of_directory(folder: Path) -> EvaluatedModel:
    run = folder.parent.parent
    steps = {path: step for step, path in find_checkpoints(folder.parent).items()}
    is_of_run = folder.parent == RunPaths(run).checkpoints and RunPaths(run).config.is_file()
    if folder in steps and is_of_run:
        return EvaluatedModel(
            path=str(folder), label=f"{run.name}-{folder.name}", step=steps[folder], run=run
        )
    return EvaluatedModel(path=str(folder), label=folder.name)
