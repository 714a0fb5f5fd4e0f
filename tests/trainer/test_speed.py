"""Speed of steps: FLOPs against torch's own count, peaks by name, phases of GPUs, numbers of two ranks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.gpus import peak_flops
from areal_like.runtime.metrics import Metrics
from tests.support.families import BIASED, write_family
from tests.support.moe_model import write_moe_model
from tests.support.trainer_helpers import ARCHITECTURES, random_groups, run_ranks, write_model
from tests.support.trainer_ranks import LATE_S, make_runner
from trainer.batching.shared_prefixes import InputSequence, SharedRows
from trainer.distributed.ranks import Ranks
from trainer.metrics import speed
from trainer.metrics.model_flops import ModelFlops
from trainer.metrics.prometheus import GpuMemory, TrainerSeries
from trainer.metrics.speed import Clock, PhaseTimer, clock_of
from trainer.metrics.step_totals import (
    NUM_BUCKETS,
    MagnitudeHistogram,
    as_parts,
    joined_parts,
    percentile_of_counts,
)
from trainer.models.policy import Policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_are_those_that_torch_counts(tmp_path: Path, architecture: str) -> None:
    # Eager attention, because torch does not count that of a CPU's fused kernel.
    path = write_model(tmp_path, architecture, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((7, 1), dtype=torch.long), use_cache=False)
    flops = ModelFlops.of(model)
    assert flops.of_forward([1] * 7, num_targets=7) == counter.get_total_flops()


@pytest.mark.parametrize("family", BIASED)
def test_flops_of_mixtures_are_those_that_torch_counts(tmp_path: Path, family: str) -> None:
    """DeepSeek-V3 has keys and values of different sizes."""
    path = write_family(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((7, 1), dtype=torch.long), use_cache=False)
    assert ModelFlops.of(model).of_forward([1] * 7, num_targets=7) == counter.get_total_flops()


def test_attention_counts_the_pairs_that_see_each_other(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_model(tmp_path, "mistral"))
    flops = ModelFlops.of(AutoModelForCausalLM.from_config(config))
    seen = sum(min(place + 1, config.sliding_window) for length in (3, 9) for place in range(length))
    layers_heads_size = config.num_hidden_layers * config.hidden_size
    linear = 2 * flops.body_weights * 12
    assert flops.of_forward([3, 9], num_targets=0) - linear == pytest.approx(4 * layers_heads_size * seen)


def test_sharded_weights_and_experts_are_counted(tmp_path: Path, ranks: Ranks) -> None:
    path = write_moe_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    plain, sharded = ModelFlops.of(model), ModelFlops.of(Policy.load(path, ranks).model)
    config = model.config
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name
    )
    unused = experts * (1 - config.num_experts_per_tok / config.num_experts)
    assert experts > 0 and plain == sharded
    assert plain.body_weights == pytest.approx(matrices - unused)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


class Stream(Clock):
    """A GPU's clock: marks are counted, and are reached at given times."""

    def __init__(self, times: Iterable[float]) -> None:
        self.times, self.num_marks, self.num_waits = list(times), 0, 0

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks - 1

    def seconds(self, spans: Iterable[tuple[int, int]]) -> list[float]:
        self.num_waits += 1
        return [self.times[end] - self.times[start] for start, end in spans]


def test_phases_of_a_gpu_are_read_at_the_end_only() -> None:
    started_s, clock = time.perf_counter(), Stream([0.0, 2.0, 2.0, 3.0, 3.0, 3.5, 3.5, 7.0])
    timer = PhaseTimer(("wait_s", "compute_s", "update_s"), clock=clock)
    groups = timer.timed("wait_s", ["group"])
    next(groups)
    with timer.span("compute_s"):
        pass
    list(groups)
    with timer.span("compute_s"):
        pass
    assert clock.num_waits == 0
    seconds = timer.seconds()
    assert 0 < seconds.pop("step_s") < time.perf_counter() - started_s
    assert seconds == {"wait_s": 2.5, "compute_s": 4.5, "update_s": 0.0}


@pytest.mark.gpu
def test_the_page_has_the_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    (family,) = GpuMemory(device).collect()
    before = {sample.labels["of"]: sample.value for sample in family.samples}
    held = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    (family,) = GpuMemory(device).collect()
    after = {sample.labels["of"]: sample.value for sample in family.samples}
    assert after["allocated"] - before["allocated"] == held.numel() <= after["reserved"] <= after["total"]
    assert after["free"] < after["total"]


@pytest.mark.gpu
def test_cuda_events_time_kernels_and_not_their_launch() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    timer = PhaseTimer(("compute_s",), clock=clock_of(device))
    started_s = time.perf_counter()
    with timer.span("compute_s"):
        for _ in range(20):
            matrix = matrix @ matrix * 1e-4
    launched_s = time.perf_counter() - started_s
    seconds = timer.seconds()
    assert launched_s < seconds["compute_s"] <= seconds["step_s"] * 1.05


def test_percentiles_of_magnitudes() -> None:
    histogram, values = MagnitudeHistogram(), torch.rand(5000, generator=torch.manual_seed(0)) ** 3 * 3
    for part in values.split(700):
        histogram.add(-part, torch.ones(len(part)))
    histogram.add(torch.tensor([7.0, 0.0]), torch.tensor([0.0, 0.0]))
    counts_K = histogram.on_host_K.numpy()
    assert counts_K.sum() == 5000 and histogram.largest == float(values.max())
    for percent in (10, 50, 99):
        exact = np.percentile(values.numpy(), percent, method="higher")
        assert exact <= percentile_of_counts(counts_K, percent) * 1.0001 <= exact * 1.076
    histogram.add(torch.tensor([math.nan, math.inf]), torch.ones(2))
    assert histogram.on_host_K[NUM_BUCKETS - 1] == 2 and histogram.largest == math.inf


