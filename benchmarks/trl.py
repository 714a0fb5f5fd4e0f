"""Compares the same training in this project and in TRL: seconds and samples to a reward, tokens/s, memory.

    make trl                                             installs TRL in its own environment (once)
    python -m benchmarks.trl [--job default long] [--seeds 0 1 2] [--again]

Both sides start from the same model and get the same prompts in the same order, the same reward, 16 prompts
with 8 samples per step, the same warm-up, AdamW settings and gradient clip, no KL, temperature 1, float32, no
evaluation during training, and a constant learning rate, so that the number of steps is not a setting.

Each side is tuned with the same budget: two methods of its own (METHODS) at three learning rates, one run
each with a seed that is used for nothing else. Its best setting is the one that reaches .9 first, then .7,
then the better greedy reward. A tuning run ends when it is behind the side's best one, which it cannot win
any more. With it each side runs the seeds, and the sides alternate. This project's two
methods can be named (`--ours`, names of `benchmarks.selection_rule`). TRL's are GRPOTrainer with the loss
`dapo` (a mean over tokens), as here, and the same with two updates for each batch, which makes more of TRL's
slow generation; with one update its other losses differ in the normalizer alone. TRL divides advantages by
the sample standard deviation, this project by that of the population. TRL uses one micro-batch per step, and
the faster number of threads in three steps that are timed first (one, or one for each core); this project's
processes have one thread each. None of TRL's other settings was faster here: four micro-batches, continuous
batching, and torch.compile, which takes longer to compile than it saves.

    default   the default job: completions of up to 10 tokens
    long      counting (benchmarks/counting.py): completions of up to 128 tokens, most of them short

Seconds count from the start of the first step, including its generation; the start of the processes is not
included. A reward is reached when the mean over the samples of the last five steps is at least as large. A
run ends at .9 or at the job's limit of seconds, the same for both sides; a reward that was not reached counts
as the limit. Afterwards the final weights of both sides are evaluated by this project's engine on the same
held-out prompts: greedily, and with one sample at temperature 1. Memory is the largest sum of the
proportional set sizes of a side's processes, measured every five seconds. A run on a machine with other work
(a load of 0.5 or more after a minute's wait) has `was_quiet: false`. Writes benchmarks/results/trl.json after
every run and does not repeat the runs in it; `python -m benchmarks.trl_report` prints its tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.paths import RunPaths, find_checkpoints
from areal_like.runtime.command_line import load_config
from benchmarks import counting, selection_rule
from benchmarks.processes import pss_mib
from benchmarks.report import RESULTS, ROOT, write
from benchmarks.staleness_cell import Sampler
from benchmarks.trl_report import PHASES, REWARDS, WINDOW, result_of, seconds_to, tables
from buffer.prompts.order import PromptOrder, PromptSet
from rollout_server.tasks.base import Example, Task
from rollout_server.tasks.sort import SortTask
from trainer.prepare_model import prepare_model

PYTHON = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "areal_like/trl/bin/python"
TIMEOUT_S = 900.0
QUIET = 0.5
LOOK_AT_MEMORY_S = 5.0
"""Reading the memory of one process costs that process 10 ms, and this project has several."""
TUNING_SEED = 1000
RATES = (2.0, 4.0, 1.0)
"""Multiples of a job's learning rate that both sides try, in the order of the runs."""
HELD_OUT_PROMPTS = 512


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training that both sides run."""

    name: str
    limit_s: float
    """A run that has not reached the last reward by then ends."""
    max_steps: int
    """Steps for which there are prompts: more than either side makes within the limit."""
    max_new_tokens: int
    context_tokens: int
    """Longest sequence."""
    lr: float
    goal: float
    """Target ratio of TRL's seconds to ours."""
    overrides: tuple[str, ...] = field(default=())

    def task(self, seed: int) -> Task:
        """The task that makes the prompts and reference answers for TRL."""
        return counting.Counting(seed=seed) if self.name == "long" else SortTask(seed=seed)

    def model(self, scratch: Path) -> str:
        """The initial model's directory."""
        if self.name == "default":
            return prepare_model(Config(), out_dir=scratch / "default-model")
        path = scratch / "long-model"
        if not path.exists():
            counting.build_model(path)
        return str(path)

    def config(self, seed: int) -> Config:
        """The configuration of this project's job, without method and rate."""
        return load_config(
            [f"seed={seed}", f"sampling.max_new_tokens={self.max_new_tokens}", *self.overrides]
        )


