"""Trains a small model on demonstrations before RL, and makes the batches of its token rows.

It runs in one process and one thread, without checkpoints: a warm start takes seconds. It is deterministic,
because the resulting model is cached under the arguments.

A row is a whole sequence: a prompt with its completion, or a conversation of many turns. Cross-entropy is
computed on the tokens in the loss mask. Rows of similar length are padded; rows of very different lengths are
packed end to end, and the positions, which begin at 0 in each row, keep the attention of transformers inside
of it.

Shapes: B rows of a batch, L tokens of one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from areal_like.chat.token_row import TokenRow

log = logging.getLogger(__name__)

WARMUP_STEPS = 10


def warm_start(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    num_steps: int,
) -> None:
    """Trains in place: one step for each batch. Learning rates rise for ten steps and fall linearly to zero.

    `optimizers`: together they hold every parameter; each group's `lr` is its largest.
    """
    largest = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    for step, batch in enumerate(islice(batches, num_steps)):
        for group, lr in largest:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / num_steps)
        loss = batch.loss(model)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step + 1 == num_steps:
            log.info("warm start: step %d of %d, loss %.3f", step + 1, num_steps, loss.item())
    model.eval()


IGNORED = -100
"""Label of a position that cross-entropy ignores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """One step's rows as tensors int64[B, L]."""

    tokens_BL: Tensor
    labels_BL: Tensor
    """The token where it is learned, else IGNORED."""
    positions_BL: Tensor | None
    """Position of each token in its row; None: rows begin at the left and are padded on the right, where a
    causal model does not attend to it."""

    def loss(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy of the learned tokens under a transformers causal LM."""
        positions = {} if self.positions_BL is None else {"position_ids": self.positions_BL[:, :-1]}
        logits_BLV = model(input_ids=self.tokens_BL[:, :-1], use_cache=False, **positions).logits
        labels = self.labels_BL[:, 1:].flatten()
        return F.cross_entropy(logits_BLV.flatten(0, 1), labels, ignore_index=IGNORED)


def padded(
    rows: Iterable[TokenRow], *, num_rows: int, length: int, pad_token_id: int
) -> Iterator[TokenBatch]:
    """Batches of `num_rows` rows, each padded to `length` tokens. Raises ValueError for a longer row."""
    rows = iter(rows)
    while some := list(islice(rows, num_rows)):
        tokens_BL, labels_BL = _empty(len(some), length, pad_token_id)
        for at, row in enumerate(some):
            _write(row, tokens_BL[at], labels_BL[at])
        yield TokenBatch(tokens_BL=tokens_BL, labels_BL=labels_BL, positions_BL=None)


def packed(
    rows: Iterable[TokenRow], *, num_rows: int, length: int, pad_token_id: int
) -> Iterator[TokenBatch]:
    """Batches of `num_rows` times `length` tokens, with whole rows end to end, in their order.

    Raises ValueError for a row longer than `length`.
    """
    lines = _lines(rows, length=length)
    while some := list(islice(lines, num_rows)):
        tokens_BL, labels_BL = _empty(len(some), length, pad_token_id)
        positions_BL = torch.zeros_like(tokens_BL)
        for at, line in enumerate(some):
            begin = 0
            for row in line:
                end = begin + len(row.tokens)
                _write(row, tokens_BL[at, begin:], labels_BL[at, begin:])
                labels_BL[at, begin] = IGNORED  # the token before it belongs to another row
                positions_BL[at, begin:end] = torch.arange(end - begin)
                begin = end
            positions_BL[at, begin:] = torch.arange(length - begin)
        yield TokenBatch(tokens_BL=tokens_BL, labels_BL=labels_BL, positions_BL=positions_BL)


def _lines(rows: Iterable[TokenRow], *, length: int) -> Iterator[list[TokenRow]]:
    line: list[TokenRow] = []
    room = length
    for row in rows:
        if line and len(row.tokens) > room:
            yield line
            line, room = [], length
        line.append(row)
        room -= len(row.tokens)
    if line:
        yield line


def _empty(num_rows: int, length: int, pad_token_id: int) -> tuple[Tensor, Tensor]:
    tokens_BL = torch.full((num_rows, length), pad_token_id, dtype=torch.long)
    return tokens_BL, torch.full_like(tokens_BL, IGNORED)


def _write(row: TokenRow, tokens_L: Tensor, labels_L: Tensor) -> None:
    """Writes a row to the left end of a line."""
    if len(row.tokens) > len(tokens_L):
        raise ValueError(f"a row of {len(row.tokens)} tokens does not fit into {len(tokens_L)}")
    tokens = torch.tensor(row.tokens)
    tokens_L[: len(tokens)] = tokens
    labels_L[: len(tokens)] = tokens.where(torch.tensor(row.loss_mask) == 1, IGNORED)
