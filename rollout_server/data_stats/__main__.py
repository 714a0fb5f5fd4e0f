"""Computes statistics of data sets, from files or from the splits of a job's task (`areal-like data stats`).

    python -m rollout_server.data_stats [--file FILE] [--rows N] [--heard] [--json] [--config F] [key=value]

`--file` may be repeated; without it the splits of the task are counted. With `--heard`, a run's results for
the training prompts are read from stdin as JSON. Every row is read once, and about 50 bytes of it are kept.
Tokens are counted if the model's tokenizer is available.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from areal_like.config import Config
from areal_like.data import RowFormat, open_rows
from areal_like.errors import ConfigError, UserError, first_line
from areal_like.paths import BUILT_MODELS, RunPaths, model_path
from areal_like.runtime.command_line import OneValue, Options, load_config, shows_help
from areal_like.runtime.imports import torch_hidden, uncollected
from rollout_server.context_length import longest_sequence
from rollout_server.data_stats.heard import HeardPrompt, summary
from rollout_server.data_stats.report import text_of_report
from rollout_server.data_stats.sources import FileRows, RowSource, TaskSplit
from rollout_server.data_stats.split import CountedRow, SplitStats
from rollout_server.environments.base import Message
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Task, make_task

_MAX_ROWS = 200_000
"""Rows of a split that are read without `--rows`: synthetic tasks have millions."""
_EXAMPLES = ("examples", "conflicting_examples")

TokenCounter = Callable[[str | list[Message]], int]


def run(values: argparse.Namespace, settings: Sequence[str]) -> int:
    """Counts, prints and returns 0. Raises ConfigError."""
    config = load_config(settings)
    max_rows = _number("--rows", values.rows) if values.rows is not None else _MAX_ROWS
    task = None if values.file else _task(config)
    sources = _splits(config, task) if task else _files(values.file, config)
    notes: list[str] = []
    renderer = _renderer(config, task, notes)
    limit = renderer.max_prompt_tokens if renderer is not None and task is not None else None
    report: dict[str, Any] = {"splits": {}, "overlaps": [], "notes": notes}
    counted: list[tuple[RowSource, SplitStats]] = []
    for source in sources:
        stats = SplitStats(max_prompt_tokens=limit, count_tokens=_token_counter(renderer))
        for row in source.rows(min(max_rows, len(source))):
            if isinstance(row, CountedRow):
                stats.add(row)
            else:
                stats.add_broken(row)
        counted.append((source, stats))
        report["splits"][source.name] = _located(stats.summary(), source) | {"of_rows": len(source)}
    (first, of_first), *others = counted
    for other, of_other in others:
        overlap = of_other.hashes.overlap(of_first.hashes)
        pairs = [[other.place(a), first.place(b)] for a, b in overlap["examples"]]
        names = {"split": other.name, "other": first.name, "rows": report["splits"][other.name]["rows"]}
        report["overlaps"].append(names | overlap | {"examples": pairs})
    if values.heard:
        assert task is not None, "a run has a task"
        # The run numbers its prompts after leaving out those that are too long.
        report["heard"] = _heard(task if renderer is None else task.without_long_prompts(renderer))
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if values.json else text_of_report(report))
    return 0


def _task(config: Config) -> Task:
    try:
        return make_task(config.task, seed=config.seed, sandbox=config.rewards.sandbox)
    except ConfigError as error:
        names_a_row = re.search(r"\.\w+:\d+: ", str(error))
        hint = "; `areal-like data stats FILE` counts all rows that cannot be used" if names_a_row else ""
        raise ConfigError(f"{error}{hint}") from error


def _splits(config: Config, task: Task) -> list[RowSource]:
    """The splits of the job's task, and the evaluation sets with a task of their own."""
    sets: list[RowSource] = []
    for name, one in config.eval.resolved_sets.items():
        if one.task:
            of_set = make_task(one.task, seed=config.seed, sandbox=config.rewards.sandbox)
            title = f"eval.sets.{name}"
            sets.append(TaskSplit(task=of_set, split="eval", name=title, most=one.num_prompts))
    return [
        TaskSplit(task=task, split="train", name="train"),
        TaskSplit(task=task, split="eval", name="eval"),
        *sets,
    ]


def _files(names: Sequence[str], config: Config) -> list[RowSource]:
    """The files, read with the keys in the configuration's section `task`."""
    keys = {
        one.name: config.task[one.name] for one in dataclasses.fields(RowFormat) if one.name in config.task
    }
    row_format = RowFormat(**keys)
    return [FileRows(name=name, data=open_rows(name, key="FILE"), format=row_format) for name in names]


def _heard(task: Task) -> dict[str, Any]:
    heard = json.load(sys.stdin)
    return summary(
        map(HeardPrompt.of_row, heard["prompts"]),
        num_train=task.num_train,
        num_drawn=None if task.sources else heard["num_drawn"],  # each task of a mixture has its own epochs
        label_of=lambda index: task.example("train", index).label,
    )


def _located(split: dict[str, Any], source: RowSource) -> dict[str, Any]:
    """Replaces row numbers with the places of the rows."""
    repeated = split["duplicates"]
    for name in _EXAMPLES:
        repeated[name] = [[source.place(row) for row in group] for group in repeated[name]]
    for problem in split["problems"].values():
        problem["examples"] = [source.place(row) for row in problem["examples"]]
    return split


def _renderer(config: Config, task: Task | None, notes: list[str]) -> PromptRenderer | None:
    """Returns the renderer that a rollout server would use, with its limit; None, with a note, without a
    model."""
    try:
        model = model_path(config)
        with torch_hidden(), uncollected():
            renderer = PromptRenderer(model, settings=config.model)
    except ConfigError as error:
        reason = first_line(error)
        if config.model.path in BUILT_MODELS:
            built = RunPaths.of(config).built_model
            reason = (
                f"a run makes model.path={config.model.path} when it starts, and {built} contains no model"
            )
        notes.append(f"tokens are not counted (model.path=DIR names a model): {reason}")
        return None
    if task is not None:
        context = longest_sequence(config, task, max_positions=renderer.max_positions)
        room = context - config.sampling.max_new_tokens
        renderer.max_prompt_tokens = min(task.max_prompt_tokens, room)
    return renderer


def _token_counter(renderer: PromptRenderer | None) -> TokenCounter | None:
    return None if renderer is None else lambda prompt: renderer.num_tokens([prompt])[0]


def _number(option: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"{option} {text}: give a number of rows, 1 or more")
    return int(text)


def main(argv: list[str]) -> int:
    """Runs the command (see the module's docstring). Exit code 2 is a user's mistake."""
    if shows_help(argv, __doc__):
        return 0
    logging.basicConfig(level=logging.ERROR)
    try:
        options = Options()
        options.add_argument("--file", action="append", default=[])
        options.add_argument("--rows", action=OneValue)
        for name in ("--heard", "--json"):
            options.add_argument(name, action="store_true")
        values, settings = options.parse_known_args(argv)
        return run(values, settings)
    except UserError as error:
        sys.stderr.write(f"areal-like: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