JOBS = {
    "default": Job(
        name="default", limit_s=120, max_steps=2400, max_new_tokens=10, context_tokens=24, lr=8e-5, goal=2.0
    ),
    "long": Job(
        name="long",
        limit_s=180,
        max_steps=1500,
        max_new_tokens=counting.MAX_CHARACTERS + 1,
        context_tokens=counting.MAX_CHARACTERS + 8,
        lr=2e-4,
        goal=3.0,
        overrides=("task._target_=benchmarks.counting.Counting",),
    ),
}

Method = Sequence[str] | Mapping[str, Any]
"""Settings of this project's job, or arguments of TRL's GRPOConfig."""
METHODS: dict[str, dict[str, Method]] = {
    "ours": {name: selection_rule.METHODS[name] for name in ("tis", "VCPO")},
    "TRL": {"dapo": {}, "dapo, two updates a batch": {"num_iterations": 2}},
}
"""Side -> label -> method."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is tuned on one side."""

    side: str
    """`ours` | `TRL`"""
    method: str
    lr: float


def settings_to_try(
    job: Job, side: str, methods: Mapping[str, Mapping[str, Method]] = METHODS
) -> list[Setting]:
    """The side's tuning runs: every method at every rate."""
    return [Setting(side=side, method=method, lr=job.lr * rate) for rate in RATES for method in methods[side]]


def best_setting(job: Job, side: str, runs: Sequence[Mapping[str, Any]]) -> Setting:
    """The side's best setting in its tuning runs on a job. Raises ValueError without such runs."""
    tried = [run for run in runs if run["stage"] == "tune" and run["job"] == job.name and run["side"] == side]
    best = min(
        tried,
        key=lambda run: (*(seconds_to(run, reward) for reward in reversed(REWARDS)), -run["greedy"]),
    )
    return Setting(side=side, method=best["method"], lr=best["lr"])


def settings_of(job: Job, *, lr: float) -> dict[str, Any]:
    """The parts of the job's configuration that TRL gets."""
    own = {
        "num_steps": job.max_steps,
        "max_new_tokens": job.max_new_tokens,
        "lr": lr,
        "lr_schedule": "constant",
    }
    return shared_settings(Config()) | own


def shared_settings(config: Config) -> dict[str, Any]:
    """The settings of a configuration that both sides have."""
    trainer, sampling = config.trainer, config.sampling
    return {
        "num_steps": trainer.num_steps,
        "samples": trainer.groups_per_step * sampling.group_size,
        "group_size": sampling.group_size,
        "max_new_tokens": sampling.max_new_tokens,
        "lr": trainer.lr,
        "lr_schedule": trainer.lr_schedule,
        "warmup_steps": trainer.warmup_steps,
        "betas": list(trainer.betas),
        "weight_decay": trainer.weight_decay,
        "max_grad_norm": trainer.max_grad_norm,
    }


def examples_of(task: Task, num: int, *, seed: int) -> list[Example]:
    """The first training examples, in the order in which the buffer issues them."""
    order = PromptOrder(seed=seed, num_prompts=task.num_train)
    order.sources = tuple(PromptSet(size=one.size, weight=one.weight) for one in task.sources)
    return [task.example("train", order.next().index) for _ in range(num)]


Run = tuple[dict[str, Any], list[dict[str, Any]], Path]
"""(facts of the run, rows of steps, directory of the final weights)"""


