"""Effective sample size of long answers: engine and trainer in bfloat16, with the same weights and different
kernels.

    python -m benchmarks.long_answers [--samples 64] [--lengths 128 512 1024 2048 4096] [--width 128]

The embedded engine samples from a random model, token by token with its KV cache, and records the log-probs.
The trainer's forward computes them again over whole sequences. The weights are the same, so every log-ratio
comes from rounding alone: what a job with `max_staleness=0` has, and less than any job with stale samples
has. No token ends an answer, so a prefix of one is an answer of that length, and all lengths come from the
same samples.

The first table has the sample sizes of the uncorrected ratios, by level. The second shows what each method
makes of them. A token's weight is the derivative of the objective's loss by its log-prob, divided by -A, so
it includes caps, clips, masks and kernels, whatever the objective. The sample size of these weights (over
tokens, as a share of them) says how much of a batch is learned from, and `used` how many tokens have a weight
at all. `rate` is the factor on the learning rate (VCPO's). Half of the answers have the advantage 1, the
others -1; VCPO has no baseline here, because its A - b* is not a correction.

A random model stands for the mismatch only: its size in nats depends on the model. The table states it, as
the standard deviation of a token's log-ratio. It grows with the logits, so `--spread` sets it: with
transformers' initial weights (.02) the policy would be uniform, and rounding hardly visible. Writes
benchmarks/results/long_answers.json.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from areal_like.runtime.command_line import load_config
from areal_like.trajectory import NOT_SAMPLED, Trajectory
from benchmarks.report import table, write
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams
from rollout_server.engine.scheduler import Sequence as EngineSequence
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models.policy import build_policy
from trainer.models.tiny import character_tokenizer, untrained_model
from trainer.objectives import Need, SampledTokens, build_objective
from trainer.objectives.importance import Level, ess_ratio

PROMPT_TOKENS = 16
GROUP_SIZE = 8
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"name": "reinforce"},
    "token TIS, cap 2": {"name": "tis", "level": "token", "cap": 2.0},
    "token TIS, geometric band": {
        "name": "tis",
        "level": "token",
        "cap": 2.0,
        "masks": [{"name": "band", "level": "geometric", "low": 0.5, "high": 2.0}],
    },
    "token mask (IcePop)": {"name": "tis", "level": "token", "mode": "mask"},
    "geometric TIS, cap 2": {"name": "tis", "level": "geometric", "cap": 2.0},
    "sequence TIS, cap 2": {"name": "tis", "level": "sequence", "cap": 2.0},
    "token TIS, sequence band": {
        "name": "tis",
        "level": "token",
        "cap": 2.0,
        "masks": [{"name": "band", "level": "sequence", "low": 0.5, "high": 2.0}],
    },
    "VCPO": {"name": "vcpo", "baseline": "none"},
    "VESPO": {"name": "vespo"},
    "GSPO, clip 3e-4, 4e-4": {"name": "gspo"},
    "GSPO, clip .05": {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05},
    "decoupled PPO": {"name": "decoupled_ppo"},
}
"""Label -> the `objective` section of a configuration."""


def build_random_model(
    path: Path, *, width: int, layers: int, context_tokens: int, spread: float, seed: int
) -> None:
    """Writes a Llama with random weights of this standard deviation over the characters of the tiny model."""
    tokenizer = character_tokenizer()
    model = untrained_model(
        tokenizer,
        seed=seed,
        hidden_size=width,
        num_layers=layers,
        context_tokens=context_tokens,
        initializer_range=spread,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def sample(model_path: str, *, num_samples: int, num_tokens: int, seed: int) -> list[Trajectory]:
    """Answers of exactly `num_tokens` tokens from the engine in bfloat16, with its log-probs."""
    context = PROMPT_TOKENS + num_tokens
    model, weights = load(
        model_path, dtype=torch.bfloat16, device=torch.device("cpu"), context_length=context
    )
    options = EngineOptions(max_running_requests=num_samples, context_length=context)
    core = EngineCore(model, weights, options, version="0")
    rng = np.random.default_rng(seed)
    vocabulary = len(character_tokenizer())
    sequences = []
    for group in range(math.ceil(num_samples / GROUP_SIZE)):
        prompt = tuple(rng.integers(4, vocabulary, PROMPT_TOKENS).tolist())
        params = SamplingParams(max_new_tokens=num_tokens, sampling_seed=(seed << 20) + group)
        for index in range(min(GROUP_SIZE, num_samples - group * GROUP_SIZE)):
            sequences.append(
                EngineSequence(seq_id=f"{group}.{index}", prompt=prompt, params=params, sample_index=index)
            )
    found = completed(core, sequences)
    assert all(trajectory.num_tokens == context for trajectory in found)
    return found


def completed(core: EngineCore, sequences: Sequence[EngineSequence]) -> list[Trajectory]:
    """Samples the sequences to their ends, with the engine's log-probs."""
    for sequence in sequences:
        core.submit(sequence)
    while core.all_sequences:
        core.step()
    found = []
    for sequence in sequences:
        assert sequence.finish is not None
        tokens = np.array([*sequence.prompt, *sequence.output_ids], dtype=np.int32)
        is_sampled = np.arange(len(tokens)) >= len(sequence.prompt)
        logprobs = np.zeros(len(tokens), dtype=np.float32)
        logprobs[is_sampled] = np.minimum(sequence.output_logprobs, 0)
        found.append(
            Trajectory(
                tokens=tokens,
                loss_mask=is_sampled.astype(np.uint8),
                logprobs=logprobs,
                versions=np.where(is_sampled, 0, NOT_SAMPLED).astype(np.int32),
                reward=0.0,
                finish_reason=sequence.finish.reason,
            )
        )
    return found


