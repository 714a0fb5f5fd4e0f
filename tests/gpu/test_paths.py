"""What runs differently on a GPU, against a CPU's numbers: the same code on both, so that it is proven here.

`make test-gpu` runs these tests on `cuda`, the quick tests on `cpu`, where most comparisons are exact.
"""

from __future__ import annotations

import gc
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from areal_like.config import from_mapping
from areal_like.weights.buckets import checksum
from launch.doctor.gpu.models import random_groups, write_model
from launch.doctor.gpu.running import run_stages
from launch.doctor.gpu.stages import OK, STAGES, Request
from launch.doctor.gpu.step import relative_error
from tests.support.planning_ranks import build_runner, run_steps
from tests.support.trainer_ranks import make_runner
from tests.trainer.planning.test_memory import SHAPE, TOLERANCE
from trainer.batching.device_copies import copied
from trainer.batching.packing import PackedBatch, collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import Policy
from trainer.optimizer import ShardedAdamW
from trainer.planning.lengths import lengths_of
from trainer.planning.shapes import with_local_model
from trainer.planning.trace import trace_step
from trainer.profiling.recorder import ProfileRequest, StepRecorder
from trainer.weights.snapshot import BackgroundGather, BoundaryGather

CPU = torch.device("cpu")
VOCAB = 96


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose results are compared with those of the CPU."""
    return torch.device("cuda", 0) if request.param == "cuda" else CPU


@pytest.fixture
def group(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, with the backends of both devices."""
    backend = "gloo" if device == CPU else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("gpu") / "model", is_small=True, dtype=torch.float32)


def batch_on(device: torch.device) -> PackedBatch:
    """Twelve sequences in three groups, whose prompts are shared."""
    groups = random_groups(3, vocab_size=VOCAB, longest=24)
    samples = [
        TrainingSample(trajectory=t, advantage=1.0, group=g) for g, ts in enumerate(groups) for t in ts
    ]
    return collate(samples, device=device)


def forward_and_backward(policy: Policy, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """(log-probs, gradients of a weighted sum of them), on the CPU."""
    logp_S = policy(batch_on(device)).logprobs_S
    (logp_S * torch.linspace(-1, 1, len(logp_S), device=device)).sum().backward()
    gradients = {name: param.grad for name, param in policy.named_parameters()}
    return logp_S.detach().cpu(), {
        name: local(grad).cpu() for name, grad in gradients.items() if grad is not None
    }


@pytest.mark.parametrize(
    ("dtype", "most_logp", "most_gradient"), [("float32", 1e-4, 3e-4), ("bfloat16", 0.06, 0.08)]
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "chunk_tokens": 16}, {"fp32_head": True}],
    ids=["plain", "recomputed", "fp32_head"],
)
@pytest.mark.usefixtures("group")
def test_the_packed_model(
    path: str,
    device: torch.device,
    dtype: str,
    most_logp: float,
    most_gradient: float,
    settings: Mapping[str, Any],
) -> None:
    """Forward and backward over shared prefixes; on a GPU in bfloat16 with the varlen kernel.

    `most_logp`: root of the mean squared difference of a token's log-prob.
    """
    want_logp, want = forward_and_backward(Policy.load(path, Ranks(device=CPU)), CPU)
    policy = Policy.load(path, Ranks(device=device), dtype=dtype, **settings)
    logp, got = forward_and_backward(policy, device)
    assert float((logp - want_logp).square().mean().sqrt()) < most_logp
    assert relative_error(got, want) < most_gradient


@pytest.mark.gpu
@pytest.mark.usefixtures("group")
def test_the_compiled_model(path: str) -> None:
    """`trainer.compile` on a GPU."""
    want_logp, want = forward_and_backward(Policy.load(path, Ranks(device=CPU)), CPU)
    policy = Policy.load(path, Ranks(device="cuda"), dtype="bfloat16", compiles=True)
    logp, got = forward_and_backward(policy, torch.device("cuda"))
    assert float((logp - want_logp).square().mean().sqrt()) < 0.06 and relative_error(got, want) < 0.08


