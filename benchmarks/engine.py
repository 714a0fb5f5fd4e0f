"""Compares the speed of the embedded engine with `model.generate`: same model, prompts, lengths, one thread.

    equal      32 requests of equal length: both run full batches, so only the cost of a step counts
    long_tail  256 requests with log-normal lengths, 32 at a time; generate takes them in order, in batches of
               32, each of which runs until its longest request ends: continuous batching avoids that
    grouped    the long tail with eight samples per prompt, as in training
    http       the long tail through a real engine process and client

Lengths are forced (no stop tokens), sampling is at temperature 1, and only requested tokens count.
Repetitions are interleaved, and medians are reported. In-process rates are per second of CPU time (one
thread, no waiting), so that other load on the machine changes them little. `http` spans two processes, so its
rate is per second of wall time, and is compared with generate's rate per second of wall time.

    python -m benchmarks.engine [--repeats 5] [--model DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rollout_server.engine.core import EngineCore, EngineOptions
from rollout_server.engine.models.loading import load
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.inference.client import EngineClient
from rollout_server.inference.types import Sampling

BATCH, PROMPT_TOKENS, MAX_NEW_TOKENS = 32, 8, 24
RESULTS = Path(__file__).parent / "results" / "engine.json"

Workload = list[tuple[tuple[int, ...], int]]
"""(prompt, number of new tokens) for each request."""


def workload(num_requests: int, *, group_size: int = 1, equal: bool = False) -> Workload:
    """Fixed requests: the same in every run and for every engine."""
    rng = np.random.default_rng(7)
    prompts = [tuple(rng.integers(3, 100, PROMPT_TOKENS).tolist()) for _ in range(num_requests // group_size)]
    lengths = np.clip(rng.lognormal(1.4, 0.9, num_requests).astype(int), 1, MAX_NEW_TOKENS)
    return [
        (prompts[i // group_size], MAX_NEW_TOKENS if equal else int(lengths[i])) for i in range(num_requests)
    ]


def run_generate(model: Any, requests: Workload) -> None:
    """Runs transformers' own loop, batch after batch."""
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        longest = max(length for _, length in batch)
        prompt = torch.tensor([prompt for prompt, _ in batch])
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            max_new_tokens=longest,
            min_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            top_k=0,
        )


def run_engine(core: EngineCore, requests: Workload) -> None:
    """Runs the engine in this process, all requests queued at once."""
    core.flush_prefix_cache()
    for i, (prompt, length) in enumerate(requests):
        core.submit(Sequence(seq_id=str(i), prompt=prompt, params=SamplingParams(max_new_tokens=length)))
    while core.all_sequences:
        core.step()


async def run_http(client: EngineClient, requests: Workload) -> None:
    """Runs the requests through the client, all at once."""
    await client.flush_cache()
    await asyncio.gather(
        *(
            client.generate(prompt, sampling=Sampling(max_new_tokens=length, ignore_eos=True))
            for prompt, length in requests
        )
    )


def rates(
    runs: dict[str, tuple[Workload, Callable[[], None]]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median tokens per second of this thread's CPU time, and of wall time, by run.

    Runs are interleaved, after one warm-up each.
    """
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, (requests, run) in runs.items():
            cpu_s, wall_s = time.thread_time(), time.perf_counter()
            run()
            if repeat:
                num_tokens = sum(length for _, length in requests)
                cpu[name].append(num_tokens / (time.thread_time() - cpu_s))
                wall[name].append(num_tokens / (time.perf_counter() - wall_s))
    medians = [
        {name: statistics.median(values) for name, values in measured.items()} for measured in (cpu, wall)
    ]
    return medians[0], medians[1]


def main() -> None:
    """Measures, prints a table, writes benchmarks/results/engine.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--model",
        default="",
        help="a Hugging Face directory; default: the default job's model with random weights",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(
            arguments.model or tiny_model(f"{scratch}/model"), scratch, repeats=arguments.repeats
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'workload':<12}{'engine tok/s':>14}{'generate tok/s':>16}{'ratio':>8}{'goal':>7}")
    for name, row in result["workloads"].items():
        print(
            f"{name:<12}{row['engine']:>14,.0f}{row['generate']:>16,.0f}"
            f"{row['ratio']:>8.2f}{row['goal'] or '':>7}"
        )
    print(f"written to {RESULTS}")


def tiny_model(path: str) -> str:
    """The default job's model, untrained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def measure(path: str, scratch: str, *, repeats: int) -> dict[str, Any]:
    """Times the in-process engine, generate, and an engine process over HTTP."""
    context = PROMPT_TOKENS + MAX_NEW_TOKENS
    device = torch.device("cpu")
    model, weights = load(path, dtype=torch.float32, device=device, context_length=context)
    core = EngineCore(model, weights, EngineOptions(max_running=BATCH, context_length=context), version="0")
    reference = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    equal, tail, grouped = workload(BATCH, equal=True), workload(256), workload(256, group_size=8)
    port_file, key_file = Path(scratch) / "port", Path(scratch) / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(secrets.token_urlsafe())
    command = [
        sys.executable,
        "-m",
        "rollout_server.engine",
        "--model-path",
        path,
        "--api-key-file",
        str(key_file),
        "--max-running-requests",
        str(BATCH),
    ]
    command += [
        "--context-length",
        str(context),
        "--port",
        "0",
        "--port-file",
        str(port_file),
        "--weight-version",
        "0",
    ]
    command += ["--log-level", "WARNING"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    loop = asyncio.new_event_loop()
    try:
        deadline = time.monotonic() + 120
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the engine process did not start")
            time.sleep(0.1)
        url = f"http://127.0.0.1:{int(port_file.read_text())}"
        client = EngineClient(url, api_key=key_file.read_text())
        cpu, wall = rates(
            {
                "equal/engine": (equal, lambda: run_engine(core, equal)),
                "equal/generate": (equal, lambda: run_generate(reference, equal)),
                "long_tail/engine": (tail, lambda: run_engine(core, tail)),
                "long_tail/generate": (tail, lambda: run_generate(reference, tail)),
                "grouped/engine": (grouped, lambda: run_engine(core, grouped)),
                "http/engine": (tail, lambda: loop.run_until_complete(run_http(client, tail))),
            },
            repeats,
        )
        loop.run_until_complete(client.close())
    finally:
        process.terminate()
        process.wait(timeout=20)
        loop.close()
    workloads = {}
    for name, goal in (("equal", 1.5), ("long_tail", 3.0), ("grouped", None), ("http", None)):
        rate = wall if name == "http" else cpu
        other = "equal/generate" if name == "equal" else "long_tail/generate"
        engine, generate = rate[f"{name}/engine"], rate[other]
        workloads[name] = {
            "engine": round(engine),
            "generate": round(generate),
            "ratio": round(engine / generate, 2),
            "goal": goal,
        }
    return {
        "workloads": workloads,
        "tokens_per_cpu_second": {
            name: round(value) for name, value in cpu.items() if not name.startswith("http")
        },
        "tokens_per_wall_second": {name: round(value) for name, value in wall.items()},
        "load_average": os.getloadavg()[0],
        "batch": BATCH,
        "prompt_tokens": PROMPT_TOKENS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_threads": 1,
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    main()
