"""Times forward and backward of one step: with and without shared prefixes, and in bare transformers.

    python -m benchmarks.trainer_step [--repeats 15]

All three compute the gradient of the same sum of log-probs of the same sampled tokens, in float32 on one
thread:

    bare      transformers' own model, sdpa attention, right-padded rows in recorded order, as many in a batch
              as fit the token budget with their padding; log_softmax over all positions, gathered
    apart     the trainer's packing and sharded policy, every sequence by itself
    shared    the same with shared prefixes, the trainer's default

The first case is a step of the default job: 16 prompts of its task, each with 8 samples of its warm-started
model. The others have random tokens, prompts of 0.2, 1 and 5 times the mean completion length, and
completions of 0.5 to 1.5 times that length, at the widths 96 (three layers, 100 tokens in the vocabulary) and
576 (four layers, 4,096).

Time is the process's CPU time; each repetition runs all three in turn, and the ratio is the median of the
repetitions' ratios, so other load changes it little. Memory is the growth of a new process's peak resident
size over two steps. Writes benchmarks/results/trainer_step.json.

`goal`: at most 0.6 of bare on the default job.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from areal_like import sorting
from areal_like.config import Config
from areal_like.trajectory import FinishReason, Trajectory
from benchmarks.report import table, write
from trainer.batching.packing import Packer, collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.prepare_model import prepare_model

GOAL = 0.6
KINDS = ("bare", "apart", "shared")
BUDGET = Config().trainer.tokens_per_microbatch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and one batch of samples."""

    name: str
    width: int
    num_groups: int
    prompt: int = 0
    """Tokens of each prompt; 0: the default job's."""
    answer: int = 64
    """Mean tokens of a completion."""


CASES = (
    Case(name="default job", width=96, num_groups=16),
    *(Case(name=f"width 96, prompt {p}", width=96, num_groups=8, prompt=p) for p in (13, 64, 320)),
    *(Case(name=f"width 576, prompt {p}", width=576, num_groups=2, prompt=p) for p in (13, 64, 320)),
)


