"""Per-sequence gradient norms and weighted sums of gradients from one backward over a packed micro-batch.

A layer's parameter gradient is a sum over tokens of input times output gradient. `GhostTape` records both (x
and e) instead of multiplying them, for every layer that has parameters. Tokens of different sequences never
mix within such a layer, so for each sequence i (the "ghost norm" trick of per-example gradient clipping):

    Linear          ||E_i^T X_i||^2 = sum_tt' (X_i X_i^T * E_i E_i^T)_tt', or of E_i^T X_i where it is smaller
    Embedding       the same with one-hot inputs: rows of equal tokens are added up first
    tied to a head  plus twice <E_i^T X_i, embedding's gradient of i>: one parameter has one gradient
    norms, biases   one vector per sequence, computed directly

Once coefficients c_i are known, `sum_i c_i g_i = (c E)^T X`, the product that autograd would have formed
during the backward. So the norms cost only their Gram matrices, and no pass is run twice. The price is
memory: inputs and output gradients of all layers of a micro-batch exist at the same time, including those of
the head (tokens times vocabulary); `trainer.tokens_per_microbatch` bounds it.

Supported layers: torch's Linear, Embedding and LayerNorm, transformers' Conv1D, and any module with one
vector `weight` that multiplies its output. A trainable parameter anywhere else is refused by name.

Shape suffixes: T rows (tokens), S rows that the head reads, N sequences, n sequences of one block, L longest
of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from areal_like.errors import ConfigError
from trainer.attention.linear import linear_layers
from trainer.gradients.ghost_layers import Embedding, Layer, Matrix, SegmentRows, layer_of, wide


class GhostTape:
    """Records one backward at a time:

    attach() -> [forward, backward -> squares() -> combined(), once or more -> clear()]* -> detach()

    While it is attached, a backward writes no `.grad`.
    """

    def __init__(self, model: nn.Module, *, head: nn.Module | None = None) -> None:
        """`head`: the module that runs over `head_rows` (see `squares`).

        Raises ConfigError naming trainable parameters of unsupported layers.
        """
        self._layers: list[Layer] = []
        self._reached: list[Layer] = []
        names = {id(param): name for name, param in model.named_parameters()}
        known: set[str] = set()
        # Linear attention pads its rows, so records of the layers within would be of other rows.
        padded = {id(part) for layer in linear_layers(model) for part in layer.modules()}
        for path, module in model.named_modules():
            own = {
                key: names[id(param)]
                for key, param in module.named_parameters(recurse=False)
                if param.requires_grad
            }
            layer = layer_of(module) if own and id(module) not in padded else None
            if layer is not None:
                layer.path, layer.names, layer.is_head, layer.reached = (
                    path,
                    own,
                    module is head,
                    self._reached,
                )
                self._layers.append(layer)
                known |= set(own.values())
        if unknown := [
            name for name, param in model.named_parameters() if param.requires_grad and name not in known
        ]:
            raise ConfigError(
                f"objective.norms=ghost does not support the layers of {', '.join(unknown[:3])}: "
                "use exact or proxy"
            )
        self._tied = list(_tied(self._layers))

    def attach(self) -> None:
        self._replaced = [layer.module.__dict__.get("forward") for layer in self._layers]
        for layer in self._layers:
            layer.module.forward = layer.forward

    def detach(self) -> None:
        for layer, forward in zip(self._layers, self._replaced, strict=True):
            del layer.module.forward
            if forward is not None:  # a module may have had a forward of its own
                layer.module.forward = forward
        self.clear()

    @torch.no_grad()
    def squares(self, rows: SegmentRows, head_rows: SegmentRows, *, read_S: Tensor | None = None) -> Tensor:
        """[N] float64: each sequence's squared gradient norm over all parameters, from the last backward.

        `rows`, `head_rows`: the sequences of the rows that the layers and the head ran over. `read_S`: int64
        indices into `rows` of the rows that the head reads. If given, layers above the last attention use
        only these rows.
        """
        self._assign(rows, head_rows, read_S)
        total_N = torch.zeros(len(rows.lengths), dtype=torch.float64, device=rows.segment_T.device)
        grams: dict[int, list[Tensor]] = {}
        for layer in self._reached:
            total_N += layer.squares(grams).double()
        for embedding, matrix in self._tied:
            if embedding in self._reached and matrix in self._reached:
                total_N += _cross(embedding, matrix).double()
        return total_N

    def _assign(self, rows: SegmentRows, head_rows: SegmentRows, read_S: Tensor | None) -> None:
        num_rows = len(rows.segment_T)
        is_late = read_S is not None and len(read_S) < 0.75 * num_rows
        if read_S is not None and is_late:
            unread_T = (
                torch.ones(num_rows, dtype=torch.bool, device=read_S.device)
                .index_fill_(0, read_S, False)
                .nonzero()[:, 0]
            )
        chosen: dict[int, Tensor] = {}
        for layer in self._reached:
            layer.rows = head_rows if layer.is_head else rows
            if len(layer.e_TO) != len(layer.rows.segment_T):
                raise ConfigError(
                    f"objective.norms=ghost cannot tell which sequences the rows of {layer.path} belong to: "
                    "use exact or proxy"
                )
            # Rows that the head does not read have no gradient above the last attention: drop them there.
            if layer.is_head or not is_late:
                continue
            is_late = float(torch.linalg.vector_norm(layer.e_TO.index_select(0, unread_T), ord=math.inf)) == 0
            if is_late and read_S is not None:
                key = layer.x_TI.data_ptr()
                chosen[key] = chosen[key] if key in chosen else layer.x_TI.index_select(0, read_S)
                layer.rows, layer.x_TI, layer.e_TO = (
                    head_rows,
                    chosen[key],
                    layer.e_TO.index_select(0, read_S),
                )

    @torch.no_grad()
    def combined(self, coefficient_N: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, sum of coefficient times gradient over sequences) of each parameter with a gradient.

        Call after squares(). Yields one at a time, so only one full gradient need exist.
        """
        halves: dict[str, Tensor] = {}
        scaled: dict[int, Tensor] = {}
        tied = {embedding.names["weight"] for embedding, _ in self._tied}
        for layer in self._reached:
            for name, whole in layer.combined(coefficient_N, scaled):
                if name in tied and name not in halves:
                    halves[name] = whole
                else:
                    yield name, whole + halves.pop(name) if name in tied else whole
        yield from halves.items()

    def clear(self) -> None:
        """Drops the recorded backward and frees its memory."""
        for layer in self._reached:
            layer.x_TI = layer.e_TO = torch.empty(0)
        self._reached.clear()


