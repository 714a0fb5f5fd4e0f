"""Renders the rows of a supervised run as tokens.

At the start every row is rendered once for its length, and each rank renders a share; only the lengths stay
in memory. A row is rendered again in its step, which takes about half a millisecond, so that memory does not
grow with the tokens of the file.

Shape suffix: N rows of the data set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config
from areal_like.data import RowFormat, Rows, open_rows
from areal_like.errors import ConfigError
from trainer.distributed.ranks import Ranks

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of the rows of one source by outcome."""

    num_rows: int
    """Number of rows of the source."""
    num_too_long: int
    """Rows that are left out because they are longer than the limit."""
    num_truncated: int
    """Rows that lost the end of a sequence."""
    num_without_target: int
    """Rows that are left out because none of their tokens is learned (after the truncation)."""
    num_tokens: int
    """Tokens of the rows that are used."""
    num_learned: int
    """Learned tokens among them."""


def build_tokens(config: Config, source: str) -> tuple[ConversationTokens, int]:
    """Returns the renderer of the rows, and the longest sequence in tokens. `source`: for `from_pretrained`.

    Raises ConfigError for a tokenizer that cannot tell which tokens are learned.
    """
    text = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    try:
        eos = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # the file is optional
        eos = None
    tokens = ConversationTokens(
        AutoTokenizer.from_pretrained(source, trust_remote_code=False),
        stop_token_ids=[i for i in (eos if isinstance(eos, list) else [eos]) if i is not None],
        vocab_size=int(text.vocab_size),
        template_kwargs=config.model.chat_template_kwargs,
    )
    budget = config.trainer.tokens_per_microbatch
    longest = config.sft.max_row_tokens
    if longest > budget:
        raise ConfigError(
            f"sft.max_row_tokens={longest} does not fit into trainer.tokens_per_microbatch={budget}: raise it"
        )
    positions = int(getattr(text, "max_position_embeddings", 0)) or budget
    return tokens, min(longest or budget, positions)


class SftRows:
    """The rows of one source."""

    def __init__(
        self,
        config: Config,
        source: str | Sequence[str],
        *,
        key: str,
        tokens: ConversationTokens,
        longest: int,
        ranks: Ranks,
    ) -> None:
        """Renders every row once; each rank renders a share. Collective.

        `source`: a value like that of `sft.train`; `key`: that setting's name. `longest`: most tokens of a
        sequence.

        Raises ConfigError for a row that cannot be rendered, with its place, and if the ranks do not see the
        same rows.
        """
        settings = config.sft
        self._rows: Rows = open_rows(
            source if isinstance(source, str) else list(source),
            split="train" if key == "sft.train" else "test",
            key=key,
        )
        self._key = key
        self._format = RowFormat(
            prompt_key=settings.prompt_key,
            completion_key=settings.completion_key,
            messages_key=settings.messages_key,
            system_prompt=settings.system_prompt,
            chat=settings.chat,
        )
        self._tokens = tokens
        self._longest = longest
        self._truncates = settings.long_rows == "truncate"
        facts_N = self._measured(ranks)
        self.num_tokens_N = np.where(facts_N[:, 1] > 0, facts_N[:, 0], 0)
        """Tokens of each row; 0: the row is left out."""
        is_used_N = self.num_tokens_N > 0
        self.counts = RowCounts(
            num_rows=len(self._rows),
            num_too_long=int(facts_N[:, 2].sum()),
            num_truncated=int(facts_N[:, 3].sum()),
            num_without_target=int((~is_used_N & (facts_N[:, 2] == 0)).sum()),
            num_tokens=int(self.num_tokens_N.sum()),
            num_learned=int(facts_N[is_used_N, 1].sum()),
        )
        if ranks.rank == 0:
            self._report()

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the content of all rows."""
        return self._rows.fingerprint

    def _measured(self, ranks: Ranks) -> NDArray[np.int64]:
        """[N, 4]: the results of `_facts` for every row."""
        mine = int(self.fingerprint[:12], 16)
        if ranks.any(ranks.agree(mine) != mine):
            raise ConfigError(f"{self._key}: the files on the trainer's machines differ: copy them again")
        shares = [range(rank, len(self._rows), ranks.world_size) for rank in range(ranks.world_size)]
        share = shares[ranks.rank]
        facts = np.zeros((len(share), 4), dtype=np.int64)
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
            self._rendered(min(found))
        everyone = ranks.gather(torch.from_numpy(facts.reshape(-1))).numpy().reshape(-1, 4)
        facts_N = np.empty_like(everyone)
        facts_N[[index for each in shares for index in each]] = everyone
        return facts_N

    def sequences(self, index: int) -> list[TokenRow]:
        """The sequences of a row that have tokens to learn, cut to the limit."""
        return self._cut(self._rendered(index))

    def _rendered(self, index: int) -> list[TokenRow]:
        return self._rows.read(index, lambda row: self._tokens.rows(self._format.conversation_of(row)))

    def _cut(self, rendered: list[TokenRow]) -> list[TokenRow]:
        return [row for row in (row.cut(self._longest) for row in rendered) if row.num_learned]

    def _facts(self, index: int) -> tuple[int, int, int, int]:
        """(tokens, learned tokens, left out as too long, truncated)"""
        rendered = self._rendered(index)
        is_long = any(len(row.tokens) > self._longest for row in rendered)
        if is_long and not self._truncates:
            return 0, 0, 1, 0
        kept = self._cut(rendered)
        return sum(len(row.tokens) for row in kept), sum(row.num_learned for row in kept), 0, int(is_long)

    def _report(self) -> None:
        counts = self.counts
        log.info("%s: %s", self._key, ", ".join(f"{name} {value}" for name, value in asdict(counts).items()))
        for num, what in (
            (counts.num_too_long, f"are left out: they have sequences of more than {self._longest} tokens"),
            (counts.num_truncated, f"are cut to {self._longest} tokens a sequence"),
            (counts.num_without_target, "are left out: none of their tokens is learned"),
        ):
            if num:
                log.warning("%s: %d of %d rows %s", self._key, num, counts.num_rows, what)
