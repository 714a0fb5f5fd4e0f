"""`areal-like plan`: the presets of whole jobs fit, what does not fit is said, and nothing is written."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, Qwen3Config

from areal_like.config import Config
from areal_like.config.default_objective import default_objective
from areal_like.config.gpus import check_gpus_are_separate
from areal_like.errors import ConfigError
from areal_like.gpus import GPUS
from areal_like.runtime.command_line import load_config, presets
from launch.cli import main
from tests.support.families import write_family
from trainer.batching.attention_layout import RectangleLayout
from trainer.distributed.sharding import rows_per_rank
from trainer.models.packed_model import build_skeleton
from trainer.planning.advice import changes_until_it_fits
from trainer.planning.engines import engine_memory
from trainer.planning.estimate import SPREADS, estimate
from trainer.planning.gpus import GIB, parse_gpus
from trainer.planning.layers import with_layers
from trainer.planning.lengths import Lengths, lengths_of, worst_lengths
from trainer.planning.memory import SNAPSHOTS
from trainer.planning.planner import Plan, make_plan, planned_again
from trainer.planning.report import json_of, text_of
from trainer.planning.shapes import known_shapes, with_local_model
from trainer.planning.staleness import Forecast
from trainer.planning.tensor_memory import INPUTS_ON_HOST, MOMENTS_ON_HOST

PARAMETERS = {
    "1xh100_1.7b": 1.72e9,
    "2xh100_8b_lora": 8.19e9,
    "4xh100_32b_lora": 32.76e9,
    "8xh100_8b": 8.19e9,
    "8x8h100_32b": 32.76e9,
    "8x8h100_70b": 70.55e9,
    "16x8h100_235b": 235.09e9,
}
"""As their authors publish them, tied embeddings counted once."""
SMALL = ("sampling.max_new_tokens=448", "rollout.max_context=512", "model.dtype=bfloat16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting of a model of two layers: a directory with only config.json."""
    directory = tmp_path_factory.mktemp("model")
    shape = Qwen3Config(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
    )
    shape.save_pretrained(directory)
    return f"model.path={directory}"


@functools.cache
def small(model: str, *settings: str, gpus: str = "1+1xH100") -> Plan:
    return make_plan(load_config([model, *SMALL, *settings]), gpus=gpus)


