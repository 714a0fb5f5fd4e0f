"""The training of a reward model as a kind of offline training."""

from __future__ import annotations

from transformers import AutoConfig, AutoTokenizer

from areal_like.chat.scored_text import scored_tokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config
from areal_like.data.preference_format import PreferenceRow
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.models.reward_model import RewardModel, build_reward_model, pad_token_id
from trainer.offline.kind import OfflineTraining
from trainer.offline.preference_rows import PreferenceRows, Render
from trainer.offline.rows import longest_sequence
from trainer.reward_model.loss import BradleyTerryLoss


class RewardTraining(OfflineTraining):
    """On comparisons of completions."""

    name = "reward_model"
    command = "reward-model"
    measured = ("loss", "accuracy", "margin", "ece")

    def rows(self, config: Config, source: str, key: str, ranks: Ranks) -> PreferenceRows:
        settings = config.reward_model
        return PreferenceRows(
            settings,
            getattr(settings, key),
            key=f"{self.name}.{key}",
            render=scored_row(config, source),
            longest=longest_sequence(config, settings, source),
            budget_tokens=config.trainer.tokens_per_microbatch,
            ranks=ranks,
        )

    def model(self, config: Config, source: str, ranks: Ranks, *, with_weights: bool) -> RewardModel:
        return build_reward_model(config, source, ranks, with_weights=with_weights)

    def loss(self, config: Config, model: PackedModel, ranks: Ranks) -> BradleyTerryLoss:
        return BradleyTerryLoss(model, center_coef=config.reward_model.center_coef)


def scored_row(config: Config, source: str) -> Render:
    """Renders a completion for a reward model, whose score is that of the last token."""
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    pad = pad_token_id(source)
    vocab_size = int(AutoConfig.from_pretrained(source, trust_remote_code=False).vocab_size)

    def render(row: PreferenceRow, at: int) -> TokenRow:
        tokens = scored_tokens(
            tokenizer,
            row.prompt,
            row.completions[at],
            pad_token_id=pad,
            vocab_size=vocab_size,
            tools=row.tools,
            template_kwargs=config.model.chat_template_kwargs,
        )
        return TokenRow(tokens=tokens, loss_mask=[0] * (len(tokens) - 1) + [1])

    return render