def model_of(case: Case, directory: str) -> str:
    """The path of the case's model."""
    if not case.prompt:
        return prepare_model(Config())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100 if case.width == 96 else 4096, hidden_size=case.width,
        num_hidden_layers=3 if case.width == 96 else 4, num_attention_heads=max(case.width // 64, 4),
        intermediate_size=case.width * 8 // 3, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    path = f"{directory}/{case.width}"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def samples_of(case: Case, path: str) -> list[Trajectory]:
    """8 samples of each prompt, group after group."""
    rng = np.random.default_rng(0)
    if not case.prompt:
        return _default_samples(path, num_groups=case.num_groups)
    samples = []
    for _ in range(case.num_groups):
        prompt = rng.integers(3, 100, case.prompt)
        for _ in range(8):
            answer = rng.integers(3, 100, int(case.answer * rng.uniform(0.5, 1.5)))
            samples.append(_trajectory(np.concatenate([prompt, answer]), num_prompt=len(prompt)))
    return samples


@torch.no_grad()
def _default_samples(path: str, *, num_groups: int) -> list[Trajectory]:
    """Samples of the default job's first prompts at temperature 1, from transformers' `generate`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    model.eval()
    samples = []
    for index in range(num_groups):
        example = sorting.sort_example(seed=0, split=sorting.Split.TRAIN, index=index)
        prompt = tokenizer(example.prompt, return_tensors="pt").input_ids
        out = model.generate(
            prompt.repeat(8, 1), do_sample=True, top_k=0, max_new_tokens=Config().sampling.max_new_tokens
        )
        for row in out.tolist():
            answer = row[prompt.shape[1] :]
            end = (
                answer.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in answer else len(answer)
            )
            tokens = np.array(row[: prompt.shape[1] + end])
            samples.append(_trajectory(tokens, num_prompt=prompt.shape[1]))
    return samples


def _trajectory(tokens: np.ndarray[Any, Any], *, num_prompt: int) -> Trajectory:
    mask = (np.arange(len(tokens)) >= num_prompt).astype(np.uint8)
    return Trajectory(
        tokens=tokens.astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    )


def step_of(kind: str, path: str, trajectories: Sequence[Trajectory]) -> Callable[[], float]:
    """A function that runs forward and backward of the step and returns the sum of the log-probs."""
    if kind == "bare":
        return _bare_step(path, trajectories)
    policy = Policy.load(path, Ranks.alone())
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories]
    shares = kind == "shared"

    def step() -> float:
        policy.zero_grad()
        total = 0.0
        packer = Packer(budget_tokens=BUDGET, shares_prefixes=shares)
        for microbatch in [*packer.add(samples), *packer.flush()]:
            logprobs = policy(collate(microbatch, shares_prefixes=shares)).logprobs_S.sum()
            logprobs.backward()
            total += float(logprobs.detach())
        return total

    return step


def _bare_step(path: str, trajectories: Sequence[Trajectory]) -> Callable[[], float]:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    batches: list[list[Trajectory]] = [[]]
    for t in trajectories:
        longest = max(len(u.tokens) for u in [*batches[-1], t])
        if (len(batches[-1]) + 1) * longest > BUDGET:
            batches.append([])
        batches[-1].append(t)

    def step() -> float:
        model.zero_grad()
        total = 0.0
        for batch in batches:
            longest = max(len(t.tokens) for t in batch)
            ids, sampled, real = np.zeros((3, len(batch), longest), dtype=np.int64)
            for row, t in enumerate(batch):
                ids[row, : len(t.tokens)] = t.tokens
                sampled[row, : len(t.tokens)] = t.loss_mask
                real[row, : len(t.tokens)] = 1
            tokens = torch.from_numpy(ids)
            logits = model(input_ids=tokens, attention_mask=torch.from_numpy(real), use_cache=False).logits
            logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
            logprobs = (logps * torch.from_numpy(sampled[:, 1:])).sum()
            logprobs.backward()
            total += float(logprobs.detach())
        return total

    return step


def peak_mib(kind: str, path: str, trajectories: list[Trajectory]) -> float:
    """Growth of the peak resident size over two steps. Call it in a new process."""
    torch.set_num_threads(1)
    step = step_of(kind, path, trajectories)
    before = _status_kib("VmRSS")
    for _ in range(2):
        step()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    # ru_maxrss cannot be used: a new process inherits its parent's.
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1])


def measure(case: Case, *, repeats: int, directory: str) -> dict[str, Any]:
    """Times and memory of a case."""
    path = model_of(case, directory)
    trajectories = samples_of(case, path)
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories]
    steps = {kind: step_of(kind, path, trajectories) for kind in KINDS}
    sums = {kind: step() for kind, step in steps.items()}
    assert all(abs(total - sums["bare"]) <= 1e-4 * abs(sums["bare"]) for total in sums.values()), sums
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind, step in steps.items():
            began = time.process_time()
            step()
            seconds[kind].append(time.process_time() - began)
    ratios = {
        kind: statistics.median(t / bare for t, bare in zip(seconds[kind], seconds["bare"], strict=True))
        for kind in KINDS
    }
    peaks = {}
    for kind in KINDS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[kind] = pool.submit(peak_mib, kind, path, trajectories).result()
    prompts = sum(int((t.loss_mask == 0).sum()) for t in trajectories)
    packer = Packer(budget_tokens=BUDGET)
    batches = [collate(microbatch) for microbatch in [*packer.add(samples), *packer.flush()]]
    num_tokens = sum(batch.num_tokens for batch in batches)
    return {
        "case": case.name,
        "tokens": num_tokens,
        "prompt_share": round(prompts / num_tokens, 3),
        "rows_share": round(sum(batch.num_rows for batch in batches) / num_tokens, 3),
        "cpu_ms": {kind: round(statistics.median(s) * 1e3, 1) for kind, s in seconds.items()},
        "ratio": {kind: round(ratio, 3) for kind, ratio in ratios.items()},
        "peak_mib": {kind: round(peak, 1) for kind, peak in peaks.items()},
    }


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    ratio = row["ratio"]
    return (
        row["case"],
        f"{row['tokens']:,}",
        *(f"{row[share]:.0%}" for share in ("prompt_share", "rows_share")),
        *(f"{each:.2f}" for each in (ratio["apart"], ratio["shared"], ratio["shared"] / ratio["apart"])),
        ", ".join(f"{row['peak_mib'][kind]:.0f}" for kind in KINDS),
    )


def main() -> None:
    """Runs every case and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            rows.append(measure(case, repeats=args.repeats, directory=directory))
            print(rows[-1], flush=True)
    default = rows[0]["ratio"]["shared"]
    write("trainer_step", {"goal": GOAL, "reached": default, "cases": rows})
    header = (
        *("step", "tokens", "prompts", "rows", "apart / bare", "shared / bare", "shared / apart"),
        "peak MiB: bare, apart, shared",
    )
    print(table(header, [_line(row) for row in rows]))
    print(f"default job: {default:.2f} of bare, goal {GOAL}")


if __name__ == "__main__":
    main()
