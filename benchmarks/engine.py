"""Compares the speed of the embedded engine with `model.generate`: same model, prompts, lengths, one thread.

    equal      32 requests of equal length: both run full batches, so only the cost of a step counts
    long_tail  256 requests with log-normal lengths, 32 at a time; generate takes them in order, in batches of
               32, each of which runs until its longest request ends: continuous batching avoids that
    grouped    the long tail with eight samples per prompt, as in training
    http       the long tail through a real engine process and client, against the engine in this process
    turns      conversations of eight turns, 16 at a time, with and without the KV that the engine keeps for
               the next turn: tokens prefilled in each turn, and turns per second (a table of its own)

Lengths are forced (no stop tokens), sampling is at temperature 1, and only requested tokens count.
Repetitions are interleaved, and medians are reported. In-process rates are per second of CPU time (one
thread, no waiting), so that other load on the machine changes them little. `http` spans two processes, so its
rate is per second of wall time, and is compared with rates per second of wall time: run it on a quiet machine
with two cores.

    python -m benchmarks.engine [--repeats 5] [--part all] [--model DIR]
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

from benchmarks.report import table, write
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Sampling

BATCH, PROMPT_TOKENS, MAX_NEW_TOKENS = 32, 8, 24
TURNS, CONVERSATIONS, FIRST_TOKENS, REPLY_TOKENS, ANSWER_TOKENS = 8, 16, 96, 24, 40
"""Turns of a conversation, concurrent conversations; tokens of the first prompt, of a turn of the policy, and
of the environment's message after it."""
TURNS_CONTEXT = FIRST_TOKENS + TURNS * (REPLY_TOKENS + ANSWER_TOKENS)
HTTP_GOAL = 0.8
"""Goal, relative to the engine's rate in this process."""
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


def run_turns(core: EngineCore, *, keeps_prefix: bool) -> list[int]:
    """Plays all conversations, and returns the prefilled tokens of each turn, summed over conversations."""
    core.flush_prefix_cache()
    rng = np.random.default_rng(7)
    said = [tuple(rng.integers(3, 100, FIRST_TOKENS).tolist()) for _ in range(CONVERSATIONS)]
    prefilled = []
    for _ in range(TURNS):
        before = core.contexts.num_prefilled
        params = SamplingParams(max_new_tokens=REPLY_TOKENS)
        turns = [
            Sequence(seq_id=str(i), prompt=tokens, params=params, keeps_prefix=keeps_prefix)
            for i, tokens in enumerate(said)
        ]
        for sequence in turns:
            core.submit(sequence)
        while core.all_sequences:
            core.step()
        answers = rng.integers(3, 100, (CONVERSATIONS, ANSWER_TOKENS)).tolist()
        said = [(*sequence.context, *answer) for sequence, answer in zip(turns, answers, strict=True)]
        prefilled.append(core.contexts.num_prefilled - before)
    return prefilled


def measure_turns(path: str, *, repeats: int) -> dict[str, Any]:
    """Conversations with and without kept KV, interleaved, after one warm-up each."""
    model, weights = load(path, dtype=torch.float32, device=torch.device("cpu"), context_length=TURNS_CONTEXT)
    core = EngineCore(
        model, weights, EngineOptions(max_running_requests=BATCH, context_length=TURNS_CONTEXT), version="0"
    )
    names = {"kept": True, "computed anew": False}
    prefilled: dict[str, list[int]] = {}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name, keeps_prefix in names.items():
            cpu_s = time.thread_time()
            prefilled[name] = run_turns(core, keeps_prefix=keeps_prefix)
            if repeat:
                rates[name].append(TURNS * CONVERSATIONS / (time.thread_time() - cpu_s))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "prefilled_tokens_a_turn": {
            name: [round(count / CONVERSATIONS, 1) for count in counts] for name, counts in prefilled.items()
        },
        "turns_per_cpu_second": {name: round(value, 1) for name, value in medians.items()},
        "ratio_prefilled": round(sum(prefilled["computed anew"]) / sum(prefilled["kept"]), 2),
        "ratio_turns": round(medians["kept"] / medians["computed anew"], 2),
        "model_parameters": sum(tensor.numel() for tensor in weights.named.values()),
        "turns": TURNS,
        "conversations": CONVERSATIONS,
        "first_prompt_tokens": FIRST_TOKENS,
        "reply_tokens": REPLY_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "repeats": repeats,
        "num_threads": 1,
        "torch": torch.__version__,
    }


def print_turns(result: dict[str, Any]) -> None:
    """The table of `measure_turns`."""
    prefilled, rates = result["prefilled_tokens_a_turn"], result["turns_per_cpu_second"]
    rows = [[name, *counts, rates[name]] for name, counts in prefilled.items()]
    print(table(["KV of earlier turns", *(f"turn {i + 1}" for i in range(TURNS)), "turns/s"], rows))
    print(f"prefilled: 1/{result['ratio_prefilled']}, turns: {result['ratio_turns']} times")


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
    parser.add_argument("--part", choices=["all", "requests", "turns"], default="all")
    parser.add_argument(
        "--model",
        default="",
        help="a Hugging Face directory; default: the default job's model with random weights",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or tiny_model(f"{scratch}/model")
        if arguments.part != "turns":
            result = measure(model, scratch, repeats=arguments.repeats)
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
            print_requests(result)
        if arguments.part != "requests":
            turns = measure_turns(model, repeats=arguments.repeats)
            print_turns(turns)
            print(f"written to {write('engine_turns', {'model': arguments.model or 'tiny'} | turns)}")


def print_requests(result: dict[str, Any]) -> None:
    """The table of `measure`."""
    print(f"{'workload':<12}{'engine tok/s':>14}{'generate tok/s':>16}{'ratio':>8}{'goal':>7}")
    for name, row in result["workloads"].items():
        print(
            f"{name:<12}{row['engine']:>14,.0f}{row['generate']:>16,.0f}"
            f"{row['ratio']:>8.2f}{row['goal'] or '':>7}"
        )
    http = result["through_http"]
    print()
    print(
        table(
            ["256 requests, long-tailed lengths, 32 at a time", "tokens/s"],
            [
                ["embedded engine, in process", f"{http['in_process']:,}"],
                ["embedded engine, through HTTP", f"{http['http']:,}"],
                ["ratio", f"{http['ratio']:.2f} (goal {http['goal']})"],
            ],
        )
    )
    print(f"written to {RESULTS}")


def tiny_model(path: str) -> str:
    """The default job's model, untrained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, max_position_embeddings=TURNS_CONTEXT, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def measure(path: str, scratch: str, *, repeats: int) -> dict[str, Any]:
    """Times the in-process engine, generate, and an engine process over HTTP."""
    context = PROMPT_TOKENS + MAX_NEW_TOKENS
    device = torch.device("cpu")
    model, weights = load(path, dtype=torch.float32, device=device, context_length=context)
    core = EngineCore(
        model, weights, EngineOptions(max_running_requests=BATCH, context_length=context), version="0"
    )
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
    in_process, http = wall["long_tail/engine"], wall["http/engine"]
    return {
        "workloads": workloads,
        "through_http": {
            "in_process": round(in_process),
            "http": round(http),
            "ratio": round(http / in_process, 2),
            "goal": HTTP_GOAL,
        },
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
