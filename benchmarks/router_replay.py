"""How far engine and trainer disagree about a mixture of experts, without and with router replay; its cost.

    python -m benchmarks.router_replay [--groups 8] [--repeats 7]

The engine is transformers' own model in bfloat16: it samples, and one pass over each sample gives the
log-probs and the routes that an engine records. Its routers compute in bfloat16, as SGLang's do, or in
float32, as those of the embedded engine. The trainer has the same weights, in float32 or bfloat16. Both
compute their heads in float32 (`model.fp32_head`).

    difference     mean |log-prob of the trainer - log-prob of the engine| over the sampled tokens
    disagreement   share of the engine's choices of experts that the trainer's routers would not have made
    step           CPU time of the trainer's forward and backward of all samples, with replay / without:
                   median of the repetitions' ratios, which run in turn
    a sample       CPU time to check, and to pack, one sample of 2,048 tokens with the routes of Qwen3-30B-A3B
                   (48 layers, 8 of 128 experts); without routes / with

The models are random: `tests` has the shape of the tests' mixture (2 layers, 2 of 8 experts), whose routers
choose clearly; `deep` has 8 layers and 4 of 32 experts, whose probabilities are close. Nothing here says how
a trained model behaves. Writes benchmarks/results/router_replay.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.precision import route_in_float32, routers, widen_head
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.routes import Routes, RoutesShape
from benchmarks.report import table, write
from trainer.batching.packing import PackedBatch, collate
from trainer.batching.routes import fault_of
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy

VOCAB, PROMPT, ANSWER, GROUP = 96, 16, 48, 4
LARGE = RoutesShape(num_layers=48, num_chosen=8, num_experts=128)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One random Qwen3-MoE."""

    name: str
    layers: int
    width: int
    experts: int
    chosen: int
    router_scale: float
    """Standard deviation of the routers' weights: large ones choose clearly."""


SHAPES = (
    Shape(name="tests", layers=2, width=32, experts=8, chosen=2, router_scale=1.0),
    Shape(name="deep", layers=8, width=64, experts=32, chosen=4, router_scale=0.05),
)


