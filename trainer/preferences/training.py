"""Preference optimization as a kind of offline training."""

from __future__ import annotations

import logging
from dataclasses import replace

from areal_like.config import Config
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.models.policy import Policy, build_policy
from trainer.offline.kind import OfflineTraining
from trainer.offline.plan import StepPlan
from trainer.offline.preference_rows import completion_tokens
from trainer.offline.rows import conversation_tokens, longest_sequence
from trainer.preferences.methods import Kto, build_method
from trainer.preferences.reference import Reference
from trainer.preferences.rows import OptimizationCounts, OptimizationRows
from trainer.preferences.step import KtoLoss, PairLoss, PreferenceLoss

log = logging.getLogger(__name__)

_MOST_RATIO = 4 / 3


class PreferenceTraining(OfflineTraining):
    """On comparisons of completions, or on completions with labels."""

    name = "preferences"
    command = "preferences"
    measured = ("loss", "accuracy", "margin")

    def __init__(self) -> None:
        self._reference: Reference | None = None

    def rows(self, config: Config, source: str, key: str, ranks: Ranks) -> OptimizationRows:
        """The rows with their log-probs under the reference model."""
        settings, method = config.preferences, build_method(config.preferences)
        is_kto = isinstance(method, Kto)
        rows = OptimizationRows(
            settings,
            getattr(settings, key),
            key=f"preferences.{key}",
            render=completion_tokens(conversation_tokens(config, source)),
            longest=longest_sequence(config, settings, source),
            budget_tokens=config.trainer.tokens_per_microbatch,
            of_pairs=not is_kto,
            ranks=ranks,
        )
        if isinstance(method, Kto) and key == "train" and ranks.rank == 0:
            warn_of_weights(method, rows.counts)
        if not method.has_reference:
            return rows
        plan = None
        if key == "train":
            plan = StepPlan.of(settings, rows.num_tokens_N, seed=config.seed, rows=rows.fingerprint)
        if self._reference is None:
            at_one = replace(config, sampling=replace(config.sampling, temperature=1.0))
            self._reference = Reference(at_one, ranks, path=settings.reference)
        if is_kto and plan is not None and ranks.rank == 0:
            warn_of_single_rows(plan)
        rows.read_reference(self._reference, plan, with_mismatched=is_kto)
        return rows

    def model(self, config: Config, source: str, ranks: Ranks, *, with_weights: bool) -> Policy:
        if self._reference is not None:
            self._reference.close()  # its log-probs are known
        return build_policy(config, source, ranks, with_weights=with_weights)

    def loss(self, config: Config, model: PackedModel, ranks: Ranks) -> PreferenceLoss:
        assert isinstance(model, Policy)
        method = build_method(config.preferences)
        if isinstance(method, Kto):
            budget_tokens = config.trainer.tokens_per_microbatch
            return KtoLoss(model, ranks, method=method, budget_tokens=budget_tokens)
        return PairLoss(model, method=method)


def warn_of_single_rows(plan: StepPlan) -> None:
    """Warns of KTO's steps of one row, whose KL cannot be estimated."""
    num_single = sum(len(plan.rows(step)) == 1 for step in range(plan.num_steps))
    if num_single:
        log.warning(
            "preferences: %d of %d steps have one row, so no completions of others from which KTO's KL is "
            "estimated: it counts as 0 there (preferences.batch_rows, preferences.batch_tokens)",
            num_single,
            plan.num_steps,
        )


def warn_of_weights(method: Kto, counts: OptimizationCounts) -> None:
    """Warns if all good completions together weigh less than the bad ones, or more than 4/3 of them: KTO's
    recommendation (arXiv 2402.01306, equation 8)."""
    num_good = counts.num_desirable
    num_bad = counts.num_completions - num_good
    if not num_good or not num_bad or not method.undesirable_weight:
        return
    ratio = method.desirable_weight * num_good / (method.undesirable_weight * num_bad)
    if not 1 <= ratio <= _MOST_RATIO:
        log.warning(
            "preferences.train: %d good completions weigh %.3g times what %d bad ones do, and 1 to 4/3 times "
            "is recommended: set preferences.desirable_weight between %.3g and %.3g",
            num_good,
            ratio,
            num_bad,
            method.desirable_weight / ratio,
            method.desirable_weight / ratio * _MOST_RATIO,
        )
