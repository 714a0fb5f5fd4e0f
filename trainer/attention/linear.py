"""Linear attention (Gated DeltaNet, arXiv 2412.06464) over packed sequences, each with a state of its own.

transformers' layer runs a short convolution and a recurrence along the rows that it gets. Rows of several
sequences, end to end, would hand the state of each sequence to the next, without an error. There are two ways
to keep them apart; `LinearAttention` chooses for each call:

    kernels      flash-linear-attention and causal-conv1d take the bounds of the sequences: CUDA, 16 bits
    rectangles   the rows padded to [sequences, longest], each sequence a row of the batch: anywhere else

The state runs from left to right and the padding is at the end, so no real position reads it. transformers
takes the two kernels wherever it can import them, even for tensors on a CPU, and its own functions in torch
drop the bounds silently. Therefore the layer's forward is called with the functions that this module chooses.

In a context group the layer's projections and norms run on the rank's own rows. Its two functions run on all
rows of the micro-batch: the convolution on a part of the channels, the recurrence on a part of the heads.

A sequence's state at the end of a prefix is not kept for other sequences, so these models compute shared
prefixes once for each sequence (`PackedModel.shares_prefixes`).

Shape suffixes: U rows, R rows of this rank of a context group, N sequences of a rectangle, L longest of them,
D hidden size, C channels of the convolution, K its kernel, H heads.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from areal_like.errors import ConfigError
from trainer.attention.context import ContextExchange
from trainer.attention.packed_attention import Kind, pad_rows, unpad_rows
from trainer.batching.attention_layout import AttentionLayout, RectangleLayout

log = logging.getLogger(__name__)

LINEAR = "linear_attention"
"""transformers' name of such a layer in `layer_types`."""
CLASSES = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
"""transformers' classes whose forward these ways fit."""
CONVOLUTION, DELTA_RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
"""The two functions that a layer's forward calls, by their names in its module."""
INSTALL = "pip install flash-linear-attention causal-conv1d"
_PACKAGES = {
    "flash-linear-attention": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "causal-conv1d": ("causal_conv1d", "causal_conv1d_fn"),
}
_FORWARDS_IN_TORCH: dict[type[nn.Module], Any] = {}


