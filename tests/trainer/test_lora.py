"""LoRA in the trainer: what is trained, gradients, pushes, checkpoints, PEFT's directories in and out."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_like.config import LoraConfig, from_mapping
from areal_like.errors import ConfigError
from areal_like.paths import model_path
from areal_like.trajectory import Trajectory
from areal_like.weights.hf_layout import adapter_tensors, is_adapter
from areal_like.weights.snapshots_on_disk import newest_snapshot
from launch import cli
from tests.support.lazily import lazily
from tests.support.lora_ranks import LORA, METHODS, adapter_of, pushed
from tests.support.moe_model import write_moe_model
from tests.support.quick import only_in_chaos, others_in_chaos
from tests.support.trainer_helpers import VOCAB, dense_logprobs, random_groups, run_ranks, write_model
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import MODEL_PREFIX, local
from trainer.metrics.model_flops import ModelFlops, cost_of
from trainer.models.lora import targets_of
from trainer.models.policy import BaseReference, Policy
from trainer.step.recipe import StepRecipe
from trainer.step.runner import StepRunner
from trainer.weights.push_source import LOST_UPDATES
from trainer.weights.snapshot import BackgroundGather, BoundaryGather

peft = lazily("peft")
F32 = torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("base"), "qwen3", dtype=F32)


def trained_runner(path: str, ranks: Ranks, *, steps: int = 2, **changes: Any) -> StepRunner:
    """A runner whose adapter has been trained, so that B is no longer zero."""
    settings: dict[str, Any] = {"lora": LORA, **changes}
    runner = make_runner(path, ranks, dtype=F32, **settings)
    for step in range(steps):
        runner.run(random_groups(4, seed=step), step=step)
    return runner


def saved(runner: StepRunner, ranks: Ranks, root: Path, path: str, *, step: int = 2) -> Path:
    """A checkpoint of a runner."""
    checkpoints = Checkpoints(root, keep=9, tokenizer_path=path)
    checkpoints.save(step, ranks=ranks, extra={}, **runner.saved)
    checkpoints.wait()
    checkpoints.close()
    return checkpoints.path(step)


def trajectories() -> list[Trajectory]:
    return [t for group in random_groups(4, seed=9) for t in group]


def log_probs(policy: Callable[..., Any]) -> Tensor:
    """Of the sampled tokens of `trajectories()`."""
    samples = [TrainingSample(trajectory=t, advantage=0.0, group=0) for t in trajectories()]
    with torch.no_grad():
        logps: Tensor = policy(collate(samples)).logprobs_S
        return logps


def dense(model: Any) -> Tensor:
    """The same by transformers on a padded batch."""
    with torch.no_grad():
        logp_BL = dense_logprobs(model, trajectories())
    rows = zip(logp_BL, trajectories(), strict=True)
    return torch.cat([row[: t.num_tokens][torch.from_numpy(t.loss_mask) > 0] for row, t in rows])


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def trained_sizes(model: nn.Module) -> dict[str, int]:
    """Name of each parameter that is trained -> its number of elements."""
    return {name: param.numel() for name, param in model.named_parameters() if param.requires_grad}


def test_only_the_adapter_is_trained(base: str, ranks: Ranks) -> None:
    runner = make_runner(base, ranks, dtype=F32, lora=LORA)
    before = {name: param.detach().clone() for name, param in runner.policy.model.named_parameters()}
    for step in range(2):
        runner.run(random_groups(4, seed=step), step=step)
    for name, param in runner.policy.model.named_parameters():
        assert torch.equal(param.detach(), before[name]) != is_adapter(name), name
    sizes = trained_sizes(runner.policy.model)
    assert sizes.keys() == {name for name in before if is_adapter(name)}
    assert runner.optimizer.shards.keys() == {MODEL_PREFIX + name for name in sizes}
    assert len(runner.optimizer._adam.state) == len(sizes)
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert targets_of(runner.policy.model) == tuple(sorted(layers))
    assert len(adapter_tensors(runner.policy.model)) == 2 * 2 * len(layers)


def test_the_base_is_frozen_in_the_dtype_of_the_forward(base: str, ranks: Ranks) -> None:
    policy = Policy.load(base, ranks, dtype="bfloat16", lora_settings=LORA)
    for name, param in policy.model.named_parameters():
        assert param.dtype == (F32 if is_adapter(name) else torch.bfloat16), name
        assert param.requires_grad == is_adapter(name)


def test_a_new_adapter_and_the_reference_are_the_base(base: str, ranks: Ranks) -> None:
    expected = log_probs(Policy.load(base, ranks))
    assert torch.equal(log_probs(make_runner(base, ranks, dtype=F32, lora=LORA).policy), expected)
    policy = trained_runner(base, ranks).policy
    assert difference(log_probs(policy), expected) > 1e-3
    assert torch.equal(log_probs(BaseReference(policy)), expected)
    assert difference(log_probs(policy), expected) > 1e-3
    assert policy.with_entropy


@pytest.mark.parametrize(
    ("kind", "architecture"),
    others_in_chaos(
        itertools.product((BackgroundGather, BoundaryGather), ("qwen3", "llama")),
        quick=[(BackgroundGather, "qwen3"), (BoundaryGather, "llama")],
    ),
)
def test_merged_pushes_have_the_trainers_log_probs(
    tmp_path: Path, ranks: Ranks, kind: Any, architecture: str
) -> None:
    path = write_model(tmp_path, architecture, dtype=F32)  # Llama with tied embeddings
    policy = trained_runner(path, ranks).policy
    model = AutoModelForCausalLM.from_pretrained(path, dtype=F32)
    weights = pushed(policy, ranks, kind=kind)
    assert weights.keys() == {name for name, _ in model.named_parameters()}
    assert difference(log_probs(policy), dense(model)) > 1e-3
    model.load_state_dict(weights, strict=False)
    assert difference(log_probs(policy), dense(model)) < 1e-4


def test_updates_that_rounding_undoes_are_counted(base: str, ranks: Ranks) -> None:
    runner = trained_runner(base, ranks)
    policy = runner.policy
    adapter = {name: param for name, param in policy.model.named_parameters() if is_adapter(name)}
    merged, shares = [], []
    snapshotter = BackgroundGather(policy, ranks, bucket_bytes=4096, dtype="bfloat16")
    for factor in (1.0, 1.0, 1.003):
        with torch.no_grad():
            for name, param in adapter.items():
                if ".lora_B." in name:
                    param.mul_(factor)
        snapshotter.take_snapshot()
        merged.append(pushed(policy, ranks))
        shares.append(snapshotter.metrics[LOST_UPDATES])
    snapshotter.close()
    changed = {name: merged[2][name] != merged[1][name] for name in merged[0] if "_proj" in name}
    lost = {name: merged[2][name].bfloat16() == merged[1][name].bfloat16() for name in changed}
    num_lost = sum(int((changed[name] & lost[name]).sum()) for name in changed)
    assert shares[:2] == [0.0, 0.0]
    assert shares[2] == pytest.approx(num_lost / sum(int(each.sum()) for each in changed.values()))
    assert 0.3 < shares[2] < 1


@pytest.mark.long
def test_two_ranks_train_push_and_score_as_one(base: str, tmp_path: Path) -> None:
    for world_size in (1, 2):
        (tmp_path / str(world_size)).mkdir()
        run_ranks(
            "steps",
            str(tmp_path / str(world_size)),
            base,
            world_size=world_size,
            module="tests.support.lora_ranks",
        )
    for name in ("plain", *METHODS, "layers"):
        one, two = (load_file(tmp_path / str(size) / f"{name}.safetensors") for size in (1, 2))
        assert one.keys() == two.keys() and len(one) > 60
        for key, value in one.items():
            # Adam divides by the root of a tiny second moment, so rounding of gradients shows.
            assert difference(value, two[key]) < 1e-4, (name, key)
        metrics = [json.loads((tmp_path / str(size) / f"{name}.json").read_text()) for size in (1, 2)]
        for key in ("loss", "grad_norm", "entropy", "kl_k3", *(["value_loss"] if name == "critic" else [])):
            assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-3, abs=1e-6), (name, key)


def test_gradients_of_a_bfloat16_forward_are_float32(base: str, tmp_path: Path) -> None:
    """On two ranks with the base frozen in bfloat16, they are those of float32 up to rounding."""
    run_ranks("narrow", str(tmp_path), base, world_size=2, module="tests.support.lora_ranks")
    exact, narrow = (load_file(tmp_path / f"{dtype}.safetensors") for dtype in ("float32", "bfloat16"))
    assert exact.keys() == narrow.keys()
    for name, value in exact.items():
        # B is zero, so A has no gradient yet.
        assert ".lora_A." in name or float((narrow[name] - value).norm()) < 0.05 * float(value.norm()), name


@pytest.mark.parametrize("method", others_in_chaos(["plain", *METHODS], quick=["plain"]))
def test_a_resumed_run_is_the_same_to_the_last_bit(
    base: str, tmp_path: Path, ranks: Ranks, method: str
) -> None:
    settings = METHODS.get(method)
    runner = trained_runner(base, ranks, settings=settings)
    folder = saved(runner, ranks, tmp_path / "checkpoints", base)
    runner.run(random_groups(4, seed=2), step=2)
    straight = saved(runner, ranks, tmp_path / "straight", base, step=3)
    other = make_runner(base, ranks, dtype=F32, lora=LORA, settings=settings, has_weights=False)
    Checkpoints(tmp_path / "checkpoints", keep=9, tokenizer_path=base).load(2, ranks=ranks, **other.saved)
    other.run(random_groups(4, seed=2), step=2)
    resumed = saved(other, ranks, tmp_path / "resumed", base, step=3)
    files = sorted(file.relative_to(straight) for file in straight.glob("**/*.safetensors"))
    assert len(files) == 3 + (method in ("critic", "proximal"))
    for file in files:
        assert (straight / file).read_bytes() == (resumed / file).read_bytes(), file
    # Neither the base nor its moments are in the checkpoint.
    names = {name for file in folder.glob("**/policy*.safetensors") for name in load_file(file)}
    assert names and all(".lora_" in name for name in names)
    assert not list(folder.glob("model*")) and not (folder / "config.json").exists()


@pytest.mark.long
def test_a_checkpoint_resumes_at_another_number_of_ranks(base: str, tmp_path: Path, ranks: Ranks) -> None:
    runner = trained_runner(base, ranks)
    saved(runner, ranks, tmp_path / "checkpoints", base)
    runner.run(random_groups(4, seed=2), step=2)
    run_ranks("resume", str(tmp_path), base, world_size=2, module="tests.support.lora_ranks")
    other = make_runner(base, ranks, dtype=F32, lora=LORA, has_weights=False)
    Checkpoints(tmp_path / "checkpoints", keep=9, tokenizer_path=base).load(3, ranks=ranks, **other.saved)
    ours, theirs = adapter_of(runner.policy), adapter_of(other.policy)
    assert all(difference(ours[name], theirs[name]) < 1e-4 for name in ours)
    assert difference(log_probs(runner.policy), log_probs(other.policy)) < 1e-4


def test_peft_loads_checkpoints_and_its_directories_are_read(base: str, tmp_path: Path, ranks: Ranks) -> None:
    policy = trained_runner(base, ranks).policy
    folder = saved(trained_runner(base, ranks), ranks, tmp_path, base)
    expected = log_probs(policy)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=F32), folder)
    assert difference(dense(model.get_base_model()), expected) < 1e-4
    assert AutoTokenizer.from_pretrained(folder).vocab_size  # the whole directory is one that users can load
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    model.save_pretrained(tmp_path / "by-peft")
    for start in (folder, tmp_path / "by-peft"):
        again = Policy.load(base, ranks, lora_settings=LoraConfig(rank=3, alpha=12.0, path=str(start)))
        assert torch.equal(log_probs(again), expected)
    assert newest_snapshot(tmp_path) is None  # engines cannot load it


def edited(folder: Path, target: Path, **changes: Any) -> str:
    """A copy of a PEFT directory with other values in its configuration."""
    shutil.copytree(folder, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | changes))
    return str(target)


def test_what_is_not_plain_lora_is_refused_by_its_key(base: str, tmp_path: Path, ranks: Ranks) -> None:
    folder = saved(trained_runner(base, ranks, steps=1), ranks, tmp_path / "run", base)

    def load(path: str, *, model: str = base, **settings: Any) -> None:
        Policy.load(
            model, ranks, lora_settings=LoraConfig(**{"rank": 3, "alpha": 12.0, "path": path, **settings})
        )

    load(str(folder))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"use_dora": True}, "use_dora=true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_rslora": True}, "use_rslora=true.*lora_alpha to 20.78"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"r": 4}, "set model.lora.rank=4"),
        ({"lora_alpha": 6}, "set model.lora.alpha=6"),
        ({"r": "4"}, "want positive numbers"),
    ]
    for number, (changes, message) in enumerate(refused):
        with pytest.raises(ConfigError, match=message):
            load(edited(folder, tmp_path / f"edited-{number}", **changes))
    with pytest.raises(ConfigError, match=r"set model.lora.targets=\[down_proj,gate_proj,.*v_proj\]"):
        load(str(folder), targets=("q_proj",))
    with pytest.raises(ConfigError, match="no layer of this name; use some of down_proj"):
        load(str(folder), targets=("query",))
    with pytest.raises(ConfigError, match=r"lm_head.*cannot have an adapter"):
        load(str(folder), targets=("lm_head",))
    with pytest.raises(ConfigError, match=r"no adapter_model.safetensors"):
        load(base)
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model.bin.*save_pretrained"):
        load(str(pickled))
    # Another base: its digest, then without the run's file its shapes.
    other = write_model(tmp_path / "other", "qwen2", dtype=F32)
    with pytest.raises(ConfigError, match=f"another base: set model.path to {base}"):
        load(str(folder), model=other)
    bare = Path(edited(folder, tmp_path / "bare"))
    (bare / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match=r"k_proj.*has shape.*set model.path"):
        load(str(bare), model=other)
    tensors = load_file(bare / "adapter_model.safetensors")
    extra = {"base_model.model.lm_head.modules_to_save.weight": torch.zeros(VOCAB, 32)}
    save_file(tensors | extra, bare / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"modules_to_save.weight: only plain LoRA"):
        load(str(bare))


def test_a_checkpoint_is_refused_by_another_adapter_or_base(base: str, tmp_path: Path, ranks: Ranks) -> None:
    saved(trained_runner(base, ranks, steps=1), ranks, tmp_path, base)
    moved = shutil.copytree(base, tmp_path / "moved")
    changed = shutil.copytree(base, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})

    def load(path: str, lora: LoraConfig | None) -> None:
        runner = make_runner(path, ranks, dtype=F32, lora=lora)
        Checkpoints(tmp_path, keep=9, tokenizer_path=path).load(2, ranks=ranks, **runner.saved)

    load(str(moved), LORA)
    for path, lora, message in (
        (base, LoraConfig(rank=3, alpha=13.0), "model.lora.alpha=12"),
        (base, LoraConfig(rank=4, alpha=12.0), "model.lora.rank=3"),
        (base, LoraConfig(rank=3, alpha=12.0, targets=("q_proj",)), "model.lora.targets=down_proj"),
        (base, None, "checkpoint of an adapter: set model.lora.rank"),
        (str(changed), LORA, "another base"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(path, lora)


@pytest.mark.parametrize("dtype", ["", *only_in_chaos("bfloat16")])
def test_merge_writes_the_model_that_is_pushed(
    base: str, tmp_path: Path, ranks: Ranks, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = trained_runner(base, ranks).policy
    folder = saved(trained_runner(base, ranks), ranks, tmp_path / "run", base)
    into = tmp_path / "merged"
    argv = ["merge", str(folder), "--into", str(into), *(["--dtype", dtype] if dtype else [])]
    assert cli.main(argv) == 0
    assert base in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(into)
    assert merged.dtype == (torch.bfloat16 if dtype else F32)
    weights = pushed(policy, ranks, dtype=dtype or "float32")
    own = dict(merged.named_parameters())
    assert own.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.allclose(own[name].float(), value.float(), rtol=2**-8 if dtype else 1e-6, atol=1e-7), (
            name
        )
    if not dtype:
        assert difference(dense(merged), log_probs(policy)) < 1e-4
    Policy.load(str(into), ranks)
    assert cli.main(argv) == 2 and "name a new directory" in capsys.readouterr().err
    assert cli.main(["merge", base, "--into", str(tmp_path / "x")]) == 2
    assert "whole model already" in capsys.readouterr().err
    other = write_model(tmp_path / "other", "qwen2", dtype=F32)
    assert cli.main(["merge", str(folder), "--base", other, "--into", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_merge_says_what_its_user_changes(
    base: str, tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its messages name its own options, and no setting of `run`, which it does not have."""
    folder = saved(trained_runner(base, ranks, steps=1), ranks, tmp_path / "run", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    other = write_model(tmp_path / "other", "qwen2", dtype=F32)
    changed = shutil.copytree(base, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})

    def with_tensors(name: str, kept: dict[str, Tensor]) -> str:
        path = Path(edited(folder, tmp_path / name))
        save_file(kept, path / "adapter_model.safetensors")
        return str(path)

    moved = edited(folder, tmp_path / "moved", base_model_name_or_path=str(changed))
    first = {name: value for name, value in tensors.items() if ".layers.0." in name}
    layer = "base_model.model.lm_head"
    head = {f"{layer}.lora_A.weight": torch.zeros(3, 32), f"{layer}.lora_B.weight": torch.zeros(VOCAB, 3)}
    deeper = {name.replace(".layers.1.", ".layers.7."): value for name, value in tensors.items()}
    refused: list[tuple[str, list[str], str]] = [
        (str(folder), ["--base", other], f"leave out --base, and {base} is used"),
        (str(folder), ["--base", str(changed)], f"another base: leave out --base, and {base} is used"),
        (moved, [], f"{changed} has changed since then: give the model"),
        (moved, ["--base", str(changed)], "another base: give the model that the adapter was made for with"),
        (with_tensors("first", first), [], "merge needs matrices for every layer of the names down_proj,"),
        (with_tensors("head", tensors | head), [], "lm_head, and merge takes those of linear layers"),
        (with_tensors("deeper", deeper), [], f"does not have: {base} has changed since then"),
    ]
    for adapter, options, message in refused:
        assert cli.main(["merge", adapter, *options, "--into", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert message in error and "model.path" not in error and "model.lora" not in error, error
    assert not (tmp_path / "x").exists()


def test_experts_are_left_out_and_pushed_as_they_are(tmp_path: Path, ranks: Ranks) -> None:
    path = write_moe_model(tmp_path, vocab_size=VOCAB)
    policy = trained_runner(path, ranks).policy
    assert targets_of(policy.model) == ("k_proj", "o_proj", "q_proj", "v_proj")
    files = load_file(tmp_path / "model.safetensors")
    weights = pushed(policy, ranks)
    assert weights.keys() == files.keys()
    for name, value in weights.items():
        assert torch.equal(value, files[name]) != ("_proj.weight" in name and "self_attn" in name), name
    with pytest.raises(ConfigError, match="gate_up_proj"):
        Policy.load(path, ranks, lora_settings=LoraConfig(rank=2, targets=("gate_up_proj",)))


def test_norms_of_single_sequences(base: str, ranks: Ranks) -> None:
    """VCPO's gradient, whose baseline follows from norms of the adapter's gradients, by two methods."""
    gradients = []
    for kind in ("exact", "ghost"):
        settings = {"objective": {"name": "vcpo", "norms": kind}}
        runner = trained_runner(base, ranks, steps=0, beta1=0.0, settings=settings)
        with torch.no_grad():
            for name, param in runner.policy.model.named_parameters():
                if ".lora_B." in name:  # with zeros A has no gradient
                    local(param).copy_(torch.linspace(-0.1, 0.1, param.numel()).view(param.shape))
        runner.run(random_groups(4), step=0)
        gradients.append(last_gradient(runner))
    assert gradients[0].keys() == gradients[1].keys() and all(".lora_" in name for name in gradients[0])
    for name, value in gradients[0].items():
        assert float((value - gradients[1][name]).norm()) < 1e-4 * float(value.norm()) + 1e-8, name


def test_recomputed_activations_change_nothing(base: str, ranks: Ranks) -> None:
    plain = trained_runner(base, ranks).policy
    again = trained_runner(base, ranks, checkpointing=True).policy
    ours, theirs = adapter_of(plain), adapter_of(again)
    assert all(difference(ours[name], theirs[name]) < 1e-6 for name in ours)


def test_flops_leave_out_the_gradients_of_frozen_weights(base: str, ranks: Ranks) -> None:
    flops = ModelFlops.of(Policy.build(base, lora_settings=LORA).model)
    full = ModelFlops.of(Policy.build(base).model)
    adapter = sum(trained_sizes(Policy.build(base, lora_settings=LORA).model).values())
    assert (flops.frozen_body_weights, full.frozen_body_weights) == (full.body_weights, 0)
    assert flops.body_weights == full.body_weights + adapter and flops.is_head_frozen
    expected = 3 * full.of_forward([10], num_targets=4) - 2 * (10 * full.body_weights + 4 * full.head_weights)
    assert flops.of_step([10], num_targets=4) == expected + 6 * 10 * adapter
    assert full.of_step([10], num_targets=4) == 3 * full.of_forward([10], num_targets=4)
    assert cost_of(flops).per_row < cost_of(full).per_row


def test_settings_that_contradict_each_other_are_refused(base: str, tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"model.lora.dropout=0.1: .*areal-like sft"):
        StepRecipe.of(from_mapping({"model": {"lora": {"rank": 4, "dropout": 0.1}}}))
    for lora, message in (
        ({"path": "x"}, "model.lora.path needs a rank"),
        ({"rank": -1}, "model.lora.rank"),
        ({"rank": 4, "dropout": 1.0}, "model.lora.dropout=1"),
        ({"rank": 4, "targets": "q_proj"}, r"a list such as \[q_proj\]"),
        ({"rank": 4, "targets": []}, "model.lora.targets is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping({"model": {"lora": lora}})
    folder = saved(trained_runner(base, ranks, steps=1), ranks, tmp_path, base)
    with pytest.raises(ConfigError, match=r"is an adapter: set model.lora.path to it"):
        model_path(from_mapping({"model": {"path": str(folder)}}))
