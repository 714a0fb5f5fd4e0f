"""Log-probs of the reference model: as transformers computes them, cached, and computed again if stale."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from areal_like.config import LoraConfig, from_mapping
from tests.support.preference_rows import rows_of, sum_pairs
from tests.support.sft_model import write_sft_model
from trainer.distributed.ranks import Ranks
from trainer.preferences.reference import Reference, store_logps, stored_logps
from trainer.preferences.rows import OptimizationRows


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "areal_like" / "reference_logps"
    if dist.is_initialized():
        dist.destroy_process_group()


def logps(model: str, rows: OptimizationRows, *, rank: int = 0) -> NDArray[np.float64]:
    config = from_mapping({"model": {"path": model}, "trainer": {"tokens_per_microbatch": 64}})
    config = replace(config, sampling=replace(config.sampling, temperature=1.0))
    config = replace(config, model=replace(config.model, lora=LoraConfig(rank=rank)))
    reference = Reference(config, Ranks.alone(), path="")
    try:
        return reference.logps(rows.facts["num_completions"], rows.completions, content="x", what="pairs")
    finally:
        reference.close()


def test_log_probs_are_those_of_transformers(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second time they come from the file; a broken one, and other weights, compute them again."""
    caplog.set_level(logging.INFO)
    path = write_sft_model(tmp_path / "model")
    rows = rows_of(tmp_path, sum_pairs(5, seed=1))
    random_state = torch.random.get_rng_state()
    first = logps(path, rows)
    assert torch.equal(torch.random.get_rng_state(), random_state), "as if it had been read from the cache"
    model = AutoModelForCausalLM.from_pretrained(path)
    completions = [row for index in range(5) for row in rows.completions(index)]
    for logp, row in zip(first, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.tokens])).logits[0]
        targets = torch.tensor(row.tokens[1:])[:, None]
        by_token = torch.log_softmax(logits.double(), -1)[:-1].gather(1, targets)[:, 0]
        expected = float((by_token * torch.tensor(row.loss_mask[1:])).sum())
        assert logp == pytest.approx(expected, abs=1e-4)
    (file,) = folder.iterdir()

    assert np.array_equal(logps(path, rows), first) and f"read from {file}" in caplog.text
    assert np.array_equal(logps(path, rows, rank=4), first), "with LoRA it is the base"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert np.array_equal(logps(path, rows), first) and "is computed again: its content" in caplog.text
    assert stored_logps(file, 10) is not None

    other = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        other.model.norm.weight[0] += 0.5
    other.save_pretrained(tmp_path / "model")
    changed = logps(path, rows)
    assert not np.allclose(changed, first) and len(list(folder.iterdir())) == 2


def test_cut_mismatched_completions_are_others(tmp_path: Path, folder: Path) -> None:
    """With another limit they have other tokens, so the log-probs in the file are not theirs."""
    path = write_sft_model(tmp_path / "model")
    given = [*sum_pairs(1, seed=5, kind="label"), {"prompt": "1=", "completion": "2" * 20, "label": True}]
    settings = {"model": {"path": path}, "trainer": {"tokens_per_microbatch": 64}}
    config = from_mapping({**settings, "sampling": {"temperature": 1.0}})
    found = {}
    for longest in (23, 40):
        rows = rows_of(tmp_path, given, of_pairs=False, longest=longest)
        reference = Reference(config, Ranks.alone(), path="")
        rows.read_reference(reference, None, with_mismatched=True)
        reference.close()
        share = rows.mismatched_share([0, 1], step=None, ranks=Ranks.alone())
        found[longest] = {row.num_learned: logp for row, logp in share}
        dist.destroy_process_group()
    (same, cut), (also_same, whole) = (sorted(each) for each in found.values())
    assert same == also_same and cut < whole == 21
    assert found[23][cut] > found[40][whole] + 1, "more tokens"
    assert len(list(folder.iterdir())) == 3, "one of completions, two of mismatched ones"


def test_files_are_checked_before_use(tmp_path: Path) -> None:
    path = tmp_path / "logps.safetensors"
    assert stored_logps(path, 4) is None
    store_logps(path, np.arange(4.0))
    found = stored_logps(path, 4)
    assert found is not None and found.tolist() == [0, 1, 2, 3]
    assert stored_logps(path, 5) is None
    path.write_bytes(path.read_bytes() + bytes(8192))
    assert stored_logps(path, 4) is None
    path.write_bytes(b"no safetensors")
    assert stored_logps(path, 4) is None
