"""Preference optimization as a kind of offline training."""

from __future__ import annotations

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
from trainer.preferences.rows import OptimizationRows
from trainer.preferences.step import KtoLoss, PairLoss, PreferenceLoss


class PreferenceTraining(OfflineTraining):
    """On comparisons of completions, or on completions with labels."""

    name = "preferences"
    command = "preferences"
    measured = ("loss", "accuracy", "margin")

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
        if not method.has_reference:
            return rows
        plan = None
        if key == "train":
            plan = StepPlan.of(settings, rows.num_tokens_N, seed=config.seed, rows=rows.fingerprint)
        at_one = replace(config, sampling=replace(config.sampling, temperature=1.0))
        reference = Reference(at_one, ranks, path=settings.reference)
        rows.read_reference(reference, plan, with_mismatched=is_kto)
        reference.close()
        return rows

    def model(self, config: Config, source: str, ranks: Ranks, *, with_weights: bool) -> Policy:
        return build_policy(config, source, ranks, with_weights=with_weights)

    def loss(self, config: Config, model: PackedModel, ranks: Ranks) -> PreferenceLoss:
        assert isinstance(model, Policy)
        method = build_method(config.preferences)
        if isinstance(method, Kto):
            budget_tokens = config.trainer.tokens_per_microbatch
            return KtoLoss(model, ranks, method=method, budget_tokens=budget_tokens)
        return PairLoss(model, method=method)
