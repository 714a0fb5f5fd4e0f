"""Models with parts that are not trained: wrapped ones on text, and mixtures with biased routers.

Their log-probs and gradients are transformers' own, and what is saved is the whole initial checkpoint with
the trained tensors replaced.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from areal_like.config import Config, LoraConfig, ModelConfig
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.runtime.command_line import load_config
from areal_like.weights.buckets import check_names, spec_of
from areal_like.weights.untrained import auto_class, left_out, persistent_buffers, text_config
from rollout_server.engine.models.loading import load
from rollout_server.engine.weights.bucket_receiver import BucketReceiver
from rollout_server.engine.weights.updater import _store_checkpoint
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from tests.rollout_server.engine.test_core import make_core, run, submit
from tests.support.engine_harness import reference_logprobs
from tests.support.families import BIASED, PARTLY_TRAINED, WRAPPED, is_trained, stored, write_family
from tests.support.lazily import lazily
from tests.support.snapshot_ranks import received
from tests.support.trainer_helpers import dense_logprobs, random_groups, run_ranks
from tests.support.trainer_ranks import last_gradient, make_runner
from tests.support.untrained_ranks import NUM_STEPS, measured_batch, train
from tests.trainer.test_policy import gradients, packed, sampled
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.merge import merge
from trainer.models.policy import Policy, build_policy
from trainer.models.value_model import ValueModel
from trainer.optimizer import ShardedAdamW
from trainer.planning.planner import make_plan
from trainer.prepare_model import prepare_model
from trainer.weights.snapshot import BackgroundGather

peft = lazily("peft")
CPU = torch.device("cpu")
F32 = torch.float32
QUICK = ("glm4_moe", "qwen3_5")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.chaos) for name in PARTLY_TRAINED]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of each family."""
    folder = tmp_path_factory.mktemp("models")
    for name in PARTLY_TRAINED:
        write_family(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What two ranks wrote after two steps, in a folder for each family that is tested."""
    out = tmp_path_factory.mktemp("trained")
    has_all = any(item.get_closest_marker("chaos") for item in request.session.items)
    paths = [str(models / name) for name in (PARTLY_TRAINED if has_all else QUICK)]
    run_ranks("steps", str(out), *paths, world_size=2, module="tests.support.untrained_ranks")
    return out


def by_transformers(path: Path, dtype: torch.dtype = F32) -> Any:
    """The whole model, with its tower, as transformers loads it."""
    config = AutoConfig.from_pretrained(path)
    model = auto_class(config).from_pretrained(path, dtype=dtype).eval()
    if dtype == torch.float64 and path.name in (*BIASED, "qwen3_5_moe"):
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", PARTLY_TRAINED)
def test_packed_equals_transformers_unpacked(family: str, models: Path) -> None:
    """Of a wrapped model on text, its own forward, tower included."""
    trajectories = [trajectory for group in random_groups(3) for trajectory in group]
    reference = by_transformers(models / family, torch.float64)
    want_S = sampled(dense_logprobs(reference, trajectories), trajectories)
    policy = Policy.load(str(models / family), Ranks.alone())
    got_S = policy(packed(trajectories)).logprobs_S
    torch.testing.assert_close(got_S.double(), want_S, rtol=0, atol=1e-5)
    want_S.sum().backward()
    got_S.sum().backward()
    want, got = gradients(reference), gradients(policy.model)
    assert want.keys() == got.keys() == {name for name, _ in policy.model.named_parameters()}
    for name, grad in got.items():
        torch.testing.assert_close(grad.double(), want[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", PARTLY_TRAINED)
def test_the_skeleton_has_only_what_is_trained(family: str, models: Path) -> None:
    policy = Policy.build(str(models / family))
    tensors = {name for name, _ in policy.model.named_parameters()}
    assert not [name for name in tensors if not is_trained(name, family)]
    assert bool(left_out(policy.model)) == (family in WRAPPED)
    assert bool(list(persistent_buffers(policy.model))) == (family in BIASED)
    untouched = {tensor.name for tensor in policy.untouched()}
    assert untouched == {name for name in stored(models / family) if not is_trained(name, family)} != set()
    critic = ValueModel.load(str(models / family), Ranks.alone())
    with torch.no_grad():
        assert not critic(measured_batch()).any()


@pytest.mark.parametrize("family", ALL)
def test_two_ranks_compute_what_one_computes(family: str, models: Path, trained: Path) -> None:
    runner = train(str(models / family), Ranks.alone())
    want = {name: grad.contiguous() for name, grad in last_gradient(runner).items()}
    got = load_file(trained / family / "gradient.safetensors")
    assert got.keys() == want.keys() and any(grad.any() for grad in got.values())
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    # The log-probs of both after two steps are those of transformers with the checkpoint's weights.
    facts = load_file(trained / family / "facts.safetensors")
    trajectories = [trajectory for group in random_groups(3, seed=9) for trajectory in group]
    [saved] = (trained / family / "checkpoints").glob("step_*")
    with torch.no_grad():
        dense_S = sampled(dense_logprobs(by_transformers(saved), trajectories), trajectories)
        alone_S = runner.policy(measured_batch()).logprobs_S
        before_S = Policy.load(str(models / family), Ranks.alone())(measured_batch()).logprobs_S
    torch.testing.assert_close(facts["logprobs_S"], dense_S, rtol=0, atol=1e-5)
    torch.testing.assert_close(facts["logprobs_S"], alone_S, rtol=0, atol=1e-3)  # Adam amplifies rounding
    assert float((dense_S - before_S).abs().max()) > 0.01, "the steps changed the model"


@pytest.mark.parametrize("family", ALL)
def test_a_checkpoint_is_the_whole_initial_one(family: str, models: Path, trained: Path) -> None:
    [saved] = (trained / family / "checkpoints").glob("step_*")
    initial, now = stored(models / family), stored(saved)
    pushed = load_file(trained / family / "pushed.safetensors")
    assert initial.keys() == now.keys()
    for name, tensor in now.items():
        trains = is_trained(name, family)
        assert trains == (name in pushed), name
        want = pushed[name] if trains else initial[name]
        assert tensor.dtype == want.dtype and torch.equal(tensor, want), name
        assert not trains or not torch.equal(tensor, initial[name]), name
    facts = load_file(trained / family / "facts.safetensors")
    untrained = {name.removeprefix("untrained.") for name in facts if name.startswith("untrained.")}
    assert untrained == initial.keys() - pushed.keys()
    index = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and index.keys() == now.keys()
    for name, file in index.items():
        with safe_open(saved / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a mapping
    # transformers loads it with its own classes, and every tensor of the files is there.
    model = by_transformers(saved)
    model.save_pretrained(saved / "again")
    again = stored(saved / "again")
    assert again.keys() == now.keys()
    assert not [name for name, tensor in again.items() if not torch.equal(tensor, now[name].float())]
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (saved, models / family))
    assert config["architectures"] == before["architectures"] and config["model_type"] == family
    assert config.get("vision_config") == before.get("vision_config")
    if family in WRAPPED:
        name = "preprocessor_config.json"
        assert (saved / name).read_bytes() == (models / family / name).read_bytes()


@pytest.mark.parametrize("family", ALL)
def test_a_checkpoint_resumes_on_one_rank(family: str, models: Path, trained: Path) -> None:
    path, out = str(models / family), trained / family
    config = Config(model=ModelConfig(path=path))
    resumed = build_policy(config, path, Ranks.alone(), with_weights=False)
    runner = make_runner(path, Ranks.alone(), dtype=F32, has_weights=False)
    for name, buffer in persistent_buffers(resumed.model):
        assert torch.equal(buffer, dict(persistent_buffers(runner.policy.model))[name]) and buffer.any(), name
        assert buffer.dtype == F32
    checkpoints = Checkpoints(out / "checkpoints", keep=1, tokenizer_path=path)
    checkpoints.load(NUM_STEPS, runner.policy, runner.optimizer, Ranks.alone())
    checkpoints.close()
    with torch.no_grad():
        logprobs_S = runner.policy(measured_batch()).logprobs_S
    torch.testing.assert_close(
        logprobs_S, load_file(out / "facts.safetensors")["logprobs_S"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("family", ALL)
def test_the_embedded_engine_takes_pushes_and_files(family: str, models: Path, trained: Path) -> None:
    [saved] = (trained / family / "checkpoints").glob("step_*")
    pushed = load_file(trained / family / "pushed.safetensors")
    core = make_core(models / family)
    facts = core.model.facts
    reference = by_transformers(saved)
    with torch.inference_mode():
        for way in ("push", "files"):
            receiver = BucketReceiver(core.model.new_weights(), facts, [])
            if way == "push":
                receiver.store(pushed)
            else:
                _store_checkpoint(saved, receiver, leaves_out=facts.untrained_names)
            check_names(receiver.received, facts.parameter_shapes, tied=facts.tied_names)
            core.model.activate(receiver.weights)
            sequence = submit(core, [5, 6, 7, 9], max_new_tokens=8)
            run(core)
            want = reference_logprobs(reference, [5, 6, 7, 9], sequence.output_ids)
            assert float(abs(want - sequence.output_logprobs).max()) < 1e-4, way


@pytest.mark.parametrize("family", ALL)
def test_an_engine_is_told_what_is_not_pushed(family: str, models: Path, trained: Path) -> None:
    """SGLang's checkpoint has tensors that no push contains; others must not be missing."""
    pushed = load_file(trained / family / "pushed.safetensors")
    specs = [spec_of(name, tensor) for name, tensor in pushed.items()]
    shapes = CheckpointShapes.of(str(models / family))
    untrained = shapes.shapes.keys() - pushed.keys()
    shapes.check(specs, untrained=untrained)
    with pytest.raises(WeightSyncError, match="missing"):
        shapes.check(specs)
    with pytest.raises(WeightSyncError, match="missing"):
        shapes.check(specs[1:], untrained=untrained)


@pytest.mark.parametrize("family", ["qwen3_5", "glm4_moe"])
def test_an_adapter_is_that_of_peft_and_is_merged(family: str, models: Path, tmp_path: Path) -> None:
    path, ranks = str(models / family), Ranks.alone()
    targets = ("q_proj", "o_proj", *(("in_proj_qkv", "out_proj") if family == "qwen3_5" else ()))
    lora = LoraConfig(rank=2, alpha=4.0, targets=targets)
    runner = make_runner(path, ranks, dtype=F32, lora=lora)
    for step in range(2):
        runner.run(random_groups(4, seed=step), step=step)
    checkpoints = Checkpoints(tmp_path / "run", keep=1, tokenizer_path=path)
    checkpoints.save(2, runner.policy, runner.optimizer, ranks, extra={})
    checkpoints.wait()
    checkpoints.close()
    folder = checkpoints.path(2)
    trajectories = [trajectory for group in random_groups(3, seed=9) for trajectory in group]
    with torch.no_grad():
        want_S = runner.policy(measured_batch()).logprobs_S
        # PEFT finds every matrix in the model with its tower.
        names = set(load_file(folder / "adapter_model.safetensors"))
        by_peft = peft.PeftModel.from_pretrained(by_transformers(models / family), folder)
        assert names == set(peft.get_peft_model_state_dict(by_peft))
        got_S = sampled(dense_logprobs(by_peft.get_base_model(), trajectories), trajectories)
        torch.testing.assert_close(got_S, want_S, rtol=0, atol=1e-4)
        merge(str(folder), tmp_path / "merged")
        merged = by_transformers(tmp_path / "merged")
        got_S = sampled(dense_logprobs(merged, trajectories), trajectories)
        torch.testing.assert_close(got_S, want_S, rtol=0, atol=1e-4)
    initial, now = stored(models / family), stored(tmp_path / "merged")
    assert initial.keys() == now.keys()
    for name, tensor in initial.items():
        if not is_trained(name, family):
            assert tensor.dtype == now[name].dtype and torch.equal(tensor, now[name]), name


def test_other_tensors_of_the_files_are_kept(models: Path, tmp_path: Path) -> None:
    """Layers for speculative decoding, in integers too; and old files' rotary frequencies are not."""
    path = shutil.copytree(models / "qwen3_5", tmp_path / "model")
    extra = {"mtp.fc.weight": torch.arange(6, dtype=torch.int8).view(2, 3), "mtp.scale": torch.tensor(0.5)}
    old = {"model.language_model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(
        load_file(path / "model.safetensors") | extra | old, path / "model.safetensors", {"format": "pt"}
    )
    runner = make_runner(str(path), Ranks.alone(), dtype=F32)
    checkpoints = Checkpoints(tmp_path / "run", keep=1, tokenizer_path=str(path))
    checkpoints.save(1, runner.policy, runner.optimizer, Ranks.alone(), extra={})
    checkpoints.wait()
    saved = stored(checkpoints.path(1))
    assert not old.keys() & saved.keys()
    for name, tensor in extra.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor)
    # A checkpoint that cannot have them fails, instead of being a part of a model.
    (path / "model.safetensors").rename(path / "elsewhere")
    checkpoints.save(2, runner.policy, runner.optimizer, Ranks.alone(), extra={})
    with pytest.raises(ConfigError, match="keep its files until the run has ended"):
        checkpoints.wait()
    checkpoints.close()
    assert not checkpoints.path(2).exists()


