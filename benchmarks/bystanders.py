"""Measures how much one disturber costs the rest of a job: the job alone, and the job with a disturber.

    python -m benchmarks.bystanders [--only agent reward server] [--rounds 3] [--seconds 25] [key=value ...]

    agent    external agents make the samples; one more process claims sessions and makes no request,
             posts absurd rewards, sends malformed bodies, or abandons them
    reward   one prompt in a hundred belongs to a task whose rewards are 1e20 or NaN, raise, or (1 %) hang
    server   a second rollout server joins, which sends forged samples and absurd statistics

The two sides of a round run one after the other on the same machine; every other round starts with the
disturbed one. After a warm-up the disturber starts, and a few seconds later optimizer steps, and the CPU time
of each role of the job, are counted over --seconds. Then the job is drained and audited. The ratio compares
the medians of steps per minute. In the case `reward`, the side without a disturber has the same two tasks.
Writes benchmarks/results/bystanders.json, one entry for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu_by_role import used
from benchmarks.report import RESULTS, ROOT, table, write
from launch.audit.run import audit_run
from tests.chaos.agents import Plan, dumps
from tests.support.chat_jobs import build_chat_model

SIDES = ("alone", "disturbed")
SETTINGS = (
    "name=x",
    "sampling.group_size=4",
    "sampling.max_new_tokens=16",
    "rollout.max_context=256",
    "rollout.max_running=32",
    "episode.max_turns=4",
    "rollout.reward_workers=2",
    "rollout.reward_timeout_s=2",
    "sessions.idle_timeout_s=3",
    "trainer.groups_per_step=8",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=100000",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=0",
    "max_staleness=4",
)
OUTSIDE = ("task={name: external}", "model.renderer=tests.support.line_chat.LineChat")
TASK = "_target_: benchmarks.broken_task.BrokenTask"
HEALTHY_PARTS, BROKEN_PARTS = 99, 1
"""Weights of the two tasks."""
NUM_AGENTS = 32
PAUSE_S = 0.1
"""Mean pause of an agent after a turn, in seconds."""
WARM_UP_STEPS = 5
START_S = 180.0
SETTLE_S = 3.0
"""Time from the disturber's first request until steps are counted, in seconds."""
DRAIN_S = 120.0


def mixture(*, is_broken: bool) -> str:
    """Returns the setting `task`: two tasks, of which the rarer one may be broken."""
    return (
        f"task={{name: mixture, tasks: [{{weight: {HEALTHY_PARTS}, {TASK}}}, "
        f"{{weight: {BROKEN_PARTS}, {TASK}, is_broken: {str(is_broken).lower()}, label: rare}}]}}"
    )


