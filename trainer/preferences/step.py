"""The loss of a micro-batch of pairs or labelled completions, for `trainer.offline.step`.

    begin() -> [batch -> log-probs of completions -> method -> sums]* -> metrics

A loss is a mean over the units of the whole step, ORPO's supervised term a mean over the tokens of its chosen
completions, and KTO's KL a mean over all of its mismatched completions. So none depends on the cuts into
micro-batches or on the number of ranks. TRL estimates the KL for each micro-batch of a device instead, and
also takes the supervised term's mean there.

The samples of a batch carry what the loss needs beside their tokens: `reward` is 1 for a desirable completion
and 0 for an undesirable one, `advantage` the log-prob under the reference model, and `group` counts from 1.

Shape suffixes: N completions of a micro-batch, K sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trainer.batching.packing import PackedBatch, TrainingSample
from trainer.batching.segments import values_of_targets
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.offline.step import OfflineLoss
from trainer.preferences.losses import mismatched_kl
from trainer.preferences.methods import Completions, Method, share_ranked_right
from trainer.preferences.units import Completion, Unit


def samples_of(unit: Unit, *, number: int) -> list[TrainingSample]:
    """A unit in the form of the trainer's batches. `number`: from 1, of the unit in its step."""
    return [
        TrainingSample(trajectory=each.trajectory(), advantage=each.ref_logp, group=number) for each in unit
    ]


class PreferenceLoss(OfflineLoss):
    """Before each step, and before held-out units are measured, call `begin`."""

    names: ClassVar[tuple[str, ...]] = (
        *("units", "losses", "entropies"),
        *("chosen", "chosen_reward", "chosen_logp", "chosen_tokens"),
        *("rejected", "rejected_reward", "rejected_logp", "rejected_tokens"),
    )
    divisor: ClassVar[str] = "units"

    def __init__(self, policy: Policy, ranks: Ranks, *, method: Method, budget_tokens: int) -> None:
        """`policy` is sharded and has temperature 1. `budget_tokens`: most tokens of a micro-batch."""
        super().__init__(policy)
        assert policy.temperature == 1.0
        self._ranks, self._method, self._budget_tokens = ranks, method, budget_tokens
        self._kl = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._units_per_token = 0.0
        self._rewards: list[Tensor] = []
        """[N, 3] implicit reward, label and group of the completions of each micro-batch."""

    def begin(
        self, *, num_units: int, num_chosen_tokens: int, mismatched: Iterable[Completion | None] = ()
    ) -> None:
        """Prepares the units of a step, or held-out units; collective.

        `num_units`, `num_chosen_tokens`: over all ranks. `mismatched`: this rank's, if the method has a KL.
        """
        self._units_per_token = num_units / max(num_chosen_tokens, 1)
        self._rewards = []
        if self._method.has_kl:
            self._kl = mismatched_kl(self._log_ratios([each for each in mismatched if each is not None]))

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        method = self._method
        output = self.model(batch)
        logp_N = batch.sum_N(output.logprobs_S.double())
        if method.of_pairs and batch.num_samples % 2:  # a dummy
            return logp_N.sum(), logp_N.new_zeros(len(self.names))
        given = Completions(
            logp_N=logp_N,
            ref_logp_N=_of_samples(batch.advantages_T, batch),
            num_tokens_N=batch.sum_N(torch.ones_like(output.logprobs_S, dtype=torch.float64)),
            is_desirable_N=batch.rewards_N > 0,
        )
        losses = method.losses(given, self._kl)
        loss = losses.sum()
        if method.sft_weight:
            supervised = -(logp_N * given.is_desirable_N).sum()
            loss = loss + method.sft_weight * self._units_per_token * supervised
        with torch.no_grad():
            reward_N = method.rewards(given)
            # Copied to the host only at the end of the step: reading them now would stall a GPU.
            self._rewards.append(torch.stack([reward_N, batch.rewards_N, batch.groups_N.to(reward_N)], dim=1))
            sums = [torch.tensor(len(losses)), losses.sum(), output.entropy_S.double().sum()]
            for chosen_N in (given.is_desirable_N, ~given.is_desirable_N):
                for value_N in (torch.ones_like(reward_N), reward_N, logp_N, given.num_tokens_N):
                    sums.append((value_N * chosen_N).sum())
            return loss, torch.stack([each.to(logp_N) for each in sums])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """loss, entropy (mean over learned tokens, in nats), tokens_trained (learned), num_units,
        reward_chosen, reward_rejected, reward_margin, reward_accuracy, logp_chosen, logp_rejected (means over
        completions); kl, sft_loss where the method has them. Collective."""
        method = self._method
        num_tokens = sums["chosen_tokens"] + sums["rejected_tokens"]
        found = {
            "loss": sums["losses"] / max(sums["units"], 1.0),
            "entropy": sums["entropies"] / max(num_tokens, 1.0),
            "tokens_trained": round(num_tokens),
            "num_units": round(sums["units"]),
        }
        for name in ("chosen", "rejected"):
            if number := sums[name]:
                found[f"reward_{name}"] = sums[f"{name}_reward"] / number
                found[f"logp_{name}"] = sums[f"{name}_logp"] / number
        accuracy = self._accuracy()  # collective
        if sums["chosen"] and sums["rejected"]:
            found["reward_margin"] = found["reward_chosen"] - found["reward_rejected"]
            found["reward_accuracy"] = accuracy
        if method.has_kl:
            found["kl"] = float(self._kl)
        if method.sft_weight and sums["chosen_tokens"]:
            found["sft_loss"] = -sums["chosen_logp"] / sums["chosen_tokens"]
            found["loss"] += method.sft_weight * found["sft_loss"]
        return found

    def _accuracy(self) -> float:
        """Share of pairs that the implicit reward ranks right, over all ranks."""
        mine = torch.cat([torch.zeros(0, 3, dtype=torch.float64), *(each.cpu() for each in self._rewards)])
        found = self._ranks.gather(mine[mine[:, 2] > 0].reshape(-1)).reshape(-1, 3)  # without dummies
        return share_ranked_right(found[:, 0], found[:, 1] > 0, of_pairs=self._method.of_pairs)

    def _log_ratios(self, completions: Sequence[Completion]) -> Tensor:
        """Log-ratios of the completions of all ranks; one 0 if there are none. Collective."""
        policy = self.model
        assert isinstance(policy, Policy)
        self._ranks.place.enter("mismatched completions")
        values = values_of_targets(
            [each.trajectory() for each in completions],
            lambda batch: policy.scored(batch).logprobs_S,
            self._ranks,
            budget_tokens=self._budget_tokens,
            shares_prefixes=policy.shares_prefixes,
        )
        mine = [value_S.sum() - each.ref_logp for value_S, each in zip(values, completions, strict=True)]
        ratios = self._ranks.gather(torch.tensor(mine, dtype=torch.float64))
        return (ratios if len(ratios) else ratios.new_zeros(1)).to(self._ranks.device)


def _of_samples(value_T: Tensor, batch: PackedBatch) -> Tensor:
    """[N] the value of each sample's first token."""
    starts_N = torch.tensor([0, *batch.sample_lengths[:-1]]).cumsum(0)
    return value_T.index_select(0, starts_N.to(value_T.device))