LARGE = ("8x8h100_70b", "16x8h100_235b")
QUICK = "1xh100_1.7b"
"""The trace of another takes longer."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name == QUICK else pytest.mark.chaos)
        for name in PARAMETERS
    ],
)
def test_preset_fits(name: str) -> None:
    plan = make_plan(load_config([f"scale={name}"]))
    assert plan.fits, plan.memory.problems
    assert plan.trace.num_params == pytest.approx(PARAMETERS[name], rel=0.005)
    # Masters, gradients and two moments in float32, divided over the ranks.
    states = 16 * plan.trace.num_trained / plan.trace.world_size
    parts = plan.trace.peak_bytes
    masters = "adapter (float32 masters)" if name.endswith("lora") else "weights (float32 masters)"
    named = (masters, "gradients", "Adam's moments")
    on_host = plan.trace.on_host_bytes.get(MOMENTS_ON_HOST, 0)
    assert sum(parts[part] for part in named) + on_host == pytest.approx(states, rel=0.01)
    assert bool(on_host) == (name == "16x8h100_235b")
    if name in LARGE:  # no rank, and no host, has all that is pushed
        assert plan.memory.rank_host[SNAPSHOTS] <= plan.pushed_bytes / 4
        assert plan.memory.host_total < 0.5 * plan.memory.host_bytes and plan.trace.unevenness < 1.01
    frozen = plan.trace.num_params + plan.trace.num_adapter - plan.trace.num_trained
    base = 2 * frozen / plan.trace.world_size
    assert parts.get("base model (frozen)", 0) == pytest.approx(base, rel=0.01)
    assert plan.memory.engine.num_tokens >= 8 * plan.lengths.context
    expected = plan.estimate
    assert expected is not None and 0.1 < expected.mfu < 0.6 and expected.lag <= plan.config.staleness_cap
    if name == "8xh100_8b":
        assert max(expected.trainer_idle, expected.engine_idle) < 0.15
    text = text_of(plan, [], explain=True)
    assert "It fits" in text and "not on this machine" in " ".join(text.split())
    longest = plan.config.sampling.max_new_tokens
    assert "objective=auto is {name: gspo" in text and f"up to {longest} tokens" in " ".join(text.split())
    assert json_of(plan, [])["objective"] == default_objective()
    assert all(formula.split()[0] in text for formula in expected.formulas)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("name", "num_params"), [("Qwen/Qwen3-30B-A3B", 30.53e9), ("zai-org/GLM-4.5-Air", 106.85e9)]
)
def test_known_mixtures_are_traced(name: str, num_params: float) -> None:
    """From the numbers in their published config.json, without layers for speculative decoding."""
    plan = small(f"model.path={name}", "trainer.groups_per_step=32", gpus="8+32xH100")
    assert plan.trace.num_params == pytest.approx(num_params, rel=0.002)
    states = sum(plan.trace.peak_bytes[part] for part in ("weights (float32 masters)", "Adam's moments"))
    assert states == pytest.approx(12 * num_params / 32, rel=0.01)
    assert "configs/scale/models/" in text_of(plan, [], explain=False)


def test_experts_are_divided_evenly(tmp_path: Path) -> None:
    """64 ranks hold two of the 128 experts of a layer each, and all the rest evenly too; of 96 ranks 64 would
    hold two and the others none."""
    _, shape = with_local_model(load_config(["model.path=Qwen/Qwen3-235B-A22B"]))
    layer = with_layers(shape, 1, tmp_path / "model").directory
    sizes = [param.shape for param in build_skeleton(layer, dtype=torch.bfloat16).parameters()]
    assert all(size[0] % 64 == 0 for size in sizes)
    experts = [size for size in sizes if len(size) == 3]
    assert [size[0] for size in experts] == [128, 128]
    for world_size, share in ((64, 1.0), (96, 1.5), (128, 1.0)):
        assert all(rows_per_rank(size, world_size) * world_size == share * 128 for size in experts)


@pytest.mark.chaos
def test_uneven_rows_are_said(tmp_path: Path) -> None:
    path = write_family("qwen3_moe", tmp_path)  # eight experts
    even, uneven = (
        small(f"model.path={path}", "trainer.groups_per_step=8", gpus=f"1+{ranks}xH100") for ranks in (4, 6)
    )
    assert even.trace.unevenness < 1.1 < uneven.trace.unevenness
    assert "times the mean of the ranks' rows" in text_of(uneven, [], explain=False)
    assert "times the mean of the ranks' rows" not in text_of(even, [], explain=False)


def test_presets_are_jobs() -> None:
    assert set(presets("scale")) == set(PARAMETERS)
    for name in PARAMETERS:
        config = load_config([f"scale={name}", "trainer.num_steps=3"])
        assert config.trainer.num_steps == 3
        assert config.resolved_objective == default_objective(), "by auto"
        check_gpus_are_separate(config)  # the shared GPU is meant
        again = load_config(["--config", f"configs/scale/{name}.yaml", "trainer.num_steps=3"])
        assert again == config
    with pytest.raises(ConfigError, match="known choices are 16x8h100_235b, 1xh100"):
        load_config(["scale=9xh100"])
    with pytest.raises(ConfigError, match="give one of them"):
        load_config(["scale=8xh100_8b", "--config", "configs/scale/8xh100_8b.yaml"])


@pytest.mark.chaos
def test_command_prints_json(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--gpus", "1xH200", "--json", model, *SMALL, f"runs_dir={tmp_path / 'runs'}"]
    assert main(words) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["fits"] and printed["gpus"] == "1xH200"
    assert printed["memory"]["trainer_total"] == sum(printed["memory"]["trainer"].values())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["8xh100"], "give a configuration file"),
        (["nothing.yaml"], "no such file"),
        (["--gpus", "4+4xH1000", *SMALL], "H1000 is not in the table of GPUs"),
        (["--gpus", "four", *SMALL], "as 4+4xH100"),
        (["--gpus", "1xH100", "--response-tokens", "no", *SMALL], "give a mean number"),
    ],
)
def test_bad_words(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    if words == ["8xh100"]:
        assert main(["plan", *words]) == 2
    else:
        from trainer.planning.__main__ import main as planning

        arguments = ["--config", *words] if words == ["nothing.yaml"] else words
        assert planning(arguments) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_jobs(tmp_path: Path) -> None:
    MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=41).save_pretrained(tmp_path)
    for settings, gpus, message in (
        (["model.path=/no/where"], "1xH100", "no known shape"),
        ([f"model.path={tmp_path}"], "1xH100", "no num_attention_heads"),
        ([], None, "give the GPUs to plan for"),
        (["objective=vcpo"], "1xH100", "norms=proxy"),
        (
            [
                "trainer.tokens_per_microbatch=256",
                "sampling.max_new_tokens=200",
                "rollout.max_context=0",
                "task=reasoning_gym",
            ],
            "1xH100",
            "raise it",
        ),
        (["rollout.engine=sglang", "rollout.gpus_per_engine=2"], "3+1xH100", "does not divide 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_plan(load_config(settings), gpus=gpus)


@pytest.mark.chaos
def test_changes_make_it_fit(model: str) -> None:
    # A card that is a little too small: found by planning the same job on a large one first.
    settings = (
        "trainer.tokens_per_microbatch=4096",
        "trainer.gradient_checkpointing=false",
        "trainer.groups_per_step=4",
    )
    plan = small(model, *settings, "rollout.max_running=8")
    assert plan.fits
    tight = on_card(plan, memory_bytes=0.85 * plan.memory.trainer_total)
    assert not tight.fits
    changes = list(changes_until_it_fits(tight))
    assert changes[0].text == "trainer.gradient_checkpointing=true" and changes[-1].plan.fits
    assert all(
        before.plan.memory.shortage > after.plan.memory.shortage for before, after in pairwise(changes)
    )
    assert changes[-1].text in text_of(tight, changes, explain=False)
    assert json_of(tight, changes)["estimate"] is None
    hopeless = list(changes_until_it_fits(on_card(plan, memory_bytes=1e9)))
    assert not any(change.plan.fits for change in hopeless)


def on_card(plan: Plan, *, memory_bytes: float) -> Plan:
    """The same job on GPUs with less memory."""
    placement = replace(plan.placement, gpu=replace(plan.placement.gpu, memory_bytes=memory_bytes))
    return planned_again(plan, plan.config, placement)


@pytest.mark.chaos
def test_gradients_are_part_of_the_trace(model: str) -> None:
    one, four = small(model), small(model, gpus="1+4xH100")
    parts_1, parts_4 = one.trace.peak_bytes, four.trace.peak_bytes
    for part in ("gradients", "Adam's moments", "weights (float32 masters)"):
        assert parts_4[part] == pytest.approx(parts_1[part] / 4, rel=0.01)
    # 6 FLOPs for each token and parameter (none in the embedding, none in the head at prompts), and 2 more
    # where activations are recomputed.
    per_token = one.trace.linear_flops["policy"] / one.trace.num_tokens
    multiplied = one.trace.num_params - 32_000 * 512
    assert 5 * multiplied < per_token < 8.1 * multiplied


@pytest.mark.chaos
def test_a_context_divides_activations(model: str) -> None:
    ranks = ("trainer.world_size=4", "trainer.tokens_per_microbatch=65536")
    one, four = (small(model, *ranks, f"trainer.context_parallel={size}", gpus="1+4xH100") for size in (1, 4))
    parts_1, parts_4 = one.trace.peak_bytes, four.trace.peak_bytes
    for part in ("gradients", "Adam's moments", "weights (float32 masters)"):
        assert parts_4[part] == pytest.approx(parts_1[part], rel=0.01)
    assert parts_4["activations"] == pytest.approx(parts_1["activations"] / 4, rel=0.25)
    for phase, flops in one.trace.attention_flops.items():
        assert four.trace.attention_flops[phase] == pytest.approx(flops)
    assert four.trace.linear_flops["policy"] == pytest.approx(one.trace.linear_flops["policy"], rel=0.01)
    assert "context_parallel=4" in text_of(four, [], explain=False)
    assert one.estimate is not None and four.estimate is not None
    assert four.estimate.train_s > one.estimate.train_s
    assert any("context groups = " in formula for formula in four.estimate.formulas)


@pytest.mark.chaos
def test_replicas_hold_more_and_send_less(model: str) -> None:
    """Sixteen ranks: the rows of eight, gathered on one host, and a sum of gradients over two hosts."""
    ranks = ("trainer.world_size=16", "trainer.tokens_per_microbatch=512", "trainer.logprob_chunk_tokens=256")
    one, two = (small(model, *ranks, f"trainer.replicas={n}", gpus="1+16xH100") for n in (1, 2))
    parts_1, parts_2 = one.trace.peak_bytes, two.trace.peak_bytes
    for part in ("gradients", "Adam's moments", "weights (float32 masters)"):
        assert parts_2[part] == pytest.approx(2 * parts_1[part], rel=0.01)
    assert parts_2["activations"] == pytest.approx(parts_1["activations"], rel=0.05)
    assert one.trace.linear_flops == two.trace.linear_flops
    written = (
        "rows of a checkpoint that is being written"  # by the eight ranks of each host's half, or by all
    )
    assert two.memory.host[written] == pytest.approx(2 * one.memory.host[written])
    assert "replicas=2" in text_of(two, [], explain=False)
    assert one.estimate is not None and two.estimate is not None
    gathering = [
        next(formula for formula in each.formulas if formula.startswith("FSDP2"))
        for each in (one.estimate, two.estimate)
    ]
    assert "/ 40 GB/s" in gathering[0] and "/ 40 GB/s" not in gathering[1]
    (summed,) = [f for f in two.estimate.formulas if f.startswith("replicas = ")]
    assert "over 2 replicas of 8 ranks / 40 GB/s" in summed
    tight = on_card(two, memory_bytes=two.memory.trainer_total - 1e6)
    assert [change.text for change in changes_until_it_fits(tight)] == ["trainer.replicas=1"]


@pytest.mark.chaos
def test_kept_and_offloaded_activations_are_part_of_the_plan(tmp_path: Path) -> None:
    """A layer's input is 2 bytes x hidden size x tokens; selective keeps attention's output, k, o and up."""
    model = model_of_layers(tmp_path, 12)
    settings = ("trainer.tokens_per_microbatch=16384", "trainer.groups_per_step=8")
    full, selective, offloaded = (
        small(model, *settings, f"trainer.gradient_checkpointing={kind}", *more)
        for kind, *more in (("true",), ("selective",), ("true", "trainer.offload_activations=true"))
    )
    assert not full.trace.on_host_bytes
    assert offloaded.trace.on_host_bytes == {INPUTS_ON_HOST: 12 * 2 * 512 * 16384}
    freed = full.trace.peak - offloaded.trace.peak
    assert freed == pytest.approx(11 * 2 * 512 * 16384, rel=0.1), "one input is being read"
    assert offloaded.memory.rank_host[INPUTS_ON_HOST] == 12 * 2 * 512 * 16384
    more_on_host = offloaded.memory.host_total - full.memory.host_total
    assert more_on_host == pytest.approx(12 * 2 * 512 * 16384)
    assert offloaded.trace.linear_flops == full.trace.linear_flops
    kept = selective.trace.peak - full.trace.peak
    per_token = 2 * (8 * 64 + 4 * 64 + 512 + 1536) + 4 * 8
    assert kept == pytest.approx(12 * per_token * 16384, rel=0.15)
    # Of the products of a layer k, o and up are not computed again.
    saved = full.trace.linear_flops["policy"] - selective.trace.linear_flops["policy"]
    assert saved == 2 * 12 * 16384 * 512 * (4 * 64 + 8 * 64 + 1536)
    assert selective.trace.attention_flops["policy"] < full.trace.attention_flops["policy"]
    assert "offload_activations" in text_of(offloaded, [], explain=False)


def model_of_layers(directory: Path, num_layers: int) -> str:
    """The model of `model`, with so many layers."""
    shape = Qwen3Config(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
    )
    shape.save_pretrained(directory)
    return f"model.path={directory}"


@pytest.mark.chaos
def test_moments_on_the_host_are_part_of_the_plan(model: str) -> None:
    on_device, on_host = small(model), small(model, "trainer.offload_optimizer=true")
    moments = 8 * on_device.trace.num_params
    assert on_device.trace.resident_bytes["Adam's moments"] == pytest.approx(moments, rel=0.01)
    assert on_host.trace.resident_bytes.get("Adam's moments", 0) < 0.01 * moments
    assert on_host.trace.on_host_bytes == {MOMENTS_ON_HOST: moments}
    assert on_host.trace.resident == pytest.approx(on_device.trace.resident - moments, rel=0.01)


@pytest.mark.chaos
def test_the_host_of_rank_0_is_judged(model: str) -> None:
    config = load_config([model, *SMALL, "trainer.groups_per_step=16"])
    plan = make_plan(config, gpus="8+16xH100", host_gib=64)
    memory, pushed = plan.memory, plan.pushed_bytes
    assert plan.fits and memory.snapshots == 2 and memory.rank_host[SNAPSHOTS] == 2 * pushed
    assert memory.host_total == pytest.approx(8 * memory.other_rank_host + 2 * pushed)
    tight = (memory.host_total - 0.5 * pushed) / GIB
    small_host = make_plan(config, gpus="8+16xH100", host_gib=tight)
    assert not small_host.fits and "the host of trainer rank 0 needs" in small_host.memory.problems[0]
    (change,) = changes_until_it_fits(small_host)
    assert change.text == "weights.num_snapshots=1" and change.plan.fits
    assert memory.host_total - change.plan.memory.host_total == pytest.approx(pushed)


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "copies", "text"),
    [("embedded", 3, "all bytes, as after a join"), ("sglang", 2, "all bytes: SGLang takes no deltas")],
)
def test_the_base_of_deltas_is_part_of_the_plan(model: str, engine: str, copies: int, text: str) -> None:
    config = load_config(
        [model, *SMALL, "trainer.groups_per_step=16", "weights.delta=auto", f"rollout.engine={engine}"]
    )
    plan = make_plan(config, gpus="8+16xH100", host_gib=64)
    assert plan.memory.rank_host[SNAPSHOTS] == copies * plan.pushed_bytes
    assert any(text in line for line in plan.estimate.formulas)


@pytest.mark.chaos
def test_lora_is_part_of_the_plan(model: str) -> None:
    settings = ("trainer.gradient_checkpointing=false", "kl.coef=0.1")
    full = small(model, *settings)
    merged = small(model, *settings, "model.lora.rank=8")
    assert merged.trace.num_params == full.trace.num_params and full.trace.num_adapter == 0
    # Two layers: rows of A and columns of B for 4 matrices of attention and 3 of the MLP.
    sizes = (512 + 512, *[512 + 256] * 2, 512 + 512, *[512 + 1536] * 3)
    assert merged.trace.num_trained == merged.trace.num_adapter == 2 * 8 * sum(sizes)

    parts = merged.trace.peak_bytes
    assert parts["base model (frozen)"] == 2 * merged.trace.num_params
    states = ("adapter (float32 masters)", "gradients", "Adam's moments")
    assert sum(parts[part] for part in states) == pytest.approx(16 * merged.trace.num_adapter, rel=0.01)
    # What the next push is compared with: another copy of A and B.
    assert parts["merging for pushes (float32)"] == pytest.approx(4 * merged.trace.num_adapter, rel=0.01)
    # The reference is the base without the adapter: a forward, and no memory.
    assert "reference model" in full.trace.resident_bytes
    assert "reference model" not in merged.trace.resident_bytes
    assert merged.trace.linear_flops["reference"] == full.trace.linear_flops["reference"]
    # No gradients of frozen weights: two products in place of three, in the recomputed head three in place of
    # four, and those of the adapter.
    share = merged.trace.linear_flops["policy"] / full.trace.linear_flops["policy"]
    assert 0.6 < share < 0.8

    text = text_of(merged, [], explain=True)
    assert "rank 8, all-linear" in text and "all weights, merged with the adapter" in text
    assert json_of(merged, [])["model"]["num_trained"] == merged.trace.num_trained


@pytest.mark.chaos
def test_teachers_are_part_of_the_plan(model: str, tmp_path: Path) -> None:
    """Of two teachers both are in memory, and the larger one's FLOPs are counted."""
    large = model.partition("=")[2]
    folder = with_layers(with_local_model(load_config([model]))[1], 1, tmp_path / "one").directory
    plain = small(model)
    taught = small(
        model,
        "objective=distill",
        f"distill.teachers={{math: {folder}, default: {large}, code: 'http://x:1'}}",
    )
    (name,) = taught.trace.resident_bytes.keys() - plain.trace.resident_bytes.keys()
    num_params = sum(
        param.numel()
        for path in (folder, large)
        for param in build_skeleton(path, dtype=torch.bfloat16).parameters()
    )
    assert name == "teachers (distill.teachers)"
    assert taught.trace.resident_bytes[name] == pytest.approx(2 * num_params, rel=0.01)
    # A forward alone, and no product with the head at prompts.
    flops = taught.trace.linear_flops
    assert 0.2 < flops["teacher"] / flops["policy"] < 0.4 and "teacher" not in plain.trace.linear_flops
    full = small(model, "objective=distill", f"distill.teachers.default={large}", "distill.loss=full")
    more = full.trace.peak_bytes["logits of the head"] - plain.trace.peak_bytes["logits of the head"]
    assert more >= 4 * 32_000 * 448  # at least the sampled tokens of one sequence


