"""Loads a Hugging Face model for the engine, and checks that its log-probs agree with transformers.

The check costs two short forward passes at start, and makes it safe to accept any decoder-only model: an
architecture whose attention, positions or cache do not behave as this package assumes is refused with an
error message, instead of producing wrong log-probs for training.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from areal_like.errors import ConfigError, first_line
from areal_like.precision import RouterDtype, route_in_float32, widen_head
from areal_like.weights.checkpoint_files import weight_files
from areal_like.weights.hf_layout import hf_tensors
from areal_like.weights.safetensors_header import tensors_in
from areal_like.weights.untrained import (
    auto_class,
    frozen_parameters,
    is_wrapped,
    read_buffers,
    set_apart,
    text_config,
)
from rollout_server.engine.models import llama
from rollout_server.engine.models.base import CausalModel, ModelFacts, NewTokens, Weights
from rollout_server.engine.models.generic import GenericModel, delta_nets, gates_of
from rollout_server.engine.models.routes import RouteRecorder
from rollout_server.engine.models.row_cache import ShapeProbe

logger = logging.getLogger(__name__)

LINEAR = "linear_attention"
"""The kind of layers with a recurrent state, in `layer_types` of a model's configuration."""
CHECK_TOKENS = 12
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.125, torch.float16: 0.015}
"""Log-prob difference of a sampled token that the check accepts on average, by dtype. In bfloat16 a different
order of summation alone causes up to 0.075 with SmolLM2 and models trained from it. The largest difference in
a vocabulary would refuse right models: it is 0.5 there, of tokens with probabilities of e^-28."""

_FORWARD_ERRORS = (TypeError, AttributeError, NotImplementedError, IndexError, ValueError, RuntimeError)
"""Errors raised by a forward pass that cannot use our cache or mask. Running out of memory is also a
RuntimeError and is reported in the same way; the error's own text shows which it is."""


