"""Supervised training of a small model on demonstrations, before RL.

One process and one thread, without checkpoints: a warm start takes seconds. It is deterministic, because the
model that it makes is cached under its arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from trainer.models.token_rows import TokenBatch

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