def write_model(shape: Shape, directory: str) -> str:
    """The path of the shape's model, in float32; its numbers are exact in bfloat16, as an engine has them."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCAB, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=shape.width // 4,
        intermediate_size=shape.width, moe_intermediate_size=shape.width // 2, num_experts=shape.experts,
        num_experts_per_tok=shape.chosen, norm_topk_prob=True, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            scale = shape.router_scale if name.endswith("gate.weight") else 0.05
            param.add_(torch.randn_like(param) * scale)
            param.copy_(param.bfloat16().float())
    path = f"{directory}/{shape.name}"
    model.save_pretrained(path)
    return path


@torch.no_grad()
def sampled(path: str, *, num_groups: int, wide_routers: bool) -> list[Trajectory]:
    """Samples of the engine at temperature 1, with its log-probs and routes."""
    torch.manual_seed(1)
    engine: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    widen_head(engine)
    if wide_routers:
        route_in_float32(engine)
    chosen: list[Tensor] = []
    found: list[Any] = list(routers(engine))
    for router in found:
        router.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[2]))
    samples = []
    for prompt in torch.randint(3, VOCAB, (num_groups, PROMPT)):
        answers = engine.generate(
            prompt.repeat(GROUP, 1), do_sample=True, top_k=0, min_new_tokens=ANSWER, max_new_tokens=ANSWER
        )
        for tokens in answers:
            chosen.clear()
            logits = engine(input_ids=tokens[None], use_cache=False).logits[0]
            logps = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
            mask = (np.arange(len(tokens)) >= PROMPT).astype(np.uint8)
            samples.append(
                Trajectory(
                    tokens=tokens.numpy().astype(np.int32),
                    loss_mask=mask,
                    logprobs=np.where(mask, np.concatenate([[0.0], logps.numpy()]), 0).astype(np.float32),
                    versions=np.where(mask, 0, -1).astype(np.int32),
                    reward=0.0,
                    finish_reason=FinishReason.LENGTH,
                    routes=Routes.of(
                        torch.stack(chosen, 1)[:-1].numpy(), num_experts=found[0].weight.shape[0]
                    ),
                )
            )
    return samples


def packed(samples: Sequence[Trajectory]) -> PackedBatch:
    return collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in samples])


def step_of(policy: Policy, batch: PackedBatch) -> Callable[[], Tensor]:
    """A function that runs forward and backward and returns the log-probs."""

    def step() -> Tensor:
        policy.zero_grad()
        logp_S = policy(batch).logprobs_S
        logp_S.sum().backward()
        return logp_S.detach()

    return step


def measure(shape: Shape, path: str, *, wide_routers: bool, dtype: str, args: Any) -> dict[str, Any]:
    """One line of the table: an engine, a trainer, and their differences."""
    samples = sampled(path, num_groups=args.groups, wide_routers=wide_routers)
    live, replayed = packed([replace(t, routes=None) for t in samples]), packed(samples)
    policy = Policy.load(path, Ranks.alone(), dtype=dtype, fp32_head=True, router_replay=True)
    assert policy.replay is not None
    behavior_S = live.behavior_logp_T[live.sampled_S]
    steps = {"without": step_of(policy, live), "with": step_of(policy, replayed)}
    differences = {kind: float((step() - behavior_S).abs().mean()) for kind, step in steps.items()}
    num_other, num_choices = policy.replay.disagreement()
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(args.repeats):
        for kind, step in steps.items():
            began = time.process_time()
            step()
            seconds[kind].append(time.process_time() - began)
    return {
        "model": shape.name,
        "engine": "bfloat16, routers in float32" if wide_routers else "bfloat16",
        "trainer": dtype,
        "tokens": len(behavior_S),
        "bytes_a_token": policy.replay.shape.bytes_per_token,
        "difference": {kind: round(value, 7) for kind, value in differences.items()},
        "disagreement": round(float(num_other) / float(num_choices), 5),
        "rows": {"without": live.num_rows, "with": replayed.num_rows},
        "step_ratio": round(
            statistics.median(b / a for a, b in zip(seconds["without"], seconds["with"], strict=True)), 3
        ),
        "step_ms_a_sample": {
            kind: round(statistics.median(each) * 1e3 / len(samples), 3) for kind, each in seconds.items()
        },
    }


def sample_cost(*, num_tokens: int, repeats: int) -> dict[str, Any]:
    """CPU milliseconds to check and to pack one sample with the routes of a large model."""
    rng = np.random.default_rng(0)
    scores = rng.random((num_tokens - 1, LARGE.num_layers, LARGE.num_experts), dtype=np.float32)
    routes = Routes.of(scores.argsort(axis=-1)[..., : LARGE.num_chosen], num_experts=LARGE.num_experts)
    mask = (np.arange(num_tokens) >= num_tokens // 4).astype(np.uint8)
    plain = Trajectory(
        tokens=rng.integers(3, 100, num_tokens).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    )
    routed = replace(plain, routes=routes)

    def milliseconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
        return round(statistics.median(times) * 1e3, 2)

    return {
        "tokens": num_tokens,
        "bytes": LARGE.bytes_per_token * num_tokens,
        "check_ms": milliseconds(lambda: fault_of(routed, LARGE)),
        "pack_ms": {
            "without": milliseconds(lambda: packed([plain])),
            "with": milliseconds(lambda: packed([routed])),
        },
    }


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    difference = row["difference"]
    return (
        *(row[name] for name in ("model", "engine", "trainer")),
        *(f"{difference[kind]:.2e}" for kind in ("without", "with")),
        f"{row['disagreement']:.2%}",
        row["bytes_a_token"],
        f"{row['step_ratio']:.2f}",
    )


def main() -> None:
    """Measures every pair of engine and trainer, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for shape in SHAPES:
            path = write_model(shape, directory)
            for wide_routers in (False, True):
                for dtype in ("float32", "bfloat16"):
                    rows.append(measure(shape, path, wide_routers=wide_routers, dtype=dtype, args=args))
                    print(rows[-1], flush=True)
    cost = sample_cost(num_tokens=2048, repeats=args.repeats)
    write("router_replay", {"cases": rows, "sample": cost})
    header = (
        *("model", "engine", "trainer", "difference without replay", "with", "disagreement"),
        *("bytes a token", "step with / without"),
    )
    print(table(header, [_line(row) for row in rows]))
    print(f"a sample of {cost['tokens']} tokens of {LARGE}: {cost}")


if __name__ == "__main__":
    main()
