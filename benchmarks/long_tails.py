"""Measures jobs whose samples have long-tailed latencies: the idle slots, and the reward by wall-clock time.

    python -m benchmarks.long_tails [--only PATTERN ...] [--seconds 32] [--jobs 1] [--report]

The tool job learns to add with a calculator whose calls sleep (`benchmarks/long_tails_task.py`): a sample's
calls take a log-normal time of spread 1, cut off at 4 times the mean, and more terms need more calls. There
are two slots for each sample of a step, and the cores are mostly idle, so latency decides the speed.

    wait       buffer.overdue=wait: steps wait for groups that would exceed the bound
    drop       buffer.overdue=drop: groups that exceed the bound are dropped
    close      buffer.overdue=close: groups are closed, and the bound holds for each token
    unbounded  buffer.overdue=wait with a bound of 64, which no group reaches

A cell is (side, objective, bound, seed), named like `close/tis-4/seed-0`; with `even` in place of the
objective all samples take the same time (a control, with TIS). A cell trains for `--seconds` from its first
step on, is drained, and appends a row to benchmarks/results/long_tails.jsonl. A finished cell is not run
again, so the grid may be stopped and continued. `--only` takes shell patterns of names. Cells are ordered so
that a partial grid compares the sides. Finally, or with `--report`, the tables are printed and
docs/long_tails.png is drawn.

Idle slots are those of the rollout server that hold no sample, from its own gauges, twice a second. The part
of them that waiting causes is the difference to `unbounded`. Held-out prompts, for which the calculator does
not sleep, are sampled at temperature 1 every few steps while training continues. With `--jobs 2` a cell of
`wait` and the one of `close` run together, and the startup of one disturbs another; on two cores that halves
the time of the grid.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from areal_like.config import Config, ModelConfig
from benchmarks.bystanders import DRAIN_S, ENV, ended, times_of, wait_until
from benchmarks.long_tails_report import as_tables, draw
from benchmarks.report import RESULTS, ROOT, machine
from launch.audit.run import audit_run
from trainer.prepare_model import TINY_RENDERER, prepare_model

RESULT = RESULTS / "long_tails.jsonl"
SLOTS = 128
GROUPS_PER_STEP, GROUP_SIZE = 8, 8
SETTINGS = (
    "name=x",
    f"model.renderer={TINY_RENDERER}",
    f"sampling.group_size={GROUP_SIZE}",
    "sampling.max_new_tokens=16",
    "episode.max_turns=12",
    "rollout.max_context=256",
    f"rollout.max_running={SLOTS}",
    "rollout.queue_samples=0",
    f"rollout.max_episodes={SLOTS}",
    f"trainer.groups_per_step={GROUPS_PER_STEP}",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=100000",
    "trainer.lr=4.0e-4",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=96",
    "eval.interval=4",
    "eval.sets={held_out: {temperature: 1.0}}",
)
OBJECTIVES = {
    "tis": ("objective={name: tis, level: token}",),
    "vcpo": ("objective={name: vcpo, leave_one_out: true}",),
    "even": ("objective={name: tis, level: token}",),
}
"""Objective of a cell's name -> settings."""
UNBOUNDED = 64
SIDES = ("wait", "drop", "close", "unbounded")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One job."""

    side: str
    objective: str
    max_staleness: int
    seed: int

    @property
    def name(self) -> str:
        """`close/tis-4/seed-0`"""
        return f"{self.side}/{self.objective}-{self.max_staleness}/seed-{self.seed}"

    @property
    def settings(self) -> list[str]:
        """The settings of the job."""
        is_even = str(self.objective == "even").lower()
        return [
            *SETTINGS,
            *OBJECTIVES[self.objective],
            f"task={{_target_: benchmarks.long_tails_task.SlowAddingTask, is_even: {is_even}}}",
            f"buffer.overdue={'wait' if self.side == 'unbounded' else self.side}",
            f"max_staleness={self.max_staleness}",
            f"seed={self.seed}",
        ]


def grid() -> Iterable[Cell]:
    """All cells; for each seed, the most important ones first, so that a partial grid is useful."""
    for seed in (0, 1, 2):
        for objective in ("tis", "vcpo"):
            for side in ("wait", "close", "unbounded", "drop"):
                yield _cell(side, objective, UNBOUNDED if side == "unbounded" else 4, seed)
        for bound in (2, 8):
            for side in ("wait", "close"):
                yield _cell(side, "tis", bound, seed)
        for side in ("wait", "close"):
            yield _cell(side, "even", 4, seed)
    for seed in (0, 1, 2):
        for bound in (2, 8):
            for side in ("wait", "close"):
                yield _cell(side, "vcpo", bound, seed)


def _cell(side: str, objective: str, bound: int, seed: int) -> Cell:
    return Cell(side=side, objective=objective, max_staleness=bound, seed=seed)


def measured(cell: Cell, *, model: str, seconds: float) -> dict[str, Any]:
    """Runs a job and returns its row. Raises RuntimeError if the job does not begin or fails."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        directory = Path(scratch)
        root, out_path = directory / "runs" / "x", directory / "out"
        settings = [*cell.settings, f"model.path={model}", f"runs_dir={directory}/runs"]
        command = [sys.executable, "-m", "launch", "run", *settings]
        out = stack.enter_context(out_path.open("wb"))
        job = stack.enter_context(ended(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=ENV)))
        metrics = root / "metrics.jsonl"
        wait_until(lambda: bool(times_of(metrics)), job=job, out=out_path)
        until_s = times_of(metrics)[0] + seconds
        while time.time() < until_s and job.poll() is None:
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout=DRAIN_S)
        if job.returncode != 0:
            raise RuntimeError(f"{cell.name} exited with {job.returncode}:\n{out_path.read_text()[-3000:]}")
        audit = audit_run(root)
        return {
            "name": cell.name,
            **asdict(cell),
            "settings": cell.settings,
            "seconds": seconds,
            **figures(rows_of(metrics), rows_of(root / "spans" / "rollout-0.jsonl"), seconds=seconds),
            "drops": audit.drops,
            "audit_is_clean": audit.is_clean,
            "audit": [] if audit.is_clean else list(audit.lines()),
            "machine": machine(),
        }


