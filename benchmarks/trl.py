"""Compares the same training in this project and in TRL: seconds and samples to a reward, tokens/s, memory.

    make trl                                             installs TRL in its own environment (once)
    python -m benchmarks.trl [--job default long] [--seeds 0 1 2] [--resume]

Both sides start from the same model and get the same prompts in the same order, the same reward, 16 prompts
with 8 samples per step, the same learning rate, schedule, warm-up, AdamW settings and gradient clip, one
update per batch, no KL, temperature 1, float32, no evaluation, no checkpoints before the end. TRL's
GRPOTrainer has the loss `dapo` (a mean over tokens) with advantages normalized in the group, as here; it
divides by the sample standard deviation, this project by that of the population. TRL uses one micro-batch per
step, and the faster number of threads in three steps that are timed first (one, or one for each core); this
project's processes have one thread each. None of TRL's other settings was faster here: four micro-batches,
continuous batching, and torch.compile, which takes longer to compile than it saves.

    default   the default job: completions of up to 10 tokens
    long      counting (benchmarks/counting.py): completions of up to 128 tokens, most of them short

Seconds count from the start of the first step, including its generation; the start of the processes is not
included. A reward is reached when the mean over the samples of the last five steps is at least as large.
Memory is the largest sum of the proportional set sizes of a side's processes, measured every five seconds.
The sides alternate for each seed. A run on a machine with other work (a load of 0.5 or more after a minute's
wait) has `was_quiet: false`. Writes benchmarks/results/trl.json after every run; `python -m
benchmarks.trl_report` prints its table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from areal_like.config import Config
from benchmarks import counting
from benchmarks.report import RESULTS, ROOT, write
from benchmarks.trl_report import PHASES, REWARDS, WINDOW, phases_of, result_of, table_of
from buffer.prompts.order import PromptOrder
from rollout_server.tasks.base import Example, Task
from rollout_server.tasks.sort import SortTask
from trainer.prepare_model import prepare_model

PYTHON = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "areal_like/trl/bin/python"
TIMEOUT_S = 900.0
QUIET = 0.5
LOOK_AT_MEMORY_S = 5.0
"""Reading the memory of one process costs that process 10 ms, and this project has several."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training that both sides run."""

    name: str
    num_steps: int
    max_new_tokens: int
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


JOBS = {
    "default": Job(name="default", num_steps=600, max_new_tokens=10, lr=8e-5, goal=1.5),
    "long": Job(
        name="long",
        num_steps=150,
        max_new_tokens=counting.MAX_CHARACTERS + 1,
        lr=2e-4,
        goal=2.0,
        overrides=("task._target_=benchmarks.counting.Counting",),
    ),
}


def settings_of(job: Job) -> dict[str, Any]:
    """The parts of the configuration that TRL gets."""
    config = Config()
    return {
        "num_steps": job.num_steps,
        "samples": config.trainer.groups_per_step * config.sampling.group_size,
        "group_size": config.sampling.group_size,
        "max_new_tokens": job.max_new_tokens,
        "lr": job.lr,
        "warmup_steps": config.trainer.warmup_steps,
        "betas": list(config.trainer.betas),
        "weight_decay": config.trainer.weight_decay,
        "max_grad_norm": config.trainer.max_grad_norm,
    }


def examples_of(task: Task, num: int, *, seed: int) -> list[Example]:
    """The first training examples, in the order in which the buffer issues them."""
    order = PromptOrder(seed=seed, num_prompts=task.num_train)
    return [task.example("train", order.next().index) for _ in range(num)]


