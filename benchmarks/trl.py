"""The same training by this project and by TRL: seconds and samples to a reward, tokens/s, memory.

    make trl                                             TRL in an environment of its own (once)
    python -m benchmarks.trl [--job default long] [--seeds 0 1 2] [--resume]

Both sides start from the same model and get the same prompts in the same order, the same reward, 16 prompts
with 8 samples a step, the same learning rate, schedule, warm-up, AdamW settings and gradient clip, one update
a batch, no KL, temperature 1, float32, no evaluation, no checkpoints before the end. TRL's GRPOTrainer has
the loss `dapo` (a mean over tokens) with advantages normalized in the group, as here. It uses one micro-batch
a step, and as many threads as are faster in three steps that are timed before (one, or one for each core);
this project's processes have one thread each.

    default   the default job: answers of up to 10 tokens
    long      counting (benchmarks/counting.py): answers of up to 128 tokens, most of them short

Seconds count from the start of the first step, with its generation; starting the processes is apart. A reward
is reached when the mean over the samples of the last five steps is at least that. Memory is the largest sum
of the proportional set sizes of a side's processes, every second. The sides take turns, seed after seed.
Writes benchmarks/results/trl.json after every run.
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
from benchmarks.report import RESULTS, ROOT, table, write
from rollout_server.tasks.base import Task
from rollout_server.tasks.sort import SortTask
from trainer.prepare_model import prepare_model

PYTHON = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "areal_like/trl/bin/python"
WINDOW = 5
REWARDS = (0.7, 0.9)
TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training that both sides run."""

    name: str
    num_steps: int
    max_new_tokens: int
    lr: float
    goal: float
    """Wanted ratio of TRL's seconds to ours."""
    overrides: tuple[str, ...] = field(default=())

    def task(self, seed: int) -> Task:
        """The task that makes the prompts and answers for TRL."""
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
    """What TRL is given of the configuration."""
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


def run_trl(
    job: Job, *, seed: int, scratch: Path, threads: int, num_steps: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts of the run, rows of steps)"""
    task, steps = job.task(seed), num_steps or job.num_steps
    examples = [task.example("train", i) for i in range(job.num_steps * Config().trainer.groups_per_step)]
    out = scratch / f"trl-{job.name}-{seed}.jsonl"
    spec = {
        "model": job.model(scratch), "prompts": [e.prompt for e in examples],
        "answers": [e.answer for e in examples], "out": str(out), "seed": seed, "num_threads": threads,
        "stop_at": REWARDS[-1], "window": WINDOW, "settings": settings_of(job) | {"num_steps": steps},
    }  # fmt: skip
    out.unlink(missing_ok=True)
    (scratch / "spec.json").write_text(json.dumps(spec))
    with _watched(
        [str(PYTHON), "-P", str(ROOT / "benchmarks/trl_side.py"), str(scratch / "spec.json")]
    ) as watch:
        watch.wait()
    first, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {"start_s": first["start_s"], "versions": first["versions"], "peak_mib": watch.peak_mib}, rows


def run_ours(job: Job, *, seed: int, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts of the run, rows of steps)"""
    name, directory = f"ours-{job.name}-{seed}", scratch / "runs"
    command = [
        sys.executable, "-m", "launch", "run", f"name={name}", f"runs_dir={directory}", f"seed={seed}",
        f"model.path={job.model(scratch)}", f"trainer.num_steps={job.num_steps}", f"trainer.lr={job.lr}",
        f"sampling.max_new_tokens={job.max_new_tokens}", f"eval.interval={job.num_steps}",
        "eval.num_prompts=8", f"trainer.checkpoint_interval={job.num_steps}", *job.overrides,
    ]  # fmt: skip
    path, began = directory / name / "metrics.jsonl", time.time()
    with _watched(command) as watch:
        while watch.is_running():
            rewards = [row["reward_mean"] for row in _rows(path)]
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
            "wait_s": row["wait_data_s"],
        }
        for row in found
    ]
    return {"start_s": first - began, "peak_mib": watch.peak_mib}, rows


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


