"""For supervised runs: rows, and a tiny Llama whose weights are the same with every version of torch."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from areal_like.adding import TOOL
from trainer.models.tiny import untrained_model
from trainer.models.tiny_chat import CHAT_TEMPLATE, chat_tokenizer

TOOLS = [{"type": "function", "function": {"name": TOOL, "parameters": {"type": "object", "properties": {}}}}]
UNMARKED_TEMPLATE = re.sub(r"\{%-? (end)?generation -?%\}\n?", "", CHAT_TEMPLATE)
"""The chat template without `generation` blocks."""


def write_sft_model(out_dir: Path, *, template: str | None = CHAT_TEMPLATE) -> str:
    """Writes the model and its tokenizer; returns the path."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    model = untrained_model(tokenizer, seed=0, hidden_size=32, num_layers=2)
    draw = np.random.RandomState(0)  # its stream is frozen, in contrast to torch's
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.from_numpy(draw.standard_normal(tuple(param.shape)).astype(np.float32))
            param.copy_(noise * 0.3 if param.ndim == 2 else 1 + 0.1 * noise)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return str(out_dir)


def addition_rows(kind: str, num_rows: int, *, seed: int) -> list[dict[str, Any]]:
    """Sums of two to six numbers as `messages` (with calls of a tool), `text` or `chat` rows.

    `text` and `chat` have a prompt and a completion.
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(num_rows):
        numbers = [draw.randint(1, 99) for _ in range(draw.randint(2, 6))]
        question, answer = "+".join(map(str, numbers)), str(sum(numbers))
        user = {"role": "user", "content": question}
        reply = {"role": "assistant", "content": answer}
        if kind == "text":
            rows.append({"prompt": f"{question}=", "completion": answer})
        elif kind == "chat":
            earlier = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
            rows.append({"prompt": [*earlier * draw.randint(0, 1), user], "completion": [reply]})
        else:
            rows.append({"messages": [user, *_calls(numbers), reply], "tools": TOOLS})
    return rows


def _calls(numbers: Sequence[int]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    total = numbers[0]
    for number in numbers[1:]:
        arguments = {"a": total, "b": number}
        call = {"type": "function", "function": {"name": TOOL, "arguments": arguments}}
        total += number
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": str(total)})
    return messages


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
