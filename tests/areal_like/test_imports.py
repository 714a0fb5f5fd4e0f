"""Faster process starts: a tokenizer without torch, and no garbage collection during imports."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

from areal_like.runtime.imports import torch_hidden
from areal_like.runtime.transformers_index import Index, stored_scan
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


@pytest.mark.chaos
def test_tokenizer_is_the_same_without_torch(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, seed=0, warm_start_steps=0, swap_prob=0.0)
    model = str(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, model, repr(PROMPTS)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert len(list((tmp_path / "cache/areal_like").glob("transformers-index-*.json"))) == 1
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


def test_the_stored_index_is_that_of_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scan, scanned = inspect.unwrap(import_utils.create_import_structure_from_path), []
    models = tmp_path / "models"
    (models / "newt").mkdir(parents=True)
    (models / "modeling_newt.py").write_text('__all__ = ["Newt"]\n')
    (models / "newt" / "configuration_newt.py").write_text('__all__ = [\n    "NewtConfig",\n]\n')

    def index() -> Index:
        """As a process that has just started gets it."""

        def counted(path: object) -> Index:
            scanned.append(path)
            found: Index = scan(path)
            return found

        get = stored_scan(counted, models)
        assert get(str(models / "__init__.py")) == get(models) == scan(models)
        return get(models)

    assert index()[frozenset({"torch"})] == {"modeling_newt": {"Newt"}}
    assert index()["newt"] == {frozenset(): {"configuration_newt": {"NewtConfig"}}} and len(scanned) == 1
    (models / "modeling_newt.py").write_text('__all__ = ["Newt", "NewtModel"]\n')
    assert index()[frozenset({"torch"})] == {"modeling_newt": {"Newt", "NewtModel"}}
    assert len(scanned) == 2, "the file changed"
    for damaged in ("[[", "[1]", '[["newt", 3]]', '[[["torch"], ["newt"]]]'):
        for file in tmp_path.glob("areal_like/*.json"):
            file.write_text(damaged)
        num_scanned = len(scanned)
        index()
        assert len(scanned) == num_scanned + 1
    (tmp_path / "no-directory").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-directory"))
    index()


def test_the_stored_index_of_transformers_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scan = import_utils.create_import_structure_from_path
    models = Path(import_utils.__file__).parents[1] / "models"
    expected = inspect.unwrap(scan)(models)
    assert len(expected) > 100
    assert stored_scan(scan, models)(models) == stored_scan(lambda _: {}, models)(models) == expected