@pytest.mark.chaos
def test_a_push_of_the_adapter_alone(model: str) -> None:
    lengths = ("sampling.max_new_tokens=4096", "rollout.max_context=8192")  # of the test's model
    settings = (model, "scale=2xh100_8b_lora", "max_staleness=4", *lengths)
    whole = make_plan(load_config([*settings, "weights.lora=merged"]))
    alone = make_plan(load_config([*settings, "weights.lora=adapter"]))
    adapter = 2 * alone.trace.num_adapter
    assert (whole.pushed_bytes, alone.pushed_bytes) == (2 * whole.trace.num_params, adapter)
    assert "merging for pushes (float32)" not in alone.trace.resident_bytes
    assert (whole.memory.host[SNAPSHOTS], alone.memory.host[SNAPSHOTS]) == (
        2 * whole.pushed_bytes,
        2 * adapter,
    )
    # One slot for each version within the bound, for the one that is pushed, and for requests without one.
    engine = alone.memory.engine
    assert whole.memory.engine.adapters == 0 and engine.adapters == 7 * adapter
    assert whole.memory.engine.kv_cache - engine.kv_cache == pytest.approx(engine.adapters)
    assert "adapters: 7 slots" in text_of(alone, [], explain=False)
    assert alone.estimate is not None and any("gloo" in formula for formula in alone.estimate.formulas)


