"""The torch of SGLang's environment is asked through its interpreter, here an executable script."""

import json
from pathlib import Path

import pytest

from areal_like.config import Config, from_mapping
from areal_like.errors import ConfigError
from areal_like.weights.foreign_torch import TorchVersions, check_engine_nccl, torch_versions

OURS = TorchVersions(torch="2.13.0+cu130", nccl="2.29.3")


def interpreter(path: Path, answer: str) -> str:
    """An executable that answers `-c ...` with this text, and counts its calls."""
    path.write_text(f'#!/bin/sh\necho call >> "{path}.calls"\necho "a warning of torch"\necho \'{answer}\'\n')
    path.chmod(0o755)
    return str(path)


def job(python: str, *, backend: str = "auto", device: str = "cuda") -> Config:
    rollout = {"engine": "sglang", "engine_device": device, "sglang": {"python": python}}
    return from_mapping({"rollout": rollout, "weights": {"backend": backend}})


def test_another_nccl_in_sglang_is_refused(tmp_path: Path) -> None:
    other = interpreter(tmp_path / "other", json.dumps({"torch": "2.14.1", "nccl": "2.30.1"}))
    for backend in ("auto", "nccl"):
        with pytest.raises(ConfigError) as refusal:
            check_engine_nccl(job(other, backend=backend), ours=OURS)
        for part in ("NCCL 2.29.3", "2.13.0+cu130", other, "NCCL 2.30.1", "2.14.1", "weights.backend=gloo"):
            assert part in str(refusal.value)
    check_engine_nccl(job(other, backend="gloo"), ours=OURS)
    check_engine_nccl(job(other, device="cpu"), ours=OURS)
    assert (tmp_path / "other.calls").read_text() == "call\n", "it is asked once"
    same = interpreter(tmp_path / "same", json.dumps({"torch": "2.13.0", "nccl": "2.29.3"}))
    check_engine_nccl(job(same), ours=OURS)


@pytest.mark.parametrize("answer", ["", "[1, 2]", '{"torch": "2.14.1"}', "not json"])
def test_an_interpreter_without_an_answer_is_unknown(tmp_path: Path, answer: str) -> None:
    python = interpreter(tmp_path / "python", answer)
    assert torch_versions(python) is None
    check_engine_nccl(job(python), ours=OURS)
    check_engine_nccl(job(str(tmp_path / "nowhere")), ours=OURS)
