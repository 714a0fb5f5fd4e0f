"""Models that are read by rows equal those of `from_pretrained`, whatever names their files use."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.config import Config, ModelConfig
from areal_like.errors import ConfigError
from tests.support.trainer_helpers import ARCHITECTURES, run_ranks, write_model
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.packed_model import PackedModel
from trainer.models.policy import Policy, build_policy
from trainer.models.value_model import ValueModel
from trainer.prepare_model import prepare_model

BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "vocab_size": 41,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gpt_neox"), BODY),
    "gemma": BODY | {"head_dim": 8},
    "gemma3_text": BODY | {"head_dim": 8, "num_hidden_layers": 6},
    "gpt2": ARCHITECTURES["gpt2"] | {"n_layer": 2, "vocab_size": 41},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4, "vocab_size": 41},
    "qwen3_moe": BODY | EXPERTS | {"num_experts": 4},
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}
INDEX = "model.safetensors.index.json"


def save_random(path: Path, family: str, settings: dict[str, Any], **options: Any) -> Any:
    """Saves a random bfloat16 model; returns it."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **settings), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    model.save_pretrained(path, **options)
    return model


def assert_equals_from_pretrained(path: Path) -> None:
    loaded: Any = PackedModel.load(str(path), Ranks.alone()).model
    wanted: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for kind in ("named_parameters", "named_buffers"):
        got, want = dict(getattr(loaded, kind)()), dict(getattr(wanted, kind)())
        assert list(got) == list(want)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype and torch.equal(local(got[name]), tensor), name
    assert loaded.config.to_dict() == wanted.config.to_dict()
    assert loaded.generation_config.to_dict() == wanted.generation_config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_from_pretrained(tmp_path: Path, family: str) -> None:
    save_random(tmp_path, family, FAMILIES[family])
    assert_equals_from_pretrained(tmp_path)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_buffers_equal_from_pretrained(tmp_path: Path, rope: str) -> None:
    parameters = {
        "rope_type": rope,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        **ROPES[rope],
    }
    save_random(tmp_path, "llama", BODY | {"rope_parameters": parameters})
    assert_equals_from_pretrained(tmp_path)


