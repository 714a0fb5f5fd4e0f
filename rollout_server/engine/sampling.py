"""The sampler: one batched draw for all rows. A request's draws do not depend on what else is in the batch.

A token is drawn by inverting the cumulative distribution at one uniform number per row. That number is a hash
of the sequence's key and the token's index (a counter-based generator), so it depends neither on the batch
nor on a shared generator's history, and needs no loop over requests. Log-probs are taken from the
temperature-scaled distribution before any filter, as SGLang and the trainer define them.

Shapes: N rows, V vocabulary; R rows at a time, B blocks of K tokens, W = B * K.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.splitmix64 import GOLDEN_GAMMA, MASK_64, mix, mix_array

_GOLDEN = np.uint64(GOLDEN_GAMMA)
LARGE_VOCABULARY = 8192
"""Size from which on a CPU draws in two stages: a block of tokens, then a token of it."""
_BLOCK = 256
_NUMBERS_AT_A_TIME = 1 << 18
"""Logits in work at the same time: 1 MiB of float32."""
_BELOW_ONE = 1 - 2.0**-52
"""A product with it is smaller than the other factor: what is drawn then has a weight above zero."""


def rng_key(seed: int, index: int) -> int:
    """Returns the uint64 key of sequence `index` under `seed`; both are taken modulo 2^64."""
    both = mix(seed & MASK_64) + GOLDEN_GAMMA * mix(index & MASK_64)
    return mix((both - GOLDEN_GAMMA) & MASK_64)  # `mix` adds what is subtracted


def uniforms(keys_N: NDArray[np.uint64], counters_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns float64[N] in [0, 1): the random number for token `counters_N[i]` of the sequence with key
    `keys_N[i]`."""
    bits_N = mix_array(keys_N + (counters_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Top-p, top-k and min-p thresholds of each row; top_p=1, top_k=V and min_p=0 exclude no token."""

    top_p_N1: Tensor
    """float32"""
    top_k_N1: Tensor
    """int64"""
    min_p_N1: Tensor
    """float32"""


def sample(
    logits_NV: Tensor,
    *,
    temperature_N: Tensor,
    uniform_N: Tensor,
    any_greedy: bool,
    any_random: bool,
    filters: Filters | None,
) -> tuple[Tensor, Tensor]:
    """Draws one token per row; returns (tokens int64[N], log-probs float32[N]).

    `temperature_N` is float32, 0 for greedy rows; `uniform_N` is float64 in [0, 1). `any_greedy` and
    `any_random` are true if there are rows of that kind, so that an all-greedy or all-random batch skips the
    work for the other kind.
    """
    if logits_NV.shape[1] >= LARGE_VOCABULARY and filters is None and logits_NV.device.type == "cpu":
        return _sample_large(
            logits_NV,
            temperature_N=temperature_N,
            uniform_N=uniform_N,
            any_greedy=any_greedy,
            any_random=any_random,
        )
    logits_NV = logits_NV.float()
    if any_random:
        divisor_N = torch.where(temperature_N > 0, temperature_N, 1.0) if any_greedy else temperature_N
        logits_NV = logits_NV / divisor_N.unsqueeze(1)
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    if any_random:
        probs_NV = logprobs_NV.exp()
        if filters is not None:
            probs_NV = _filtered(probs_NV, filters)
        cdf_NV = probs_NV.cumsum(-1, dtype=torch.float64)
        # right=True finds the first entry above the target, so a token of probability zero is never drawn.
        token_N1 = torch.searchsorted(cdf_NV, uniform_N.unsqueeze(1) * cdf_NV[:, -1:], right=True)
        token_N1 = token_N1.clamp_(max=logits_NV.shape[1] - 1)
        if any_greedy:
            token_N1 = torch.where(
                (temperature_N > 0).unsqueeze(1), token_N1, logits_NV.argmax(-1, keepdim=True)
            )
    else:
        token_N1 = logits_NV.argmax(-1, keepdim=True)
    return token_N1.squeeze(1), logprobs_NV.gather(1, token_N1).squeeze(1)


def _filtered(probs_NV: Tensor, filters: Filters) -> Tensor:
    """Zeroes the tokens that a filter excludes.

    As in SGLang, every filter uses the unfiltered probabilities.
    """
    sorted_NV, order_NV = probs_NV.sort(-1, descending=True)
    before_NV = sorted_NV.cumsum(-1) - sorted_NV
    rank_V = torch.arange(probs_NV.shape[1], device=probs_NV.device)
    keep_NV = (
        (before_NV <= filters.top_p_N1)
        & (rank_V < filters.top_k_N1)
        & (sorted_NV >= sorted_NV[:, :1] * filters.min_p_N1)
    )
    # The most likely token is always kept, so that at least one token can be drawn.
    keep_NV[:, 0] = True
    return torch.zeros_like(probs_NV).scatter_(-1, order_NV, sorted_NV * keep_NV)


def _sample_large(
    logits_NV: Tensor, *, temperature_N: Tensor, uniform_N: Tensor, any_greedy: bool, any_random: bool
) -> tuple[Tensor, Tensor]:
    """`sample` for a large vocabulary on a CPU, where each pass over [N, V] numbers costs memory bandwidth.

    A few rows at a time, which stay in the cache: exp(x - max) and the sums of its blocks. The cumulative
    distribution of the blocks chooses a block, and that of its tokens a token. So only one block of each row
    is summed up token by token, in float64.
    """
    num_rows, vocab_size = logits_NV.shape
    num_blocks = -(-vocab_size // _BLOCK)
    rows = max(1, _NUMBERS_AT_A_TIME // vocab_size)
    # Zeros after the last token: nothing is drawn from them.
    weight_RW = logits_NV.new_zeros(min(rows, num_rows), num_blocks * _BLOCK, dtype=torch.float32)
    scale_N1 = torch.where(temperature_N > 0, temperature_N, 1.0).reciprocal_().unsqueeze(1)
    is_scaled = bool((scale_N1 != 1).any())
    tokens, logprobs = [], []
    for start in range(0, num_rows, rows):
        part = slice(start, start + rows)
        logits_RV = logits_NV[part].float()
        scaled_RV = logits_RV * scale_N1[part] if is_scaled else logits_RV
        top_R1, first_R1 = scaled_RV.max(-1, keepdim=True)
        buffer_RW = weight_RW[: len(logits_RV)]
        torch.sub(scaled_RV, top_R1, out=buffer_RW[:, :vocab_size]).exp_()
        weight_RBK = buffer_RW.view(-1, num_blocks, _BLOCK)
        block_RB = weight_RBK.sum(-1).double()
        if any_random:
            token_R1 = _drawn(weight_RBK, block_RB, uniform_N[part]).clamp_(max=vocab_size - 1)
            if any_greedy:
                token_R1 = torch.where((temperature_N[part] > 0).unsqueeze(1), token_R1, first_R1)
        else:
            token_R1 = first_R1
        logsum_R1 = block_RB.sum(-1, keepdim=True).log().float()
        logprobs.append(scaled_RV.gather(1, token_R1) - top_R1 - logsum_R1)
        tokens.append(token_R1)
    return torch.cat(tokens).squeeze(1), torch.cat(logprobs).squeeze(1)


def _drawn(weight_RBK: Tensor, block_RB: Tensor, uniform_R: Tensor) -> Tensor:
    """Tokens int64[R, 1] with probabilities proportional to the weights, in blocks with sums `block_RB`."""
    cdf_RB = block_RB.cumsum(-1)
    uniform_R1 = uniform_R.clamp(max=_BELOW_ONE).unsqueeze(1)
    target_R1 = uniform_R1 * cdf_RB[:, -1:]
    block_R1 = torch.searchsorted(cdf_RB, target_R1, right=True).clamp_(max=block_RB.shape[1] - 1)
    size_R1 = block_RB.gather(1, block_R1)
    # The place of the target within its block. The sums of blocks are rounded, so it may be a little outside.
    rest_R1 = ((target_R1 - cdf_RB.gather(1, block_R1) + size_R1) / size_R1).clamp_(0, _BELOW_ONE)
    inner_RK = weight_RBK[torch.arange(len(block_R1)), block_R1.squeeze(1)].cumsum(-1, dtype=torch.float64)
    token_R1 = torch.searchsorted(inner_RK, rest_R1 * inner_RK[:, -1:], right=True)
    return block_R1 * weight_RBK.shape[2] + token_R1
