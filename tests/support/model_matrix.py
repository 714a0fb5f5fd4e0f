"""What works with which family of models: a table that is tried out, and the page that shows it.

`python -m tests.support.model_matrix` prints the table of docs/reference/models.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.config import LoraConfig
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.trajectory import Trajectory
from areal_like.weights.adapters import adapter_shapes, linear_layers
from areal_like.weights.buckets import spec_of
from areal_like.weights.hf_layout import adapter_tensors, hf_tensors
from areal_like.weights.untrained import auto_class
from rollout_server.engine.models.loading import load
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from tests.support.families import FAMILIES, stored, write_family
from tests.support.routes import routed
from tests.support.trainer_helpers import VOCAB, dense_logprobs, random_groups
from trainer.batching.packing import PackedBatch, collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.models.tiny import character_tokenizer
from trainer.optimizer import ShardedAdamW

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 64,
}  # fmt: skip
YES = "yes"

NOT_SHARED = "prefixes are not shared"
DENSE = "has no experts"
LINEAR = "has linear_attention layers"

MATRIX: dict[str, tuple[str, ...]] = {
    "llama": (*(YES,) * 6, DENSE),
    "qwen2": (*(YES,) * 6, DENSE),
    "qwen3": (*(YES,) * 6, DENSE),
    "gpt2": (*(YES,) * 5, "has no linear layers", DENSE),
    "qwen3_moe": (YES,) * 7,
    "mixtral": (YES,) * 7,
    "glm4_moe": (YES,) * 7,
    "deepseek_v3": (YES,) * 7,
    "qwen3_next": (YES, NOT_SHARED, *(YES,) * 5),
    "qwen3_5": (YES, NOT_SHARED, *(YES,) * 4, DENSE),
    "qwen3_5_moe": (YES, NOT_SHARED, *(YES,) * 5),
    "qwen3_5_text": (YES, NOT_SHARED, *(YES,) * 4, DENSE),
    "qwen3_vl": (*(YES,) * 6, DENSE),
    "gemma3": (*(YES,) * 5, "has no linear layers named", DENSE),
    "gpt_oss": ("soft-capping or sinks",) * 2 + (YES,) * 3 + ("soft-capping or sinks",) * 2,
    "jamba": (LINEAR, LINEAR, "not that of a Gated DeltaNet", *(LINEAR,) * 4),
}
"""Family -> for each of COLUMNS, YES or a part of the message with which it is refused."""


def write(family: str, directory: Path) -> str:
    """Writes a tiny random model of a family in MATRIX with a tokenizer; returns the path."""
    if family in FAMILIES:
        return write_family(family, directory)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return str(directory)


def _logprobs_agree(path: str, trajectories: list[Trajectory]) -> PackedBatch:
    """Packed log-probs are those of transformers; returns the batch."""
    policy = Policy.load(path, Ranks.alone())
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories]
    batch = collate(samples, shares_prefixes=policy.shares_prefixes)
    model = auto_class(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        found_S = policy(batch).logprobs_S
        wanted_BL = dense_logprobs(model, trajectories)
    masks = [torch.from_numpy(t.loss_mask) == 1 for t in trajectories]
    wanted_S = torch.cat([wanted_BL[i, : len(mask)][mask] for i, mask in enumerate(masks)])
    torch.testing.assert_close(found_S, wanted_S, rtol=0, atol=1e-4)
    return batch


def _trains(path: str) -> None:
    assert _logprobs_agree(path, [t for group in random_groups(3) for t in group]).shared is None


def _shares(path: str) -> None:
    groups = random_groups(3, prompt=12, longest=40, seed=2)
    if _logprobs_agree(path, [t for group in groups for t in group]).shared is None:
        raise ConfigError(NOT_SHARED)  # what the trainer logs


def _decodes(path: str) -> None:
    load(path, dtype=torch.float32, device=torch.device("cpu"), context_length=64)


def _pushes(path: str) -> None:
    """A push has the names and shapes of the checkpoint that SGLang loads."""
    policy = Policy.load(path, Ranks.alone())
    tensors = {tensor.name: torch.empty(tensor.shape) for tensor in hf_tensors(policy.model)}
    assert policy.stored is not None
    CheckpointShapes.of(path).check(
        [spec_of(name, tensor) for name, tensor in tensors.items()],
        untrained=[*policy.stored.untouched, *policy.stored.obsolete],
    )


def _saves(path: str) -> None:
    """transformers loads a checkpoint, and it has every tensor of the initial model."""
    ranks = Ranks.alone()
    policy = Policy.load(path, ranks)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=1, tokenizer_path=path)
        checkpoints.save(1, policy, ShardedAdamW(policy, ranks, lr=1e-3), ranks, extra={})
        checkpoints.wait()
        checkpoints.close()
        before, after = stored(Path(path)), stored(checkpoints.path(1))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
        auto_class(AutoConfig.from_pretrained(path)).from_pretrained(checkpoints.path(1))


def _adapts(path: str) -> None:
    """An adapter of all linear layers trains, and the embedded engine has the same matrices."""
    policy = Policy.load(path, Ranks.alone(), lora_settings=LoraConfig(rank=2, alpha=4.0))
    policy(collate([TrainingSample(trajectory=random_groups(1)[0][0], advantage=1.0, group=0)]))
    engine, _ = load(path, dtype=torch.float32, device=torch.device("cpu"), context_length=64)
    engine.make_slots(policy.adapter_header, num_slots=1)
    shapes = adapter_shapes(policy.adapter_header, linear_layers(engine.facts.parameter_shapes))
    assert shapes == {tensor.name: tensor.shape for tensor in adapter_tensors(policy.model)}


def _replays(path: str) -> None:
    """The trainer's routers take the experts that a sample's routes name, of which the engine records as
    many."""
    policy = Policy.load(path, Ranks.alone(), router_replay=True)
    assert policy.replay is not None
    shape = policy.replay.shape
    rng = np.random.default_rng(0)
    samples = [
        TrainingSample(trajectory=routed(t, rng, shape=shape), advantage=1.0, group=0)
        for t in random_groups(1)[0]
    ]
    batch = collate(samples, shares_prefixes=policy.shares_prefixes)
    with torch.no_grad():
        routed_S = policy(batch).logprobs_S
        num_other, num_choices = policy.replay.disagreement()
        with policy.routed_live():
            live_S = policy(batch).logprobs_S
    assert 0 < num_other < num_choices
    assert routed_S.isfinite().all() and not torch.allclose(routed_S, live_S)
    engine, _ = load(
        path, dtype=torch.float32, device=torch.device("cpu"), context_length=64, records_routes=True
    )
    assert engine.routes is not None and engine.routes.shape == shape


COLUMNS: dict[str, Callable[[str], None]] = {
    "training": _trains,
    "shared prefixes": _shares,
    "embedded engine": _decodes,
    "names of pushes": _pushes,
    "checkpoints": _saves,
    "LoRA": _adapts,
    "router replay": _replays,
}


def outcome(column: str, path: str) -> str:
    """YES, or the message with which something is refused."""
    try:
        COLUMNS[column](path)
    except (ConfigError, WeightSyncError) as error:
        return str(error)
    return YES


def table() -> str:
    """The table of the page."""
    rows = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family, cells in MATRIX.items():
        shown = [{YES: YES, DENSE: "not a mixture"}.get(cell, f"no: {cell}") for cell in cells]
        rows.append(f"| `{family}` | " + " | ".join(shown) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
