"""For tests of objectives: the inputs of published examples, and a step computed as in the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.batching.scope import Scope
from trainer.objectives import Objective, SampledTokens, StepStats
from trainer.objectives.normalizers import Normalizer

BEHAVIOR_LOGP = [[-1.0, -2.0, -0.5], [-0.7, -1.2]]
PROX_LOGP = [[-0.9, -1.2, -0.9], [-0.8, -1.5]]
LOGP = [[-0.8, -1.1, -0.6], [-1.0, -1.9]]
ADVANTAGES = [1.0, -1.0]
REWARDS = [1.0, 0.0]
NORMALIZERS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant")

Rows = Sequence[Sequence[float]]


def tokens_of(
    logp: Rows,
    behavior_logp: Rows,
    advantages: Sequence[float],
    rewards: Sequence[float] | None = None,
    *,
    prox_logp: Rows | None = None,
    ref_logp: Rows | None = None,
    teacher_logp: Rows | None = None,
    entropy: Rows | None = None,
    lag: Rows | None = None,
    truncated: Sequence[bool] | None = None,
) -> SampledTokens:
    """One group of sequences, given by the log-probs of their tokens, as a micro-batch in float64.

    `prox_logp` defaults to `logp`, as with one optimizer step per batch; `ref_logp` and
    `teacher_logp` to `behavior_logp`.
    """
    lengths = torch.tensor([len(row) for row in logp])
    sample_S = torch.repeat_interleave(torch.arange(len(logp)), lengths)

    def flat(rows: Rows) -> Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=torch.float64)

    zeros = [[0.0] * len(row) for row in logp]
    return SampledTokens(
        logp_S=flat(logp).requires_grad_(),
        behavior_logp_S=flat(behavior_logp),
        advantage_S=torch.tensor(advantages, dtype=torch.float64)[sample_S],
        sample_S=sample_S,
        length_N=lengths.double(),
        reward_N=torch.tensor(rewards or [0.0] * len(logp), dtype=torch.float64),
        group_N=torch.zeros(len(logp), dtype=torch.int64),
        truncated_N=torch.tensor(truncated or [False] * len(logp)),
        version_S=torch.zeros(len(sample_S), dtype=torch.int32),
        lag_S=flat(lag or zeros),
        entropy_S=flat(entropy or zeros),
        prox_logp_S=flat(prox_logp or logp),
        ref_logp_S=flat(ref_logp or behavior_logp),
        teacher_logp_S=flat(teacher_logp or behavior_logp),
    )


def evaluate(
    objective: Objective, parts: Sequence[SampledTokens], *, normalizer: str = "token_mean"
) -> tuple[float, list[float]]:
    """Loss of a step cut into these micro-batches, and its gradient with respect to log pi.

    A normalizer that the objective prescribes replaces `normalizer`.
    """
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
    settings: Mapping[str, Any] = {
        "advantages": ADVANTAGES,
        "rewards": REWARDS,
        "prox_logp": PROX_LOGP,
        **more,
    }
    return tokens_of(LOGP, BEHAVIOR_LOGP, **settings)
