"""The critic's value model: a causal language model with a scalar head in place of the vocabulary's.

The head's weight and bias start at zero, so every value is 0 until the critic has learned, whatever the seed.
Of a model in bfloat16 the head's product is float32 (`Fp32Head`): values in bfloat16 would have 8 bits.

Shape suffixes: S sampled tokens, C those whose values this rank computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from areal_like.precision import Fp32Head
from areal_like.weights.untrained import text_config
from trainer.batching.packing import PackedBatch
from trainer.models.packed_model import PackedModel


class ValueModel(PackedModel):
    """Estimates the return from the state before each sampled token."""

    def __init__(self, model: Any) -> None:
        """Takes over a transformers causal LM and replaces its head."""
        config = text_config(model.config)
        head = Fp32Head(config.hidden_size, 1, dtype=model.dtype, device=model.device)
        model.config.tie_word_embeddings = config.tie_word_embeddings = False
        model.set_output_embeddings(head)
        super().__init__(model)

    def fresh_parameters(self) -> frozenset[str]:
        head = self.model.get_output_embeddings()
        return frozenset(
            f"{name}.{leaf}"
            for name, module in self.model.named_modules()
            if module is head
            for leaf in ("weight", "bias")
        )

    def forward(self, batch: PackedBatch) -> Tensor:
        """[S] value of the state before each sampled token, in float32 or the master weights' dtype if wider.

        It is read from the same hidden state as the token's log-prob.
        """
        value_C1 = self.model.get_output_embeddings()(self.hidden(batch))
        # A sum and not a squeeze: FSDP2 attaches its backward hook to outputs, which must not be views.
        value_C = value_C1.to(torch.promote_types(value_C1.dtype, torch.float32)).sum(1)
        return self.of_all(batch, [value_C])[0]