def _cross(embedding: Layer, head: Layer) -> Tensor:
    """[N] twice the inner product of each sequence's gradients from the two uses of a tied table.

    The blocks of both layers hold the same sequences.
    """
    out_N = wide(embedding.e_TO).new_zeros(len(embedding.rows.lengths))
    for of_embedding, of_head in zip(embedding.rows.blocks, head.rows.blocks, strict=True):
        tokens_nL = of_embedding.pad(embedding.x_TI).squeeze(-1)
        inner_nSL = torch.bmm(of_head.pad(wide(head.x_TI)), of_embedding.pad(wide(embedding.e_TO)).mT)
        at_tokens_nSL = head.e_TO[of_head.places_nL[:, :, None], tokens_nL[:, None, :]]
        real_nSL = of_head.real_nL[:, :, None] & of_embedding.real_nL[:, None, :]
        out_N.index_add_(0, of_embedding.sequences_n, 2 * (inner_nSL * at_tokens_nSL * real_nSL).sum((1, 2)))
    return out_N


def _tied(layers: Sequence[Layer]) -> Iterator[tuple[Layer, Layer]]:
    """Pairs (embedding, linear layer) that share a table.

    Raises ConfigError for any other shared parameter.
    """
    users: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.names.values():
            users.setdefault(name, []).append(layer)
    for name, sharing in users.items():
        if len(sharing) == 1:
            continue
        pair = sorted(sharing, key=lambda layer: isinstance(layer, Matrix))
        if [type(layer) for layer in pair] != [Embedding, Matrix] or isinstance(pair[1].module, Conv1D):
            raise ConfigError(
                f"objective.norms=ghost does not support the sharing of {name}: use exact or proxy"
            )
        yield pair[0], pair[1]