class _Watch:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self._deadline = time.monotonic() + TIMEOUT_S
        self.peak_mib = 0.0
        self._is_stopped = False

    def is_running(self) -> bool:
        """Looks at the memory, once a second. Raises TimeoutError after TIMEOUT_S."""
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"{self._process.args!r} is not done after {TIMEOUT_S:.0f} s")
        self.peak_mib = max(self.peak_mib, _pss_mib(self._process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.poll() is None

    def stop(self) -> None:
        """Asks the process to end."""
        if not self._is_stopped:
            self._is_stopped = True
            self._process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Until the process has ended. Raises RuntimeError if it failed."""
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
    """Sum of the proportional set sizes of a process and all below it."""
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


def result_of(facts: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one run."""
    reached: dict[str, Any] = {}
    for reward in REWARDS:
        reached[str(reward)] = None
        for end in range(WINDOW, len(rows) + 1):
            if statistics.mean(row["reward"] for row in rows[end - WINDOW : end]) >= reward:
                samples = sum(row["samples"] for row in rows[:end])
                reached[str(reward)] = {
                    "seconds": round(rows[end - 1]["seconds"], 2),
                    "samples": round(samples),
                }
                break
    seconds = rows[-1]["seconds"]
    sampled = sum(row["sampled_tokens"] for row in rows)
    tokens = sampled + sum(row["prompt_tokens"] for row in rows)
    result = {
        "steps": len(rows),
        "reached": reached,
        "seconds": round(seconds, 2),
        "seconds_per_step": round(seconds / len(rows), 4),
        "tokens_per_s": round(tokens / seconds),
        "sampled_tokens_per_s": round(sampled / seconds),
        "last_reward": round(statistics.mean(row["reward"] for row in rows[-WINDOW:]), 3),
        "start_s": round(facts["start_s"], 1),
        "peak_mib": round(facts["peak_mib"]),
    }
    if "lag" in rows[0]:
        result["lag"] = round(statistics.mean(row["lag"] for row in rows), 2)
        result["trainer_idle"] = round(sum(row["wait_s"] for row in rows) / seconds, 3)
    return result | ({"versions": facts["versions"]} if "versions" in facts else {})


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
                    load = os.getloadavg()[0]
                    if side == "ours":
                        facts, rows = run_ours(job, seed=seed, scratch=scratch)
                    else:
                        facts, rows = run_trl(job, seed=seed, scratch=scratch, threads=threads)
                    run = {"job": name, "seed": seed, "side": side, "load_before": round(load, 2)}
                    runs.append(
                        run | {"threads": threads if side == "TRL" else None} | result_of(facts, rows)
                    )
                    print(runs[-1], flush=True)
                    write("trl", {"window": WINDOW, "runs": runs})
    print(table_of(runs))


def _faster_threads(job: Job, *, scratch: Path) -> int:
    """The number of threads with which TRL makes three steps faster; the first step does not count."""

    def seconds(threads: int) -> float:
        rows = run_trl(job, seed=0, scratch=scratch, threads=threads, num_steps=4)[1]
        return float(rows[-1]["seconds"] - rows[0]["seconds"])

    return min((1, os.cpu_count() or 1), key=seconds)


def table_of(runs: Sequence[dict[str, Any]]) -> str:
    """Medians over the seeds, with the smallest and largest."""
    lines = []
    for name in dict.fromkeys(run["job"] for run in runs):
        of_job = {
            side: [r for r in runs if (r["job"], r["side"]) == (name, side)] for side in ("ours", "TRL")
        }
        for side, some in of_job.items():
            columns = [
                [r["reached"][str(reward)] and r["reached"][str(reward)][unit] for r in some]
                for reward in REWARDS
                for unit in ("seconds", "samples")
            ]
            columns += [[r[key] for r in some] for key in ("seconds_per_step", "tokens_per_s", "peak_mib")]
            lines.append([name, side, *map(_spread, columns)])
        if all(of_job.values()):
            lines.append([name, "TRL / ours", *_ratios(of_job)])
    header = [f"{unit} to {reward}" for reward in REWARDS for unit in ("seconds", "samples")]
    return table(["job", "side", *header, "s a step", "tokens/s", "peak MiB"], lines)


def _ratios(of_job: dict[str, list[dict[str, Any]]]) -> list[str]:
    def ratio(value: Any) -> str:
        medians = []
        for side in ("TRL", "ours"):
            values = [value(run) for run in of_job[side]]
            if None in values:
                return "-"
            medians.append(statistics.median(values))
        return f"{medians[0] / medians[1]:.2f}"

    keys = [(str(reward), unit) for reward in REWARDS for unit in ("seconds", "samples")]
    return [
        *(ratio(lambda r, k=k, u=u: r["reached"][k] and r["reached"][k][u]) for k, u in keys),
        *(ratio(lambda r, k=k: r[k]) for k in ("seconds_per_step", "tokens_per_s", "peak_mib")),
    ]


def _spread(values: Sequence[Any]) -> str:
    if not values or None in values:
        reached = sum(value is not None for value in values)
        return f"{reached} of {len(values)} runs"
    digits = 3 if max(values) < 10 else 1 if max(values) < 1000 else 0
    low, middle, high = (f"{v:,.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
