"""The losses of a micro-batch of preferences, for `trainer.offline.step`.

    begin() -> [batch -> log-probs of completions -> losses -> sums]* -> metrics

A loss is a mean over the comparisons (for KTO the completions) of the whole step, ORPO's supervised term a
mean over the tokens of its best completions, and KTO's KL a mean over all of its mismatched completions. So
none depends on the cuts into micro-batches or on the number of ranks. TRL takes these means over the
micro-batch of each device instead.

The samples of a batch carry what a loss needs beside their tokens: see `OptimizationRows.units`.

Shape suffixes: N completions of a micro-batch, K sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trainer.batching.packing import PackedBatch
from trainer.batching.segments import values_of_targets
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.offline.preference_rows import comparisons, margins
from trainer.offline.rows import training_sample
from trainer.offline.step import OfflineLoss, RowFacts
from trainer.preferences.losses import mismatched_kl
from trainer.preferences.methods import Completions, Kto, PairMethod, ranked_right, share_ranked_right
from trainer.preferences.rows import OptimizationRows

_SIDES = ("chosen", "rejected")
_PARTS = ("", "_reward", "_logp")
_OF_SIDES = tuple(f"{side}{part}" for side in _SIDES for part in _PARTS)


class PreferenceLoss(OfflineLoss):
    """Base of both kinds of loss."""

    names: ClassVar[tuple[str, ...]] = ("losses", "entropies", "tokens", *_OF_SIDES)
    divisor: ClassVar[str] = "chosen"

    def __init__(self, policy: Policy) -> None:
        """`policy`: sharded, with temperature 1."""
        assert policy.temperature == 1.0
        super().__init__(policy)

    def _completions(self, batch: PackedBatch) -> tuple[Completions, Tensor]:
        """(log-probs of the completions, sum of the entropies of their learned tokens)"""
        logp_S, entropy_S, *_ = self.model(batch)
        given = Completions(
            logp_N=batch.sum_N(logp_S.double()),
            ref_logp_N=margins(batch),
            num_tokens_N=batch.sum_N(torch.ones_like(logp_S, dtype=torch.float64)),
        )
        return given, entropy_S.detach().double().sum()

    @staticmethod
    def _sums(
        loss: Tensor,
        entropy: Tensor,
        given: Completions,
        reward_N: Tensor,
        weights: Sequence[Tensor],
    ) -> list[Tensor]:
        """The sums that both kinds have. `weights`: [N] how often each completion is chosen, and rejected."""
        values = (torch.ones_like(reward_N), reward_N, given.logp_N)
        sides = [(weight_N * value_N).sum() for weight_N in weights for value_N in values]
        return [loss, entropy, given.num_tokens_N.sum(), *sides]

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """loss, entropy (mean over learned tokens, in nats), tokens_trained (learned), reward_chosen,
        reward_rejected, logp_chosen, logp_rejected (means over completions), margin."""
        found = {
            "loss": sums["losses"] / max(self._num_losses(sums), 1.0),
            "entropy": sums["entropies"] / max(sums["tokens"], 1.0),
            "tokens_trained": round(sums["tokens"]),
        }
        for side in _SIDES:
            if number := sums[side]:
                found |= {f"{part[1:]}_{side}": sums[f"{side}{part}"] / number for part in _PARTS[1:]}
        if all(sums[side] for side in _SIDES):
            found["margin"] = found["reward_chosen"] - found["reward_rejected"]
        return found

    def _num_losses(self, sums: Mapping[str, float]) -> float:
        return sums["chosen"]


class PairLoss(PreferenceLoss):
    """Of comparisons of the completions of a prompt, all of which are in one micro-batch."""

    names: ClassVar[tuple[str, ...]] = (*PreferenceLoss.names, "ranked_right", "best_nll", "best_tokens")

    def __init__(self, policy: Policy, *, method: PairMethod) -> None:
        """`policy`: sharded, with temperature 1."""
        super().__init__(policy)
        self._method = method
        self._pairs_per_token = 0.0

    def begin(self, rows: RowFacts, indices: Sequence[int], *, step: int | None) -> None:
        """Before a step, or a measurement of held-out rows (None)."""
        num_pairs, num_tokens = (
            int(rows.facts[name][list(indices)].sum()) for name in ("num_better", "num_best_tokens")
        )
        self._pairs_per_token = num_pairs / max(num_tokens, 1)

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        method = self._method
        given, entropy = self._completions(batch)
        better_P, worse_P, *_ = comparisons(batch, with_ties=False)
        score_N = method.scores(given)
        losses = method.losses(score_N[better_P] - score_N[worse_P]).sum()
        ones_P, none_N = torch.ones_like(better_P, dtype=torch.float64), torch.zeros_like(given.logp_N)
        times_better_N, times_worse_N = (none_N.index_add(0, each, ones_P) for each in (better_P, worse_P))
        is_best_N = (times_better_N > 0) & (times_worse_N == 0)
        best_nll = -(given.logp_N * is_best_N).sum()
        # The sum is divided by the number of pairs, and this term is a mean over tokens.
        loss = losses + method.sft_weight * self._pairs_per_token * best_nll
        with torch.no_grad():
            reward_N = method.rewards(given)
            right = ranked_right(reward_N[better_P] - reward_N[worse_P]).sum()
            best_tokens = (given.num_tokens_N * is_best_N).sum()
            sums = self._sums(losses, entropy, given, reward_N, (times_better_N, times_worse_N))
            return loss, torch.stack([*sums, right, best_nll, best_tokens])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Those of every loss over pairs, num_pairs, accuracy; of ORPO sft_loss, which is a part of
        the loss."""
        found = super().metrics(sums) | {"num_pairs": round(sums["chosen"])}
        if sums["chosen"]:
            found["accuracy"] = sums["ranked_right"] / sums["chosen"]
        if self._method.sft_weight:
            found["sft_loss"] = sums["best_nll"] / max(sums["best_tokens"], 1.0)
            found["loss"] += self._method.sft_weight * found["sft_loss"]
        return found


