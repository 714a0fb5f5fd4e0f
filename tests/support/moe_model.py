"""A tiny Qwen3-MoE with a tokenizer, and a job that trains it or another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from areal_like.weights.untrained import auto_class
from tests.support.families import is_trained, stored, write_family
from tests.support.launching import launcher, processes_of
from trainer.models.tiny import character_tokenizer


def write_moe_model(directory: Path, *, vocab_size: int | None = None, seed: int = 0) -> str:
    """Writes a random Qwen3-MoE of 60 thousand parameters (8 experts, 2 for a token); returns the path."""
    return write_family(
        "qwen3_moe", directory, seed=seed, vocab_size=vocab_size or len(character_tokenizer())
    )


def run_moe_job(cwd: Path, *settings: str, num_steps: int, family: str = "qwen3_moe") -> list[dict[str, Any]]:
    """Runs a whole job on the model and checks that engine and trainer agree at every step.

    `family`: one of `tests.support.families`. With max_staleness=0 every trained token was sampled by the
    weights that compute its log-prob again. Returns the rows of metrics.jsonl.
    """
    root = cwd / "runs" / "x"
    path = write_family(family, cwd / "model", vocab_size=len(character_tokenizer()))
    job = (
        "name=x",
        f"model.path={path}",
        "task._target_=tests.support.rollout_tasks.Checksum",
        "sampling.group_size=4",
        "sampling.max_new_tokens=12",
        "trainer.groups_per_step=4",
        f"trainer.num_steps={num_steps}",
        "trainer.lr=0.001",
        "rollout.max_running=16",
        "rollout.queue_samples=8",
        "eval.num_prompts=8",
        "max_staleness=0",
        *settings,
    )
    try:
        with launcher(*job, cwd=cwd) as process:
            out, err = process.communicate()
        assert (process.returncode, err) == (0, ""), out + err
        rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(num_steps))
        assert min(row["num_tokens"] for row in rows) > 0
        assert max(row["mismatch_abs"] for row in rows) < 1e-5
        summary = json.loads((root / "summary.json").read_text())
        assert summary["max_trained_lag"] == 0 and summary["weights_version"] >= num_steps
        _check_checkpoint(max((root / "checkpoints").glob("step_*")), Path(path), family=family)
    finally:
        left = processes_of(root)
    assert not left, "processes of the job outlived it"
    return rows


def _check_checkpoint(saved: Path, initial: Path, *, family: str) -> None:
    """It has the initial model's names and shapes, transformers loads it, and all that is trained changed."""
    made_by = auto_class(AutoConfig.from_pretrained(saved))
    model: Any = made_by.from_pretrained(saved, dtype=torch.float32)
    model.save_pretrained(saved.parent / "again")
    tensors, before = stored(saved.parent / "again"), stored(initial)
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in before.items()}
    assert stored(saved).keys() == before.keys()
    same = {name for name, tensor in tensors.items() if torch.equal(tensor, before[name].float())}
    untrained = {name for name in before if not is_trained(name, family)}
    assert untrained <= same
    # An expert whose bias is low may get no token.
    assert all(family != "qwen3_moe" and ".experts." in name for name in same - untrained)