def run_trl(
    job: Job, *, seed: int, scratch: Path, threads: int, num_steps: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts of the run, rows of steps)"""
    task, steps = job.task(seed), num_steps or job.num_steps
    examples = examples_of(task, steps * Config().trainer.groups_per_step, seed=seed)
    out = scratch / f"trl-{job.name}-{seed}.jsonl"
    spec = {
        "model": job.model(scratch), "prompts": [e.prompt for e in examples],
        "answers": [e.answer for e in examples], "out": str(out), "seed": seed, "num_threads": threads,
        "trl": {}, "stop_at": REWARDS[-1], "window": WINDOW,
        "settings": settings_of(job) | {"num_steps": steps},
    }  # fmt: skip
    out.unlink(missing_ok=True)
    (scratch / "spec.json").write_text(json.dumps(spec))
    with _watched(
        [str(PYTHON), "-P", str(ROOT / "benchmarks/trl_side.py"), str(scratch / "spec.json")]
    ) as watch:
        watch.wait()
    first, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    return first | {"peak_mib": watch.peak_mib}, rows


def run_ours(job: Job, *, seed: int, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts of the run, rows of steps)"""
    name, directory = f"ours-{job.name}-{seed}", scratch / "runs"
    command = [
        sys.executable, "-m", "launch", "run", f"name={name}", f"runs_dir={directory}", f"seed={seed}",
        f"model.path={job.model(scratch)}", f"trainer.num_steps={job.num_steps}", f"trainer.lr={job.lr}",
        f"sampling.max_new_tokens={job.max_new_tokens}", f"eval.interval={job.num_steps}",
        "eval.num_prompts=0", f"trainer.checkpoint_interval={job.num_steps}", *job.overrides,
    ]  # fmt: skip
    path, began = directory / name / "metrics.jsonl", time.time()
    rewards: list[float] = []
    with _watched(command) as watch:
        while watch.is_running():
            rewards += [row["reward_mean"] for row in _rows(path, begin=len(rewards))]
            if len(rewards) >= WINDOW and statistics.mean(rewards[-WINDOW:]) >= REWARDS[-1]:
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
    return {"start_s": first - began, "peak_mib": watch.peak_mib, "generation_idle": idle}, rows


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
            self.peak_mib = max(self.peak_mib, _pss_mib(self._process.pid))
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


def _pss_mib(root: int) -> float:
    """Sum of the proportional set sizes of a process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    total, pending = 0, [root]
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total / 1024


def main() -> None:
    """Runs the jobs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--job", nargs="+", choices=[*JOBS], default=[*JOBS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="keep the runs of an earlier, ended call")
    parser.add_argument("--steps", type=int, help="of a trial")
    args = parser.parse_args()
    if not PYTHON.exists():
        parser.exit(2, f"benchmarks.trl: no TRL at {PYTHON}: run `make trl`\n")
    path = RESULTS / "trl.json"
    runs = json.loads(path.read_text())["runs"] if args.resume and path.exists() else []
    done = {(run["job"], run["seed"], run["side"]) for run in runs}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for name in args.job:
            job = JOBS[name]
            if args.steps:
                job = Job(**{**vars(job), "num_steps": args.steps})
            threads = _faster_threads(job, scratch=scratch)
            for seed in args.seeds:
                for side in ("ours", "TRL"):
                    if (name, seed, side) in done:
                        continue
                    load = _load_when_quiet(wait_s=60.0)
                    if side == "ours":
                        facts, rows = run_ours(job, seed=seed, scratch=scratch)
                    else:
                        facts, rows = run_trl(job, seed=seed, scratch=scratch, threads=threads)
                    run = {
                        "job": name,
                        "seed": seed,
                        "side": side,
                        "load_before": load,
                        "was_quiet": load < QUIET,
                    }
                    runs.append(
                        run | {"threads": threads if side == "TRL" else None} | result_of(facts, rows)
                    )
                    print(runs[-1], flush=True)
                    write("trl", {"window": WINDOW, "runs": runs})
    print(table_of(runs) + "\n\n" + phases_of(runs))


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
        rows = run_trl(job, seed=0, scratch=scratch, threads=threads, num_steps=4)[1]
        return float(rows[-1]["seconds"] - rows[0]["seconds"])

    return min((1, os.cpu_count() or 1), key=seconds)


if __name__ == "__main__":
    main()
