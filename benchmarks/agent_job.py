"""Trains the tiny tool model with an agent framework, inside the job and externally: scores, turns, lags.

    python -m benchmarks.agent_job [key=value ...] [--seed 0] [--only inside] [--apis chat,messages]
        [--processes 2]

There is a run for each API of sessions (--apis), with the agent of benchmarks/adding_agents.py. `inside`: the
job runs it as the task's `agent()`. `outside`: separate processes claim sessions over HTTP. Each run ends
with an audit. Writes benchmarks/results/agent_job.json, which keeps the other runs, and prints the tables of
docs/results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from areal_like.runtime.command_line import load_config
from benchmarks.adding_agents import AddingWithTask
from benchmarks.conversations import CONVERSATIONS, apis_of
from benchmarks.report import RESULTS, ROOT, run_job, table, write
from launch.audit.run import audit_run
from trainer.models.tiny_chat import build_tiny_chat_model

CONFIG = ("--config", "configs/jobs/agents.yaml")
KEPT = (
    "steps", "eval_before", "eval_after", "reward_first", "reward_last", "training_seconds", "wall_seconds",
    "max_trained_lag", "mean_trained_lag", "tickets", "drops", "generation_idle_fraction",
    "trainer_idle_fraction",
)  # fmt: skip
"""Keys of the job's summary that are copied to the result."""
CURVES = ("reward_mean", "turns", "response_length_mean", "lag_max", "truncated_fraction")
TIMEOUT_S = 1800.0
FIFTHS = 5
"""Parts of a run in the second table."""


def main() -> None:
    """Makes the runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("inside", "outside"))
    parser.add_argument("--apis", type=apis_of, default=list(CONVERSATIONS), help="chat,responses,messages")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    file = RESULTS / "agent_job.json"
    runs: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    for api in args.apis:
        for variant in [args.only] if args.only else ["outside", "inside"]:
            num_processes = args.processes if variant == "outside" else 0
            run = measured(variant, args.seed, args.overrides, api=api, num_processes=num_processes)
            runs[f"{variant}, {CONVERSATIONS[api].title}"] = run
            write("agent_job", {"runs": runs})
    print(outcomes(runs), progress(runs), sep="\n\n")


def measured(
    variant: str, seed: int, overrides: list[str], *, api: str, num_processes: int
) -> dict[str, Any]:
    """One run: its summary, and a curve for each of CURVES over the steps. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        settings = [*CONFIG, f"seed={seed}", *overrides]
        if num_processes:
            port = free_port()
            settings += ["task.external=true", f"sessions.port={port}"]
            url = f"http://127.0.0.1:{port}"
            stack.enter_context(agents_from_outside(url, api=api, num_processes=num_processes))
        elif api != "chat":
            settings += settings_of_own_task(api, seed, overrides, model=Path(scratch) / "model")
        summary, rows = run_job(variant, settings, runs_dir=Path(scratch), timeout_s=TIMEOUT_S)
        audit = audit_run(Path(scratch) / variant)
    if not audit.is_clean:
        raise RuntimeError("\n".join(audit.lines()))
    start_s = rows[0]["time_unix_s"]
    return {
        "api": api,
        "seed": seed,
        "overrides": overrides,
        "processes_of_agents": num_processes,
        "audit": list(audit.lines())[-2:],
        **{key: summary[key] for key in KEPT},
        "seconds": [round(row["time_unix_s"] - start_s, 2) for row in rows],
        "curves": {name: [round(row[name], 4) for row in rows] for name in CURVES},
        "evals": [(row["step"], row["eval_reward"]) for row in rows if "eval_reward" in row],
    }


def settings_of_own_task(api: str, seed: int, overrides: list[str], *, model: Path) -> list[str]:
    """The agents of CONFIG with another API. A job warm-starts its model only for a task of this project, so
    the same model is built here."""
    warm_start_steps = load_config([*CONFIG, *overrides]).model.warm_start_steps
    build_tiny_chat_model(model, seed=seed, warm_start_steps=warm_start_steps, uses_tool=True)
    task = f"{AddingWithTask.__module__}.{AddingWithTask.__qualname__}"
    return [f"task={{_target_: {task}, api: {api}}}", f"model.path={model}", "model.warm_start_steps=0"]


@contextlib.contextmanager
def agents_from_outside(url: str, *, api: str, num_processes: int) -> Iterator[None]:
    """Starts processes with external agents, which wait for the server and end after it."""
    command = [sys.executable, "-m", "benchmarks.outside_agent", url, "--api", api]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(num_processes)]
    try:
        yield
        for process in processes:
            process.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def outcomes(runs: dict[str, Any]) -> str:
    """A row for each run."""
    header = [
        "agent", "seed", "held-out before", "held-out after", "steps", "training s", "turns a sample",
        "max lag", "mean lag", "stale drops / issued",
    ]  # fmt: skip
    rows = [
        [
            variant,
            run["seed"],
            f"{run['eval_before']:.2f}",
            f"{run['eval_after']:.2f}",
            run["steps"],
            f"{run['training_seconds']:.0f}",
            f"{sum(run['curves']['turns']) / run['steps']:.1f}",
            run["max_trained_lag"],
            f"{run['mean_trained_lag']:.2f}",
            f"{run['drops']['stale']} / {run['tickets']['issued']}",
        ]
        for variant, run in runs.items()
    ]
    return table(header, rows)


def progress(runs: dict[str, Any]) -> str:
    """A row for each run: mean reward and turns of a sample in each fifth of its steps."""
    header = ["agent", *(f"fifth {part + 1}" for part in range(FIFTHS))]
    return table(header, [[name, *map(_means, _fifths(run))] for name, run in runs.items()])


def _fifths(run: dict[str, Any]) -> Iterator[list[list[float]]]:
    """Rewards and turns of the steps of each part."""
    curves = [run["curves"][name] for name in ("reward_mean", "turns")]
    num_steps = len(curves[0])
    for part in range(FIFTHS):
        yield [curve[part * num_steps // FIFTHS : (part + 1) * num_steps // FIFTHS] for curve in curves]


def _means(part: list[list[float]]) -> str:
    """`reward, turns`; empty if there are fewer steps than parts."""
    return ", ".join(f"{fmean(values):.2f}" for values in part if values)


if __name__ == "__main__":
    main()
