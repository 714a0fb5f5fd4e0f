"""`auto` settings: one rule for every role, and one message where it cannot work."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from areal_like import automatic_settings
from areal_like.automatic_settings import (
    compute_dtype,
    cpu_dtype,
    dtype_choice,
    most_threads,
    recomputation,
    resolved,
    router_dtype,
    threads_alone,
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
    devices: dict[str, Any] = {
        "rollout": {"engine_device": engine},
        "trainer": {"device": trainer, "tokens_per_microbatch": 9000},
    }
    for name in ("rollout", "model"):
        devices[name] = devices.get(name, {"path": path}) | sections.pop(name, {})
    return from_mapping(devices | sections)


FAST = frozenset({"avx512f", "avx512_bf16"})
LARGE = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
    "dtype": "float32",
}  # fmt: skip
SMALL = LARGE | {"num_hidden_layers": 2, "vocab_size": 512}


@pytest.mark.parametrize(
    ("flags", "num_parameters", "dtype", "reason"),
    [
        (FAST, 134_000_000, "bfloat16", "the CPU has avx512_bf16, and a model of 134 million parameters"),
        (frozenset({"amx_bf16", "avx512_bf16"}), 2 * 10**7, "bfloat16", "the CPU has amx_bf16"),
        (FAST, 19_000_000, "float32", "a model of 19 million parameters gains nothing"),
        (FAST, 300_000, "float32", "a model of 0.3 million parameters gains nothing"),
        (frozenset({"avx512f", "avx2"}), 10**9, "float32", "has neither amx_bf16 nor avx512_bf16"),
        (frozenset(), 10**9, "float32", "has neither"),
    ],
)
def test_dtype_on_a_cpu(flags: frozenset[str], num_parameters: int, dtype: str, reason: str) -> None:
    found, why = cpu_dtype(flags, num_parameters=num_parameters)
    assert found == dtype and reason in why


def test_auto_on_cpus_looks_at_cpu_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = _model(tmp_path / "large", **LARGE), _model(tmp_path / "small", **SMALL)
    monkeypatch.setattr(automatic_settings, "cpu_flags", lambda: FAST)
    for path, dtype in (
        (large, "bfloat16"),
        ("smollm2", "bfloat16"),
        (small, "float32"),
        ("tiny", "float32"),
    ):
        job = _job(path)
        assert compute_dtype(job) == resolved(job).model.dtype == dtype
        assert uses_fp32_head(job) is (dtype == "bfloat16")
        assert dtype_choice(job).startswith(f"model.dtype=auto is {dtype}: ")
    assert (
        dtype_choice(_job(large, model={"dtype": "float32"}))
        == dtype_choice(_job(large, trainer="cuda"))
        == ""
    )
    assert compute_dtype(_job(large, rollout={"engine": "sglang"})) == "float32"
    experts = SMALL | {"moe_intermediate_size": 1536, "num_experts": 8}
    assert compute_dtype(_job(_model(tmp_path / "experts", **experts))) == "bfloat16"
    monkeypatch.setattr(automatic_settings, "cpu_flags", lambda: frozenset({"avx2"}))
    assert compute_dtype(_job(large)) == "float32"
    # Without a fast bfloat16 the model decides nothing, so nothing is read.
    assert compute_dtype(_job(str(tmp_path / "absent"))) == "float32"


def test_threads_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = _model(tmp_path / "large", **LARGE)
    monkeypatch.setattr(automatic_settings, "usable_cores", lambda: 6)
    assert most_threads(_job(large)) == 6
    assert most_threads(_job("tiny")) == most_threads(_job(large, engine="cuda")) == 1
    fixed = _job(large, rollout={"num_threads": 2})
    assert most_threads(fixed) == fixed.rollout.least_threads == 2
    with pytest.raises(ConfigError, match=r"rollout.num_threads must be at least 1 or auto, not 0"):
        _job(large, rollout={"num_threads": 0})
    monkeypatch.setattr(automatic_settings, "usable_cores", lambda: 1)
    assert most_threads(_job(str(tmp_path / "absent"))) == 1


def test_threads_of_training_from_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = _model(tmp_path / "large", **LARGE)
    monkeypatch.setattr(automatic_settings, "usable_cores", lambda: 6)
    assert threads_alone(_job(large)) == 6
    assert threads_alone(_job("tiny")) == threads_alone(_job(large, trainer="cuda")) == 1
    several = _job(large)
    several = dataclasses.replace(several, trainer=dataclasses.replace(several.trainer, world_size=4))
    assert threads_alone(several) == several.trainer.least_threads == 1
    two_machines = dataclasses.replace(several.trainer, num_hosts=2, rendezvous="node-0:29500")
    assert threads_alone(dataclasses.replace(several, trainer=two_machines)) == 3
    fixed = _job(large)
    fixed = dataclasses.replace(fixed, trainer=dataclasses.replace(fixed.trainer, num_threads=2))
    assert threads_alone(fixed) == fixed.trainer.least_threads == 2
    with pytest.raises(ConfigError, match=r"trainer.num_threads must be at least 1 or auto, not 0"):
        from_mapping({"trainer": {"num_threads": 0}})


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
        assert recomputation(job) is (trainer != "cpu")
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
