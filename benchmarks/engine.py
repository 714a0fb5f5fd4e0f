"""Compares the embedded engine with `model.generate`: same model, dtype, prompts and lengths, one thread.

    equal      32 requests (--rows) of equal length: both run full batches, so only the cost of a step counts
    long_tail  256 requests with log-normal lengths, 32 at a time (--rows); generate takes them in order, in
               batches of as many, each of which runs until its longest request ends: continuous batching
               avoids that
    grouped    the long tail with eight samples per prompt, as in training
    http       the long tail through a real engine process and client, against the engine in this process
    turns      conversations of eight turns, 16 at a time, with and without the KV that the engine keeps for
               the next turn: tokens prefilled in each turn, and turns per second (a table of its own)
    phases     prefill, and decode steps of several numbers of rows: milliseconds in the model and in the
               sampler (a table of its own)

Lengths are forced (no stop tokens), sampling is at temperature 1, and only requested tokens count.
Repetitions are interleaved, and medians are reported. In-process rates are per second of CPU time (one
thread, no waiting), so that other load on the machine changes them little. `http` spans two processes, so its
rate is per second of wall time, and is compared with rates per second of wall time: run it on a quiet machine
with two cores.

    python -m benchmarks.engine [--repeats 5] [--part all]
    python -m benchmarks.engine --model smollm2 --dtype bfloat16 --prompt-tokens 96 --new-tokens 64
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from areal_like.config import from_mapping
from benchmarks.report import table, write
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.base import NewTokens
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.sampling import sample
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Sampling
from trainer.prepare_model import prepare_model

BATCH, PROMPT_TOKENS, MAX_NEW_TOKENS = 32, 8, 24
PHASE_ROWS, PHASE_STEPS = (1, 8, 32, 64, 128), 8
"""Rows of the decode steps that are measured, and steps of one measurement."""
TURNS, CONVERSATIONS, FIRST_TOKENS, REPLY_TOKENS, ANSWER_TOKENS = 8, 16, 96, 24, 40
"""Turns of a conversation, concurrent conversations; tokens of the first prompt, of a turn of the policy, and
of the environment's message after it."""
TURNS_CONTEXT = FIRST_TOKENS + TURNS * (REPLY_TOKENS + ANSWER_TOKENS)
HTTP_GOAL = 0.8
"""Goal, relative to the engine's rate in this process."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured."""

    path: str
    """A Hugging Face directory."""
    name: str
    """For the files with the results."""
    dtype: torch.dtype
    prompt_tokens: int
    new_tokens: int
    """Largest number of sampled tokens of a request."""
    rows: int = BATCH
    """Requests that run at a time."""
    long_tail_goal: float
    """Goal of the engine's rate on the long tail, relative to `generate`."""

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.new_tokens

    @property
    def facts(self) -> dict[str, Any]:
        """For the results."""
        return {"model": self.name, "dtype": str(self.dtype).removeprefix("torch.")}

    def load(self, *, context: int = 0, rows: int = 0) -> EngineCore:
        """An engine in this process, as a job has it in this dtype."""
        context = context or self.context
        model, weights = load(
            self.path,
            dtype=self.dtype,
            device=torch.device("cpu"),
            context_length=context,
            fp32_head=self.dtype != torch.float32,
        )
        options = EngineOptions(max_running_requests=rows or self.rows, context_length=context)
        return EngineCore(model, weights, options, version="0")


Workload = list[tuple[tuple[int, ...], int]]
"""(prompt, number of new tokens) for each request."""


