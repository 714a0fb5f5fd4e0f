"""The trainer's step on one GPU with each of its options: tokens/s, MFU, and memory beside the plan's.

    python -m benchmarks.gpu_step                         all options
    python -m benchmarks.gpu_step liger selective         some of them
    python -m benchmarks.gpu_step liger --profile 30      the longest kernels of one micro-batch of one option

The steps are those of `areal-like doctor --gpu`, stage `speed`: a model of the shape of Qwen3-1.7B with
random weights, sequences of up to 4096 tokens, micro-batches of 16,384 tokens. Each option has a process of
its own, because kernels and compilers change a whole process. An option that fails, because it needs more
memory than there is for example, has its error in the table. Writes benchmarks/results/gpu/step.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from areal_like.automatic_settings import resolved
from areal_like.config import Config
from benchmarks.report import table, write
from launch.doctor.gpu.speed import predict, run_steps, settings_of
from launch.doctor.gpu.stages import Request
from trainer.planning.lengths import lengths_of
from trainer.planning.shapes import with_local_model

OPTIONS: dict[str, dict[str, Any]] = {
    "torch": {"kernels": "torch"},
    "liger": {},
    "selective": {"gradient_checkpointing": "selective"},
    "kept": {"gradient_checkpointing": False},
    "compile": {"compile": True},
    "rectangles": {"attention": "rectangles"},
    "chunk-4096": {"logprob_chunk_tokens": 4096},
    "micro-32768": {"tokens_per_microbatch": 32768},
}
"""Name -> settings of the trainer, where they differ from those of the stage `speed`."""
TIMES = 5
"""Timed steps of four micro-batches; the fastest counts: a single one was up to 30 % slower."""
LIMIT_S = 120.0
"""Longest time of one option."""


def job(name: str, model: str, folder: str) -> Config:
    """The job of one option."""
    return settings_of(model, Request(scratch=folder), **OPTIONS[name])


def measure(name: str, model: str, *, profiled: int) -> dict[str, Any]:
    """Runs the steps of one option in this process. `profiled`: number of kernels to print."""
    profiler = torch.profiler.profile() if profiled else None
    with tempfile.TemporaryDirectory() as folder:
        config, shape = with_local_model(job(name, model, folder))
        lengths = lengths_of(config, max_positions=shape.max_positions)
        found = dict(run_steps(resolved(config), lengths, times=TIMES, around=profiler))
    if profiler is not None:
        averages = profiler.key_averages()
        print(averages.table(sort_by="self_device_time_total", row_limit=profiled, max_name_column_width=90))
    return found


def planned(name: str, model: str) -> dict[str, Any]:
    """What `areal-like plan` predicts for one option."""
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        config, shape = with_local_model(job(name, model, folder))
        lengths = lengths_of(config, max_positions=shape.max_positions)
        found = predict(config, shape, lengths, device)
    return {
        "planned_peak_gb": round(found.peak_bytes / 1e9, 1),
        "planned_tokens_per_s": found.tokens_per_s and round(found.tokens_per_s),
    }


def apart(name: str, model: str, part: str) -> dict[str, Any]:
    """`measure` or `planned` in a process of its own; its error, if it fails."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", name, "--model", model, "--part", part]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT_S:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="OPTION", help=", ".join(OPTIONS))
    parser.add_argument("--model", default="qwen3-1.7b", help="a shape of configs/scale/models/")
    parser.add_argument("--profile", type=int, default=0, metavar="KERNELS")
    parser.add_argument("--part", choices=("measure", "planned"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.options or list(OPTIONS)
    for name in names:
        if name not in OPTIONS:
            parser.error(f"{name}: use one of {', '.join(OPTIONS)}")
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU on this machine")
    if args.profile and len(names) != 1:
        parser.error("--profile is for one option: name it")
    if args.part == "planned":
        print(json.dumps(planned(names[0], args.model)))
        return
    if args.part or args.profile:
        print(json.dumps(measure(names[0], args.model, profiled=args.profile)))
        return
    results = {name: apart(name, args.model, "measure") for name in names}  # alone on the GPU
    complete = [name for name, found in results.items() if "error" not in found]
    with ThreadPoolExecutor(max_workers=4) as pool:  # plans need no GPU
        plans = pool.map(lambda name: apart(name, args.model, "planned"), complete)
    for name, plan in zip(complete, plans, strict=True):
        results[name] |= plan
    gpu = torch.cuda.get_device_name(0)
    write("gpu/step", {"gpu": gpu, "torch": torch.__version__, "model": args.model, "options": results})
    print(report(results))


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table of the options."""
    rows = []
    for name, found in results.items():
        if "error" in found:
            rows.append([name, found["error"], "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{found['tokens_per_s']:,} ({found.get('planned_tokens_per_s') or '-'})",
                found["model_tflops_per_s"],
                f"{found['mfu']:.1%}" if "mfu" in found else "-",
                f"{found['peak_gb']} ({found.get('planned_peak_gb', '-')})",
            ]
        )
    return table(["option", "tokens/s (planned)", "TFLOP/s", "MFU", "peak GB (planned)"], rows)


if __name__ == "__main__":
    main()