def test_vectors_of_ranks_are_joined_after_one_gather() -> None:
    first = as_parts([torch.tensor([1.0, 2.0]), torch.zeros(0), torch.tensor([5.0])])
    second = as_parts([torch.zeros(0), torch.tensor([3.0]), torch.tensor([6.0])])
    joined = joined_parts(torch.cat([first, second]), num_vectors=3)
    assert [part.tolist() for part in joined] == [[1.0, 2.0], [3.0], [5.0, 6.0]]


@pytest.mark.parametrize("window", [0, 4])
def test_a_shared_prefix_is_counted_once(window: int) -> None:
    flops = ModelFlops(body_weights=10.0, head_weights=7.0, heads_size=1, num_layers_of={window: 3})
    rows = [(sequence, place) for sequence, first in ((6, 0), (8, 5)) for place in range(first, sequence)]
    pairs = sum(min(place + 1, window or 99) for _, place in rows)
    got = flops.of_forward([6, 8], own_lengths=[6, 3], num_targets=2)
    assert got == 2 * (10 * len(rows) + 7 * 2) + 4 * 3 * pairs


def test_the_share_of_tokens_that_were_not_run(tmp_path: Path, ranks: Ranks) -> None:
    longest = [max(group, key=lambda t: t.num_tokens) for group in random_groups(4)]
    groups = [[replace(t, reward=float(i)) for i in range(3)] for t in longest]
    runner = make_runner(write_model(tmp_path), ranks, budget_tokens=1000)
    metrics = runner.run(groups, step=5)
    rows = SharedRows.of([InputSequence(t.tokens) for group in groups for t in group])
    assert rows is not None and metrics["num_tokens"] == sum(t.num_tokens for g in groups for t in g)
    assert metrics["shared_share"] == pytest.approx(1 - sum(rows.own_lengths) / metrics["num_tokens"])
    assert metrics["shared_share"] > 0.1


def test_mfu_of_a_step_with_a_given_peak(tmp_path: Path, ranks: Ranks) -> None:
    path, groups = write_model(tmp_path), random_groups(4)
    metrics = make_runner(path, ranks, peak_tflops=2e-6).run(groups, step=5)
    flops = ModelFlops.of(AutoModelForCausalLM.from_pretrained(path))
    run = [t for group in groups if len({t.reward for t in group}) > 1 for t in group]
    want = 3 * flops.of_forward(
        [t.num_tokens for t in run],
        num_targets=sum(t.num_sampled for t in run),
    )
    assert metrics["model_tflops_per_s"] * metrics["step_s"] * 1e12 == pytest.approx(want)
    assert metrics["mfu"] * metrics["step_s"] * 2e6 == pytest.approx(want)
    assert metrics["mfu_compute"] * metrics["compute_s"] * 2e6 == pytest.approx(want)
    assert metrics["tokens_per_s"] == pytest.approx(sum(t.num_tokens for t in run) / metrics["step_s"])
    assert 0.05 < metrics["memory_peak_gb"] < 50
    assert "mfu" not in make_runner(path, ranks).run(groups, step=5)
    nothing = make_runner(path, ranks, peak_tflops=1.0).run(groups[:1], step=5)  # equal rewards
    assert nothing["num_tokens"] == nothing["shared_share"] == nothing["mfu"] == nothing["mfu_compute"] == 0


def test_freed_memory_is_returned_after_growth(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, returned = iter([100, 120, 130, 300, 310]), []
    monkeypatch.setattr(speed, "resident_bytes", lambda: next(resident))
    monkeypatch.setattr(speed, "return_freed_memory", lambda: returned.append(step))
    runner = make_runner(write_model(tmp_path), ranks)
    for step in range(5):
        runner.run(random_groups(1), step=step)
    assert returned == [2]


def test_two_ranks_report_their_slowest_and_all_lengths(tmp_path: Path) -> None:
    run_ranks("straggler", str(tmp_path), write_model(tmp_path / "model"), world_size=2)
    metrics = json.loads((tmp_path / "straggler.json").read_text())
    assert metrics["wait_s_min"] < LATE_S <= metrics["wait_s_max"]
    assert metrics["wait_s"] == metrics["wait_s_min"], "rank 0 has all its groups at once"
    assert metrics["compute_s_min"] <= metrics["compute_s"] <= metrics["compute_s_max"]
    samples = [t for group in random_groups(8) for t in group]
    lengths = [t.num_sampled for t in samples]
    for percent in (10, 50, 90, 99):
        assert metrics[f"response_length_p{percent}"] == pytest.approx(np.percentile(lengths, percent))
    assert metrics["response_length_max"] == max(lengths)
    assert metrics["prompt_tokens_max"] == max(t.num_tokens - t.num_sampled for t in samples)
    assert metrics["tokens_per_s_per_gpu"] * 2 == pytest.approx(metrics["tokens_per_s"])
    # The samples are of version 5, and the step is the fifth: all tokens are of the current weights.
    assert 0 < metrics["mismatch_abs"] < metrics["mismatch_abs_p99"] <= metrics["mismatch_abs_max"]
    assert metrics["mismatch_k3"] == pytest.approx(metrics["kl_k3"])
    series = TrainerSeries(shown := Metrics())
    series.stepped(5, metrics | {"tokens_trained": 1, "freeze_s": 0.0, "wait_data_s": 0.0})
    text = shown.exposition().decode()
    assert f'areal_trainer_phase_max_seconds{{phase="wait"}} {metrics["wait_s_max"]}' in text
    assert f"areal_trainer_step_seconds_sum {metrics['step_s']}" in text
    assert f'areal_trainer_response_length{{of="max"}} {float(max(lengths))}' in text