@torch.no_grad()
def trained_logprobs(model_path: str, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
    """([N, L] log-probs, [N, L] entropies in nats), float32, by the trainer's forward in bfloat16."""
    context = trajectories[0].num_tokens
    config = load_config(
        [
            f"model.path={model_path}",
            "model.dtype=bfloat16",
            f"trainer.tokens_per_microbatch={context}",
        ]
    )
    policy = build_policy(config, model_path, Ranks.alone())
    logprobs, entropies = [], []
    for trajectory in trajectories:
        batch = collate([TrainingSample(trajectory=trajectory, advantage=0.0, group=0)])
        found = policy(batch)
        logprobs.append(found.logprobs_S)
        entropies.append(found.entropy_S)
    return torch.stack(logprobs), torch.stack(entropies)


def raw_sizes(log_ratio_NL: Tensor) -> dict[str, float]:
    """Effective sample size of the uncorrected ratios, by level."""
    sum_N = log_ratio_NL.double().sum(1)
    by_level = {
        "token": log_ratio_NL.double().flatten(),
        "sequence": sum_N,
        "geometric": sum_N / log_ratio_NL.shape[1],
    }
    return {level: ess_ratio(by_level[level]) for level in get_args(Level)}


def corrected(settings: dict[str, Any], logp_NL: Tensor, behavior_NL: Tensor) -> dict[str, float]:
    """What an objective makes of log-probs [N, L] of the trainer and of the engine.

    `ess`: effective sample size of its tokens' weights, as a share of the tokens. `used`: share of tokens
    with a weight above 0. `rate`: factor on the learning rate.
    """
    num_sequences, length = logp_NL.shape
    objective = build_objective(settings, max_tokens=length)
    logp_S = logp_NL.double().flatten().requires_grad_()
    sign_N = torch.where(torch.arange(num_sequences) % 2 == 0, 1.0, -1.0).double()
    zeros_S = torch.zeros_like(logp_S, requires_grad=False)
    batch = SampledTokens(
        logp_S=logp_S,
        behavior_logp_S=behavior_NL.double().flatten(),
        advantage_S=sign_N.repeat_interleave(length),
        sample_S=torch.arange(num_sequences).repeat_interleave(length),
        length_N=torch.full((num_sequences,), float(length), dtype=torch.float64),
        reward_N=(sign_N + 1) / 2,
        group_N=torch.arange(num_sequences) // GROUP_SIZE,
        truncated_N=torch.ones(num_sequences, dtype=torch.bool),
        version_S=torch.zeros(len(logp_S), dtype=torch.int32),
        lag_S=zeros_S,
        entropy_S=zeros_S,
        prox_logp_S=logp_S.detach() if Need.PROX in objective.needs else None,
    )
    losses = objective.losses(batch, {})
    (derivative_S,) = torch.autograd.grad(losses.loss_S.sum(), logp_S)
    weight_S = -derivative_S / batch.advantage_S
    observed = objective.observe(batch)
    stats = (
        objective.summarize({name: value.detach() for name, value in observed.items()}) if observed else {}
    )
    total = weight_S.sum()
    squares = weight_S.square().sum()
    return {
        "ess": float(total.square() / squares / len(weight_S)) if squares else 0.0,
        "used": float((weight_S > 0).double().mean()),
        "rate": objective.lr_scale(stats),
    }


def measured(
    logp_NL: Tensor, behavior_NL: Tensor, lengths: Sequence[int], corrections: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each length: the mismatch, the sizes by level, and those after each correction."""
    rows = []
    for length in lengths:
        trained, sampled = logp_NL[:, :length], behavior_NL[:, :length]
        log_ratio = (trained - sampled).double()
        rows.append(
            {
                "tokens": length,
                "token_std": float(log_ratio.std()),
                "token_abs_mean": float(log_ratio.abs().mean()),
                "log_w_std": float(log_ratio.sum(1).std()),
                "ess": raw_sizes(log_ratio),
                "corrections": {
                    label: corrected(settings, trained, sampled) for label, settings in corrections.items()
                },
            }
        )
    return rows


def as_tables(rows: Sequence[dict[str, Any]]) -> str:
    """The two tables, lengths in columns."""
    header = [f"{row['tokens']:,} tokens" for row in rows]
    sizes = [
        ["sd of a token's log-ratio", *(f"{row['token_std']:.4f}" for row in rows)],
        ["sd of log W", *(f"{row['log_w_std']:.3f}" for row in rows)],
        *([f"ESS, {level}", *(f"{row['ess'][level]:.3f}" for row in rows)] for level in get_args(Level)),
    ]
    methods = []
    for label in rows[0]["corrections"]:
        fields = []
        for row in rows:
            found = row["corrections"][label]
            rate = f", rate {found['rate']:.2f}" if found["rate"] != 1 else ""
            fields.append(f"{found['ess']:.2f} / {found['used']:.2f}{rate}")
        methods.append([label, *fields])
    return (
        table(["uncorrected", *header], sizes) + "\n\n" + table(["correction: ESS / used", *header], methods)
    )


def main() -> None:
    """Samples, computes, prints the tables and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--width", type=int, default=128, help="hidden size of the random model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--spread", type=float, default=0.13, help="standard deviation of its weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", default="long_answers", help="name of the result's file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    longest = max(args.lengths)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        build_random_model(
            path,
            width=args.width,
            layers=args.layers,
            context_tokens=PROMPT_TOKENS + longest,
            spread=args.spread,
            seed=args.seed,
        )
        trajectories = sample(str(path), num_samples=args.samples, num_tokens=longest, seed=args.seed)
        logp_NL, entropy_NL = trained_logprobs(str(path), trajectories)
    behavior_NL = torch.stack([torch.from_numpy(t.logprobs[PROMPT_TOKENS:]) for t in trajectories])
    rows = measured(logp_NL, behavior_NL, sorted(args.lengths), CORRECTIONS)
    entropy = float(entropy_NL.mean())
    settings = vars(args) | {"dtype": "bfloat16", "device": "cpu"}
    write(args.to, {"settings": settings, "entropy": entropy, "lengths": rows})
    print(f"{args.samples} answers, entropy {entropy:.2f} nats a token\n\n{as_tables(rows)}")


if __name__ == "__main__":
    main()