def test_a_resume_without_other_tensors_is_refused(tmp_path: Path) -> None:
    """Of a model that needs nothing else of the initial files; the files of a checkpoint can replace them."""
    path = Path(write_family("qwen3_next", tmp_path / "model"))
    file = path / "model.safetensors"
    save_file(load_file(file) | {"mtp.scale": torch.tensor(0.5)}, file, {"format": "pt"})
    runner = make_runner(str(path), Ranks.alone(), dtype=F32)
    checkpoints = Checkpoints(tmp_path / "run", keep=1, tokenizer_path=str(path))
    checkpoints.save(1, runner.policy, runner.optimizer, Ranks.alone(), extra={})
    checkpoints.close()
    saved = checkpoints.path(1)
    file.unlink()

    def resume() -> None:
        policy = build_policy(
            Config(model=ModelConfig(path=str(path))), str(path), Ranks.alone(), with_weights=False
        )
        Checkpoints(tmp_path / "run", keep=1, tokenizer_path=str(path)).load(
            1, policy, ShardedAdamW(policy, Ranks.alone(), lr=0.1), Ranks.alone()
        )

    with pytest.raises(ConfigError, match=r"1 tensors that are not trained \(mtp\.scale, .*files back"):
        resume()
    for one in saved.glob("model*"):
        shutil.copy(one, path)
    resume()
    (saved / "model-00002-of-00002.safetensors").write_bytes(bytes(16))
    with pytest.raises(ConfigError, match=r"not a safetensors file.*resume from another step"):
        resume()


