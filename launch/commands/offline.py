"""`areal-like sft|reward-model|preferences`: trains on rows of a file, in a run directory of its own.

    prepare the model -> train (trainer.sft, ...) -> results

A run that fails or is stopped continues with `resume=latest` or `resume=auto`; it is not restarted
automatically, because no other daemon waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from areal_like.errors import ConfigError
from areal_like.runtime.process import keep_files_private
from areal_like.runtime.signals import request_reopen
from launch.commands.configuration import configuration, settings_of
from launch.commands.foreground import StopSignals, in_directory
from launch.commands.parser import command
from launch.local_job.foreground import Foreground
from launch.local_job.specs import DRAINED, JobSpecs
from launch.offline_verbs import OFFLINE_VERBS, PREFERENCES, REWARD_MODEL, SFT, OfflineVerb
from launch.run_directory.open_run import OpenRun, open_run
from launch.view.lasting import LastingView, output_may_be_gone
from launch.view.plain import PlainView, offline_line
from launch.view.summary import show_offline_summary

_OF_REWARDS = ("normalizer", "entropy_coef", "fetch_timeout_s", "buffer_timeout_s")
_WITHOUT_EFFECT = (
    *("buffer.", "rollout.", "weights.", "eval.", "sampling.", "episode.", "rewards.", "kl."),
    *("objective", "advantage", "task", "max_staleness", "ess_target"),
    *(f"trainer.{name}=" for name in _OF_REWARDS),
)
"""Prefixes of settings that belong to reinforcement learning only."""
_INSTEAD = {
    "num_steps": "{0}.num_epochs or {0}.num_steps",
    "groups_per_step": "{0}.batch_rows or {0}.batch_tokens",
}
"""Settings of the section `trainer` that have another name in the verb's section."""


def _trains(verb: OfflineVerb, description: str, *, examples: Sequence[str]) -> None:
    """Declares the verb."""

    @command(verb.verb, description, *configuration(has_presets=False), examples=examples)
    def main(args: argparse.Namespace) -> int:
        return run_offline(verb, settings_of(verb.verb, args, has_presets=False))


_trains(
    SFT,
    "Train on conversations, or on prompts with completions (sft.train=FILE), in the run NAME-sft, or "
    "NAME if name=NAME is given. The result is a model for `areal-like run`. resume=latest continues a run "
    "that was stopped.",
    examples=["sft name=mine model=smollm2 sft.train=train.jsonl", "sft job.yaml name=mine resume=latest"],
)
_trains(
    REWARD_MODEL,
    "Train a reward model on comparisons of completions (reward_model.train=FILE), in the run "
    "NAME-reward-model, or NAME if name=NAME is given. The result is a directory for "
    "AutoModelForSequenceClassification. resume=latest continues a run that was stopped.",
    examples=[
        "reward-model name=mine model=smollm2 reward_model.train=pairs.jsonl",
        "reward-model job.yaml name=mine resume=latest",
    ],
)
_trains(
    PREFERENCES,
    "Train on comparisons of completions, or on completions with labels (preferences.train=FILE), by DPO, "
    "IPO, KTO, SimPO or ORPO, in the run NAME-preferences, or NAME if name=NAME is given. The result is a "
    "model for `areal-like run`. resume=latest continues a run that was stopped.",
    examples=[
        "preferences name=mine model=smollm2 preferences.train=pairs.jsonl",
        "preferences job.yaml name=mine preferences.method=kto preferences.train=labels.jsonl",
    ],
)


def run_offline(verb: OfflineVerb, argv: Sequence[str]) -> int:
    """Runs the job with these command line arguments; returns its exit code.

    0: finished; `daemon.exit_code_on_drain`: stopped; 1: failed. Raises ConfigError before a step was
    trained.
    """
    remarks = list(check_settings(verb, argv))
    keep_files_private()
    run = open_run(argv, verb=verb.verb)
    console = Console()
    view = LastingView(PlainView(run.config, console, line=offline_line))
    with in_directory(run), contextlib.closing(view):
        for line in (*run.announcement, *remarks):
            view.notice(line)
        started_unix_s = time.time()
        code = _train(verb, run, view)
    is_new = run.paths.summary.exists() and run.paths.summary.stat().st_mtime >= started_unix_s
    if code != 1 and is_new:
        with output_may_be_gone():
            show_offline_summary(verb, run.config, console)
    return run.config.daemon.exit_code_on_drain if code == DRAINED else code


def check_settings(verb: OfflineVerb, argv: Sequence[str]) -> Iterator[str]:
    """A line for each setting in `argv` that has no effect. Raises ConfigError for one that has another name.

    Settings in a file are not checked: the same file may also have settings of other verbs.
    """
    others = {f"{each.section}.": name for name, each in OFFLINE_VERBS.items() if each != verb}
    for setting in argv:
        section, _, name = setting.partition("=")[0].partition(".")
        if section == "trainer" and name in _INSTEAD:
            raise ConfigError(f"{setting}: here this is {_INSTEAD[name].format(verb.section)}")
        other = others.get(f"{section}.", "run" if setting.startswith(_WITHOUT_EFFECT) else "")
        if other:
            yield f"{setting} has no effect: it belongs to `areal-like {other}`"


def _train(verb: OfflineVerb, run: OpenRun, view: LastingView) -> int:
    stops = StopSignals(on_hangup=request_reopen)
    foreground = Foreground(run, view=view, num_stops=lambda: stops.count)
    specs = JobSpecs(run.config, config_path=run.config_file)
    prepare = specs.prepare_model(*verb.prepares)
    code = foreground.run(prepare, phase="preparing the model", notice="stopping")
    if code or stops.count:
        return code or DRAINED
    code = foreground.run(
        specs.offline(verb),
        phase="reading the rows",
        notice="stopping after this step, with a checkpoint (Ctrl-C again to stop at once)",
        orderly=(0, DRAINED),
        on_step=run.keep_settings,
    )
    if code == 0:  # its steps may have ended before they were seen
        run.keep_settings()
    return code