@pytest.mark.chaos
def test_proximal_policy_is_part_of_the_trace(model: str) -> None:
    """Its weights are as large as the masters, and its forward is a third of forward and backward."""
    trace = small(model, "objective.prox=average", "objective=decoupled_ppo").trace
    masters = trace.resident_bytes["weights (float32 masters)"]
    assert trace.resident_bytes["proximal policy (float32)"] == masters
    assert trace.linear_flops["proximal"] == pytest.approx(trace.linear_flops["policy"] / 3, rel=0.35)
    assert "proximal" not in small(model).trace.linear_flops


def test_worst_packing_pads_most() -> None:
    for context, budget in ((512, 512), (512, 513), (500, 2048), (4096, 16384)):
        lengths = Lengths(context=context, max_response=context - 1, prompt=1, response=1)
        packed = worst_lengths(lengths, budget_tokens=budget)
        assert max(packed) == context and sum(packed) <= budget
        padded = sum(
            n * longest
            for n, longest in (
                (r.num_sequences, r.num_queries) for r in RectangleLayout.of(packed).rectangles
            )
        )
        assert padded <= 2 * sum(packed)
        if budget >= 4 * context:
            assert padded > 1.9 * budget


def test_engine_memory_and_time(model: str) -> None:
    plan = make_plan(load_config(["scale=1xh100_1.7b", model, "rollout.sglang.args="]), gpus="1+1xA100")
    engine = plan.memory.engine
    # 2 layers x keys and values x 4 heads x 64 x 2 bytes.
    assert engine.kv_per_token == 2 * 2 * 4 * 64 * 2
    assert engine.weights + engine.kv_cache + engine.other == pytest.approx(80e9)
    short = replace(plan.config.rollout.sglang, args="--kv-cache-dtype fp8_e4m3")
    in_8_bits = with_settings(plan, rollout=replace(plan.config.rollout, sglang=short))
    assert engine_memory(in_8_bits).kv_per_token == engine.kv_per_token / 2
    halved = engine_memory(plan, trainer_bytes=40e9)
    assert halved.num_tokens < 0.6 * engine.num_tokens
    slow, fast = (estimated(plan, response) for response in (4000.0, 1000.0))
    assert slow["train_s"] > fast["train_s"] and slow["generate_s"] > 3.9 * fast["generate_s"]
    synchronous = replace(plan, config=replace(plan.config, max_staleness=0))
    waiting = estimated(synchronous, 1000.0)
    assert waiting["step_s"] >= waiting["train_s"] + waiting["generate_s"] and waiting["lag"] == 0
    assert waiting["trainer_idle"] > 0 and waiting["engine_idle"] > 0