@torch.inference_mode()
def load(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    context_length: int,
    allow_fast_path: bool = True,
    fp32_head: bool = False,
    router_dtype: RouterDtype = "float32",
    records_routes: bool = False,
) -> tuple[CausalModel, Weights]:
    """Loads a model and its active set of weights.

    Raises ConfigError if the model does not exist or cannot be run exactly. `allow_fast_path`: false takes
    the generic path for the Llama family too (for tests). `fp32_head`: the logits are computed in float32.
    `router_dtype`: as `model.router_dtype`.
    `records_routes`: the model records which experts are chosen.
    """
    module = _from_pretrained(path, dtype=dtype).to(device).eval()
    route_in_float32(module, product=router_dtype)
    if fp32_head:
        widen_head(module)
    config = text_config(module.config)
    _check_attention(config, context_length=context_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, config.vocab_size, (2, CHECK_TOKENS), generator=generator).to(device)
    facts = _facts(module, tokens_BT, stored=_stored_names(path), dtype=dtype, device=device)
    if facts.max_positions < context_length:
        raise ConfigError(
            f"--context-length {context_length}: {path} supports only {facts.max_positions} positions; "
            f"use at most {facts.max_positions}"
        )
    recorder = RouteRecorder(module) if records_routes else None
    reference = [module(input_ids=tokens_BT[:1], use_cache=False).logits[0, -1]]
    reference.append(module(input_ids=tokens_BT[1:, : CHECK_TOKENS // 2], use_cache=False).logits[0, -1])

    names = set(facts.parameter_shapes)
    if allow_fast_path and not is_wrapped(module.config) and llama.supports(config, names):
        positions_1T = torch.arange(context_length, device=device).unsqueeze(0)
        cos_1TD, sin_1TD = module.model.rotary_emb(
            torch.zeros(1, dtype=torch.float32, device=device), positions_1T
        )
        model: CausalModel = llama.LlamaModel(
            config, facts, rotary=(cos_1TD[0], sin_1TD[0]), fp32_head=fp32_head
        )
    else:
        model = GenericModel(module, facts)
    weights = model.new_weights()
    parameters = dict(module.named_parameters())
    for tensor in facts.layout:
        weights.named[tensor.name].copy_(tensor.whole_in(parameters[tensor.param]))
    model.activate(weights)
    model.routes = recorder
    try:
        difference = _difference(model, tokens_BT, reference)
    except _FORWARD_ERRORS as error:
        raise ConfigError(f"model type {facts.model_type} cannot run over our KV cache: {error}") from None
    if not difference <= TOLERANCE[dtype]:
        raise ConfigError(
            f"--model-path {path}: model type {facts.model_type} does not run exactly on the embedded engine "
            f"(log-probs of sampled tokens differ by {difference:.2g} from transformers)"
        )
    if recorder is not None:
        logger.info("%s: routes of %s", path, recorder.shape)  # raises ConfigError if they are not known
    num_parameters = sum(tensor.numel() for tensor in weights.named.values())
    logger.info(
        "%s: %s, %d parameters, %s path", path, facts.model_type, num_parameters, type(model).__name__
    )
    return model, weights


def _from_pretrained(path: str, *, dtype: torch.dtype) -> Any:
    """The model of a directory or name, without encoders of other inputs."""
    folder = str(Path(path).expanduser())
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        is_linear = LINEAR in (getattr(text_config(config), "layer_types", None) or ())
        made_by = auto_class(config)
        with torch.device("meta"):
            frozen = frozen_parameters(made_by.from_config(copy.deepcopy(config), trust_remote_code=False))
        module = made_by.from_pretrained(
            folder, dtype=torch.float32 if is_linear else dtype, trust_remote_code=False
        )
        set_apart(module, frozen=frozen)
        files = _weight_files(path)
        if files:
            read_buffers(module, files)
        if is_linear and dtype != torch.float32:
            _narrow(module, dtype, files)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--model-path {path}: {first_line(error)}") from None
    return module


def _weight_files(path: str) -> list[Path]:
    """The safetensors files of a model; none if its weights are stored otherwise."""
    try:
        return weight_files(str(Path(path).expanduser()))
    except OSError:
        return []


def _stored_names(path: str) -> set[str]:
    """Names of the tensors in the safetensors files of a model."""
    return {tensor.name for file in _weight_files(path) for tensor in tensors_in(file)}


def _narrow(module: Any, dtype: torch.dtype, files: list[Path]) -> None:
    """Casts the parameters of a float32 model to `dtype`, in place, except the vectors of linear attention
    that the checkpoint stores in float32.

    The decay of a state is exp(-exp(A_log) softplus(a + dt_bias)), and acts at every position: rounding A_log
    changes how long a state lasts. The trainer has the same rule, and transformers rounds all parameters.
    Raises OSError and ValueError for weights that cannot be read.
    """
    vectors = [
        f"{path}.{name}"
        for path, layer in delta_nets(module).items()
        for name, param in layer.named_parameters()
        if param.ndim == 1
    ]
    # Checkpoints may have other names before the number of the layer: `model.language_model.layers.0`.
    ends = {name: name[name.rindex("layers.") :] for name in vectors if "layers." in name}
    stored = _float32_vectors(files)
    wide = {name for name, end in ends.items() if end in stored}
    for name, param in module.named_parameters():
        if name not in wide:
            param.data = param.data.to(dtype)


def _float32_vectors(files: list[Path]) -> set[str]:
    """Names of the vectors of a checkpoint in float32, from `layers.` on; without those of layers that
    predict further tokens (`mtp.`)."""
    return {
        tensor.name[tensor.name.rindex("layers.") :]
        for file in files
        for tensor in tensors_in(file)
        if "layers." in tensor.name and not tensor.name.startswith("mtp.")
        if tensor.dtype == "F32" and len(tensor.shape) == 1
    }


def _check_attention(config: Any, *, context_length: int) -> None:
    """Raises ConfigError for layers that are neither attention nor linear attention, and for a sliding window
    shorter than `context_length`."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention", LINEAR}:
        raise ConfigError(
            f"model type {config.model_type} has {', '.join(sorted(other))} layers: "
            "the embedded engine runs attention and Gated DeltaNet only"
        )
    window = getattr(config, "sliding_window", None)
    implicit = not hasattr(config, "layer_types") and getattr(config, "use_sliding_window", True)
    if window and ("sliding_attention" in kinds or implicit) and context_length > window:
        raise ConfigError(
            f"--context-length {context_length}: the model attends to a sliding window of {window} tokens; "
            f"use at most {window}"
        )


def _facts(
    module: Any, tokens_BT: Tensor, *, stored: set[str], dtype: torch.dtype, device: torch.device
) -> ModelFacts:
    config = text_config(module.config)
    probe = ShapeProbe()
    try:
        module(input_ids=tokens_BT, past_key_values=probe, use_cache=True)
    except _FORWARD_ERRORS as error:
        raise ConfigError(f"model type {config.model_type} cannot run over our KV cache: {error}") from None
    _check_layers(module, probe)
    unique = {name for name, _ in module.named_parameters()}
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    layout = hf_tensors(module)
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    eos = module.generation_config.eos_token_id
    if eos is None:
        eos = config.eos_token_id
    return ModelFacts(
        model_type=config.model_type,
        vocab_size=int(config.vocab_size),
        max_positions=int(getattr(config, "max_position_embeddings", None) or 1 << 30),
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),),
        parameter_shapes={tensor.name: tensor.shape for tensor in layout},
        parameter_dtypes={tensor.name: dtypes[tensor.param] for tensor in layout},
        layout=layout,
        tied_names=frozenset(every - unique),
        untrained_names=frozenset(stored - {tensor.name for tensor in layout}),
        kv_shapes=[shape for _, shape in sorted(probe.kv.items())],
        kv_layers=sorted(probe.kv),
        state_shapes=[shape for _, shape in sorted(probe.states.items())],
        state_layers=sorted(probe.states),
        dtype=dtype,
        device=device,
    )


def _check_layers(module: Any, probe: ShapeProbe) -> None:
    """Raises ConfigError if the probe has not seen each layer once, or saw states that padding would
    change."""
    config = text_config(module.config)
    kind = f"model type {config.model_type}"
    if sorted([*probe.kv, *probe.states]) != list(range(config.num_hidden_layers)):
        raise ConfigError(
            f"{kind}: the embedded engine needs keys and values or a recurrent state from every layer, "
            "and some layers of this model have none"
        )
    if not probe.kv:
        raise ConfigError(
            f"{kind}: the embedded engine needs a layer with full attention, and this model has none"
        )
    if len(gates_of(module)) != len(probe.states):
        raise ConfigError(
            f"{kind}: the embedded engine runs the linear attention of Qwen3-Next, Qwen3.5 and OLMo Hybrid "
            "(Gated DeltaNet), and this model has another"
        )


def _difference(model: CausalModel, tokens_BT: Tensor, reference: list[Tensor]) -> float:
    """Returns the expected |log-prob difference| of a token that is sampled from `reference`, two rows of
    logits [V], to the engine's; the larger of the rows.

    The engine's come from a padded prefill, an extension and one decode step over two contexts of unequal
    length, and, if the model joins passes, from a padded prefill in one pass with a decode step.
    """
    facts = model.facts
    lengths = [CHECK_TOKENS, CHECK_TOKENS // 2]
    cache = facts.new_cache(num_rows=2, context_length=CHECK_TOKENS)
    starts_B = np.array([CHECK_TOKENS - 4, CHECK_TOKENS // 2 - 3], np.int64)
    cache.begin_prefill(starts_B, rows=[[0], [1]])
    model.compute(NewTokens(tokens_BT=tokens_BT[:, : int(starts_B[0])]), cache)
    cache.end_prefill()
    lengths_B = np.array(lengths, np.int64) - 1 - starts_B
    new_BT = torch.zeros(2, int(lengths_B.max()), dtype=torch.int64, device=facts.device)
    for row, (start, length) in enumerate(zip(starts_B.tolist(), lengths_B.tolist(), strict=True)):
        new_BT[row, :length] = tokens_BT[row, start : start + length]
    extension = cache.begin_extension(rows=[0, 1], starts_B=starts_B, lengths_B=lengths_B)
    new = NewTokens(tokens_BT=new_BT, extension=extension)
    if not model.joins_passes:
        model.compute(new, cache)
    last_N = torch.stack([tokens_BT[row, length - 1] for row, length in enumerate(lengths)])
    position_N = np.array(lengths, np.int64) - 1
    batch = cache.begin_decode(position_N)
    found = [model.decode(last_N, batch, cache, new if model.joins_passes else None)]
    if model.joins_passes:
        cache = facts.new_cache(num_rows=2, context_length=CHECK_TOKENS)
        cache.begin_prefill(position_N, rows=[[0], [1]])
        new = NewTokens(tokens_BT=tokens_BT[:, : CHECK_TOKENS - 1])
        found.append(model.decode(last_N, cache.begin_decode(position_N), cache, new))
    ours_WNV = torch.log_softmax(torch.stack(found).float(), -1)
    theirs_NV = torch.log_softmax(torch.stack(reference).float(), -1)
    return float((theirs_NV.exp() * (ours_WNV - theirs_NV).abs()).sum(-1).max())
