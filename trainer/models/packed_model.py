"""A causal language model of transformers over packed batches, under FSDP2: the base of policy and critic.

The master weights are float32; the forward runs in `dtype` through FSDP2's mixed precision. Dropout is always
off: the trained policy has to be the one that the engine samples from.

Left out: loading shard by shard (every rank reads the whole model into host memory once), tensor and pipeline
parallelism.

Shape suffixes: T packed tokens, S sampled tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from areal_like.errors import ConfigError
from areal_like.moe import route_in_float32
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.models.packed_attention import ATTENTION_NAME, PackedLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PackedModel(nn.Module):
    """Base class; a subclass defines `forward`. `model` keeps its Hugging Face parameter names."""

    def __init__(self, model: Any) -> None:
        """`model`: a transformers causal LM, which is modified in place."""
        super().__init__()
        self.model = model
        model.set_attn_implementation(ATTENTION_NAME)
        route_in_float32(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.eval()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        gradient_checkpointing: bool = False,
        master_dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> Self:
        """Loads a Hugging Face directory or name. `settings`: of the subclass. Call `shard` afterwards."""
        loaded = cls(
            AutoModelForCausalLM.from_pretrained(path, dtype=master_dtype, trust_remote_code=False),
            **settings,
        )
        if gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            loaded.train()  # transformers recomputes only in training mode; dropout stays zero
        return loaded

    def shard(self, ranks: Ranks, *, dtype: str = "float32") -> Self:
        """Moves the model to the rank's device and shards it in place: each decoder layer, then the rest.

        Returns itself. Gradients are summed over ranks and not averaged: the step divides by global counts,
        once.
        """
        self.to(ranks.device)
        compute = DTYPES[dtype]
        precision = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=None if compute == torch.float32 else torch.float32,
        )
        for layer in decoder_layers(self.model):
            fully_shard(layer, mesh=ranks.mesh, mp_policy=precision)
        fully_shard(self, mesh=ranks.mesh, mp_policy=precision)
        for module in self.modules():
            if isinstance(module, FSDPModule) and ranks.world_size > 1:
                module.set_gradient_divide_factor(1.0)
                # gloo supports only a plain sum, which is exact.
                module.set_force_sum_reduction_for_comms(True)
        return self

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [S, D] at the position before each sampled token, where its logits come from.

        A sequence's first token is never sampled, so there is always a position before.
        """
        hidden_TD: Tensor = self.model.base_model(
            input_ids=batch.tokens_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            packed_layout=PackedLayout.of(batch.lengths, device=batch.tokens_T.device),
        ).last_hidden_state[0]
        return hidden_TD.index_select(0, batch.sampled_S - 1)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's stack of decoder layers.

    Raises ConfigError if there is no list of `num_hidden_layers` modules.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ConfigError(
        f"{type(model).__name__}: no list of {model.config.num_hidden_layers} decoder layers to shard"
    )
