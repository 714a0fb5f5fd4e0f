"""The rows of a micro-batch that one rank of a context group computes; computed on the host.

Rank c of N computes the rows c, c + N, c + 2 N, ... So all have equally many rows and nearly equally many
sampled tokens, whose logits are the largest tensors of a micro-batch. All ranks have the same number of rows:
the last ones repeat the micro-batch's last row, which nothing reads.

Shape suffixes: T packed tokens, U rows of the micro-batch, R rows of a rank, S sampled tokens, C sampled
tokens whose logits a rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batching.device_copies import copied
from trainer.batching.shared_prefixes import SharedRows


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextPart:
    """What one rank computes of a micro-batch."""

    num_rows: int
    """U"""
    most_sampled: int
    """Largest C of the ranks."""
    row_R: Tensor
    """int64 index into U of each own row."""
    token_R: Tensor
    """int64 index into T of the token that each own row computes."""
    read_C: Tensor
    """int64 index into R of the row from which each of its sampled tokens is predicted."""
    target_C: Tensor
    """int64 index into T of these sampled tokens."""
    place_S: Tensor
    """int64 index of each sampled token of the micro-batch into the parts of all ranks, each padded to
    `most_sampled`."""

    @classmethod
    def of(
        cls,
        sampled_S: NDArray[np.int64],
        *,
        num_tokens: int,
        shared: SharedRows | None,
        num_ranks: int,
        rank: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The part of `rank`. `sampled_S`: indices into T. `shared`: the rows; None: one for each token."""
        token_U = np.arange(num_tokens) if shared is None else shared.token_U
        read_S = sampled_S - 1
        if shared is not None:
            read_S = shared.row_T[read_S]
        num_rows = len(token_U)
        row_R = np.minimum(np.arange(-(-num_rows // num_ranks)) * num_ranks + rank, num_rows - 1)
        owner_S = read_S % num_ranks
        count_N = np.bincount(owner_S, minlength=num_ranks)
        most = int(count_N.max())
        place_S = np.empty(len(sampled_S), dtype=np.int64)
        for owner in range(num_ranks):
            place_S[owner_S == owner] = owner * most + np.arange(count_N[owner])
        own_C = np.flatnonzero(owner_S == rank)
        tensors = copied(
            [row_R, token_U[row_R], read_S[own_C] // num_ranks, sampled_S[own_C], place_S], device
        )
        row, token, read, target, place = tensors
        return cls(
            num_rows=num_rows,
            most_sampled=most,
            row_R=row,
            token_R=token,
            read_C=read,
            target_C=target,
            place_S=place,
        )
