"""Rows of preferences for tests: sums with a right and a wrong answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.data import open_rows
from areal_like.data.preference_format import PreferenceFormat
from tests.support.sft_model import write_rows
from trainer.distributed.ranks import Ranks
from trainer.models.tiny_chat import chat_tokenizer
from trainer.preferences.units import PreferenceUnits


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


def units_of_rows(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    of_pairs: bool = True,
    longest: int = 100,
    budget_tokens: int = 200,
    truncates: bool = False,
) -> PreferenceUnits:
    """The units of rows in a file, for the tokenizer of the tiny chat model."""
    source = write_rows(folder / "rows.jsonl", rows)
    return PreferenceUnits(
        open_rows(source, key="preferences.train"),
        key="preferences.train",
        format=PreferenceFormat(),
        tokens=ConversationTokens(chat_tokenizer()),
        longest=longest,
        budget_tokens=budget_tokens,
        truncates=truncates,
        of_pairs=of_pairs,
        ranks=Ranks.alone(),
    )