@pytest.mark.usefixtures("group")
def test_the_optimizer_has_the_same_updates(path: str, device: torch.device) -> None:
    """Three updates with clipping, from the same gradients."""
    policies = [Policy.load(path, Ranks(device=each)) for each in (CPU, device)]
    optimizers = [
        ShardedAdamW(policy, Ranks(device=each), lr=1e-2, weight_decay=0.1)
        for policy, each in zip(policies, (CPU, device), strict=True)
    ]
    for step in range(3):
        norms = []
        for policy, optimizer in zip(policies, optimizers, strict=True):
            random = torch.Generator().manual_seed(step)
            for param in policy.parameters():
                param.grad = torch.zeros_like(param)
                local(param.grad).copy_(torch.randn(param.shape, generator=random))
            norms.append(optimizer.step(divisor=2.0, lr=1e-2))
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    for ours, theirs in zip(policies[1].parameters(), policies[0].parameters(), strict=True):
        torch.testing.assert_close(local(ours).cpu(), local(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_a_snapshot_has_the_bytes_of_the_weights(path: str, device: torch.device) -> None:
    """Both ways to gather, while the weights change; pinned memory and the checksum of the device."""
    snapshots = []
    for gather, each in ((BackgroundGather, CPU), (BoundaryGather, device)):
        ranks = Ranks(device=each)
        policy = Policy.load(path, ranks)
        snapshotter = gather(policy, ranks, bucket_bytes=5000, dtype="bfloat16")
        snapshot = snapshotter.take_snapshot()
        assert snapshot is not None and snapshot.acquire()
        with torch.no_grad():
            for param in policy.parameters():
                local(param).add_(1.0)
        assert snapshotter.take_snapshot() is not None
        snapshots.append(snapshot)
    want, got = snapshots
    assert len(want.buckets) > 3 and want.buckets == got.buckets
    for index in range(len(want.buckets)):
        ours = got.read(index)
        assert torch.equal(ours.data, want.read(index).data)
        assert ours.checksum == want.read(index).checksum == checksum(ours.data)
        assert ours.data.is_pinned() == (device != CPU)


def test_copies_arrive_while_the_device_computes(device: torch.device) -> None:
    """Pinned memory is reused only after its copy, and copies overlap kernels of the current stream."""
    matrix = torch.randn(64, 64, device=device)
    sums = []
    for number in range(30):
        matrix = torch.tanh(matrix @ matrix)
        (copy,) = copied([np.full(5000, number, dtype=np.int64)], device)
        sums.append(copy.sum() + 0 * matrix.sum().long())
    assert [int(each) for each in sums] == [5000 * number for number in range(30)]


@pytest.mark.usefixtures("group")
def test_a_checkpoint_restores_every_bit(path: str, device: torch.device, tmp_path: Path) -> None:
    """Weights and moments travel from the device through pinned memory to the disk, and to either device."""
    ranks = Ranks(device=device)
    runner = make_runner(path, ranks, dtype=torch.float32, budget_tokens=200)
    groups = random_groups(3, vocab_size=VOCAB, longest=24)
    runner.run(groups, step=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, tokenizer_path=path)
    checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={})
    saved = state_of(runner.policy, runner.optimizer)
    runner.run(groups, step=1)  # while the checkpoint is being written
    checkpoints.close()
    for each in (CPU, device):
        other = make_runner(path, Ranks(device=each), dtype=torch.float32)
        loading = Checkpoints(tmp_path / "checkpoints", keep=2, tokenizer_path=path)
        loading.load(1, other.policy, other.optimizer, Ranks(device=each))
        loading.close()
        restored = state_of(other.policy, other.optimizer)
        assert restored.keys() == saved.keys()
        assert all(torch.equal(restored[name], tensor) for name, tensor in saved.items())


def state_of(policy: Policy, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """Copies of weights and moments, on the CPU."""
    found = {}
    for name, param in policy.named_parameters():
        found[name] = local(param.detach()).cpu().clone()
        found |= {f"{name}/{kind}": value.cpu().clone() for kind, value in optimizer.moments(name).items()}
    return found


@pytest.mark.usefixtures("group")
def test_a_profile_shows_the_kernels_of_the_device(path: str, device: torch.device, tmp_path: Path) -> None:
    ranks = Ranks(device=device)
    runner = make_runner(path, ranks, dtype=torch.float32, budget_tokens=200)
    recorder = StepRecorder(tmp_path, rank=0, device=device)
    recorder.ask(ProfileRequest.of({"id": "0123456789abcdef", "steps": 1}))
    recorder.meet(ranks, stop=False)
    with recorder.step(0):
        runner.run(random_groups(2, vocab_size=VOCAB, longest=24), step=0)
    recorder.close()
    (trace,) = tmp_path.glob("trace-*.json.gz")
    kinds = {event.get("cat") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "cpu_op" in kinds and ("kernel" in kinds) == (device != CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_traced_memory_is_the_measured_one(tmp_path: Path, dtype: str, checkpointing: bool) -> None:
    SHAPE.save_pretrained(tmp_path / "model")
    settings = {
        "model": {"path": str(tmp_path / "model"), "dtype": dtype},
        "rollout": {"max_context": 512},
        "sampling": {"max_new_tokens": 384, "group_size": 4},
        "task": {"name": "sort", "max_prompt_tokens": 128},
        "trainer": {
            "device": "cuda",
            "kernels": "torch",  # Liger keeps less
            "tokens_per_microbatch": 2048,
            "logprob_chunk_tokens": 512,
            "gradient_checkpointing": checkpointing,
        },
    }
    config, shape = with_local_model(from_mapping(settings))
    lengths = lengths_of(config, max_positions=shape.max_positions)
    traced = trace_step(config, shape, lengths).peak
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = Ranks(device=torch.device("cuda", 0))
        run_steps(
            build_runner(config, ranks), config, lengths, ranks, microbatches=[1]
        )  # libraries and workspaces
        gc.collect()  # a runner has reference cycles
        before = torch.cuda.memory_allocated()
        found = run_steps(build_runner(config, ranks), config, lengths, ranks, microbatches=[1, 2])
    finally:
        dist.destroy_process_group()
    measured = 1e9 * max(metrics["memory_peak_gb"] for metrics in found) - before
    assert traced == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("peer", "sglang")])
def test_a_stage_of_the_doctor(name: str, tmp_path: Path) -> None:
    """Everything that `areal-like doctor --gpu` compares: kernels, ranks over NCCL, a push, the plan."""
    tmp_path.chmod(0o700)
    (result,) = run_stages([STAGES[name]], Request(device="cuda", scratch=str(tmp_path)))
    assert result.verdict == OK, (result.verdict, result.measured)