class LinearAttention:
    """Replaces the forward of one layer of transformers."""

    def __init__(self, layer: nn.Module) -> None:
        self.exact: dict[str, Tensor] = {}
        """Name of a parameter within the layer -> its values in float32, which take the place of the rounded
        ones in the forward; see `trainer/models/wide_vectors.py`."""
        self.layer = layer
        self._with_kernels: Callable[..., Tensor] = layer.forward
        self._in_torch: Callable[..., Tensor] = functools.partial(_forward_in_torch(type(layer)), layer)
        self._stand_ins: Mapping[str, Callable[..., Any]] = {}

    def __call__(
        self,
        hidden_states: Tensor,
        *,
        packed_layout: AttentionLayout | None = None,
        packed_kind: Kind = "auto",
        packed_context: ContextExchange | None = None,
        **_ignored: Any,
    ) -> Tensor:
        """[1, U, D] -> [1, U, D]; with `packed_context` [1, R, D] -> [1, R, D]."""
        assert packed_layout is not None and packed_layout.shared is None and len(hidden_states) == 1
        packed_layout.users.append(self.layer)
        with self._exact_parameters():
            takes_bounds = bool(self._stand_ins) or uses_kernels(packed_kind, hidden_states)
            if packed_context is not None:
                return self._divided(hidden_states, packed_layout, packed_context, takes_bounds=takes_bounds)
            if takes_bounds:
                sequences = packed_layout.linear
                return self._with_kernels(
                    hidden_states, cu_seq_lens_q=sequences.bounds, seq_idx=sequences.index_1U
                )
            forward = self._with_kernels if has_delta_rule(hidden_states) else self._in_torch
            return in_rectangles(forward, hidden_states[0], packed_layout.rectangles)[None]

    def stand_in(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Every call takes the way of the kernels, with other functions in their place. For traces.

        `functions`: CONVOLUTION and DELTA_RULE -> functions with the signatures of transformers' own.
        """
        forward = _with_functions(inspect.unwrap(type(self.layer).forward), functions)
        self._with_kernels, self._stand_ins = functools.partial(forward, self.layer), functions

    def _divided(
        self,
        hidden_1RD: Tensor,
        layout: AttentionLayout,
        exchange: ContextExchange,
        *,
        takes_bounds: bool,
    ) -> Tensor:
        forward: Any = inspect.unwrap(type(self.layer).forward)
        functions: Mapping[str, Callable[..., Any]] = self._stand_ins or {
            name: forward.__globals__[name] for name in (CONVOLUTION, DELTA_RULE)
        }
        if not takes_bounds and not has_delta_rule(hidden_1RD):
            functions = {name: inspect.unwrap(each) for name, each in functions.items()}
        divided = _Divided(functions, layout, exchange, takes_bounds=takes_bounds)
        out: Tensor = _with_functions(forward, divided.functions)(self.layer, hidden_1RD)
        return out

    @contextmanager
    def _exact_parameters(self) -> Iterator[None]:
        """Within the block the layer has the values of `exact`; gradients reach its own parameters."""
        own = []
        for path, exact in self.exact.items():
            module_path, _, name = path.rpartition(".")
            parameters: dict[str, Any] = self.layer.get_submodule(module_path)._parameters
            param = parameters[name]
            own.append((parameters, name, param))
            # FSDP2 gives a module its gathered parameters just before the forward, so they are replaced here.
            parameters[name] = exact + (param - param.detach()).to(exact.dtype)
        try:
            yield
        finally:
            for parameters, name, param in own:
                parameters[name] = param


class _Divided:
    """The two functions of a layer's forward for own rows. Each exchanges rows for channels or heads,
    runs on all rows of the micro-batch, and exchanges back."""

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        layout: AttentionLayout,
        exchange: ContextExchange,
        *,
        takes_bounds: bool,
    ) -> None:
        """`takes_bounds`: `functions` take the bounds of sequences; else they run in rectangles."""
        self._whole = functions
        self._layout = layout
        self._exchange = exchange
        self._takes_bounds = takes_bounds
        self.functions: Mapping[str, Callable[..., Any]] = {
            CONVOLUTION: self._convolution,
            DELTA_RULE: self._delta_rule,
        }

    def _convolution(
        self, hidden_1CR: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, **settings: Any
    ) -> Tensor:
        (hidden_UC1,) = self._exchange.to_heads(hidden_1CR[0].T[:, :, None])
        own = self._exchange.own_heads(len(weight_CK))
        bias = None if bias_C is None else bias_C[own]

        def convolve(hidden_NLC: Tensor, **bounds: Tensor) -> Tensor:
            out_NCL: Tensor = self._whole[CONVOLUTION](
                hidden_NLC.transpose(1, 2), weight_CK[own], bias, **settings, **bounds
            )
            return out_NCL.transpose(1, 2)

        if self._takes_bounds:
            sequences = self._layout.linear
            bounds = {"cu_seq_lens_q": sequences.bounds, "seq_idx": sequences.index_1U}
            out_UC = convolve(hidden_UC1[None, :, :, 0], **bounds)[0]
        else:
            out_UC = in_rectangles(convolve, hidden_UC1[:, :, 0], self._layout.rectangles)
        return self._exchange.to_rows(out_UC[:, :, None])[:, :, 0].T[None]

    def _delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        cu_seqlens: None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        """query, key and value [1, R, H, size], g and beta [1, R, H] -> [1, R, H, size]"""
        of_heads = self._exchange.to_heads(query[0], key[0], value[0], g[0, :, :, None], beta[0, :, :, None])

        def scan(*parts: Tensor, **bounds: Tensor) -> Tensor:
            query, key, value, g, beta = parts
            out, _ = self._whole[DELTA_RULE](
                query, key, value, g=g.squeeze(-1), beta=beta.squeeze(-1), **settings, **bounds
            )
            assert isinstance(out, Tensor)
            return out

        if self._takes_bounds:
            sequences = self._layout.linear
            bounds = {"cu_seqlens": sequences.bounds, "seq_idx": sequences.index_1U}
            out_UHD = scan(*(each[None] for each in of_heads), **bounds)[0]
        else:
            out_UHD = in_rectangles(scan, of_heads, self._layout.rectangles)
        return self._exchange.to_rows(out_UHD)[None], None


def in_rectangles(
    forward: Callable[..., Tensor], rows: Tensor | Sequence[Tensor], layout: RectangleLayout
) -> Tensor:
    """[U, ...] -> [U, ...]: `forward` gets [N, L, ...] of each rectangle, of each of `rows`."""
    sizes = [each.num_sequences * each.num_queries for each in layout.rectangles]
    inputs = [rows] if isinstance(rows, Tensor) else rows
    parts = [torch.split(pad_rows(row_U, layout), sizes) for row_U in inputs]
    outs = [
        forward(
            *(part.unflatten(0, (each.num_sequences, each.num_queries)) for part in of_rectangle)
        ).flatten(0, 1)
        for each, *of_rectangle in zip(layout.rectangles, *parts, strict=True)
    ]
    return unpad_rows(outs[0] if len(outs) == 1 else torch.cat(outs), layout)


def state_size(config: Any) -> int:
    """Numbers in the state of one sequence in one layer, of a configuration of transformers; 0 without such
    layers."""
    heads = getattr(config, "linear_num_value_heads", 0)
    return int(heads and heads * config.linear_key_head_dim * config.linear_value_head_dim)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that this module supports."""
    return [module for module in model.modules() if type(module).__name__ in CLASSES]


def pack_linear_layers(model: nn.Module) -> list[LinearAttention]:
    """Makes the linear-attention layers of a model keep packed sequences apart, in place; call it once."""
    packed = []
    for layer in linear_layers(model):
        packed.append(LinearAttention(layer))
        layer.forward = packed[-1]
    return packed


def check_kernels(device: torch.device, *, kind: Kind, dtype: torch.dtype) -> None:
    """Logs, once, how linear attention is computed on a device. `dtype`: of the forward.

    Raises ConfigError where flash-linear-attention fits and is missing, unless rectangles were chosen.
    """
    obstacle = _obstacle(device.type, dtype)
    missing = "" if _unfit(device.type, dtype) else _import_error("flash-linear-attention")
    if missing and kind != "rectangles":
        raise ConfigError(
            f"this model has linear attention, whose kernels cannot be used ({missing}): {INSTALL}. "
            "trainer.attention=rectangles does without them, in torch, and is much slower"
        )
    if kind == "varlen" and obstacle:
        raise ConfigError(f"trainer.attention=varlen: {obstacle}. Set trainer.attention=auto")
    why = "trainer.attention=rectangles" if kind == "rectangles" else obstacle
    _log_once(f"linear attention: {f'rectangles ({why})' if why else 'kernels'}; prefixes are not shared")


def uses_kernels(kind: Kind, hidden: Tensor) -> bool:
    """True if both kernels are called. Raises ConfigError if they were chosen and cannot be used."""
    if kind == "rectangles":
        return False
    obstacle = _obstacle(hidden.device.type, hidden.dtype)
    if obstacle and kind == "varlen":
        raise ConfigError(f"trainer.attention=varlen: {obstacle}. Set trainer.attention=auto")
    return not obstacle


def has_delta_rule(hidden: Tensor) -> bool:
    """True if flash-linear-attention takes tensors like these, in rectangles too."""
    return not _unfit(hidden.device.type, hidden.dtype) and not _import_error("flash-linear-attention")


def _obstacle(device_type: str, dtype: torch.dtype) -> str:
    """Why the kernels do not take the bounds of sequences; empty if they do."""
    return _unfit(device_type, dtype) or "; ".join(filter(None, map(_import_error, _PACKAGES)))


def _unfit(device_type: str, dtype: torch.dtype) -> str:
    if device_type != "cuda":
        return f"the kernels of linear attention need CUDA, and the trainer runs on {device_type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels of linear attention do not support {str(dtype).removeprefix('torch.')}"
    return ""


@functools.cache
def _import_error(package: str) -> str:
    """Why a kernel cannot be imported, as transformers tries it; empty if it can be."""
    module, function = _PACKAGES[package]
    try:
        getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        is_absent = error.name == module.partition(".")[0]
        return f"{package} is not installed" if is_absent else f"{package}: {error}"
    except Exception as error:  # built for another torch, no driver: the package decides what it raises
        return f"{package}: {type(error).__name__}: {error}"
    return _wrong_on_hopper() if package == "flash-linear-attention" else ""


def _wrong_on_hopper() -> str:
    """Why this machine's Triton is refused; empty if it is not, or if tilelang takes its place.

    From 3.4.0 to 3.7.0 it computes wrong gradients of the gated delta rule on Hopper GPUs, and the package
    raises in the first backward (flash-linear-attention, issue 640).
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return ""
    version = str(importlib.import_module("triton").__version__)
    is_wrong = (3, 4) <= tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 7, 1)
    if not is_wrong or importlib.util.find_spec("tilelang"):
        return ""
    return (
        f"Triton {version} computes wrong gradients of it on this GPU, so tilelang or Triton 3.7.1 is needed"
    )


@functools.cache
def _log_once(message: str) -> None:
    log.info("%s", message)


def _forward_in_torch(layer: type[nn.Module]) -> Any:
    """The forward of a class with transformers' own functions, whatever is installed."""
    if layer not in _FORWARDS_IN_TORCH:
        forward: Any = inspect.unwrap(layer.forward)
        own = {name: inspect.unwrap(forward.__globals__[name]) for name in (CONVOLUTION, DELTA_RULE)}
        _FORWARDS_IN_TORCH[layer] = _with_functions(forward, own)
    return _FORWARDS_IN_TORCH[layer]


def _with_functions(forward: Any, functions: Mapping[str, Callable[..., Any]]) -> Any:
    """A copy of a function for which some names of its module mean other functions."""
    return FunctionType(
        forward.__code__,
        forward.__globals__ | functions,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
