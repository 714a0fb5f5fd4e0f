"""The rows of one source, rendered as tokens.

At the start every row is rendered once for its length, and each rank renders a share; only a few numbers a
row stay in memory. A row is rendered again in its step, which takes about half a millisecond, so that memory
does not grow with the tokens of the file.

Shape suffixes: N rows of the data set, F facts of a row.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config, OfflineConfig
from areal_like.data import Rows, open_rows
from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.offline.step import Unit

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0


def conversation_tokens(config: Config, source: str) -> ConversationTokens:
    """The renderer of conversations for the tokenizer and the model of `source`, for `from_pretrained`.

    Raises ConfigError for a tokenizer that cannot tell which tokens are learned.
    """
    text = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    try:
        eos = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # the file is optional
        eos = None
    return ConversationTokens(
        AutoTokenizer.from_pretrained(source, trust_remote_code=False),
        stop_token_ids=[i for i in (eos if isinstance(eos, list) else [eos]) if i is not None],
        vocab_size=int(text.vocab_size),
        template_kwargs=config.model.chat_template_kwargs,
    )


def longest_sequence(config: Config, settings: OfflineConfig, source: str) -> int:
    """The longest sequence, in tokens, that the settings and the model of `source` allow.

    Raises ConfigError if `max_row_tokens` exceeds the budget of a micro-batch.
    """
    text = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    budget, longest = config.trainer.tokens_per_microbatch, settings.max_row_tokens
    if longest > budget:
        raise ConfigError(
            f"{settings.key}.max_row_tokens={longest} does not fit into "
            f"trainer.tokens_per_microbatch={budget}: raise it"
        )
    positions = int(getattr(text, "max_position_embeddings", 0)) or budget
    return min(longest or budget, positions)


class OfflineRows(abc.ABC):
    """The rows of one source. A subclass renders them."""

    fact_names: tuple[str, ...]
    """Names of the facts [F] of a row, whole numbers."""

    def __init__(self, source: str | Sequence[str], *, key: str, ranks: Ranks) -> None:
        """Renders every row once; each rank renders a share. Collective. A subclass sets what it renders with
        before.

        `source`: a value like that of `sft.train`; `key`: that setting's name.

        Raises ConfigError for a row that cannot be rendered, with its place, if every row is left out, and if
        the ranks do not see the same rows.
        """
        self._rows: Rows = open_rows(
            source if isinstance(source, str) else list(source),
            split="train" if key.endswith(".train") else "test",
            key=key,
        )
        self._key = key
        facts_NF = self._measured(ranks)
        self.facts: dict[str, NDArray[np.int64]] = dict(zip(self.fact_names, facts_NF.T, strict=True))
        """Name -> int64 [N] facts of all rows."""
        if problem := self._problem() or self._emptiness():
            raise ConfigError(f"{key}: {problem}")
        if ranks.rank == 0:
            log.info(
                "%s: %s", key, ", ".join(f"{name} {value}" for name, value in asdict(self.counts).items())
            )
            for num, what in self._warnings():
                if num:
                    log.warning("%s: %d of %d rows %s", key, num, len(self._rows), what)

    def _emptiness(self) -> str:
        """Why no row is left; empty if one is."""
        if self.num_tokens_N.any():
            return ""
        reasons = [f"{num} of {len(self._rows)} {what}" for num, what in self._warnings() if num]
        return "; ".join(["no row is left to learn from", *reasons])

    @property
    @abc.abstractmethod
    def num_tokens_N(self) -> NDArray[np.int64]:
        """Tokens of each row; 0: the row is left out."""

    @property
    @abc.abstractmethod
    def counts(self) -> Any:
        """A dataclass of numbers: counts of the rows by outcome."""

    @abc.abstractmethod
    def units(self, index: int, *, group: int = 0) -> list[Unit]:
        """The samples of a row, in units that must be in one micro-batch.

        `group`: its position in the step, in which a row may occur twice where one epoch follows another."""

    @abc.abstractmethod
    def _facts(self, index: int) -> Sequence[int]:
        """[F]. Raises ConfigError with the place of the row, if it cannot be used."""

    def _warnings(self) -> Iterator[tuple[int, str]]:
        """(number of rows, what happens to them)"""
        yield from ()

    def _problem(self) -> str:
        """What is wrong with the rows as a whole; empty: nothing."""
        return ""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the content of all rows."""
        return self._rows.fingerprint

    def _measured(self, ranks: Ranks) -> NDArray[np.int64]:
        """[N, F]"""
        mine = int(self.fingerprint[:12], 16)
        if ranks.any(ranks.agree(mine) != mine):
            raise ConfigError(f"{self._key}: the files on the trainer's machines differ: copy them again")
        shares = [range(rank, len(self._rows), ranks.world_size) for rank in range(ranks.world_size)]
        share = shares[ranks.rank]
        facts = np.zeros((len(share), len(self.fact_names)), dtype=np.int64)
        broken = -1
        due_s = time.monotonic() + _LOG_INTERVAL_S
        for at, index in enumerate(share):
            try:
                facts[at] = self._facts(index)
            except ConfigError:
                broken = index
                break
            if time.monotonic() > due_s:
                log.info("%s: %d of %d rows are rendered", self._key, at * ranks.world_size, len(self._rows))
                due_s += _LOG_INTERVAL_S
        # If only one rank raised, the others would report that they had lost it.
        if found := [index for index in ranks.gather(torch.tensor([broken])).tolist() if index >= 0]:
            self._facts(min(found))
        everyone = ranks.gather(torch.from_numpy(facts.reshape(-1))).numpy().reshape(-1, facts.shape[1])
        facts_NF = np.empty_like(everyone)
        facts_NF[[index for each in shares for index in each]] = everyone
        return facts_NF


def training_sample(
    row: TokenRow, *, value: float = 0.0, margin: float = 0.0, group: int = 0
) -> TrainingSample:
    """A row in the form of the trainer's batches; fields that only sampled tokens have are zero.

    `value`, `margin`, `group`: for losses that compare samples; they are the batch's `rewards_N`,
    `advantages_T` and `groups_N`.
    """
    mask = np.asarray(row.loss_mask, dtype=np.uint8)
    trajectory = Trajectory(
        tokens=np.asarray(row.tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.zeros(len(mask), dtype=np.float32),
        versions=mask.astype(np.int32) - 1,
        reward=value,
        finish_reason=FinishReason.STOP,
    )
    return TrainingSample(trajectory=trajectory, advantage=margin, group=group)
