"""A task with a long tail of completion lengths: count from one number to another, `17-21=` ->
`17,18,19,20,21`.

Answers have 3 n - 1 characters, n = 1 + floor(exp(N(1.5, 0.9))), at most 43: a median of 14 characters and a
maximum of 128. `python -m benchmarks.counting DIR` writes a tiny model that is often wrong in the digit that
changes: its warm start uses demonstrations some of which have a wrong number.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from rollout_server.tasks.base import Example, Split, Task

MAX_CHARACTERS = 128
_WARM_START_STEPS = 400
_WRONG = 0.25
"""Share of demonstrations with a number left out or repeated."""


def example(rng: random.Random) -> tuple[str, list[int]]:
    """(prompt, numbers of the correct completion)"""
    length = min(1 + math.floor(rng.lognormvariate(1.5, 0.9)), (MAX_CHARACTERS + 1) // 3)
    first = rng.randint(10, 100 - length)
    numbers = list(range(first, first + length))
    return f"{first}-{numbers[-1]}=", numbers


@dataclass(frozen=True, kw_only=True)
class Counting(Task):
    """The task for rollout servers: `task._target_=benchmarks.counting.Counting`."""

    max_prompt_tokens: int = 6

    def example(self, split: Split, index: int) -> Example:
        """Prompt and answer."""
        prompt, numbers = example(self.rng(split, index))
        return Example(prompt=prompt, answer=",".join(map(str, numbers)))

    def reward(self, example: Example, completion: str) -> float:
        """1.0 for exactly the reference answer, else 0.0."""
        return float(completion == example.answer)


def build_model(out_dir: Path, *, seed: int = 0) -> None:
    """Writes the model and its tokenizer."""
    import torch

    from areal_like.chat.token_row import TokenRow
    from trainer.models.tiny import EOS, WARM_START_LR, character_tokenizer, untrained_model
    from trainer.models.warm_start import packed, warm_start

    tokenizer = character_tokenizer()
    vocabulary = tokenizer.get_vocab()

    def rows() -> Iterator[TokenRow]:
        for index in count():
            rng = random.Random(f"{seed}/counting/{index}")
            prompt, numbers = example(rng)
            if len(numbers) > 1 and rng.random() < _WRONG:
                at = rng.randrange(len(numbers))
                numbers[at : at + 1] = [] if rng.random() < 0.5 else [numbers[at], numbers[at]]
            answer = ",".join(map(str, numbers))
            tokens = [vocabulary[token] for token in (*prompt, *answer, EOS)]
            yield TokenRow(tokens=tokens, loss_mask=[0] * len(prompt) + [1] * (len(answer) + 1))

    model = untrained_model(tokenizer, seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=WARM_START_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    batches = packed(rows(), num_rows=16, length=256, pad_token_id=tokenizer.pad_token_id)
    warm_start(model, batches, [optimizer], num_steps=_WARM_START_STEPS)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


if __name__ == "__main__":
    build_model(Path(sys.argv[1]))