def test_files_that_lack_what_is_not_trained_are_refused(models: Path, tmp_path: Path) -> None:
    path = shutil.copytree(models / "glm4_moe", tmp_path / "model")
    config = Config(model=ModelConfig(path=str(path)))
    assert prepare_model(config) == str(path)
    tensors = load_file(path / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for change, message in (
        ({bias: torch.zeros(7)}, rf"{bias} has shape \[7\], and Glm4MoeForCausalLM needs \[8\]"),
        ({bias: None}, f"lack {bias} of Glm4MoeForCausalLM"),
        ({"model.visual.patch.weight": torch.zeros(2)}, "which Glm4MoeForCausalLM does not have"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            prepare_model(config)
    save_file({k: v for k, v in tensors.items() if k != bias}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"lack {bias}"):
        load(str(path), dtype=F32, device=CPU, context_length=32)


def test_a_bias_stays_in_float32(models: Path) -> None:
    """Also in a bfloat16 forward, of the trainer and of the engine."""
    policy = Policy.load(str(models / "glm4_moe"), Ranks.alone(), dtype="bfloat16")
    module, _ = load(str(models / "glm4_moe"), dtype=torch.bfloat16, device=CPU, context_length=32)
    want = stored(models / "glm4_moe")["model.layers.1.mlp.gate.e_score_correction_bias"]
    with torch.no_grad():
        policy(measured_batch())
    for model in (policy.model, module._module):  # type: ignore[attr-defined]
        [(_, bias)] = persistent_buffers(model)
        assert bias.dtype == F32 and torch.equal(bias, want)


def test_float32_vectors_under_the_wrapper(models: Path, tmp_path: Path) -> None:
    """Of linear attention, in a bfloat16 checkpoint: the trainer, its files and the engine keep them."""
    path = shutil.copytree(models / "qwen3_5", tmp_path / "model")
    wide = {
        name: x for name, x in stored(path).items() if name.endswith(("A_log", "linear_attn.norm.weight"))
    }
    narrow = {name: x.to(torch.bfloat16) for name, x in stored(path).items()}
    save_file(narrow | wide, path / "model.safetensors", {"format": "pt"})
    want = {name: x.dtype for name, x in stored(path).items()}
    policy = Policy.load(str(path), Ranks.alone(), dtype="bfloat16")
    assert policy.float32_names == wide.keys() and len(wide) == 4
    for param in policy.parameters():
        local(param.detach()).mul_(1 + 2**-12)  # less than half a step of bfloat16's numbers
    with torch.no_grad():
        logprobs_S = policy(measured_batch()).logprobs_S
    gathering = BackgroundGather(policy, Ranks.alone(), bucket_bytes=5000, dtype="bfloat16")
    snapshot = gathering.take_snapshot()
    assert snapshot is not None and snapshot.acquire()
    pushed = received(snapshot)
    gathering.close()
    assert all(x.dtype == want[name] for name, x in pushed.items())
    assert not any(torch.equal(pushed[name], x) for name, x in wide.items())
    checkpoints = Checkpoints(tmp_path / "run", keep=1, tokenizer_path=str(path), dtype="bfloat16")
    optimizer = ShardedAdamW(policy, Ranks.alone(), lr=1e-3)
    checkpoints.save(1, policy, optimizer, Ranks.alone(), extra={})
    checkpoints.close()
    saved = stored(checkpoints.path(1))
    assert {name: x.dtype for name, x in saved.items()} == want
    assert not [name for name, x in pushed.items() if not torch.equal(saved[name], x)]
    model, weights = load(str(checkpoints.path(1)), dtype=torch.bfloat16, device=CPU, context_length=32)
    assert {name: x.dtype for name, x in weights.named.items()} == {name: want[name] for name in pushed}
    assert not [name for name, x in weights.named.items() if not torch.equal(x, pushed[name])]
    assert model.facts.parameter_dtypes == {name: want[name] for name in pushed}
    with torch.no_grad():
        exact_S = Policy.load(str(checkpoints.path(1)), Ranks.alone())(measured_batch()).logprobs_S
    assert float((logprobs_S - exact_S).abs().max()) < 0.1


@pytest.mark.chaos
@pytest.mark.parametrize("family", ["qwen3_5", "glm4_moe"])
def test_plan_counts_what_is_trained(family: str, models: Path, tmp_path: Path) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()  # of another test; a trace has its own
    shutil.copyfile(models / family / "config.json", tmp_path / "config.json")
    settings = ("sampling.max_new_tokens=48", "rollout.max_context=64", "model.dtype=bfloat16")
    plan = make_plan(load_config([f"model.path={tmp_path}", *settings]), gpus="1+1xH100")
    sizes = {name: tensor.numel() for name, tensor in stored(models / family).items()}
    assert plan.trace.num_params == sum(size for name, size in sizes.items() if is_trained(name, family))


def test_a_wrapper_without_one_language_model_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "blip-2", vision_config=sizes, qformer_config=sizes, text_config={"model_type": "opt", **sizes}
    )
    config.save_pretrained(tmp_path)
    assert text_config(config) is not config
    with pytest.raises(ConfigError, match="cannot be trained on text alone"):
        Policy.build(str(tmp_path))


def test_the_rows_of_every_rank_are_float32(models: Path) -> None:
    for name in PARTLY_TRAINED:
        policy = Policy.load(str(models / name), Ranks.alone())
        assert {local(param).dtype for param in policy.parameters()} == {F32}
