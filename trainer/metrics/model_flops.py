"""Counts the FLOPs that a model's arithmetic needs for a micro-batch, without a kernel's additional work.

A product of a row with a matrix is 2 FLOPs for each of the matrix's numbers; a backward is twice its forward,
or once where the matrix is frozen and has no gradient of its own.
The count includes the matrices that a token uses (of experts only those that it is routed to; not the
embedding, which is a lookup), the head only at the positions that are trained on, attention over the pairs of
positions that see each other, and for linear attention three products with each state: it is read for the
key, updated, and read for the query. A shared prefix counts once. Not counted: recomputation, padding, norms,
the critic, the optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trainer.attention.linear import LINEAR, state_size
from trainer.batching.balance import Cost

_STATE_PRODUCTS = 3
FORWARD_AND_BACKWARD = 3
"""Cost of a forward and its backward in units of a forward, where all weights are trained."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """The cost of one forward of a model."""

    body_weights: float
    """Numbers in the matrices that each row uses, without the head."""
    head_weights: float
    frozen_body_weights: float = 0.0
    """The part of `body_weights` that is not trained."""
    is_head_frozen: bool = False
    heads_size: int
    """Query heads times head size; the mean of the sizes of keys and values."""
    num_layers_of: dict[int, int]
    """Layers by their attention window; window 0: none. Without those with linear attention."""
    state_values: float = 0.0
    """Numbers in the state of a sequence, over all layers with linear attention."""

    @classmethod
    def of(cls, model: Any) -> ModelFlops:
        """The FLOPs of a causal language model of transformers, sharded or not."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        looked_up = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        apart = looked_up if head is None else looked_up | {id(head.weight)}
        used = [
            (param.numel() * _used_share(name, config), param.requires_grad)
            for name, param in model.named_parameters()
            if param.ndim >= 2 and id(param) not in apart
        ]
        num_linear = list(getattr(config, "layer_types", None) or ()).count(LINEAR)
        return cls(
            body_weights=sum(num for num, _ in used),
            head_weights=0.0 if head is None else float(head.weight.numel()),
            frozen_body_weights=sum(num for num, is_trained in used if not is_trained),
            is_head_frozen=head is not None and not head.weight.requires_grad,
            heads_size=_heads_size(config),
            num_layers_of=dict(_windows(config)),
            state_values=float(num_linear * state_size(config)),
        )

    def of_forward(
        self, lengths: Sequence[int], *, num_targets: int, own_lengths: Sequence[int] | None = None
    ) -> float:
        """FLOPs of one forward.

        `lengths`: lengths of the sequences. `num_targets`: rows of the head. `own_lengths`: rows that run
        through the layers for each sequence, without a prefix that another one computes; None: all.
        """
        length_N = np.array(lengths, dtype=np.float64)
        own_N = length_N if own_lengths is None else np.array(own_lengths, dtype=np.float64)
        of_row = self.body_weights + _STATE_PRODUCTS * self.state_values
        linear = 2.0 * (of_row * float(own_N.sum()) + self.head_weights * num_targets)
        pairs = sum(
            layers * float((_pairs_N(length_N, window) - _pairs_N(length_N - own_N, window)).sum())
            for window, layers in self.num_layers_of.items()
        )
        return linear + 4.0 * self.heads_size * pairs

    def of_step(
        self, lengths: Sequence[int], *, num_targets: int, own_lengths: Sequence[int] | None = None
    ) -> float:
        """FLOPs of a forward and its backward; the arguments are those of `of_forward`."""
        num_rows = sum(lengths if own_lengths is None else own_lengths)
        forward = self.of_forward(lengths, num_targets=num_targets, own_lengths=own_lengths)
        head = self.head_weights * num_targets if self.is_head_frozen else 0.0
        return FORWARD_AND_BACKWARD * forward - 2.0 * (self.frozen_body_weights * num_rows + head)


def cost_of(flops: ModelFlops) -> Cost:
    """FLOPs of forward and backward by rows and pairs, for the balance over ranks.

    The head is counted at every row, and windows are ignored.
    """
    layers = sum(flops.num_layers_of.values())
    frozen = flops.frozen_body_weights + (flops.head_weights if flops.is_head_frozen else 0.0)
    of_row = flops.body_weights + flops.head_weights + _STATE_PRODUCTS * flops.state_values
    return Cost(
        per_row=round(FORWARD_AND_BACKWARD * 2 * of_row - 2 * frozen),
        per_pair=FORWARD_AND_BACKWARD * 4 * flops.heads_size * layers,
    )


def _pairs_N(length_N: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Pairs of positions in causal attention over sequences of these lengths, each by itself."""
    seen_N = np.minimum(length_N, window) if window else length_N
    return seen_N * (seen_N + 1) / 2 + (length_N - seen_N) * seen_N


def _heads_size(config: Any) -> int:
    heads = int(config.num_attention_heads)
    # Latent attention: keys have a part without positions and one with, and values another size.
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes = [int(getattr(config, name, None) or 0) for name in names]
    if all(sizes):
        return heads * sum(sizes) // 2
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _windows(config: Any) -> Counter[int]:
    window = int(getattr(config, "sliding_window", None) or 0)
    # A model without layer types uses its window, if it has one, in all layers (Mistral).
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * int(config.num_hidden_layers)
    return Counter(window if kind == "sliding_attention" else 0 for kind in kinds if kind != LINEAR)


def _used_share(name: str, config: Any) -> float:
    """Share of a parameter's numbers that one token uses: below 1 for the experts of a mixture."""
    total = next((getattr(config, key) for key in _EXPERTS if getattr(config, key, None)), 0)
    used = getattr(config, "num_experts_per_tok", None)
    return used / total if total and used and ".experts." in name else 1.0