def estimated(plan: Plan, response: float) -> dict[str, Any]:
    return vars(estimate(replace(plan, lengths=replace(plan.lengths, response=response)), plan.memory.engine))


def test_what_the_bound_costs_is_said(model: str) -> None:
    plan = small(model, "max_staleness=4", "buffer.overdue=wait")
    assert plan.estimate is not None
    short, long = plan.estimate.staleness
    assert (short.spread, long.spread) == SPREADS and 0 < long.waiting <= short.waiting <= 1
    text = text_of(plan, [], explain=True)
    assert "throughput / limit with wait, spread 0.5 and 1" in text
    assert f"max_staleness=4 with a spread of 1: wait reaches {long.waiting:.0%} of the limit" in text
    json.dumps(json_of(plan, []))

    costly = replace(long, waiting=0.4, masked=0.2)
    lines = advised(plan, costly)
    assert "buffer.overdue=wait makes steps wait for the slowest samples: 40% of the limit" in lines
    assert (
        "buffer.overdue=close reaches 100% and masks 20% of the tokens; at most 5% with max_staleness="
        in lines
    )
    assert "staleness.close_after=4" in lines
    assert "max_staleness=" not in advised(plan, replace(costly, masked=0.01))
    assert advised(plan, replace(costly, waiting=0.95)) == ""
    pairs = with_settings(plan, objective={"name": "rebel"})
    assert "close would not, but objective.name=rebel needs whole groups." in advised(pairs, costly)
    dropping = with_settings(plan, buffer=replace(plan.config.buffer, overdue="drop"))
    assert "buffer.overdue=drop throws away samples" in advised(dropping, costly)
    closing = with_settings(plan, buffer=replace(plan.config.buffer, overdue="close"))
    assert " masks at most 5% of the tokens instead of 20% (spread 1)" in advised(closing, costly)
    assert advised(closing, replace(costly, masked=0.01)) == ""