def workload(subject: Subject, num_requests: int, *, group_size: int = 1, equal: bool = False) -> Workload:
    """Fixed requests: the same in every run and for every engine.

    The median length is a sixth of the longest one.
    """
    rng = np.random.default_rng(7)
    size, most = subject.prompt_tokens, subject.new_tokens
    prompts = [tuple(rng.integers(3, 100, size).tolist()) for _ in range(num_requests // group_size)]
    median = np.log(most / MAX_NEW_TOKENS)
    lengths = np.clip(rng.lognormal(1.4 + median, 0.9, num_requests).astype(int), 1, most)
    return [(prompts[i // group_size], most if equal else int(lengths[i])) for i in range(num_requests)]


def run_generate(model: Any, requests: Workload, *, rows: int) -> None:
    """Runs transformers' own loop, batch after batch of `rows` requests."""
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
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


def measure_turns(subject: Subject, *, repeats: int) -> dict[str, Any]:
    """Conversations with and without kept KV, interleaved, after one warm-up each."""
    core = subject.load(context=TURNS_CONTEXT)
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
        "model_parameters": _num_parameters(core),
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


@torch.inference_mode()
def measure_phases(subject: Subject, *, repeats: int) -> dict[str, Any]:
    """CPU time of one prefill and of decode steps; the medians."""
    core = subject.load(rows=max(PHASE_ROWS))
    model = core.model
    rng = np.random.default_rng(7)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(3, 100, shape))

    prefill_ms, decode_ms, sample_ms = [], defaultdict(list), defaultdict(list)
    for repeat in range(repeats + 1):
        cache = model.facts.new_cache(num_rows=max(PHASE_ROWS), context_length=subject.context)
        prompts_BT = tokens(BATCH, subject.prompt_tokens)
        began_s = time.thread_time()
        cache.begin_prefill(np.full(BATCH, subject.prompt_tokens, np.int64), rows=[[i] for i in range(BATCH)])
        model.compute(NewTokens(tokens_BT=prompts_BT), cache)
        cache.end_prefill()
        if repeat:
            prefill_ms.append(1e3 * (time.thread_time() - began_s))
        for rows in PHASE_ROWS:
            modelled_s = sampled_s = 0.0
            for step in range(PHASE_STEPS):
                began_s = time.thread_time()
                position_N = np.full(rows, subject.prompt_tokens + step, np.int64)
                logits_NV = model.decode(tokens(rows), cache.begin_decode(position_N), cache)
                ended_s = time.thread_time()
                sample(
                    logits_NV,
                    temperature_N=torch.ones(rows),
                    uniform_N=torch.from_numpy(rng.random(rows)),
                    any_greedy=False,
                    any_random=True,
                    filters=None,
                )
                modelled_s += ended_s - began_s
                sampled_s += time.thread_time() - ended_s
            if repeat:
                decode_ms[rows].append(1e3 * modelled_s / PHASE_STEPS)
                sample_ms[rows].append(1e3 * sampled_s / PHASE_STEPS)
    decode = {}
    for rows in PHASE_ROWS:
        model_ms, sampler_ms = statistics.median(decode_ms[rows]), statistics.median(sample_ms[rows])
        decode[str(rows)] = {
            "model_ms": round(model_ms, 3),
            "sampler_ms": round(sampler_ms, 3),
            "tokens_per_cpu_second": round(1e3 * rows / (model_ms + sampler_ms)),
        }
    prefilled = BATCH * subject.prompt_tokens
    return {
        "prefill": {
            "tokens": prefilled,
            "ms": round(statistics.median(prefill_ms), 2),
            "tokens_per_cpu_second": round(1e3 * prefilled / statistics.median(prefill_ms)),
        },
        "decode": decode,
        "model_parameters": _num_parameters(core),
        "prompt_tokens": subject.prompt_tokens,
        "repeats": repeats,
        "num_threads": 1,
        "torch": torch.__version__,
    }


def print_phases(result: dict[str, Any]) -> None:
    """The table of `measure_phases`."""
    prefill = result["prefill"]
    rows = [[f"prefill, {prefill['tokens']} tokens", prefill["ms"], "", prefill["tokens_per_cpu_second"]]]
    rows += [
        [f"decode, {name} rows", each["model_ms"], each["sampler_ms"], each["tokens_per_cpu_second"]]
        for name, each in result["decode"].items()
    ]
    print(table(["phase", "model, ms", "sampler, ms", "tokens/s"], rows))


def _num_parameters(core: EngineCore) -> int:
    shapes = core.model.facts.parameter_shapes.values()
    return sum(torch.Size(shape).numel() for shape in shapes)


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
    """Measures, prints tables, writes benchmarks/results/engine*.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--part", choices=["all", "requests", "turns", "phases"], default="all")
    parser.add_argument(
        "--model",
        default="",
        help="smollm2, or a Hugging Face directory; default: the default job's model with random weights",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--rows", type=int, default=BATCH, help="requests that run at a time")
    parser.add_argument("--label", default="", help="end of the names of the written files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        subject = Subject(
            path=model_of(arguments.model, f"{scratch}/model"),
            name=arguments.model or "tiny",
            dtype=getattr(torch, arguments.dtype),
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.new_tokens,
            rows=arguments.rows,
            long_tail_goal=4.0 if arguments.model else 3.0,
        )
        # The default model's results keep their file.
        kept = f"_{Path(subject.name).name}_{arguments.dtype}" if arguments.model else ""
        kept += f"_{arguments.label}" if arguments.label else ""
        if arguments.part in ("all", "requests"):
            result = measure(subject, scratch, repeats=arguments.repeats)
            print_requests(result)
            print(f"written to {write('engine' + kept, subject.facts | result)}")
        if arguments.part in ("all", "turns"):
            turns = measure_turns(subject, repeats=arguments.repeats)
            print_turns(turns)
            print(f"written to {write('engine_turns' + kept, subject.facts | turns)}")
        if arguments.part in ("all", "phases"):
            phases = measure_phases(subject, repeats=arguments.repeats)
            print_phases(phases)
            print(f"written to {write('engine_phases' + kept, subject.facts | phases)}")


def model_of(name: str, folder: str) -> str:
    """The directory of a model; the default job's, and smollm2, are made in `folder`."""
    if not name:
        return tiny_model(folder)
    if name == "smollm2":
        return prepare_model(from_mapping({"model": {"path": name}}), out_dir=Path(folder))
    return name


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
            [f"256 requests, long-tailed lengths, {result['batch']} at a time", "tokens/s"],
            [
                ["embedded engine, in process", f"{http['in_process']:,}"],
                ["embedded engine, through HTTP", f"{http['http']:,}"],
                ["ratio", f"{http['ratio']:.2f} (goal {http['goal']})"],
            ],
        )
    )


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


def measure(subject: Subject, scratch: str, *, repeats: int) -> dict[str, Any]:
    """Times the in-process engine, generate, and an engine process over HTTP."""
    core = subject.load()
    reference = LlamaForCausalLM.from_pretrained(subject.path, dtype=subject.dtype).eval()
    equal, tail = workload(subject, subject.rows, equal=True), workload(subject, 256)
    grouped = workload(subject, 256, group_size=8)
    port_file, key_file = Path(scratch) / "port", Path(scratch) / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(secrets.token_urlsafe())
    command = [
        sys.executable,
        "-m",
        "rollout_server.engine",
        "--model-path",
        subject.path,
        "--api-key-file",
        str(key_file),
        "--max-running-requests",
        str(subject.rows),
    ]
    command += [
        "--context-length",
        str(subject.context),
        "--port",
        "0",
        "--port-file",
        str(port_file),
        "--weight-version",
        "0",
    ]
    command += ["--log-level", "WARNING", "--dtype", str(subject.facts["dtype"])]
    command += ["--enable-fp32-lm-head"] * (subject.dtype != torch.float32)
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
                "equal/generate": (equal, lambda: run_generate(reference, equal, rows=subject.rows)),
                "long_tail/engine": (tail, lambda: run_engine(core, tail)),
                "long_tail/generate": (tail, lambda: run_generate(reference, tail, rows=subject.rows)),
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
    for name, goal in (
        ("equal", 1.5),
        ("long_tail", subject.long_tail_goal),
        ("grouped", None),
        ("http", None),
    ):
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
        "batch": subject.rows,
        "prompt_tokens": subject.prompt_tokens,
        "max_new_tokens": subject.new_tokens,
        "num_threads": 1,
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    main()
