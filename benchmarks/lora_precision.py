"""The log-probs of engine and trainer in bfloat16 on a model with a LoRA adapter, for both kinds of pushes.

    python -m benchmarks.lora_precision [--model DIR] [--sizes 0 .001 .01 .05] [--samples 16] [--tokens 64]

The trainer computes x W^T + scale (x A^T) B^T, with W, A and B in bfloat16. With `weights.lora=adapter` the
engine does the same with its own kernels. With `merged` it gets W + scale B A, rounded to bfloat16. Each push
is that of a job (`trainer.weights`). The engine then samples answers to some prompts at temperature 1, and
the trainer scores them. The gap is the absolute difference in log-prob of the sampled tokens, in nats. A size
is the Frobenius norm of scale B A relative to that of W, the same in all layers; B is random. Size 0 is the
base alone: its gap is that of a full training.

`--model`: a Hugging Face directory. The default is SmolLM2-135M-Instruct (`areal-like fetch smollm2`), which
is expanded into runs/lora_precision/model. Writes benchmarks/results/lora_precision.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from areal_like.automatic_settings import uses_fp32_head
from areal_like.runtime.command_line import load_config
from areal_like.weights.buckets import unflatten
from benchmarks.long_answers import completed
from benchmarks.report import ROOT, table, write
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams
from rollout_server.engine.scheduler import Sequence as EngineSequence
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.lora import layer_matrices, scales
from trainer.models.policy import Policy, build_policy
from trainer.models.smollm2 import convert_smollm2
from trainer.weights.snapshot import BackgroundGather, Snapshot

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
    "Write two sentences about a river in winter.",
    "Why does ice float on water?",
)
CONTEXT_TOKENS = 512
BUCKET_BYTES = 64 << 20


def main() -> None:
    """Measures, prints the table and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "lora_precision" / "model")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.0, 0.001, 0.01, 0.05])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.model / "config.json").exists():
        convert_smollm2(args.model)
    rows = measure(
        str(args.model), rank=args.rank, sizes=args.sizes, num_samples=args.samples, num_tokens=args.tokens
    )
    settings = {name: value for name, value in vars(args).items() if name != "model"}
    write("lora_precision", {"settings": settings | {"dtype": "bfloat16", "device": "cpu"}, "rows": rows})
    print(as_table(rows))


def measure(
    model: str, *, rank: int, sizes: Sequence[float], num_samples: int, num_tokens: int
) -> list[dict[str, Any]]:
    """One row for each kind of push and size."""
    config = load_config([f"model.path={model}", "model.dtype=bfloat16", f"model.lora.rank={rank}"])
    policy = build_policy(config, model, Ranks.alone())
    engine, weights = load(
        model,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        context_length=CONTEXT_TOKENS,
        fp32_head=uses_fp32_head(config),
    )
    options = EngineOptions(
        max_running_requests=num_samples, context_length=CONTEXT_TOKENS, max_adapters=1, random_seed=0
    )
    core = EngineCore(engine, weights, options, version="0")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    prompts = [tuple(tokenizer(f"{prompt}\n")["input_ids"]) for prompt in PROMPTS]
    rows = []
    # Merged weights replace the base, which adapters need, so they come last.
    for kind in ("adapter", "merged"):
        for size in sizes:
            set_size(policy, size)
            push(policy, core, kind=kind)
            params = SamplingParams(max_new_tokens=num_tokens, sampling_seed=7)
            sequences = [
                EngineSequence(
                    seq_id=f"{kind}-{size}-{index}",
                    prompt=prompts[index % len(prompts)],
                    params=params,
                    sample_index=index,
                )
                for index in range(num_samples)
            ]
            gaps = []
            for trajectory in completed(core, sequences):
                batch = collate([TrainingSample(trajectory=trajectory, advantage=0.0, group=0)])
                with torch.no_grad():
                    logp_S = policy(batch).logprobs_S
                gaps.append(logp_S - torch.from_numpy(trajectory.logprobs[trajectory.loss_mask == 1]))
            rows.append({"push": kind, "size": size, **summary(torch.cat(gaps))})
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def set_size(policy: Policy, size: float) -> None:
    """Makes scale B A of every layer random, with this Frobenius norm relative to that of W."""
    params = {name: local(param.detach()) for name, param in policy.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for layer, scale in scales(policy.model).items():
        weight, a, b = (params[name] for name in layer_matrices(layer))
        b.normal_(generator=generator)
        b.mul_(size * weight.float().norm() / (scale * (b @ a).norm()))


def push(policy: Policy, core: EngineCore, *, kind: str) -> None:
    """Pushes the policy's weights of the moment, as a job with `weights.lora=kind` does."""
    snapshotter = BackgroundGather(
        policy, Ranks.alone(), bucket_bytes=BUCKET_BYTES, dtype="bfloat16", lora=kind
    )
    snapshot = snapshotter.take_snapshot()
    assert snapshot is not None and snapshot.acquire()
    if snapshot.adapter is None:
        weights = core.take_shadow_weights()
        receive(snapshot, weights.named)
        core.swap_weights(weights, version="1", recompute=True)
    else:
        tensors = core.new_adapter(snapshot.adapter)
        receive(snapshot, tensors)
        core.activate_adapter(tensors, version="1", running="recompute")
    snapshot.release()
    snapshotter.close()


@torch.inference_mode()
def receive(snapshot: Snapshot, named: Mapping[str, Tensor]) -> None:
    """Copies every bucket into the tensors of these names."""
    for index, bucket in enumerate(snapshot.buckets):
        for name, tensor in unflatten(bucket, snapshot.read(index).data).items():
            named[name].copy_(tensor)


def summary(gap_S: Tensor) -> dict[str, float]:
    """Figures of the differences in log-prob [S]."""
    size_S = gap_S.abs().double()
    return {
        "tokens": len(gap_S),
        "mean": float(size_S.mean()),
        "p99": float(size_S.quantile(0.99)),
        "max": float(size_S.max()),
        "bias": float(gap_S.double().mean()),
    }


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each kind of push and size."""
    return table(
        ["push", "size of scale B A", "sampled tokens", "mean gap", "99 %", "largest", "mean difference"],
        [
            [
                row["push"],
                f"{100 * row['size']:g} %",
                row["tokens"],
                *(f"{row[key]:.4f}" for key in ("mean", "p99", "max")),
                f"{row['bias']:+.4f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
