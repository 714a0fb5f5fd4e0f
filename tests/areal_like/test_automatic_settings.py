"""`auto` settings: one rule for every role, and one message where it cannot work."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from areal_like.automatic_settings import (
    compute_dtype,
    recomputes_activations,
    resolved,
    router_dtype,
    uses_fp32_head,
)
from areal_like.config import Config, from_mapping
from areal_like.errors import ConfigError
from launch.run_directory.open_run import open_run


def _model(directory: Path, **facts: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | facts))
    return str(directory)


def _job(path: str, *, engine: str = "cpu", trainer: str = "cpu", **sections: Any) -> Config:
    devices = {
        "rollout": {"engine_device": engine},
        "trainer": {"device": trainer, "tokens_per_microbatch": 9000},
    }
    return from_mapping(devices | sections | {"model": {"path": path} | sections.get("model", {})})


@pytest.mark.parametrize(
    ("facts", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
    ],
)
def test_auto_is_the_checkpoints_dtype_on_gpus(tmp_path: Path, facts: dict[str, Any], dtype: str) -> None:
    path = _model(tmp_path / "model", **facts)
    assert resolved(_job(path)).model.dtype == "float32"
    # Each role of a job by hand may be given only its own device: both find the same dtype.
    for engine, trainer in (("cuda", "cuda:4"), ("cuda:1", "cpu"), ("cpu", "cuda")):
        job = _job(path, engine=engine, trainer=trainer)
        assert compute_dtype(job) == resolved(job).model.dtype == dtype
        assert recomputes_activations(job) is (trainer != "cpu")
    assert resolved(resolved(job)) == resolved(job)


def test_explicit_settings_stay() -> None:
    for checkpointing in (True, False):
        job = from_mapping(
            {
                "model": {
                    "dtype": "bfloat16",
                    "path": "some/model",
                    "fp32_head": checkpointing,
                    "router_dtype": "float32" if checkpointing else "bfloat16",
                },
                "trainer": {"device": "cuda", "gradient_checkpointing": checkpointing},
                "objective": {"name": "ppo"},
            }
        )
        assert resolved(job) == job
    on_cpu = resolved(Config())
    assert (on_cpu.model.dtype, on_cpu.trainer.gradient_checkpointing) == ("float32", False)
    assert compute_dtype(_job("tiny", trainer="cuda")) == "float32"


def test_head_and_routers_follow_the_dtype() -> None:
    for dtype in ("float32", "bfloat16"):
        job = _job("some/model", model={"dtype": dtype})
        assert job.model.fp32_head == "auto"
        assert uses_fp32_head(job) is resolved(job).model.fp32_head is (dtype == "bfloat16")
        assert job.model.router_dtype == "auto"
        assert router_dtype(job) == resolved(job).model.router_dtype == dtype


def test_one_message_where_auto_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no dtype: set model\.dtype"):
        compute_dtype(_job(_model(tmp_path / "nameless"), engine="cuda"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json, which model\.dtype=auto needs, cannot be read"):
        compute_dtype(_job(str(broken), engine="cuda"))
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        compute_dtype(_job(str(tmp_path / "absent"), engine="cuda"))


def test_float32_refused_for_long_grouped_queries(tmp_path: Path) -> None:
    grouped = _model(tmp_path / "gqa", dtype="float32", num_attention_heads=32, num_key_value_heads=8)
    alike = _model(tmp_path / "mha", dtype="float32", num_attention_heads=32, num_key_value_heads=32)
    long: dict[str, Any] = {"sampling": {"max_new_tokens": 8192}}

    def job(path: str, *, device: str = "cuda", **sections: Any) -> Config:
        return _job(path, trainer=device, **sections)

    with pytest.raises(ConfigError, match=r"8193 tokens on trainer\.device=cuda.*set model\.dtype=bfloat16"):
        resolved(job(grouped, **long))
    with pytest.raises(ConfigError, match=r"set model\.dtype=bfloat16"):
        settings = [f"runs_dir={tmp_path / 'runs'}", f"model.path={grouped}", "trainer.device=cuda"]
        open_run([*settings, "sampling.max_new_tokens=8192", "trainer.tokens_per_microbatch=9000"])
    assert not (tmp_path / "runs").exists()  # refused before anything is written
    resolved(job(grouped))
    resolved(job(grouped, device="cpu", **long))
    resolved(job(alike, **long))
    resolved(job(grouped, **long, model={"dtype": "bfloat16"}))


def test_run_records_what_auto_was(tmp_path: Path) -> None:
    run = open_run([f"runs_dir={tmp_path}", "name=x"])
    run.close()
    assert "dtype: float32" in run.paths.config.read_text()
    assert "fp32_head: false" in run.paths.config.read_text()
    assert "router_dtype: float32" in run.paths.config.read_text()
    assert run.config == dataclasses.replace(resolved(Config()), name="x", runs_dir=str(tmp_path))
