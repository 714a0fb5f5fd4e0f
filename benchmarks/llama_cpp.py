"""The embedded engine beside llama.cpp: SmolLM2 on one thread of the same machine.

    prefill    32 prompts of 8 tokens at once
    decode     steps of several numbers of rows, without sampling

llama.cpp computes with the published 4-bit weights (q4_1), and with the same weights in bfloat16 and in 8
bits (q8_0), which are made by its own quantizer; the embedded engine with bfloat16 weights. Repetitions are
interleaved, each in a new process for llama.cpp; medians of CPU time.

    python3 -m venv LLAMA
    CMAKE_ARGS=-DGGML_NATIVE=ON LLAMA/bin/pip install llama-cpp-python    # compiles for ten minutes
    python -m benchmarks.llama_cpp LLAMA/bin/python [--repeats 5] [--plain-kernels]

`--plain-kernels` is for machines on which llama.cpp crashes: its AMX kernels for quantized weights do in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import BATCH, PHASE_ROWS, PHASE_STEPS, PROMPT_TOKENS, Subject, measure_phases, model_of
from benchmarks.report import ROOT, table, write
from trainer.models.smollm2 import smollm2_gguf

TYPES = ("bf16", "q8_0", "q4_1")
"""The weights of llama.cpp."""
SIDE_S = 600.0
"""Limit of one repetition."""


def main() -> None:
    """Measures, prints the table, writes benchmarks/results/llama_cpp.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--plain-kernels", action="store_true", help="llama.cpp does not rearrange weights for AMX and others"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(
            arguments.python, Path(scratch), repeats=arguments.repeats, plain=arguments.plain_kernels
        )
    print(table(*rows_of(result)))
    print(f"written to {write('llama_cpp', result)}")


def measure(python: str, scratch: Path, *, repeats: int, plain: bool) -> dict[str, Any]:
    """Milliseconds of the prefill and of each decode step: medians over the repetitions."""
    subject = Subject(
        path=model_of("smollm2", f"{scratch}/model"),
        name="smollm2",
        dtype=torch.bfloat16,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=2 * PHASE_STEPS,
        long_tail_goal=0.0,
    )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("engine", *TYPES)}
    version = ""
    for _ in range(repeats):
        phases = measure_phases(subject, repeats=1)
        own = {f"decode {rows}": one["model_ms"] for rows, one in phases["decode"].items()}
        found["engine"].append({"prefill": phases["prefill"]["ms"], **own})
        for name in TYPES:
            measured = _side(python, scratch, name, plain=plain)
            version = measured.pop("version")
            found[name].append(measured)
    return {
        "llama_cpp_python": version,
        "torch": torch.__version__,
        "num_threads": 1,
        "plain_kernels": plain,
        "repeats": repeats,
        "prefill_tokens": BATCH * PROMPT_TOKENS,
        "ms": {
            name: {key: round(statistics.median(one[key] for one in some), 3) for key in some[0]}
            for name, some in found.items()
        },
    }


def _side(python: str, scratch: Path, weights: str, *, plain: bool) -> dict[str, Any]:
    spec = {
        "gguf": str(smollm2_gguf()),
        "type": weights,
        "plain": plain,
        "folder": str(scratch),
        "rows": list(PHASE_ROWS),
        "steps": PHASE_STEPS,
        "prompts": BATCH,
        "prompt_tokens": PROMPT_TOKENS,
    }
    side = ROOT / "benchmarks" / "llama_cpp_side.py"
    done = subprocess.run(
        [python, "-P", str(side), json.dumps(spec)],
        capture_output=True,
        text=True,
        timeout=SIDE_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{side.name} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def rows_of(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of the table, in tokens a second of CPU time."""
    tokens = {f"decode {rows}": rows for rows in PHASE_ROWS} | {"prefill": result["prefill_tokens"]}
    header = ["tokens/s, model only", "engine, bf16", *(f"llama.cpp, {name}" for name in TYPES)]
    lines = []
    for key, count in tokens.items():
        title = f"prefill, {count} tokens" if key == "prefill" else f"{key} rows"
        lines.append(
            [title, *(f"{1e3 * count / result['ms'][name][key]:,.0f}" for name in ("engine", *TYPES))]
        )
    return header, lines


if __name__ == "__main__":
    main()