def figures(steps: Sequence[dict[str, Any]], spans: Sequence[Any], *, seconds: float) -> dict[str, Any]:
    """What a job's metrics and its server's gauges say about the first `seconds` after its first step.

    `steps`: rows of metrics.jsonl. `spans`: rows of spans/rollout-0.jsonl; a gauge is (Unix time, name,
    value).
    """
    first_s = steps[0]["time_unix_s"]
    rows = [row for row in steps[1:] if row["time_unix_s"] <= first_s + seconds]
    num = max(1, len(rows))
    held: dict[float, float] = {}
    at_s = 0.0
    for row in spans:
        if isinstance(row, list) and len(row) == 3 and row[1] in _PLACES:
            # The gauges of a report are a few microseconds apart.
            at_s = at_s if row[0] - at_s < 0.1 else row[0]
            held[at_s] = held.get(at_s, 0.0) + row[2]
    within = [num_held for at_s, num_held in held.items() if first_s <= at_s <= first_s + seconds]
    trained = sum(
        row["num_sequences"] * row["response_length_mean"] * (1 - row.get("masked_share", 0.0))
        for row in rows
    )
    return {
        "steps": len(rows),
        "tokens_a_second": round(trained / seconds, 1),
        "idle_slots": round(1 - sum(within) / max(1, len(within)) / SLOTS, 4),
        "trainer_wait": round(sum(row["wait_data_s"] for row in rows) / seconds, 4),
        "longest_step_s": round(max((b - a for a, b in _gaps(steps, first_s + seconds)), default=0.0), 2),
        "lag_mean": round(sum(row["lag_mean"] for row in rows) / num, 3),
        "lag_max": max((row["lag_max"] for row in rows), default=0),
        "masked_share": round(sum(row.get("masked_share", 0.0) for row in rows) / num, 4),
        "early_members": round(sum(row.get("early_members", 0.0) for row in rows) / num, 2),
        "late_share": round(sum(row.get("late_share", 0.0) for row in rows) / num, 4),
        "rewards": [(round(row["time_unix_s"] - first_s, 2), round(row["reward_mean"], 4)) for row in rows],
        "evals": [
            (round(row["time_unix_s"] - first_s, 2), round(row["eval_reward"], 4))
            for row in rows
            if row.get("eval_reward") is not None
        ],
    }


_PLACES = frozenset({"at_engine", "in_tools", "in_rewards"})


def _gaps(steps: Sequence[dict[str, Any]], until_s: float) -> Iterable[tuple[float, float]]:
    """Times of consecutive steps; the last gap is open at `until_s`."""
    times = [row["time_unix_s"] for row in steps if row["time_unix_s"] < until_s]
    return zip(times, [*times[1:], until_s], strict=True)


def rows_of(path: Path) -> list[Any]:
    """The complete lines of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def main() -> None:
    """Runs the missing cells, and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--seconds", type=float, default=32.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.report:
        cells = [
            cell
            for cell in grid()
            if any(fnmatch.fnmatch(cell.name, pattern) for pattern in args.only)
            and not is_done(cell, rows_of(RESULT) if RESULT.exists() else [], seconds=args.seconds)
        ]
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
            task: dict[str, Any] = {"name": "adding"}
            model = ModelConfig(path="tiny", renderer=TINY_RENDERER, warm_start_steps=400)
            path = prepare_model(Config(task=task, model=model), out_dir=Path(scratch))
            runs = {pool.submit(measured, cell, model=path, seconds=args.seconds): cell for cell in cells}
            for run in as_completed(runs):
                try:
                    row = run.result()
                except RuntimeError as error:
                    print(f"{runs[run].name} failed: {error}", flush=True)
                    continue
                with RESULT.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print({key: row[key] for key in PRINTED}, flush=True)
    rows = latest(rows_of(RESULT)) if RESULT.exists() else []
    print(as_tables(rows))
    draw(rows, ROOT / "docs" / "long_tails.png")


PRINTED = ("name", "steps", "idle_slots", "trainer_wait", "lag_mean", "masked_share", "audit_is_clean")


def is_done(cell: Cell, rows: Iterable[dict[str, Any]], *, seconds: float) -> bool:
    """True if one of the rows is of this cell with its present settings."""
    return any(row["settings"] == cell.settings and row["seconds"] == seconds for row in rows)


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each cell."""
    return list({row["name"]: row for row in rows}.values())


if __name__ == "__main__":
    main()
