"""The engine's options: the same as data and on a command line."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import RolloutConfig
from areal_like.config.common import field_texts
from areal_like.errors import ConfigError
from rollout_server.engine.options import ProcessOptions
from tests.support.engine_harness import API_KEY, key_file

GIVEN: dict[str, Any] = {
    "max_running_requests": 3, "context_length": 77, "max_prefill_tokens": 5, "prefix_cache_tokens": 0,
    "conversation_cache_tokens": 9, "max_adapters": 4, "random_seed": -4, "model_path": "m", "port": 0,
    "port_file": "p", "device": "cuda:1", "dtype": "bfloat16", "enable_fp32_lm_head": True,
    "router_dtype": "bfloat16", "enable_return_routed_experts": True,
    "weights_from": ("a", "b c"), "weight_version": "12", "num_threads": 2, "max_threads": 4,
    "stream_interval": 8, "max_body_bytes": 10, "max_connections": 11, "weights_timeout_s": 1.5,
    "log_level": "DEBUG",
}  # fmt: skip


def words(given: dict[str, Any]) -> list[str]:
    found = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
        else:
            for one in value if isinstance(value, tuple) else (value,):
                found += [flag, str(one)]
    return found


def test_both_ways_give_the_same_options(tmp_path: Path) -> None:
    options = ProcessOptions(api_key=API_KEY, **GIVEN)
    assert {one.name for one in fields(options)} == {*GIVEN, "api_key"}
    argv = [*words(GIVEN), "--api-key-file", str(key_file(tmp_path))]
    assert ProcessOptions.from_command_line(argv) == options
    data = tmp_path / "options.json"
    data.write_text(options.to_json())
    assert ProcessOptions.from_command_line(["--options", str(data)]) == options
    assert API_KEY not in repr(options)


def test_defaults_are_those_of_the_fields(tmp_path: Path) -> None:
    argv = ["--model-path", "m", "--api-key-file", str(key_file(tmp_path))]
    options = ProcessOptions.from_command_line(argv)
    assert options == ProcessOptions(model_path="m", api_key=API_KEY)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ProcessOptions.from_command_line(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    texts = field_texts(ProcessOptions)
    for one in fields(ProcessOptions):
        assert f"--{one.name.replace('_', '-')}" in shown
        assert one.name == "api_key" or texts[one.name] in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_running_requests": 0}, "max_running_requests must be at least 1"),
        ({"conversation_cache_tokens": -1}, "conversation_cache_tokens must be at least 0"),
        ({"port": 65536}, "port=65536: use 0 to 65535"),
        ({"dtype": "float64"}, "dtype=float64"),
        ({"num_threads": "two"}, "num_threads: want int"),
        ({"max_runing_requests": 8}, "did you mean `max_running_requests`"),
    ],
)
def test_data_is_checked_like_a_command_line(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = tmp_path / "options.json"
    data.write_text(json.dumps(GIVEN | {"api_key": API_KEY} | wrong))
    with pytest.raises(ConfigError, match=message):
        ProcessOptions.from_command_line(["--options", str(data)])


def test_sizes_that_the_job_sets_too_have_its_defaults() -> None:
    options = ProcessOptions(model_path="m", api_key=API_KEY)
    rollout = RolloutConfig()
    assert options.max_running_requests == rollout.max_running
    assert (options.device, options.num_threads) == (rollout.engine_device, rollout.least_threads)
