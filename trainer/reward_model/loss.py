"""The loss of a Bradley-Terry reward model (Bradley and Terry, 1952; Ouyang et al., 2022, arXiv 2203.02155,
section 3.5).

    a better completion    -log sigmoid(s_better - s_worse - margin)    (margin: Touvron et al., 2023, arXiv
                                                                        2307.09288, section 3.2.2)
    a tie                  -1/2 log sigmoid(s_a - s_b) - 1/2 log sigmoid(s_b - s_a)
    centering              + coefficient (s_a + s_b)^2                  (Eisenstein et al., 2023, arXiv
                                                                        2312.09244, section 2)

A tie counts half for either side: it is least, log 2, where both scores are equal. The model of ties of Rao
and Kupper (1967) was left out: it needs a threshold beside the scores, which no other program would read from
the model's directory. The mean is over all comparisons of a step.

Calibration: a pair is predicted with confidence sigmoid(|s_a - s_b|), from 1/2 to 1, and is correct if the
higher score is that of the better completion. The expected calibration error (Guo et al., 2017, arXiv
1706.04599, equation 3) is the mean of |accuracy - confidence| over ten bins of confidence, weighted by their
numbers of pairs. Ties are neither correct nor wrong and are left out; equal scores are half correct.

Shape suffixes: N completions, P pairs, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.batching.packing import PackedBatch
from trainer.models.packed_model import PackedModel
from trainer.offline.preference_rows import comparisons
from trainer.offline.step import OfflineLoss

NUM_BINS = 10
_TOTALS = ("loss", "pairs", "decided", "correct", "margin", "completions", "score", "score_square")
_OF_BIN = ("num", "confidence", "correct")


class BradleyTerryLoss(OfflineLoss):
    """The loss of comparisons, with accuracy and calibration."""

    names = (*_TOTALS, *(f"{name}_{at}" for name in _OF_BIN for at in range(NUM_BINS)))
    divisor = "pairs"

    def __init__(self, model: PackedModel, *, center_coef: float = 0.0) -> None:
        """`model`: gives one score for each sequence of a batch."""
        super().__init__(model)
        self._center_coef = center_coef

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        score_N: Tensor = self.model(batch)
        pairs = comparisons(batch)
        better_P, worse_P = score_N[pairs.better_P], score_N[pairs.worse_P]
        margin_P = better_P - worse_P
        even_P = -(logsigmoid(margin_P) + logsigmoid(-margin_P)) / 2
        decided_P = -logsigmoid(margin_P - pairs.margin_P.to(margin_P.dtype))
        loss_P = torch.where(pairs.is_tie_P, even_P, decided_P)
        if self._center_coef:
            loss_P = loss_P + self._center_coef * (better_P + worse_P).square()
        return loss_P.sum(), _sums(score_N.detach(), margin_P.detach(), pairs.is_tie_P, loss_P.detach())

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """loss; accuracy and margin (the mean of s_better - s_worse) of pairs that are no ties; mean and
        standard deviation of all scores; num_pairs."""
        found = {"loss": sums["loss"] / max(sums["pairs"], 1.0), "num_pairs": round(sums["pairs"])}
        if sums["decided"]:
            found["accuracy"] = sums["correct"] / sums["decided"]
            found["margin"] = sums["margin"] / sums["decided"]
        if num := sums["completions"]:
            mean = sums["score"] / num
            found["score_mean"] = mean
            found["score_std"] = max(sums["score_square"] / num - mean**2, 0.0) ** 0.5
        return found

    def details(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """ece: expected calibration error; reliability: the bins that have pairs."""
        reliability = []
        for at in range(NUM_BINS):
            num, confidence, correct = (sums[f"{name}_{at}"] for name in _OF_BIN)
            if num:
                reliability.append(
                    {
                        "from": 0.5 + 0.5 * at / NUM_BINS,
                        "to": 0.5 + 0.5 * (at + 1) / NUM_BINS,
                        "num_pairs": round(num),
                        "confidence": confidence / num,
                        "accuracy": correct / num,
                    }
                )
        gaps = [each["num_pairs"] * abs(each["accuracy"] - each["confidence"]) for each in reliability]
        return {"ece": sum(gaps) / max(sums["decided"], 1.0), "reliability": reliability}


def _sums(score_N: Tensor, margin_P: Tensor, is_tie_P: Tensor, loss_P: Tensor) -> Tensor:
    """float64, in the order of `BradleyTerryLoss.names`."""
    score_N, margin_P, loss_P = score_N.double(), margin_P.double(), loss_P.double()
    decided_P = (~is_tie_P).double()
    correct_P = decided_P * (1 + margin_P.sign()) / 2
    confidence_P = torch.sigmoid(margin_P.abs())
    bin_P = ((confidence_P - 0.5) * 2 * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    totals = [
        loss_P.sum(),
        loss_P.new_full((), len(loss_P)),
        decided_P.sum(),
        correct_P.sum(),
        (decided_P * margin_P).sum(),
        score_N.new_full((), len(score_N)),
        score_N.sum(),
        score_N.square().sum(),
    ]
    bins = [
        loss_P.new_zeros(NUM_BINS).index_add(0, bin_P, value_P)
        for value_P in (decided_P, decided_P * confidence_P, correct_P)
    ]
    return torch.cat([torch.stack(totals), *bins])
