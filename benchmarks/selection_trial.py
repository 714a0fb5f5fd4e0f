"""Runs one trial of the selection of a default method: a job, a method, a lag, a learning rate and a seed.

The two jobs of one turn (`default`, `long`) run with fixed ages, as the cells of `benchmarks.staleness_cell`:
one process, one thread, every sample exactly `lag` steps old. A method changes nothing in a real job but the
trainer's step, and here its CPU time is measured without the noise of four other processes; the age does not
depend on the speed of the machine, so trials can run two at a time and next to other work. The model, the
task, the batch and the trainer's step are those of the job.

The jobs with environments and agents (`tool`, `agents`) are real jobs, run by the launcher, because turns,
tools and agents' processes exist only there. Their samples have ages from 0 to `lag`, as from a real queue:
the bound is `max_staleness=lag`, and above 4 the engine is updated only every lag - 3 steps, since the
samples of a job whose generation is slow would otherwise be younger (the tool job's are 2 steps old under a
bound of 4). The mean that occurred is in the result. `buffer.overdue=wait` holds for all methods, because
VCPO's baseline needs whole groups. The seconds of these trials are wall time, so nothing else may run.

The learning rate is constant after its warm-up: a rate that falls to zero hides the harm of stale samples.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from benchmarks import counting
from benchmarks.report import run_job
from benchmarks.staleness_cell import GREEDY_PROMPTS, Sampler, train
from trainer.prepare_model import prepare_model

CURVE_POINTS = 20
SAMPLED_PROMPTS = 128
"""Held-out prompts of a point of the curve, one sample each at temperature 1."""
CURVE_GREEDY_PROMPTS = 256
"""Held-out prompts of a point of the curve, one greedy completion each."""
JOB_TIMEOUT_S = 1200.0


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """A job in which methods are compared."""

    lr: float
    """Its present learning rate; a trial's is a multiple of it."""
    num_steps: int
    """Optimizer steps of a trial."""
    settings: tuple[str, ...]
    """Arguments of `areal-like run`."""
    context_tokens: int = 0
    """Longest sequence, for fixed ages; 0: a real job."""

    @property
    def is_real(self) -> bool:
        """True if the launcher runs it."""
        return self.context_tokens == 0


