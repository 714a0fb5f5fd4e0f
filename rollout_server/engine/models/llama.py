"""Hand-written forward passes of the Llama family: Llama, Qwen2, Qwen3 and models configured like them.

A decode step of a small model spends most of its time in the interpreter, between kernels, so this path runs
as few kernels as it can: Q, K and V are one fused matrix, gate and up another, rotary embedding is applied to
queries and keys at once, residuals are added inside the matrix product. The named parameters are views into
the fused matrices, so writing a parameter by name fills its fused matrix. `supports` is true for the
configurations for which this code is exact; all others take the generic path.

Shapes: N rows, B contexts, T positions, C hidden, H query heads, K key/value heads, G = H / K, D head size, F
intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from areal_like.precision import fp32_linear, fp32_operand
from areal_like.weights.adapters import AdapterHeader, linear_layers
from rollout_server.engine.cache import DecodeBatch, KVCache
from rollout_server.engine.models import packed
from rollout_server.engine.models.adapters import AdapterSlots
from rollout_server.engine.models.base import ModelFacts, NewTokens, Weights, new_arena
from rollout_server.engine.models.routes import RouteRecorder

_CACHE_BYTES = 2 << 20
"""Of the level-2 cache of a core."""


class _MatrixNames(NamedTuple):
    """The first linear layer of each matrix of a decoder layer, by which adapters are found."""

    qkv: str
    output: str
    gate_up: str
    down: str

    @classmethod
    def below(cls, prefix: str) -> _MatrixNames:
        """`prefix`: `model.layers.N.`."""
        names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        return cls(*(prefix + name for name in names))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One decoder layer's tensors, fused as the forward passes use them."""

    names: _MatrixNames
    input_norm_C: Tensor
    qkv: Tensor
    """[(H + 2K) D, C]"""
    qkv_bias: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    output_CO: Tensor
    """[C, H D]"""
    post_norm_C: Tensor
    gate_up: Tensor
    """[2F, C]"""
    down_CF: Tensor


class _Part(NamedTuple):
    """Tokens of a forward pass that attend in the same way."""

    tokens: Tensor
    """int64[tokens]"""
    positions: Tensor
    """int64[tokens]"""
    attend: Callable[[int, Tensor, Tensor], Tensor]
    """Of a layer: takes rotated queries and keys [tokens, H + K, D] and values [tokens, K, D], stores the
    latter two, returns what the queries get [tokens, H D]; [0, H D] in the last layer if it is not wanted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    embed_VC: Tensor
    layers: tuple[_Layer, ...]
    norm_C: Tensor
    head_VC: Tensor


def _packed(plan: _Plan) -> _Plan:
    """A copy whose matrices are packed. It shares no memory with the original but that of the head."""

    def copied(layer: _Layer) -> _Layer:
        copies: dict[str, Any] = {}
        for field in fields(layer):
            value = getattr(layer, field.name)
            if isinstance(value, Tensor):
                copies[field.name] = packed.packed(value) if value.ndim == 2 else value.clone()
        return replace(layer, **copies)

    return _Plan(
        embed_VC=plan.embed_VC.clone(),
        layers=tuple(map(copied, plan.layers)),
        norm_C=plan.norm_C.clone(),
        head_VC=plan.head_VC,
    )


def supports(config: Any, names: set[str]) -> bool:
    """True if this module computes what transformers would for this configuration and these parameters."""
    if config.model_type not in ("llama", "qwen2", "qwen3") or config.hidden_act != "silu":
        return False
    # These rotary embeddings depend on the length of the sequence, so a table computed once would be wrong.
    if (config.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope"):
        return False
    return names == {name for name, _ in _parameters(config, names)}


def _parameters(config: Any, names: set[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns name and shape of every parameter of this path; biases and q, k norms only if in `names`."""
    hidden, head_dim, inner = config.hidden_size, _head_dim(config), config.intermediate_size
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (config.vocab_size, hidden))]
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for projection, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes.append((f"{prefix}self_attn.{projection}_proj.weight", (size, hidden)))
            if f"{prefix}self_attn.{projection}_proj.bias" in names:
                shapes.append((f"{prefix}self_attn.{projection}_proj.bias", (size,)))
            if projection != "v" and f"{prefix}self_attn.{projection}_norm.weight" in names:
                shapes.append((f"{prefix}self_attn.{projection}_norm.weight", (head_dim,)))
        shapes += [
            (f"{prefix}self_attn.o_proj.weight", (hidden, q_size)),
            (f"{prefix}mlp.gate_proj.weight", (inner, hidden)),
            (f"{prefix}mlp.up_proj.weight", (inner, hidden)),
            (f"{prefix}mlp.down_proj.weight", (hidden, inner)),
            (f"{prefix}input_layernorm.weight", (hidden,)),
            (f"{prefix}post_attention_layernorm.weight", (hidden,)),
        ]
    shapes.append(("model.norm.weight", (hidden,)))
    if not config.tie_word_embeddings:
        shapes.append(("lm_head.weight", (config.vocab_size, hidden)))
    return shapes


