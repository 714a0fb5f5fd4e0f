"""Loads a Hugging Face model for the engine, and checks that its log-probs agree with transformers.

The check costs two short forward passes at start, and makes it safe to accept any decoder-only model: an
architecture whose attention, positions or cache do not behave as this package assumes is refused with an
error message, instead of producing wrong log-probs for training.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.errors import ConfigError, first_line
from areal_like.precision import route_in_float32, widen_head
from areal_like.weights.hf_layout import hf_tensors
from rollout_server.engine.cache import KVCache
from rollout_server.engine.models import llama
from rollout_server.engine.models.base import CausalModel, ModelFacts, Weights
from rollout_server.engine.models.generic import GenericModel, RowCache
from rollout_server.engine.models.routes import RouteRecorder

logger = logging.getLogger(__name__)

CHECK_TOKENS = 12
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Maximum log-prob difference that the check accepts, by dtype. A different order of summation alone causes
1e-5 (float32), 0.1 (bfloat16) and 0.01 (float16)."""

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
    records_routes: bool = False,
) -> tuple[CausalModel, Weights]:
    """Loads a model and its active set of weights.

    Raises ConfigError if the model does not exist or cannot be run exactly. `allow_fast_path`: false takes
    the generic path for the Llama family too (for tests). `fp32_head`: the logits are computed in float32.
    `records_routes`: the model records which experts are chosen.
    """
    module = _from_pretrained(path, dtype=dtype).to(device).eval()
    route_in_float32(module)
    if fp32_head:
        widen_head(module)
    config = module.config
    _check_attention(config, context_length=context_length)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, config.vocab_size, (2, CHECK_TOKENS), generator=generator).to(device)
    facts = _facts(module, tokens_BT, dtype=dtype, device=device)
    if facts.max_positions < context_length:
        raise ConfigError(
            f"--context-length {context_length}: {path} supports only {facts.max_positions} positions; "
            f"use at most {facts.max_positions}"
        )
    recorder = RouteRecorder(module) if records_routes else None
    reference = [module(input_ids=tokens_BT[:1], use_cache=False).logits[0, -1]]
    reference.append(module(input_ids=tokens_BT[1:, : CHECK_TOKENS // 2], use_cache=False).logits[0, -1])

    names = set(facts.parameter_shapes)
    if allow_fast_path and llama.supports(config, names):
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
            f"(log-probs differ by {difference:.2g} from transformers)"
        )
    if recorder is not None:
        logger.info("%s: routes of %s", path, recorder.shape)  # raises ConfigError if they are not known
    num_parameters = sum(tensor.numel() for tensor in weights.named.values())
    logger.info(
        "%s: %s, %d parameters, %s path", path, facts.model_type, num_parameters, type(model).__name__
    )
    return model, weights


def _from_pretrained(path: str, *, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(Path(path).expanduser()), dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model-path {path}: {first_line(error)}") from None


def _check_attention(config: Any, *, context_length: int) -> None:
    """Raises ConfigError for layers without KV rows, and for a sliding window shorter than
    `context_length`."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"model type {config.model_type} has {', '.join(sorted(other))} layers: "
            "the embedded engine runs attention only"
        )
    window = getattr(config, "sliding_window", None)
    implicit = not hasattr(config, "layer_types") and getattr(config, "use_sliding_window", True)
    if window and ("sliding_attention" in kinds or implicit) and context_length > window:
        raise ConfigError(
            f"--context-length {context_length}: the model attends to a sliding window of {window} tokens; "
            f"use at most {window}"
        )


def _facts(module: Any, tokens_BT: Tensor, *, dtype: torch.dtype, device: torch.device) -> ModelFacts:
    config = module.config
    probe = RowCache()
    try:
        module(input_ids=tokens_BT, past_key_values=probe, use_cache=True)
    except _FORWARD_ERRORS as error:
        raise ConfigError(f"model type {config.model_type} cannot run over our KV cache: {error}") from None
    if sorted(probe.seen) != list(range(config.num_hidden_layers)):
        raise ConfigError(
            f"model type {config.model_type}: the embedded engine needs keys and values from every layer, "
            "and some layers of this model have none"
        )
    unique = {name for name, _ in module.named_parameters()}
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    layout = hf_tensors(module, with_buffers=False)
    eos = module.generation_config.eos_token_id
    if eos is None:
        eos = config.eos_token_id
    return ModelFacts(
        model_type=config.model_type,
        vocab_size=int(config.vocab_size),
        max_positions=int(getattr(config, "max_position_embeddings", None) or 1 << 30),
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),),
        parameter_shapes={tensor.name: tensor.shape for tensor in layout},
        layout=layout,
        tied_names=frozenset(every - unique),
        kv_shapes=[probe.seen[i] for i in range(config.num_hidden_layers)],
        dtype=dtype,
        device=device,
    )


def _difference(model: CausalModel, tokens_BT: Tensor, reference: list[Tensor]) -> float:
    """Returns the largest log-prob difference between the engine's logits and `reference`, two rows of logits
    [V].

    The engine's come from a padded prefill, an extension and one decode step over two contexts of unequal
    length.
    """
    facts = model.facts
    lengths = [CHECK_TOKENS, CHECK_TOKENS // 2]
    cache = KVCache(
        facts.kv_shapes, num_rows=2, context_length=CHECK_TOKENS, dtype=facts.dtype, device=facts.device
    )
    num_prefilled = [CHECK_TOKENS - 4, CHECK_TOKENS // 2 - 3]
    cache.begin_prefill(num_contexts=2, num_positions=num_prefilled[0])
    model.prefill(tokens_BT[:, : num_prefilled[0]], cache)
    cache.end_prefill(rows=[0, 1], sources=[0, 1])
    starts_B = np.array(num_prefilled, np.int64)
    lengths_B = np.array(lengths, np.int64) - 1 - starts_B
    new_BT = torch.zeros(2, int(lengths_B.max()), dtype=torch.int64, device=facts.device)
    for row, (start, length) in enumerate(zip(num_prefilled, lengths_B, strict=True)):
        new_BT[row, :length] = tokens_BT[row, start : start + length]
    model.extend(new_BT, cache.begin_extension(rows=[0, 1], starts_B=starts_B, lengths_B=lengths_B), cache)
    last_N = torch.stack([tokens_BT[row, length - 1] for row, length in enumerate(lengths)])
    batch = cache.begin_decode(np.array(lengths, dtype=np.int64) - 1)
    ours_NV = torch.log_softmax(model.decode(last_N, batch, cache).float(), -1)
    theirs_NV = torch.log_softmax(torch.stack(reference).float(), -1)
    return float((ours_NV - theirs_NV).abs().max())