def run_trl(
    job: Job, setting: Setting, *, seed: int, scratch: Path, threads: int, num_steps: int | None = None
) -> Run:
    """Trains with TRL. `num_steps`: 3 or 4 for a trial of the speed."""
    task, steps = job.task(seed), num_steps or job.max_steps
    method = METHODS["TRL"][setting.method]
    assert isinstance(method, Mapping)
    arguments = dict(method)
    num_batches = steps // arguments.get("num_iterations", 1)
    examples = examples_of(task, num_batches * Config().trainer.groups_per_step, seed=seed)
    out, weights = scratch / f"trl-{job.name}-{seed}.jsonl", scratch / "trl-weights"
    spec = {
        "model": job.model(scratch), "prompts": [e.prompt for e in examples],
        "answers": [e.answer for e in examples], "out": str(out), "seed": seed, "num_threads": threads,
        "trl": arguments, "stop_at": REWARDS[-1], "stop_after_s": job.limit_s, "window": WINDOW,
        "weights": str(weights), "settings": settings_of(job, lr=setting.lr) | {"num_steps": steps},
    }  # fmt: skip
    out.unlink(missing_ok=True)
    shutil.rmtree(weights, ignore_errors=True)
    (scratch / "spec.json").write_text(json.dumps(spec))
    with _watched(
        [str(PYTHON), "-P", str(ROOT / "benchmarks/trl_side.py"), str(scratch / "spec.json")]
    ) as watch:
        watch.wait()
    first, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    return first | {"peak_mib": watch.peak_mib}, rows, weights


def run_ours(job: Job, setting: Setting, *, seed: int, scratch: Path, settings: Sequence[str]) -> Run:
    """Trains with this project. `settings`: those of the method."""
    name, directory = f"ours-{job.name}-{seed}", scratch / "runs"
    shutil.rmtree(directory / name, ignore_errors=True)
    command = [
        sys.executable, "-m", "launch", "run", f"name={name}", f"runs_dir={directory}", f"seed={seed}",
        f"model.path={job.model(scratch)}", f"trainer.num_steps={job.max_steps}", f"trainer.lr={setting.lr}",
        "trainer.lr_schedule=constant", f"sampling.max_new_tokens={job.max_new_tokens}",
        f"eval.interval={job.max_steps}", "eval.num_prompts=0",
        f"trainer.checkpoint_interval={job.max_steps}", *job.overrides, *settings,
    ]  # fmt: skip
    path, began = directory / name / "metrics.jsonl", time.time()
    rewards: list[float] = []
    begun_s = last_s = 0.0
    with _watched(command) as watch:
        while watch.is_running():
            for row in _rows(path, begin=len(rewards)):
                begun_s, last_s = begun_s or row["time_unix_s"] - row["step_s"], row["time_unix_s"]
                rewards.append(row["reward_mean"])
            is_reached = len(rewards) >= WINDOW and statistics.mean(rewards[-WINDOW:]) >= REWARDS[-1]
            if is_reached or last_s - begun_s >= job.limit_s:
                watch.stop()
        watch.wait()
    found = _rows(path)
    first = found[0]["time_unix_s"] - found[0]["step_s"]
    rows = [
        {
            "step": row["step"] + 1,
            "seconds": row["time_unix_s"] - first,
            "reward": row["reward_mean"],
            "samples": row["num_sequences"],
            "sampled_tokens": row["response_length_mean"] * row["num_sequences"],
            "prompt_tokens": row["prompt_tokens"] * row["num_sequences"],
            "lag": row["lag_mean"],
            "phases_s": {key: row[key] for key in PHASES},
        }
        for row in found
    ]
    summary = json.loads((path.parent / "summary.json").read_text())
    idle = summary["generation_idle_fraction"]
    facts = {"start_s": first - began, "peak_mib": watch.peak_mib, "generation_idle": idle}
    checkpoints = find_checkpoints(RunPaths(path.parent).checkpoints)
    return facts, rows, checkpoints[max(checkpoints)]