JOBS = {
    "default": TrialJob(lr=8e-5, num_steps=400, settings=(), context_tokens=24),
    "long": TrialJob(
        lr=2e-4,
        num_steps=150,
        settings=(
            "task._target_=benchmarks.counting.Counting",
            f"sampling.max_new_tokens={counting.MAX_CHARACTERS + 1}",
        ),
        context_tokens=counting.MAX_CHARACTERS + 8,
    ),
    "tool": TrialJob(
        lr=5e-4,
        num_steps=100,
        # The warm start that the job had when its trials were run.
        settings=("--config", "configs/jobs/tools.yaml", "model.warm_start_steps=400"),
    ),
    "agents": TrialJob(lr=5e-4, num_steps=40, settings=("--config", "configs/jobs/agents.yaml")),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Settings that decide a trial's result."""

    job: str
    """Key of JOBS."""
    method: str
    """Label of the method in tables."""
    settings: tuple[str, ...]
    """Arguments of `areal-like run` that choose the method."""
    lag: int
    """Age of every sample in optimizer steps (fixed ages), or the largest age (real jobs)."""
    factor: float
    """Learning rate, as a multiple of the job's present one."""
    seed: int
    """Seed of the initial model, the prompts and the samples."""
    num_steps: int
    """Optimizer steps."""

    @property
    def name(self) -> str:
        """Such as `default/VCPO/lag-4/x2/seed-0`."""
        return f"{self.job}/{self.method}/lag-{self.lag}/x{self.factor:g}/seed-{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Arguments of `areal-like run`."""
        job = JOBS[self.job]
        return [
            *job.settings,
            *self.settings,
            f"seed={self.seed}",
            f"trainer.num_steps={self.num_steps}",
            f"trainer.lr={job.lr * self.factor:.6g}",
            "trainer.lr_schedule=constant",
            f"max_staleness={self.lag}",
            f"weights.sync_interval={max(1, self.lag - 3)}",
            "buffer.overdue=wait",
        ]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Greedy held-out reward at one moment of the training."""

    step: int
    """Completed optimizer steps."""
    seconds: float
    """Training time so far, without evaluations: CPU seconds of the thread (fixed ages), or wall seconds with
    the evaluations of the job (real jobs)."""
    greedy: float


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The result of a trial."""

    points: tuple[Point, ...]
    """From before the first step to after the last."""
    reward: float
    """Mean reward at temperature 1 over the last tenth of the run: of held-out prompts (fixed ages), or of
    the training samples (real jobs)."""
    best: float
    """Largest such mean over a tenth of the run."""
    greedy: float
    """Greedy held-out reward of the final weights."""
    entropy: float
    """Nats per token, mean over the last tenth of the run."""
    ess_ratio: float
    """Effective sample size over the number of sequences, mean over the run."""
    lag: float
    """Mean age of the trained samples, in steps."""
    samples: int
    """Samples that were trained on."""
    num_prompts: int = CURVE_GREEDY_PROMPTS
    """Held-out prompts of a point."""
    seconds: float = field(compare=False)
    """Training time, as in the last point."""
    wall_s: float = field(compare=False)
    """Wall time of the whole trial."""
    cpu_s: float = field(compare=False)
    """CPU time of the whole trial, of all its processes."""

    @classmethod
    def read(cls, row: dict[str, Any]) -> TrialResult:
        """The result from its JSON object."""
        return cls(**row | {"points": tuple(Point(**point) for point in row["points"])})

    @property
    def has_collapsed(self) -> bool:
        """True if the reward at temperature 1 ended below half of its best, or the greedy one below where it
        began, by more than twice the standard error of the difference.

        The errors are those of independent sets of `num_prompts` rewards of 0 and 1: an upper bound, as the
        points share their prompts and the means at temperature 1 are of more samples.
        """
        # `greedy` has more prompts than the points.
        begin, end = self.points[0].greedy, self.points[-1].greedy
        loss_of_reward = self.best / 2 - self.reward
        return loss_of_reward > 2 * self._error(self.reward, self.best, 0.5) or begin - end > 2 * self._error(
            begin, end
        )

    def _error(self, one: float, other: float, factor: float = 1.0) -> float:
        """Standard error of `one - factor * other`, for two means of rewards of 0 and 1."""
        variance = one * (1 - one) + factor**2 * other * (1 - other)
        return math.sqrt(variance / self.num_prompts)


def write_model(directory: str, trial: Trial) -> None:
    """Writes the initial model of a trial with fixed ages."""
    if trial.job == "long":
        counting.build_model(Path(directory), seed=trial.seed)
    else:
        prepare_model(load_config(trial.arguments), out_dir=Path(directory))


def run_at_fixed_age(trial: Trial, model_path: str) -> TrialResult:
    """Runs a trial in this process, from the model that `write_model` wrote, with one thread."""
    torch.set_num_threads(1)
    began_wall, began_cpu = time.perf_counter(), time.process_time()
    config = load_config(trial.arguments)
    num_groups, group_size = config.trainer.groups_per_step, config.sampling.group_size
    sampler = Sampler(model_path, config, context_tokens=JOBS[trial.job].context_tokens)
    plan: dict[int, list[tuple[int, int]]] = {}
    for step in range(trial.num_steps):
        plan.setdefault(max(0, step - trial.lag), []).extend((step, group) for group in range(num_groups))
    every = max(1, trial.num_steps // CURVE_POINTS)
    points: list[Point] = []
    rewards: list[float] = []
    not_training = time.process_time() - began_cpu

    def score(version: int) -> None:
        nonlocal not_training
        stopped = time.process_time()
        rewards.append(sampler.score(num_prompts=SAMPLED_PROMPTS, temperature=1.0))
        greedy = sampler.score(num_prompts=CURVE_GREEDY_PROMPTS, temperature=0.0)
        seconds = round(stopped - began_cpu - not_training, 3)
        points.append(Point(step=version, seconds=seconds, greedy=round(greedy, 4)))
        not_training += time.process_time() - stopped

    rows = train(
        plan,
        config,
        sampler,
        model_path,
        group_size=group_size,
        at_point=lambda version: version % every == 0 or version == trial.num_steps,
        score=score,
    )
    ages = [min(step, trial.lag) for step in range(trial.num_steps)]
    return TrialResult(
        points=tuple(points),
        greedy=sampler.score(num_prompts=GREEDY_PROMPTS, temperature=0.0),
        **_means(rewards, rows),
        lag=round(statistics.fmean(ages), 2),
        samples=trial.num_steps * num_groups * group_size,
        seconds=points[-1].seconds,
        wall_s=round(time.perf_counter() - began_wall, 1),
        cpu_s=round(time.process_time() - began_cpu, 1),
    )


def run_real(trial: Trial) -> TrialResult:
    """Runs a trial as a job of the launcher. Raises RuntimeError if the job fails."""
    every = max(1, trial.num_steps // 5)
    began_wall, began_cpu = time.perf_counter(), _cpu_s_of_children()
    with tempfile.TemporaryDirectory() as scratch:
        summary, rows = run_job(
            "trial",
            [*trial.arguments, f"eval.interval={every}"],
            runs_dir=Path(scratch),
            timeout_s=JOB_TIMEOUT_S,
        )
        evaluations = RunPaths(Path(scratch) / "trial").evaluations.read_text().splitlines()
    points = points_of([json.loads(line) for line in evaluations], rows)
    return TrialResult(
        points=points,
        greedy=summary["eval_after"],
        **_means([row["reward_mean"] for row in rows], rows),
        lag=round(summary["mean_trained_lag"], 2),
        samples=round(sum(row["num_sequences"] for row in rows)),
        num_prompts=load_config(trial.arguments).eval.num_prompts,
        seconds=points[-1].seconds,
        wall_s=round(time.perf_counter() - began_wall, 1),
        cpu_s=round(_cpu_s_of_children() - began_cpu, 1),
    )


def points_of(
    evaluations: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[Point, ...]:
    """The points of a real job: each evaluation at the moment at which the step that made its weights ended.

    With `weights.sync_interval` those are older than the step after which it was asked for. If new weights
    arrived meanwhile, the oldest count.
    """
    start_s = rows[0]["time_unix_s"] - rows[0]["step_s"]
    greedy_of = {row["oldest_step"]: row["avg"] for row in evaluations}
    return tuple(
        Point(
            step=step,
            seconds=round(rows[step - 1]["time_unix_s"] - start_s, 2) if step else 0.0,
            greedy=round(greedy_of[step], 4),
        )
        for step in sorted(greedy_of)
    )


def _means(rewards: Sequence[float], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """reward, best, entropy and ess_ratio, from the rewards along the run and the metrics of its steps."""
    tail = max(1, len(rewards) // 10)
    # Steps that trained no group (in each group all rewards were equal) lack these metrics.
    live = [row for row in rows if "kl_k3" in row]
    last = [row["entropy"] for row in live[-max(1, len(rows) // 10) :]]
    return {
        "reward": round(statistics.fmean(rewards[-tail:]), 4),
        "best": round(
            max(statistics.fmean(rewards[i : i + tail]) for i in range(len(rewards) - tail + 1)), 4
        ),
        "entropy": round(statistics.fmean(last), 4) if last else 0.0,
        "ess_ratio": round(statistics.fmean(row["ess_ratio"] for row in live), 4) if live else 0.0,
    }


def _cpu_s_of_children() -> float:
    """CPU seconds of processes that this one has started and waited for, and of those that they have."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
