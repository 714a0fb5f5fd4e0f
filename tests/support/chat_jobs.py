"""A tiny untrained model for conversations, with `model.renderer=tests.support.line_chat.LineChat`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.models.tiny import build_tiny_model, character_tokenizer


def build_chat_model(directory: Path) -> None:
    """An untrained model, of which a third of all characters end a turn."""
    build_tiny_model(directory, seed=0, warm_start_steps=0, swap_prob=0.5)
    path = directory / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [2, *range(4, len(character_tokenizer()), 3)]}))
