"""Settings of supervised training (`areal-like sft`), in addition to those of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from areal_like.config.offline import OfflineConfig


@dataclass(frozen=True, kw_only=True)
class SftConfig(OfflineConfig, key="sft"):
    """Supervised training on conversations, or on prompts with completions.

    Optimizer, micro-batches, ranks and checkpoints are those of the section `trainer`.
    """

    completion_key: str = ""
    """Key of the completion; empty: the first of `completion`, `response`, `answer`, ... that a row has."""
    messages_key: str = ""
    """Key of the conversation; empty: `messages` or `conversations`."""
    long_rows: Literal["drop", "truncate"] = "drop"
    """Treatment of a row with a longer sequence: the row is left out, or the sequence is cut at its end. Both
    are counted."""