class KtoLoss(PreferenceLoss):
    """Of single completions with labels."""

    names: ClassVar[tuple[str, ...]] = (*PreferenceLoss.names, "completions")
    divisor: ClassVar[str] = "completions"

    def __init__(self, policy: Policy, ranks: Ranks, *, method: Kto, budget_tokens: int) -> None:
        """`policy`: sharded, with temperature 1. `budget_tokens`: most tokens of a micro-batch."""
        super().__init__(policy)
        self._ranks, self._method, self._budget_tokens = ranks, method, budget_tokens
        self._kl = torch.zeros((), dtype=torch.float64)
        self._rewards: list[Tensor] = []
        """[N, 3] implicit reward, label and group of the completions of each micro-batch."""

    def begin(self, rows: RowFacts, indices: Sequence[int], *, step: int | None) -> None:
        """Estimates the KL before a step, or a measurement of held-out rows (None). Collective."""
        assert isinstance(rows, OptimizationRows) and isinstance(self.model, Policy)
        policy, ranks = self.model, self._ranks
        share = list(rows.mismatched_share(indices, step=step, ranks=ranks))
        ranks.place.enter("mismatched completions")
        values = values_of_targets(
            [training_sample(tokens).trajectory for tokens, _ in share],
            lambda batch: policy.scored(batch).logprobs_S,
            ranks,
            budget_tokens=self._budget_tokens,
            shares_prefixes=policy.shares_prefixes,
        )
        mine = [float(value_S.sum()) - ref for value_S, (_, ref) in zip(values, share, strict=True)]
        ratios = ranks.gather(torch.tensor(mine, dtype=torch.float64))
        self._kl = mismatched_kl(ratios if len(ratios) else ratios.new_zeros(1)).to(ranks.device)
        self._rewards = []

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        given, entropy = self._completions(batch)
        is_desirable_N = batch.rewards_N > 0
        loss = self._method.losses(given, is_desirable_N, self._kl.to(given.logp_N)).sum()
        with torch.no_grad():
            reward_N = self._method.rewards(given)
            if self._ranks.has_samples:
                # Copied to the host at the end of the step: reading them now would stall a GPU.
                each_N3 = torch.stack([reward_N, batch.rewards_N, batch.groups_N.to(reward_N)], dim=1)
                self._rewards.append(each_N3)
            sums = self._sums(loss, entropy, given, reward_N, (is_desirable_N.double(), ~is_desirable_N))
            return loss, torch.stack([*sums, loss.new_full((), len(reward_N))])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Those of every loss, kl, num_completions; accuracy over all pairs of a desirable and an
        undesirable completion. Collective."""
        found = super().metrics(sums) | {"kl": float(self._kl), "num_completions": round(sums["completions"])}
        mine = torch.cat([torch.zeros(0, 3, dtype=torch.float64), *(each.cpu() for each in self._rewards)])
        of_all = self._ranks.gather(mine[mine[:, 2] > 0].reshape(-1)).reshape(-1, 3)  # without dummies
        if all(sums[side] for side in _SIDES):
            found["accuracy"] = share_ranked_right(of_all[:, 0], of_all[:, 1] > 0)
        return found

    def _num_losses(self, sums: Mapping[str, float]) -> float:
        return sums["completions"]
