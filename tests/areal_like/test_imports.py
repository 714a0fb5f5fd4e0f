"""Faster process starts: a tokenizer without torch, and no garbage collection during imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from areal_like.runtime.imports import torch_hidden
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Example
from tests.support.launching import ROOT
from trainer.models.tiny import build_tiny_model

PROMPTS: list[str | list[dict[str, str]]] = [
    "3 1 2",
    [{"role": "user", "content": "3 1"}, {"role": "user", "content": "2"}],
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

CHILD = """
import gc, os, sys
from areal_like.runtime.imports import torch_hidden, uncollected
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Example
before = dict(os.environ)
with torch_hidden(), uncollected():
    assert not gc.isenabled()
    renderer = PromptRenderer(sys.argv[1])
assert gc.isenabled() and gc.get_freeze_count() > 10_000, gc.get_freeze_count()
assert dict(os.environ) == before
for prompt in eval(sys.argv[2]):
    tokens = renderer.encode(Example(prompt=prompt, answer=""))
    print(tokens.tolist(), repr(renderer.decode(tokens)), renderer.stop_token_ids, renderer.vocab_size,
          renderer.max_positions)
assert "torch" not in sys.modules
import torch
assert torch.zeros(1).item() == 0
"""


def test_tokenizer_is_the_same_without_torch(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, seed=0, warm_start_steps=0, swap_prob=0.0)
    model = str(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, model, repr(PROMPTS)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    renderer = PromptRenderer(model)
    expected = []
    for prompt in PROMPTS:
        tokens = renderer.encode(Example(prompt=prompt, answer=""))
        expected.append(
            f"{tokens.tolist()} {renderer.decode(tokens)!r} {renderer.stop_token_ids} {renderer.vocab_size} "
            f"{renderer.max_positions}"
        )
    assert run.stdout.splitlines() == expected
    assert len(set(expected)) == len(PROMPTS)


def test_imported_torch_stays_imported() -> None:
    torch = sys.modules["torch"]
    with torch_hidden():
        assert sys.modules["torch"] is torch
    assert sys.modules["torch"] is torch
