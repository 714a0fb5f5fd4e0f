"""What the tests of objectives share: the numbers of the published vectors, and a step done as the trainer does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.batching.scope import Scope
from trainer.objectives import Objective, SampledTokens, StepStats
from trainer.objectives.normalizers import Normalizer

MU = [[-1.0, -2.0, -0.5], [-0.7, -1.2]]
PROX = [[-0.9, -1.2, -0.9], [-0.8, -1.5]]
PI = [[-0.8, -1.1, -0.6], [-1.0, -1.9]]
ADVANTAGES = [1.0, -1.0]
REWARDS = [1.0, 0.0]
NORMALIZERS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant")

Rows = Sequence[Sequence[float]]


def tokens_of(
    pi: Rows,
    mu: Rows,
    advantages: Sequence[float],
    rewards: Sequence[float] | None = None,
    *,
    prox: Rows | None = None,
    ref: Rows | None = None,
    entropy: Rows | None = None,
    lag: Rows | None = None,
    truncated: Sequence[bool] | None = None,
) -> SampledTokens:
    """Sequences as a micro-batch, in float64; one group. `prox` defaults to pi, as with one optimizer step a batch; `ref` to mu."""
    lengths = torch.tensor([len(row) for row in pi])
    segment_S = torch.repeat_interleave(torch.arange(len(pi)), lengths)

    def flat(rows: Rows) -> Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=torch.float64)

    zeros = [[0.0] * len(row) for row in pi]
    return SampledTokens(
        logp_S=flat(pi).requires_grad_(),
        behavior_logp_S=flat(mu),
        advantage_S=torch.tensor(advantages, dtype=torch.float64)[segment_S],
        segment_S=segment_S,
        length_N=lengths.double(),
        reward_N=torch.tensor(rewards or [0.0] * len(pi), dtype=torch.float64),
        group_N=torch.zeros(len(pi), dtype=torch.int64),
        truncated_N=torch.tensor(truncated or [False] * len(pi)),
        version_S=torch.zeros(len(segment_S), dtype=torch.int32),
        lag_S=flat(lag or zeros),
        entropy_S=flat(entropy or zeros),
        prox_logp_S=flat(prox or pi),
        ref_logp_S=flat(ref or mu),
    )


def evaluate(
    objective: Objective, parts: Sequence[SampledTokens], *, normalizer: str = "token_mean"
) -> tuple[float, list[float]]:
    """Loss and dL/dpi of a step that was cut into these micro-batches; a normaliser that the objective prescribes wins."""
    observed: dict[str, list[Tensor]] = {}
    for part in parts:
        with torch.no_grad():
            for name, vector in objective.observe(part).items():
                observed.setdefault(name, []).append(vector.double())
    stats: StepStats = {}
    if objective.scope is Scope.BATCH:
        stats = objective.summarize({name: torch.cat(vectors) for name, vectors in observed.items()})
    norm = Normalizer(name=objective.normalizer or normalizer, max_tokens=10)
    total = num_tokens = num_seqs = 0.0
    for part in parts:
        part.logp_S.grad = None
        loss_S, tokens, seqs = norm.weigh(objective.losses(part, stats), part)
        loss_S.sum().backward()  # type: ignore[no-untyped-call]
        total, num_tokens, num_seqs = (
            total + loss_S.sum().item(),
            num_tokens + float(tokens),
            num_seqs + float(seqs),
        )
    divisor = norm.divisor(num_tokens=num_tokens, num_seqs=num_seqs)
    grads = [part.logp_S.grad for part in parts]
    return total / divisor, [x / divisor for grad in grads if grad is not None for x in grad.tolist()]


def published(**more: Any) -> SampledTokens:
    """The published example as one micro-batch."""
    settings: Mapping[str, Any] = {"advantages": ADVANTAGES, "rewards": REWARDS, "prox": PROX, **more}
    return tokens_of(PI, MU, **settings)
