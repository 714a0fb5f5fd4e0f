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
    """Put before conversations and prompts that have no system message."""
    chat: bool = False
    """A prompt that is a text becomes the message of a user, and its completion the reply."""
    num_epochs: PositiveInt = 1
    """Times that every row is learned from. Each epoch has an order of its own."""
    num_steps: NonNegativeInt = 0
    """Most optimizer steps, whatever `num_epochs` is; 0: no limit."""
    batch_rows: PositiveInt = 32
    """Most rows in one optimizer step."""
    batch_tokens: NonNegativeInt = 0
    """Most tokens in one optimizer step, where a row that has more is a step of its own; 0: no limit."""
    max_row_tokens: int = 0
    """Longest sequence, in tokens; 0: what fits into `trainer.tokens_per_microbatch` and the model."""
    long_rows: Literal["drop", "truncate"] = "drop"
    """What happens to a row that has a longer sequence: it is left out, or loses the end of that sequence.
    Both are counted."""
    eval_interval: PositiveInt = 100
    """Steps between measurements of the held-out loss; there is always one before the first and after the
    last step."""

    def check(self) -> None:
        is_limit = self.max_row_tokens == 0 or self.max_row_tokens >= 2
        require(is_limit, f"sft.max_row_tokens={self.max_row_tokens}: use 0, or at least 2")