def rename(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrites the tensors of the model's only file."""
    file = path / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def test_names_that_from_pretrained_accepts(tmp_path: Path) -> None:
    tied = BODY | {"tie_word_embeddings": True}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    changes: list[tuple[str, dict[str, Any], Callable[..., Any]]] = [
        ("llama", tied, lambda t: t | {head: t[embedding].clone()}),
        ("llama", tied, lambda t: {head if name == embedding else name: x for name, x in t.items()}),
        ("llama", tied, lambda t: {name.removeprefix("model."): x for name, x in t.items()}),
        ("llama", BODY, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", FAMILIES["gpt2"], lambda t: {n.removeprefix("transformer."): x for n, x in t.items()}),
        ("gpt2", FAMILIES["gpt2"], lambda t: t | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}),
    ]
    for number, (family, settings, change) in enumerate(changes):
        path = tmp_path / str(number)
        save_random(path, family, settings)
        rename(path, change)
        assert_equals_from_pretrained(path)


def edit_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def truncate(path: Path) -> None:
    file = max(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "missing": (f"lack {NORM}", lambda p: rename(p, lambda t: {k: v for k, v in t.items() if k != NORM})),
    "unknown": (r"hold score\.weight", lambda p: rename(p, lambda t: t | {"score.weight": torch.ones(2, 2)})),
    "shape": (r"\[33\].*needs \[32\]", lambda p: rename(p, lambda t: t | {NORM: torch.ones(33)})),
    "integers": ("quantized", lambda p: rename(p, lambda t: t | {NORM: torch.ones(32, dtype=torch.int8)})),
    "tied-differs": (
        "tie_word_embeddings to false",
        lambda p: rename(p, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
    ),
    "truncated": ("cannot be read .*is it complete", truncate),
    "pickle": ("are pickles", lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin")),
    "nothing": (r"no model\.safetensors", lambda p: (p / "model.safetensors").unlink()),
    "shard-missing": ("does not exist", lambda p: max(p.glob("*.safetensors")).unlink()),
    "shard-outside": (
        "of its own directory",
        lambda p: edit_index(p, lambda m: m.update({NORM: "../other/model.safetensors"})),
    ),
    "index-wrong": (
        "is not in model-00001",
        lambda p: edit_index(p, lambda m: m.update({NORM: min(m.values())})),
    ),
    "index-broken": ("is not an index", lambda p: (p / INDEX).write_text("[]")),
    "generation": (
        "refuses its generation_config",
        lambda p: (p / "generation_config.json").write_text('{"num_return_sequences": 4}'),
    ),
    "index-nested": ("nested too deeply", lambda p: (p / INDEX).write_text("[" * 100_000)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_are_one_clear_error(tmp_path: Path, fault: str) -> None:
    message, breaks = BROKEN[fault]
    options = {"max_shard_size": "20KB"} if fault.startswith(("shard", "index", "trunc")) else {}
    save_random(tmp_path, "llama", BODY | {"tie_word_embeddings": fault == "tied-differs"}, **options)
    assert (tmp_path / INDEX).exists() == bool(options)
    PackedModel.load(str(tmp_path), Ranks.alone())
    breaks(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        PackedModel.load(str(tmp_path), Ranks.alone())
    assert str(tmp_path) in str(error.value)


def test_models_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    path = Path(write_model(tmp_path))
    written = (path / "config.json").read_text()

    def configure(**keys: Any) -> None:
        (path / "config.json").write_text(json.dumps(json.loads(written) | keys))

    configure(quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="quantized"):
        PackedModel.build(str(path))
    config = Config(model=ModelConfig(path=str(path)))
    AutoConfig.for_model("longcat_flash", **BODY | {"num_hidden_layers": 4}).save_pretrained(path)
    with pytest.raises(ConfigError, match="no list of 4 decoder layers"):
        prepare_model(config)
    configure(model_type="t5")
    with pytest.raises(ConfigError, match="no causal language model of type t5"):
        prepare_model(config)
    with pytest.raises(ConfigError, match="no causal language model"):
        PackedModel.build(str(path))
    configure(vocab_size=96)
    with pytest.raises(ConfigError, match=r"has shape \[\d+, 32\], and .* needs \[96, 32\]"):
        prepare_model(config)
    configure()
    truncate(path)
    with pytest.raises(ConfigError, match="is it complete"):
        prepare_model(config)
    layers = {"n_embd": 32, "n_head": 2, "n_layer": 2, "dff": 32, "vocab_size": 41}
    AutoConfig.for_model("ctrl", **layers).save_pretrained(path)
    with pytest.raises(ConfigError, match=r"Set trainer\.gradient_checkpointing=false"):
        PackedModel.build(str(path), gradient_checkpointing=True)


def test_a_checkpoint_needs_no_initial_weights(tmp_path: Path) -> None:
    path = Path(write_model(tmp_path))
    (path / "model.safetensors").unlink()
    config = Config(model=ModelConfig(path=str(path)))
    policy = build_policy(config, str(path), Ranks.alone(), with_weights=False)
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        policy.read_initial_weights()


def test_the_critic_reads_a_tied_model_without_its_head(tmp_path: Path) -> None:
    save_random(tmp_path, "llama", BODY | {"tie_word_embeddings": True})
    rename(tmp_path, lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()})
    critic: Any = ValueModel.load(str(tmp_path), Ranks.alone()).model
    policy: Any = Policy.load(str(tmp_path), Ranks.alone()).model
    assert torch.equal(local(critic.model.embed_tokens.weight), local(policy.lm_head.weight))
    assert local(critic.lm_head.weight).shape == (1, 32) and not local(critic.lm_head.weight).any()


@pytest.mark.long
def test_four_ranks_hold_a_share_and_one_tensor(tmp_path: Path) -> None:
    large, small, out = tmp_path / "large", tmp_path / "small", tmp_path / "out"
    out.mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 16384}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads))
    assert 58e6 < sum(param.numel() for param in model.parameters()) < 62e6
    model.config.save_pretrained(large)
    tensors = {name: torch.rand(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    write_model(small, "qwen2")
    run_ranks("loading", str(out), str(large), str(small), world_size=4, module="tests.support.loading_ranks")
