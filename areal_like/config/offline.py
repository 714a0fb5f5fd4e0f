"""Settings that all kinds of training on rows of a file share, in addition to those of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from areal_like.config.common import NonNegativeInt, PositiveInt, Section, require


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(Section):
    """Rows, epochs and batches. Optimizer, micro-batches, ranks and checkpoints are those of the section
    `trainer`.
    """

    train: str | tuple[str, ...] = ""
    """Rows to learn from: a file (.jsonl, .parquet), a pattern, a list of these, or `hf:owner/name`."""
    eval: str | tuple[str, ...] = ""
    """Held-out rows, whose loss is measured; empty: none."""
    prompt_key: str = ""
    """Key of the prompt; empty: the first of `prompt`, `question`, `problem` that a row has."""
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
    eval_interval: PositiveInt = 100
    """Steps between measurements of the held-out loss; there is always one before the first and after the
    last step."""

    def check(self) -> None:
        key, limit = self.key, self.max_row_tokens
        require(limit == 0 or limit >= 2, f"{key}.max_row_tokens={limit}: use 0, or at least 2")


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig(OfflineConfig):
    """The settings of rows with preferences (`areal_like/data/preference_format.py`)."""

    chosen_key: str = ""
    """Key of the better completion; empty: `chosen`."""
    rejected_key: str = ""
    """Key of the worse completion; empty: `rejected`."""
    long_rows: Literal["refuse", "drop"] = "refuse"
    """Treatment of a row with a longer sequence: it ends the run before its first step, or is left out and
    counted. Nothing is cut, because a preference is one between whole completions."""
