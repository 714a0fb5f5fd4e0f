"""SmolLM2-135M-Instruct before training, after a supervised start, and after reinforcement learning.

    python -m benchmarks.real_model [--work FOLDER] [--steps 90] [--sglang-steps 6] [key=value ...]

    rows -> `areal-like eval` of the published model -> `areal-like sft` -> `areal-like run`
         -> some steps of the same job with SGLang, in float32 -> results

The job is configs/jobs/smollm2.yaml; `key=value` changes its reinforcement learning. Each stage is a run in
`--work` that is started with `resume=auto`: a benchmark that was killed continues where it stopped when it is
restarted, and a complete one only writes its results again. `--sglang-steps 0` leaves SGLang out (it needs
`make sglang`).

Writes benchmarks/results/real_model.json and docs/real_model.png, and prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from areal_like.runtime.process import die_with_parent
from benchmarks.real_model_data import write_rows
from benchmarks.real_model_report import collect, draw, tables
from benchmarks.report import ROOT, write

CONFIG = "configs/jobs/smollm2.yaml"
WORK = Path("runs/real_model")
"""Where the configuration expects the rows, relative to the repository."""
SFT = ("trainer.lr=2e-5", "trainer.warmup_steps=5")
SGLANG = ("rollout.engine=sglang", "model.dtype=float32", "max_staleness=0", "eval.num_prompts=0")
"""float32, because engine and trainer then agree to rounding, and no staleness, so that each step can compare
the log-probs of all its tokens."""
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
"""Makes glibc keep the memory of large tensors. By default it returns the memory to the kernel after each
one, which then spends time on clearing the same pages again."""


def main() -> None:
    """Runs the missing stages, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--sglang-steps", type=int, default=6)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    work = (ROOT / args.work).resolve()
    rows = ROOT / WORK / "rows"
    write_rows(rows)
    stage(work, "base", "eval", "smollm2")
    stage(work, "sft", "sft", *SFT)
    start = f"model.path={json.loads((work / 'sft' / 'summary.json').read_text())['model']}"
    stage(work, "rl", "run", start, f"trainer.num_steps={args.steps}", *args.overrides)
    if args.sglang_steps:
        stage(work, "sglang", "run", start, *SGLANG, f"trainer.num_steps={args.sglang_steps}")
    result = collect(work, rows)
    write("real_model", {"overrides": args.overrides, **result})
    draw(result, ROOT / "docs" / "real_model.png")
    print(tables(result))


def stage(work: Path, name: str, verb: str, *settings: str) -> None:
    """Runs `areal-like verb` to its end, in the run `name`; a complete run is left unchanged.

    Raises RuntimeError if it fails.
    """
    summary = work / name / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["finished"]:
        print(f"{name}: complete", flush=True)
        return
    work.mkdir(parents=True, exist_ok=True)
    words, rest = ([settings[0]], settings[1:]) if verb == "eval" else ([], settings)
    own = [f"name={name}", f"runs_dir={work}", "resume=auto", *rest]
    command = [sys.executable, "-m", "launch", verb, *words, "--config", CONFIG, *own]
    log = work / f"{name}.log"
    print(f"{name}: {' '.join(command[1:])} > {log}", flush=True)
    with log.open("a") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=MEMORY | {"OMP_NUM_THREADS": "1"} | os.environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{name} exited with {done.returncode}:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
