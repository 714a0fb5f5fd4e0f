"""Opens the run directory of `areal-like eval MODEL`: a new one, or that of an evaluation to continue.

An evaluation has a directory of its own, so that the run whose checkpoint it evaluates stays as it is, and
may be running. Its configuration is that of a run without training: the settings of trainer, objective and
curriculum are replaced by ones that cost nothing, and samples are never deleted.

MODEL is one of:

    tiny, smollm2              models that are built for the evaluation
    runs/x/checkpoints/step_N  a checkpoint of a run: also a Hugging Face directory
    directory with config.json any other model
    x, runs/x                  a run: its newest checkpoint
    owner/name                 a model of the hub
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.automatic_settings import resolved
from areal_like.config import Config, DistillConfig, LoraConfig, to_mapping
from areal_like.config.gpus import check_gpus_are_separate
from areal_like.config.trainer import TrainerConfig
from areal_like.errors import ConfigError
from areal_like.paths import ADAPTER_CONFIG, BUILT_MODELS, RunPaths, find_checkpoints
from areal_like.runtime.command_line import load_config
from launch.run_directory.open_run import OpenRun, free_directory, prepared
from launch.run_directory.rundir import is_summarized, lock, newest_checkpoint

_COMPARED = ("model", "task", "eval", "sampling", "episode", "rewards", "seed", "trainer")
"""Sections that determine the results: they may not change when an evaluation is continued. The section
`trainer` also distinguishes an evaluation from a training run."""


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model to evaluate."""

    path: str
    """Value of `model.path`."""
    label: str
    """The name of the results."""
    step: int = 0
    """Optimizer steps of its run; 0 for a model that is not a checkpoint."""
    run: Path | None = None
    """Directory of its run."""


def find_model(word: str) -> EvaluatedModel:
    """The model that a word of the command line names. Raises ConfigError."""
    if word in BUILT_MODELS:
        return EvaluatedModel(path=word, label=word)
    folder = Path(word).expanduser()
    if (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
        return _of_directory(folder.resolve())
    if (newest := newest_checkpoint(word, verb="eval")) is not None:
        return _of_directory(newest)
    if _HUB_NAME.fullmatch(word) and not folder.exists():
        return EvaluatedModel(path=word, label=word.rpartition("/")[2])
    raise ConfigError(
        f"eval {word}: give a directory with config.json, a run with a checkpoint, "
        f"{', '.join(BUILT_MODELS)}, or an owner/name"
    )


def _of_directory(folder: Path) -> EvaluatedModel:
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{folder} is an adapter: merge it with its base, then evaluate the result: areal-like merge "
            f"{folder} --into DIRECTORY && areal-like eval DIRECTORY"
        )
    run = folder.parent.parent
    steps = {path: step for step, path in find_checkpoints(folder.parent).items()}
    is_of_run = folder.parent == RunPaths(run).checkpoints and RunPaths(run).config.is_file()
    if folder in steps and is_of_run:
        return EvaluatedModel(
            path=str(folder), label=f"{run.name}-{folder.name}", step=steps[folder], run=run
        )
    return EvaluatedModel(path=str(folder), label=folder.name)