def held_out(job: Job, weights: Path, *, seed: int) -> dict[str, float]:
    """Mean held-out reward of a model's directory, greedy and at temperature 1."""
    sampler = Sampler(str(weights), job.config(seed), context_tokens=job.context_tokens)
    scores = {
        name: sampler.score(num_prompts=HELD_OUT_PROMPTS, temperature=temperature)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }
    return {name: round(score, 4) for name, score in scores.items()}


def _rows(path: Path, *, begin: int = 0) -> list[dict[str, Any]]:
    """The complete rows from number `begin` on."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()[begin:] if line.endswith("}")]


class _Watch:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self._deadline = time.monotonic() + TIMEOUT_S
        self.peak_mib = 0.0
        self._next_look = 0.0
        self._is_stopped = False

    def is_running(self) -> bool:
        """Waits a second; measures the memory at intervals. Raises TimeoutError after TIMEOUT_S."""
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"{self._process.args!r} is not done after {TIMEOUT_S:.0f} s")
        if time.monotonic() >= self._next_look:
            self.peak_mib = max(self.peak_mib, pss_mib(self._process.pid))
            self._next_look = time.monotonic() + LOOK_AT_MEMORY_S
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.poll() is None

    def stop(self) -> None:
        """Asks the process to end."""
        if not self._is_stopped:
            self._is_stopped = True
            self._process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Waits until the process has ended. Raises RuntimeError if it failed."""
        while self.is_running():
            pass
        if self._process.returncode != 0:
            raise RuntimeError(f"{self._process.args!r} failed:\n{self._log.read_text()[-3000:]}")


