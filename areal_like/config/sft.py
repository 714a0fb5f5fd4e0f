"""Settings of supervised training (`areal-like sft`), in addition to those of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from areal_like.config.common import NonNegativeInt, PositiveInt, Section, require


@dataclass(frozen=True, kw_only=True)
class SftConfig(Section, key="sft"):
    """Supervised training on conversations, or on prompts with completions.

    Optimizer, micro-batches, ranks and checkpoints are those of the section `trainer`.
    """

    train: str | tuple[str, ...] = ""
    """Rows to learn from: a file (.jsonl, .parquet), a pattern, a list of these, or `hf:owner/name`."""
    eval: str | tuple[str, ...] = ""
    """Held-out rows, whose loss is measured; empty: none."""
    prompt_key: str = ""
    """Key of the prompt; empty: the first of `prompt`, `question`, `problem` that a row has."""
    completion_key: str = ""
    """Key of the completion; empty: the first of `completion`, `response`, `answer`, ... that a row has."""
    messages_key: str = ""
    """Key of the conversation; empty: `messages` or `conversations`."""
    system_prompt: str = ""
    """System message of conversations and prompts that have none."""
    chat: bool = False
    """Turn a text prompt into a user message and its completion into the assistant's reply."""
    num_epochs: PositiveInt = 1
    """Number of passes over the rows. Each epoch has its own order."""
    num_steps: NonNegativeInt = 0
    """Maximum number of optimizer steps, regardless of `num_epochs`; 0: no limit."""
    batch_rows: PositiveInt = 32
    """Maximum number of rows in one optimizer step."""
    batch_tokens: NonNegativeInt = 0
    """Maximum number of tokens in one optimizer step; a row with more tokens is its own step. 0: no limit."""
    max_row_tokens: int = 0
    """Longest sequence, in tokens; 0: what fits into `trainer.tokens_per_microbatch` and the model."""
    long_rows: Literal["drop", "truncate"] = "drop"
    """Treatment of a row with a longer sequence: the row is left out, or the sequence is cut at its end. Both
    are counted."""
    eval_interval: PositiveInt = 100
    """Steps between measurements of the held-out loss; there is always one before the first and after the
    last step."""

    def check(self) -> None:
        is_limit = self.max_row_tokens == 0 or self.max_row_tokens >= 2
        require(is_limit, f"sft.max_row_tokens={self.max_row_tokens}: use 0, or at least 2")
