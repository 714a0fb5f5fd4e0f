"""Log-probs of given tokens under the engine's active weights, computed with the kernels for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rollout_server.engine.cache import KVCache
from rollout_server.engine.core import EngineCore


@torch.inference_mode()
def score(core: EngineCore, tokens: Sequence[int], *, first: int) -> NDArray[np.float32]:
    """Returns the log-probs, at temperature 1, of the tokens from index `first` (at least 1) on:
    float32[len(tokens) - first].

    Runs in the engine's thread between two steps, in a KV row of its own. The tokens before `first` are one
    prefill; each later token is one decode step, as when it was sampled.
    """
    facts = core.model.facts
    cache = KVCache(
        facts.kv_shapes, num_rows=1, context_length=len(tokens), dtype=facts.dtype, device=facts.device
    )
    tokens_1T = torch.tensor([list(tokens)], device=facts.device)
    if first > 1:
        cache.begin_prefill(num_contexts=1, num_positions=first - 1)
        core.model.prefill(tokens_1T[:, : first - 1], cache)
        cache.end_prefill(rows=[0], sources=[0])
    logprobs = []
    for position in range(first - 1, len(tokens) - 1):
        batch = cache.begin_decode(np.array([position]))
        logits_1V = core.model.decode(tokens_1T[0, position : position + 1], batch, cache)
        logprobs.append(torch.log_softmax(logits_1V[0].float(), -1)[tokens_1T[0, position + 1]])
    scores: NDArray[np.float32] = torch.stack(logprobs).cpu().numpy()
    return scores