@contextlib.contextmanager
def _watched(command: Sequence[str]) -> Iterator[_Watch]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield _Watch(process, Path(log.name))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    """Tunes both sides, runs the seeds with the best settings, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--job", nargs="+", choices=[*JOBS], default=[*JOBS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ours", nargs=2, choices=[*selection_rule.METHODS], default=["tis", "VCPO"])
    parser.add_argument("--again", action="store_true", help="repeat the runs of earlier calls")
    parser.add_argument("--limit", type=float, help="seconds of a run, for a trial of this program")
    parser.add_argument("--to", default="trl", help="name of the result's file")
    args = parser.parse_args()
    if TUNING_SEED in args.seeds:
        parser.exit(2, f"benchmarks.trl: seed {TUNING_SEED} is the one of the tuning runs: choose others\n")
    if args.limit and args.to == "trl":
        parser.exit(2, "benchmarks.trl: --limit is for trials of this program: name another file, --to\n")
    if not PYTHON.exists():
        parser.exit(2, f"benchmarks.trl: no TRL at {PYTHON}: run `make trl`\n")
    methods = METHODS | {"ours": {name: selection_rule.METHODS[name] for name in args.ours}}
    jobs = [JOBS[name] if not args.limit else replace(JOBS[name], limit_s=args.limit) for name in args.job]
    path = RESULTS / f"{args.to}.json"
    comparison = Comparison(path, methods, again=args.again)
    with tempfile.TemporaryDirectory() as directory:
        for job in jobs:
            comparison.run(job, seeds=args.seeds, scratch=Path(directory))
    print(tables(comparison.runs))
    for job in jobs:
        print(f"Goal on {job.name}: TRL takes {job.goal:g} times as many seconds to {REWARDS[0]}.")


class Comparison:
    """The runs so far, and the missing ones."""

    def __init__(
        self, path: Path, methods: Mapping[str, Mapping[str, Method]], *, again: bool = False
    ) -> None:
        """`path`: the results. `again`: start without those that are there."""
        self._path, self._methods = path, methods
        found = json.loads(path.read_text())["runs"] if path.exists() and not again else []
        self.runs: list[dict[str, Any]] = [run for run in found if "stage" in run]
        """Runs of an earlier release, which were not tuned, have no stage and are left out."""
        self._threads: dict[str, int] = {}

    def missing(self, job: Job, *, seeds: Sequence[int]) -> list[tuple[str, Setting, int]]:
        """(stage, setting, seed) of the runs that a job needs next: the tuning, then the comparison."""
        done = {
            (run["stage"], run["side"], run["method"], run["lr"], run["seed"])
            for run in self.runs
            if run["job"] == job.name
        }
        tried = {side: settings_to_try(job, side, self._methods) for side in ("ours", "TRL")}
        wanted = [("tune", one, TUNING_SEED) for pair in zip(*tried.values(), strict=True) for one in pair]
        if all((stage, s.side, s.method, s.lr, seed) in done for stage, s, seed in wanted):
            own = [r for r in self.runs if r["stage"] != "tune" or r["method"] in self._methods[r["side"]]]
            best = [best_setting(job, side, own) for side in tried]
            wanted = [("compare", setting, seed) for seed in seeds for setting in best]
        return [
            (stage, s, seed) for stage, s, seed in wanted if (stage, s.side, s.method, s.lr, seed) not in done
        ]

    def run(self, job: Job, *, seeds: Sequence[int], scratch: Path) -> None:
        """Makes a job's missing runs, and writes the results after each."""
        while missing := self.missing(job, seeds=seeds):
            for stage, setting, seed in missing:
                limited = job
                if stage == "tune":
                    limited = replace(job, limit_s=self._tuning_limit_s(job, setting.side))
                load = _load_when_quiet(wait_s=60.0)
                if setting.side == "ours":
                    own = self._methods["ours"][setting.method]
                    facts, rows, weights = run_ours(
                        limited, setting, seed=seed, scratch=scratch, settings=tuple(own)
                    )
                else:
                    if job.name not in self._threads:
                        self._threads[job.name] = _faster_threads(job, scratch=scratch)
                    facts, rows, weights = run_trl(
                        limited, setting, seed=seed, scratch=scratch, threads=self._threads[job.name]
                    )
                run = {
                    "stage": stage, "job": job.name, "seed": seed, "side": setting.side,
                    "method": setting.method, "lr": setting.lr,
                    "limit_s": job.limit_s, "stopped_s": limited.limit_s,
                    "load_before": load, "was_quiet": load < QUIET,
                    "threads": self._threads[job.name] if setting.side == "TRL" else None,
                }  # fmt: skip
                run |= result_of(facts, rows, limit_s=job.limit_s) | held_out(job, weights, seed=seed)
                self.runs.append(run)
                print(run, flush=True)
                write(self._path.stem, {"window": WINDOW, "runs": self.runs})

    def _tuning_limit_s(self, job: Job, side: str) -> float:
        """Seconds after which a tuning run cannot be its side's best, as another one had the last reward."""
        of_side = [r for r in self.runs if (r["stage"], r["job"], r["side"]) == ("tune", job.name, side)]
        return min([job.limit_s, *(seconds_to(run, REWARDS[-1]) for run in of_side)])


def _load_when_quiet(*, wait_s: float) -> float:
    """Mean number of running processes over 3 s; waits for less than QUIET, at most `wait_s`. The one-minute
    load average would include the previous run.
    """
    until = time.monotonic() + wait_s
    while True:
        begun, began = _cpu_s(), time.monotonic()
        time.sleep(3.0)
        load = (_cpu_s() - begun) / (time.monotonic() - began)
        if load < QUIET or time.monotonic() > until:
            return round(load, 2)


def _cpu_s() -> float:
    """CPU seconds of the machine, all processes."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _faster_threads(job: Job, *, scratch: Path) -> int:
    """The number of threads with which TRL is faster in three steps; the first step does not count."""

    def seconds(threads: int) -> float:
        setting = Setting(side="TRL", method="dapo", lr=job.lr)
        rows = run_trl(job, setting, seed=0, scratch=scratch, threads=threads, num_steps=4)[1]
        return float(rows[-1]["seconds"] - rows[0]["seconds"])

    return min((1, os.cpu_count() or 1), key=seconds)


if __name__ == "__main__":
    main()