@pytest.mark.chaos
def test_closing_changes_the_expected_lag(model: str) -> None:
    plan = small(model, "buffer.overdue=close", "max_staleness=16")
    assert plan.estimate is not None
    assert plan.estimate.lag == pytest.approx(plan.estimate.staleness[-1].lag) and plan.estimate.lag < 16
    assert "buffer.overdue=close does not let the engines run ahead" in text_of(plan, [], explain=True)
    assert plan.fits and small(model, "max_staleness=0").estimate.staleness == ()  # type: ignore[union-attr]


def with_settings(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, config=replace(plan.config, **changes))


def advised(plan: Plan, forecast: Forecast) -> str:
    """What the report advises about the bound if its cost were this."""
    assert plan.estimate is not None
    found = replace(plan.estimate, staleness=(*plan.estimate.staleness[:-1], forecast))
    text = text_of(replace(plan, estimate=found), [], explain=False)
    table = text.index("tokens beyond max_staleness with close")
    return " ".join(text[text.index("\n", table) : text.index("--explain")].split())


def test_gpus_and_shapes() -> None:
    assert parse_gpus("4+4xh100").text == "4+4xH100" and not parse_gpus("4+4xh100").is_shared
    assert parse_gpus("2xB200").is_shared and parse_gpus("2xB200").num_gpus == 2
    assert not parse_gpus("32+32xH200").is_one_host
    assert all(gpu.bf16_flops > gpu.float32_flops for gpu in GPUS.values())
    for name in known_shapes():
        _, shape = with_local_model(Config(model=replace(Config().model, path=f"some/{name.upper()}")))
        assert shape.num_heads % shape.num_kv_heads == 0, name
    lengths = lengths_of(load_config([]), max_positions=512)
    assert lengths.context == 10 + sum((8, 2))
