"""Supervised training as a kind of offline training."""

from __future__ import annotations

from areal_like.config import Config
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.models.policy import Policy, build_policy
from trainer.offline.kind import OfflineTraining
from trainer.offline.rows import conversation_tokens, longest_sequence
from trainer.sft.rows import SftRows
from trainer.sft.step import SupervisedLoss


class SupervisedTraining(OfflineTraining):
    """On conversations, or on prompts with completions."""

    name = "sft"
    command = "sft"
    measured = ("loss",)

    def rows(self, config: Config, source: str, key: str, ranks: Ranks) -> SftRows:
        return SftRows(
            config,
            getattr(config.sft, key),
            key=f"sft.{key}",
            tokens=conversation_tokens(config, source),
            longest=longest_sequence(config, config.sft, source),
            ranks=ranks,
        )

    def model(self, config: Config, source: str, ranks: Ranks, *, with_weights: bool) -> Policy:
        return build_policy(config, source, ranks, with_weights=with_weights)

    def loss(self, config: Config, model: PackedModel, ranks: Ranks) -> SupervisedLoss:
        assert isinstance(model, Policy)
        return SupervisedLoss(model)