def measured(
    case: str, side: str, overrides: Sequence[str], *, directory: Path, seconds: float
) -> dict[str, Any]:
    """Runs one job; returns its steps per minute, CPU time, exit code and audit, and the disturber's
    report."""
    is_disturbed, root, port = side == "disturbed", directory / "runs" / "x", free_port()
    settings = [*SETTINGS, f"model.path={directory}/model", f"runs_dir={directory}/runs"]
    settings += {
        "agent": [*OUTSIDE, f"sessions.port={port}"],
        "reward": [mixture(is_broken=is_disturbed)],
        "server": [f"task={{{TASK}}}"],
    }[case]
    build_chat_model(directory / "model")
    command = [sys.executable, "-m", "launch", "run", *settings, *overrides]
    disturbance: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context((directory / "out").open("wb"))
        job = stack.enter_context(ended(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=ENV)))
        if case == "agent":
            wait_until(lambda: is_listening(port), job=job, out=directory / "out")
            plan = Plan(urls=[f"http://127.0.0.1:{port}"], num_agents=NUM_AGENTS, pause_s=PAUSE_S)
            agents = ["-m", "tests.chaos.agents", dumps(plan), str(directory / "agents")]
            stack.enter_context(ended(subprocess.Popen([sys.executable, *agents], cwd=ROOT, env=ENV)))
        rows = root / "metrics.jsonl"
        wait_until(lambda: len(times_of(rows)) >= WARM_UP_STEPS, job=job, out=directory / "out")
        disturber = None
        if is_disturbed and case != "reward":
            target = f"http://127.0.0.1:{port}" if case == "agent" else str(root)
            disturber = stack.enter_context(
                ended(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.disturbers", case, target],
                        cwd=ROOT, env=ENV, stdout=subprocess.PIPE,
                    )
                )
            )  # fmt: skip
            time.sleep(1.0)  # its imports
        time.sleep(SETTLE_S)
        started_s, before = time.time(), used(job.pid, root).by_role
        while time.time() < started_s + seconds and job.poll() is None:
            time.sleep(0.1)
        after = used(job.pid, root).by_role
        cpu_ms = {role: ms - before[role] for role, ms in after.items()}
        if disturber is not None:
            disturber.send_signal(signal.SIGTERM)
            report, _ = disturber.communicate(timeout=60)
            disturbance = json.loads(report) if report else {"exit_code": disturber.returncode}
        job.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout=DRAIN_S)
    num_steps = sum(started_s <= at_s < started_s + seconds for at_s in times_of(rows))
    audit = audit_run(root)
    return {
        "steps_per_minute": round(60 * num_steps / seconds, 1),
        "cpu_ms_per_step": {role: round(ms / max(1, num_steps), 2) for role, ms in sorted(cpu_ms.items())},
        "exit_code": job.returncode,
        "audit_is_clean": audit.is_clean,
        "audit": list(audit.lines())[-3:],
        "failures": audit.failures,
        "drops": audit.drops,
        "disturber": disturbance,
        "last_lines": [] if job.returncode == 0 else (directory / "out").read_text()[-600:].splitlines(),
    }


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Yields the process, and ends it with the block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(is_so: Callable[[], bool], *, job: subprocess.Popen[bytes], out: Path) -> None:
    """Waits for a condition. Raises RuntimeError if the job ends first, or after START_S."""
    until_s = time.monotonic() + START_S
    while not is_so():
        if job.poll() is not None or time.monotonic() > until_s:
            raise RuntimeError(f"the job does not start:\n{out.read_text()[-2000:]}")
        time.sleep(0.1)


def times_of(path: Path) -> list[float]:
    """Returns the Unix time of each step so far."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["time_unix_s"] for line in lines]


def is_listening(port: int) -> bool:
    """True once the port accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Returns a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ratio_of(runs: dict[str, list[dict[str, Any]]]) -> float:
    """Returns the median steps per minute of the disturbed jobs, relative to that of the others."""
    alone, disturbed = (statistics.median(run["steps_per_minute"] for run in runs[side]) for side in SIDES)
    return round(disturbed / alone, 3)


def as_table(cases: dict[str, Any]) -> str:
    """Returns the table of docs/results.md."""
    header = [
        "disturber",
        "steps a minute alone",
        "disturbed",
        "ratio",
        "exit codes",
        "audits",
        "its requests",
    ]
    rows = []
    for case, found in cases.items():
        runs = found["runs"]
        disturbed = runs["disturbed"]
        requests = statistics.median(run["disturber"].get("requests", 0) for run in disturbed)
        rows.append(
            [
                case,
                *(" ".join(f"{run['steps_per_minute']:.0f}" for run in runs[side]) for side in SIDES),
                f"{found['ratio']:.2f}",
                " ".join(str(run["exit_code"]) for run in disturbed),
                "clean" if all(run["audit_is_clean"] for run in disturbed) else "not clean",
                f"{requests:.0f}" if requests else "–",
            ]
        )
    return table(header, rows)


def main() -> None:
    """Measures the cases and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=("agent", "reward", "server"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    file = RESULTS / "bystanders.json"
    cases: dict[str, Any] = json.loads(file.read_text())["cases"] if file.exists() else {}
    for case in args.only or ("agent", "reward", "server"):
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(args.rounds):
            for side in reversed(SIDES) if number % 2 else SIDES:
                with tempfile.TemporaryDirectory() as scratch:
                    run = measured(case, side, args.overrides, directory=Path(scratch), seconds=args.seconds)
                runs[side].append(run)
                print(f"{case}, {side}: {json.dumps(run)}", flush=True)
        cases[case] = {"overrides": args.overrides, "ratio": ratio_of(runs), "runs": runs}
        write("bystanders", {"seconds": args.seconds, "cases": cases})
    print(as_table(cases))


if __name__ == "__main__":
    main()
