"""A reward model: transformers' sequence classifier of one label, over packed batches.

The score of a text is that of its last token, by a linear head on the last hidden state. The parameters have
the names of `AutoModelForSequenceClassification`, so its directories are read and written as they are. From a
causal language model the head of the vocabulary is left out, and the new head starts at zero: every score is
0 until the model has learned, whatever the seed.

Shape suffixes: S scored tokens, R rows of a micro-batch that this rank computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from areal_like.automatic_settings import compute_dtype, recomputation, router_dtype
from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.precision import Fp32Head, RouterDtype
from areal_like.weights.untrained import is_wrapped
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.models.kernels import use_kernels
from trainer.models.packed_model import PackedModel, build_skeleton

_HEAD = "score"
"""The name that transformers gives the head of decoders."""


class RewardModel(PackedModel):
    """Gives each text one score."""

    def __init__(self, model: Any, *, router_dtype: RouterDtype = "float32") -> None:
        """`model`: of `AutoModelForSequenceClassification`, with one label, and the configuration of the
        directory that it comes from."""
        super().__init__(model, router_dtype=router_dtype)
        self._fresh = _names_of_vocabulary_head(model.config)
        if not _is_reward_model(model.config):
            self._fresh |= {f"{_HEAD}.{name}" for name, _ in model.get_submodule(_HEAD).named_parameters()}
        model.config.architectures = [type(model).__name__]
        # Scores in bfloat16 would have 8 bits: a score of 5 would be a multiple of 1/32.
        model.get_submodule(_HEAD).__class__ = Fp32Head

    @classmethod
    def skeleton(cls, path: str, *, dtype: torch.dtype) -> Any:
        model = build_skeleton(path, dtype=dtype, auto_class=_auto_class)
        if not isinstance(getattr(model, _HEAD, None), nn.Linear):
            raise ConfigError(
                f"{path}: {type(model).__name__} has no linear head `{_HEAD}`: choose another model"
            )
        model.config.pad_token_id = pad_token_id(path)
        model.generation_config = None
        return model

    def fresh_parameters(self) -> frozenset[str]:
        """A new head, and the vocabulary's, which the files may have and which is not read."""
        return self._fresh

    def forward(self, batch: PackedBatch) -> Tensor:
        """[S] score of the text up to each token of the loss mask, in float32 or the master weights' dtype if
        wider."""
        hidden_RD = self.hidden_rows(batch)
        if batch.context is None:  # no scores of other tokens
            return self._scores(self.at_tokens(batch, hidden_RD, batch.sampled_S))
        return self.at_tokens(batch, self._scores(hidden_RD), batch.sampled_S)

    def _scores(self, hidden_RD: Tensor) -> Tensor:
        score_R1 = self.model.get_submodule(_HEAD)(hidden_RD)
        # A sum and not a squeeze: FSDP2 attaches its backward hook to outputs, which must not be views.
        score_R: Tensor = score_R1.to(torch.promote_types(score_R1.dtype, torch.float32)).sum(1)
        return score_R


def pad_token_id(path: str) -> int | None:
    """The padding token of a reward model; at the end of a text it is not scored (`scored_text`).

    `path`: directory or name of a reward model, whose configuration names it, or of a language model: then it
    is the tokenizer's, or its EOS.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if _is_reward_model(config):
        return None if config.pad_token_id is None else int(config.pad_token_id)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return None if found is None else int(found)


def _is_reward_model(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _auto_class(config: Any) -> Any:
    known: Any = AutoModelForSequenceClassification
    if is_wrapped(config) or type(config) not in known._model_mapping:
        raise ConfigError(
            f"transformers has no sequence classifier of type {config.model_type}: choose another model"
        )
    if _is_reward_model(config) and config.num_labels != 1:
        raise ConfigError(
            f"the model has {config.num_labels} labels, and a reward model has one score: choose another one"
        )
    config.num_labels = 1
    return known


def _names_of_vocabulary_head(config: Any) -> frozenset[str]:
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    return frozenset(
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if module is head
        for leaf, _ in head.named_parameters()
    )


def build_reward_model(config: Config, path: str, ranks: Ranks, *, with_weights: bool = True) -> RewardModel:
    """The sharded reward model of a configuration, loaded from `path`, a reward model or a language model.

    `with_weights`: as in `build_policy`. Raises ConfigError.
    """
    if config.model.lora.is_on:
        raise ConfigError(
            f"model.lora.rank={config.model.lora.rank}: a reward model is trained whole: leave it at 0"
        )
    kernels = use_kernels(config, ranks.device, dtype=compute_dtype(config))
    built = RewardModel.build(
        path,
        router_dtype=router_dtype(config),
        compiles=config.trainer.compile,
        liger=not kernels.liger,
        liger_rope=recomputation(config) != "selective",
        gradient_checkpointing=recomputation(config),
        offload_activations=config.trainer.offload_activations,
        seed=config.seed,
    )
    return built.made_ready(config, ranks, with_weights=with_weights)
