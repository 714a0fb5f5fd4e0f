"""Rows of preferences for tests: sums with a right and a wrong answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.config.preferences import PreferenceOptimizationConfig
from tests.support.sft_model import write_rows
from trainer.distributed.ranks import Ranks
from trainer.models.tiny_chat import chat_tokenizer
from trainer.offline.preference_rows import completion_tokens
from trainer.preferences.rows import OptimizationRows


def sum_pairs(num_rows: int, *, seed: int, kind: str = "text") -> list[dict[str, Any]]:
    """Rows of `text`, `chat` or `label`: the sum of two numbers, and a wrong one of another length."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(num_rows):
        left, right = draw.randint(10, 99), draw.randint(10, 99)
        prompt, good = f"{left}+{right}=", str(left + right)
        bad = str(left + right + draw.choice([-1, 1, 1000]))
        if kind == "text":
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif kind == "chat":
            user = {"role": "user", "content": prompt}
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (good, bad))
            rows.append({"prompt": [user], "chosen": chosen, "rejected": rejected})
        else:
            label = draw.random() < 0.5
            rows.append({"prompt": prompt, "completion": good if label else bad, "label": label})
    return rows


def rows_of(
    folder: Path, rows: Sequence[dict[str, Any]], *, of_pairs: bool = True, longest: int = 100
) -> OptimizationRows:
    """The rows of a file, for the tokenizer of the tiny chat model."""
    return OptimizationRows(
        PreferenceOptimizationConfig(),
        write_rows(folder / "rows.jsonl", rows),
        key="preferences.train",
        render=completion_tokens(ConversationTokens(chat_tokenizer())),
        longest=longest,
        budget_tokens=200,
        of_pairs=of_pairs,
        ranks=Ranks.alone(),
    )