def open_evaluation(model: EvaluatedModel, argv: Sequence[str]) -> OpenRun:
    """Opens the directory in which `model` is evaluated with the configuration that `argv` describes.

    `argv`: as for `areal-like run`; without `--config`, a checkpoint is evaluated with its run's
    configuration. Raises ConfigError.
    """
    if model.run is not None and "--config" not in argv:
        argv = ["--config", str(RunPaths(model.run).config), *argv]
    config = evaluation_config(load_config(argv), model)
    if not config.eval.is_enabled:
        raise ConfigError("eval.num_prompts=0 turns evaluation off: give a number of prompts")
    given = [arg.partition("=")[2] for arg in argv if arg.startswith("name=")]
    resume = next((arg.partition("=")[2] for arg in argv if arg.startswith("resume=")), "")
    if resume not in ("", "auto", "latest"):
        raise ConfigError(f"resume={resume}: an evaluation has no steps: use resume=latest or resume=auto")
    own_name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', model.label)[:48]}-eval"
    config = dataclasses.replace(config, name=given[-1] if given else own_name)
    check_gpus_are_separate(config)
    if resume and RunPaths.of(config).config.is_file():
        return _continued(config)
    if resume == "latest":
        raise ConfigError(f"resume=latest: there is no evaluation in {RunPaths.of(config).root}")
    run = free_directory(
        config,
        is_named=bool(given) or resume == "auto",
        is_taken=lambda paths: paths.config.exists() or paths.summary.exists() or bool(paths.ledgers),
        refusal=lambda paths: (
            f"{paths.root} already holds a run or an evaluation: choose another name=..., or "
            "continue the evaluation with resume=latest"
        ),
    )
    return prepared(dataclasses.replace(run, announcement=(f"new evaluation in {run.paths.root}",)))


def evaluation_config(config: Config, model: EvaluatedModel) -> Config:
    """`config` for the evaluation of `model` alone. Raises ConfigError."""
    evaluated = dataclasses.replace(config.model, path=model.path, lora=LoraConfig())
    config = dataclasses.replace(config, model=evaluated, resume="")
    config = resolved(config)  # before the devices change: model.dtype depends on them
    trainer = TrainerConfig(
        num_steps=1,
        groups_per_step=1,
        tokens_per_microbatch=config.trainer.tokens_per_microbatch,
        fetch_timeout_s=config.trainer.fetch_timeout_s,
        buffer_timeout_s=config.trainer.buffer_timeout_s,
        gradient_checkpointing=False,
    )
    kept = "process_crash" if config.buffer.durability == "none" else config.buffer.durability
    buffer = dataclasses.replace(
        config.buffer,
        num_shards=1,
        ports=(),
        curriculum="none",
        group_filter="none",
        durability=kept,
        retain_trajectories=True,
    )
    return dataclasses.replace(
        config,
        task=_with_training_rows(config.task),
        # Without its samples, the result of a finished set could not be requested again.
        eval=dataclasses.replace(config.eval, keep=max(1, config.eval.keep)),
        max_staleness=0,
        objective={"name": "tis"},
        advantage={"name": "grpo"},
        weights=dataclasses.replace(config.weights, sync_interval=1),
        kl=dataclasses.replace(config.kl, coef=0.0, reference=""),
        distill=DistillConfig(),
        trainer=trainer,
        buffer=buffer,
    )


def _with_training_rows(task: dict[str, Any]) -> dict[str, Any]:
    """Adds training prompts to the task, because a rollout server requires some; they are never issued."""
    has_only_eval = task.get("name") == "data" and task.get("eval") and not task.get("train")
    return task | {"train": task["eval"]} if has_only_eval else task


def _continued(config: Config) -> OpenRun:
    paths = RunPaths.of(config)
    lock_fd = lock(paths)
    try:
        stored = to_mapping(load_config(["--config", str(paths.config)]))
        wanted = to_mapping(config)
        if changed := [section for section in _COMPARED if stored[section] != wanted[section]]:
            raise ConfigError(
                f"{paths.root} holds an evaluation with different settings in {', '.join(changed)}: use "
                "the same settings, or choose another name=..."
            )
    except ConfigError:
        os.close(lock_fd)
        raise
    if is_summarized(paths):
        lines: tuple[str, ...] = (f"the evaluation in {paths.root} is finished",)
        return OpenRun(config=config, paths=paths, lock_fd=lock_fd, announcement=lines, is_finished=True)
    lines = (f"continuing the evaluation in {paths.root} with the samples in its ledger",)
    return prepared(OpenRun(config=config, paths=paths, lock_fd=lock_fd, announcement=lines, is_resumed=True))