def _fused_with(name: str) -> tuple[str, ...]:
    """Returns the names fused into the matrix that starts with `name`: q, k, v or gate, up, or `name`
    alone."""
    for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if f".{first}." in name:
            return (name, *(name.replace(f".{first}.", f".{other}.") for other in others))
    return (name,)


def _fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups the names: fused parameters together, otherwise in the given order (the order of a push)."""
    seen: set[str] = set()
    groups = []
    for name in names:
        if name not in seen:
            groups.append(_fused_with(name))
            seen.update(groups[-1])
    return groups


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class LlamaModel:
    """CausalModel for the Llama family."""

    def __init__(
        self, config: Any, facts: ModelFacts, *, rotary: tuple[Tensor, Tensor], fp32_head: bool = False
    ) -> None:
        """`rotary`: (cos, sin) float32[T, D], for all positions that the engine may use. `fp32_head`: the
        logits are computed in float32."""
        self.facts = facts
        self.adapters: AdapterSlots | None = None
        self.routes: RouteRecorder | None = None
        self._config = config
        self._has_fp32_head = fp32_head and facts.dtype.itemsize < torch.float32.itemsize
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._group = self._num_heads // self._num_kv_heads
        self._head_dim = _head_dim(config)
        self._scale = self._head_dim**-0.5
        self._eps = config.rms_norm_eps
        cos_TD, sin_TD = rotary
        half = self._head_dim // 2
        # x * cos + rotate_half(x) * sin, with rotate_half's sign moved into the table: a roll is cheaper than
        # a negation and a concatenation.
        self._cos_TD = cos_TD.to(facts.dtype)
        self._sin_TD = torch.cat((-sin_TD[:, :half], sin_TD[:, half:]), -1).to(facts.dtype)
        # On a CPU in float32 a few plain kernels are faster than the composite ones at these sizes (32 rows:
        # attention takes 42 us instead of 60, a norm 6 us instead of 10, with seven norms per step).
        self._plain = facts.device.type == "cpu" and facts.dtype == torch.float32
        self._rounds_norms = facts.device.type == "cpu" and facts.dtype.itemsize < torch.float32.itemsize
        self.copies_weights = packed.can_pack(dtype=facts.dtype, device=facts.device)
        # So that a pass's gates and up-projections stay in the core's own cache.
        of_token = 2 * config.intermediate_size * facts.dtype.itemsize
        self.max_pass_tokens = _CACHE_BYTES // of_token if self.copies_weights else None
        self.joins_passes = True
        self._mean_C1 = torch.full(
            (config.hidden_size, 1), 1 / config.hidden_size, dtype=facts.dtype, device=facts.device
        )
        self._eps_11 = torch.full((1, 1), self._eps, dtype=facts.dtype, device=facts.device)
        self._plan: _Plan | None = None
        self._head_VC = torch.empty(0)
        self._packs_head = False

    def new_weights(self) -> Weights:
        """An uninitialized set: fused storage, and its views by name."""
        facts, config = self.facts, self._config
        groups = _fused_groups(facts.parameter_shapes)
        arena, parts = new_arena(facts, groups)
        flat = dict(zip(groups, parts, strict=True))
        named: dict[str, Tensor] = {}
        for group, part in flat.items():
            shapes = [facts.parameter_shapes[name] for name in group]
            for name, shape, piece in zip(
                group, shapes, torch.split(part, [math.prod(shape) for shape in shapes]), strict=True
            ):
                named[name] = piece.view(shape)
        layers = []
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}."
            layers.append(
                _Layer(
                    names=_MatrixNames.below(prefix),
                    input_norm_C=named[f"{prefix}input_layernorm.weight"],
                    qkv=flat[_fused_with(f"{prefix}self_attn.q_proj.weight")].view(-1, config.hidden_size),
                    qkv_bias=flat.get(_fused_with(f"{prefix}self_attn.q_proj.bias")),
                    q_norm_D=named.get(f"{prefix}self_attn.q_norm.weight"),
                    k_norm_D=named.get(f"{prefix}self_attn.k_norm.weight"),
                    output_CO=named[f"{prefix}self_attn.o_proj.weight"],
                    post_norm_C=named[f"{prefix}post_attention_layernorm.weight"],
                    gate_up=flat[_fused_with(f"{prefix}mlp.gate_proj.weight")].view(-1, config.hidden_size),
                    down_CF=named[f"{prefix}mlp.down_proj.weight"],
                )
            )
        embed_VC = named["model.embed_tokens.weight"]
        plan = _Plan(
            embed_VC=embed_VC,
            layers=tuple(layers),
            norm_C=named["model.norm.weight"],
            head_VC=named.get("lm_head.weight", embed_VC),
        )
        assert named.keys() == facts.parameter_shapes.keys()
        return Weights(named=named, arena=arena, plan=plan)

    def make_slots(self, header: AdapterHeader, *, num_slots: int) -> AdapterSlots:
        """Allocates slots for adapters of this model. Raises WeightSyncError for an unknown target."""
        layers = linear_layers(self.facts.parameter_shapes)
        groups = _fused_groups(f"{layer}.weight" for layer in layers)
        return AdapterSlots(
            header,
            [tuple(name.removesuffix(".weight") for name in group) for group in groups],
            layers,
            num_slots=num_slots,
            dtype=self.facts.dtype,
            device=self.facts.device,
        )

    def activate(self, weights: Weights) -> None:
        """Makes all later forward passes use this set."""
        assert isinstance(weights.plan, _Plan)
        # The set is complete here, so copies in other forms are made once, not for each token.
        self._plan, self._head_VC = None, torch.empty(0)  # frees a copy before the next one is made
        self._plan = _packed(weights.plan) if self.copies_weights else weights.plan
        head_VC = weights.plan.head_VC
        self._head_VC = fp32_operand(head_VC) if self._has_fp32_head else head_VC
        self._packs_head = self.copies_weights and self._head_VC.dtype == self.facts.dtype
        if self._packs_head:
            self._head_VC = packed.packed(head_VC)

    def compute(self, new: NewTokens, cache: KVCache) -> None:
        """Computes the KV of new tokens of contexts, and writes it to the rows."""
        self._forward([self._new_tokens(new, cache)], num_wanted=0)

    def decode(
        self, tokens_N: Tensor, batch: DecodeBatch, cache: KVCache, new: NewTokens | None = None
    ) -> Tensor:
        """Returns the logits [N, V] after one more token in each of rows 0..N-1."""
        parts = [self._decoded(tokens_N, batch, cache)]
        if new is not None:
            # Before the rows are decoded, because it writes what they attend to.
            parts.insert(0, self._new_tokens(new, cache))
        h_NC = self._forward(parts, num_wanted=batch.num_rows)
        if not self._has_fp32_head:
            return self._linear(h_NC, self._head_VC)
        product = packed.fp32_linear if self._packs_head else fp32_linear
        return product(h_NC, self._head_VC)

    def _decoded(self, tokens_N: Tensor, batch: DecodeBatch, cache: KVCache) -> _Part:
        num_rows, num_heads = batch.num_rows, self._num_heads
        grouped = (num_rows, self._num_kv_heads, self._group, self._head_dim)
        bias_N11T = batch.bias_N1T.unsqueeze(1)

        def attend(layer: int, qk_NHD: Tensor, value_NKD: Tensor) -> Tensor:
            key_NKTD, value_NKTD = cache.append(layer, qk_NHD[:, num_heads:], value_NKD)
            query_NKGD = qk_NHD[:, :num_heads].reshape(grouped)
            return self._attend(query_NKGD, key_NKTD, value_NKTD, bias_N11T).reshape(num_rows, -1)

        return _Part(tokens_N, batch.position_N, attend)

    def _new_tokens(self, new: NewTokens, cache: KVCache) -> _Part:
        """In a prefill the causal mask is enough: padding comes after all real tokens."""
        extension = new.extension
        num_contexts, length = new.tokens_BT.shape
        if extension is None:
            position_T = torch.arange(length, device=new.tokens_BT.device)
            positions = position_T.expand(num_contexts, length).reshape(-1)
        else:
            positions = extension.position_BT.flatten()
        last = self._config.num_hidden_layers - 1

        def attend(layer: int, qk: Tensor, value: Tensor) -> Tensor:
            qk_BTHD = qk.view(num_contexts, length, *qk.shape[1:])
            query_BHTD = qk_BTHD[:, :, : self._num_heads].transpose(1, 2)
            key_BKTD = qk_BTHD[:, :, self._num_heads :].transpose(1, 2)
            value_BKTD = value.view(num_contexts, length, *value.shape[1:]).transpose(1, 2)
            if extension is None:
                cache.fill(layer, key_BKTD, value_BKTD)
            else:
                key_BKTD, value_BKTD = cache.extend(layer, key_BKTD, value_BKTD)
            if layer == last:
                return qk.new_empty(0, self._num_heads * self._head_dim)
            attended_BHTD = F.scaled_dot_product_attention(
                query_BHTD,
                key_BKTD,
                value_BKTD,
                attn_mask=None if extension is None else extension.bias_B1TS,
                is_causal=extension is None,
                scale=self._scale,
                enable_gqa=self._group > 1,
            )
            return attended_BHTD.transpose(1, 2).reshape(num_contexts * length, -1)

        return _Part(new.tokens_BT.reshape(-1), positions, attend)

    def _forward(self, parts: list[_Part], *, num_wanted: int) -> Tensor:
        """Runs the layers over the tokens of all parts, one after the other. Returns the normed hidden states
        of the last `num_wanted` tokens, which are a part or none; of the others only the KV are computed."""
        plan = self._plan
        assert plan is not None, "activate a set of weights first"
        sizes = [len(part.tokens) for part in parts]
        tokens, positions = parts[0].tokens, parts[0].positions
        if len(parts) > 1:
            tokens = torch.cat([part.tokens for part in parts])
            positions = torch.cat([part.positions for part in parts])
        rotated_heads = self._num_heads + self._num_kv_heads
        x = F.embedding(tokens, plan.embed_VC)
        cos_N1D = self._cos_TD.index_select(0, positions).unsqueeze(1)
        sin_N1D = self._sin_TD.index_select(0, positions).unsqueeze(1)
        for i, layer in enumerate(plan.layers):
            h = self._rms_norm(x, layer.input_norm_C)
            qkv = self._qkv(h, layer).view(len(x), -1, self._head_dim)
            qk = self._rotate(self._normed(qkv[:, :rotated_heads], layer), cos_N1D, sin_N1D)
            value = qkv[:, rotated_heads:]
            if len(parts) == 1:
                attended = parts[0].attend(i, qk, value)
            else:
                pieces = zip(parts, torch.split(qk, sizes), torch.split(value, sizes), strict=True)
                attended = torch.cat([part.attend(i, *piece) for part, *piece in pieces])
            if i + 1 == len(plan.layers):
                if not num_wanted:
                    return x[:0]
                x = x[-num_wanted:]
            x = self._mlp(self._output(x, attended, layer), layer)
        return self._rms_norm(x, plan.norm_C)

    def _rms_norm(self, x: Tensor, weight_C: Tensor) -> Tensor:
        """Divides x [rows, C] by its root mean square.

        On the plain path the mean is a product with a constant column. In bfloat16 on a CPU it is rounded
        before the weights and after them, as in the trainer; F.rms_norm rounds once, and takes longer for
        hundreds of rows.
        """
        if self._rounds_norms:
            wide = x.float()
            norm_N1 = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            scale_N1 = norm_N1.square_().div_(x.shape[-1]).add_(self._eps).rsqrt_()
            return wide.mul_(scale_N1).to(x.dtype).mul_(weight_C)
        if not self._plain:
            return F.rms_norm(x, x.shape[-1:], weight_C, self._eps)
        return (x * weight_C).mul_(torch.addmm(self._eps_11, x * x, self._mean_C1).rsqrt_())

    def _normed(self, qk: Tensor, layer: _Layer) -> Tensor:
        """Normalizes queries and keys per head, before rotation, in models that do so (Qwen3)."""
        if layer.q_norm_D is None or layer.k_norm_D is None:
            return qk
        query, key = qk[..., : self._num_heads, :], qk[..., self._num_heads :, :]
        size = (self._head_dim,)
        query, key = (
            F.rms_norm(query, size, layer.q_norm_D, self._eps),
            F.rms_norm(key, size, layer.k_norm_D, self._eps),
        )
        return torch.cat((query, key), -2)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, x.roll(self._head_dim // 2, -1), sin)

    def _attend(self, query_NKGD: Tensor, key_NKTD: Tensor, value_NKTD: Tensor, bias_N11T: Tensor) -> Tensor:
        """Computes attention for one query per row.

        The G query heads of a KV head are laid out as G query positions, so keys need not be repeated for
        each head.
        """
        if not self._plain:
            return F.scaled_dot_product_attention(
                query_NKGD, key_NKTD, value_NKTD, attn_mask=bias_N11T, scale=self._scale
            )
        scores_NKGT = torch.matmul(query_NKGD, key_NKTD.transpose(-1, -2))
        scores_NKGT = torch.add(bias_N11T, scores_NKGT, alpha=self._scale)
        return torch.matmul(torch.softmax(scores_NKGT, -1), value_NKTD)

    def _qkv(self, h: Tensor, layer: _Layer) -> Tensor:
        return self._adapted(layer.names.qkv, h, self._linear(h, layer.qkv, layer.qkv_bias))

    def _output(self, x: Tensor, attended: Tensor, layer: _Layer) -> Tensor:
        return self._adapted(layer.names.output, attended, self._added(x, attended, layer.output_CO))

    def _mlp(self, x: Tensor, layer: _Layer) -> Tensor:
        h = self._rms_norm(x, layer.post_norm_C)
        gate, up = self._adapted(layer.names.gate_up, h, self._linear(h, layer.gate_up)).chunk(2, -1)
        h = F.silu(gate) * up
        return self._adapted(layer.names.down, h, self._added(x, h, layer.down_CF))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return packed.linear(x, weight, bias) if self.copies_weights else F.linear(x, weight, bias)

    def _added(self, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return packed.added(out, x, weight) if self.copies_weights else torch.addmm(out, x, weight.t())

    def _adapted(self, matrix: str, x: Tensor, out: Tensor) -> Tensor:
        return out if self.adapters is None else self.adapters.add(matrix, x, out)
