"""The options with which SGLang is started, the GPUs of a job, and the engines that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from areal_like.config import Config
from areal_like.config.gpus import check_gpus_are_separate, engine_gpus, trainer_gpus
from areal_like.config.sglang_args import option, words_of
from areal_like.config.weights import MAX_TIMEOUT_S
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.runtime.command_line import load_config
from areal_like.weights.buckets import TensorSpec
from launch.run_directory.open_run import open_run
from rollout_server.policy.engines.sglang.process import (
    check_context_option,
    check_server_info,
    head_precision,
    launch_options,
)
from rollout_server.weights.checkpoint_shapes import CheckpointShapes


def config_of(*settings: str) -> Config:
    return load_config(["rollout.engine=sglang", *settings])


def options_of(*settings: str, index: int = 0) -> list[str]:
    return launch_options(
        config_of(*settings), model="/m", port=1, version=0, index=index, context_length=100
    )


def test_each_engine_gets_gpus_of_its_own() -> None:
    settings = ["rollout.engine_device=cuda:2", "rollout.gpus_per_engine=2"]
    words = options_of(*settings, index=1)
    assert option(words, ("--base-gpu-id",)) == "4" and option(words, ("--tp-size",)) == "2"
    assert option(words, ("--device",)) == "cuda" and option(words, ("--context-length",)) == "100"
    assert option(words, ("--schedule-policy",)) == "lpm" and "--disable-radix-cache" not in words
    assert float(option(words, ("--watchdog-timeout",)) or 0) > MAX_TIMEOUT_S, "it counts paused batches"
    mine = options_of(*settings, "rollout.sglang.args='--base-gpu-id {index}'", index=3)
    assert option(mine, ("--base-gpu-id",)) == "3", "args come last"
    assert option(options_of(index=3), ("--base-gpu-id",)) is None, "a CPU has no GPUs"


def test_gpus_of_a_job_are_counted() -> None:
    config = config_of(
        "rollout.engine_device=cuda", "rollout.gpus_per_engine=2", "rollout.num_servers=2",
        "trainer.device=cuda:4", "trainer.world_size=4",
    )  # fmt: skip
    check_gpus_are_separate(config)
    assert [engine_gpus(config.rollout, index=index) for index in (0, 1)] == [range(2), range(2, 4)]
    assert trainer_gpus(config) == range(4, 8)
    assert not trainer_gpus(load_config([])) and not engine_gpus(load_config([]).rollout, index=0)
    embedded = load_config(["rollout.engine_device=cuda:3"]).rollout
    assert engine_gpus(embedded, index=2) == range(3, 4)


SHARED = ["rollout.engine_device=cuda", "trainer.device=cuda"]
BOTH_ON_ONE = ["rollout.engine_device=cuda", "rollout.num_servers=2", "rollout.sglang.args=--base-gpu-id 0"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (SHARED, ["rollout.engine_device=cuda", "trainer.device=cuda", "GPUs 0", "trainer.device=cuda:1"]),
        (
            [*SHARED, "rollout.num_servers=4", "trainer.world_size=2", "trainer.device=cuda:3"],
            ["rollout.num_servers=4", "trainer.world_size=2", "share the GPUs 3", "trainer.device=cuda:4"],
        ),
        ([*SHARED, "rollout.sglang.args=--mem-fraction-static 0.85"], ["GPUs 0", "to share a GPU"]),
        ([*SHARED, "rollout.sglang.args=--mem-fraction-static half"], ["half: give a number below 1"]),
        (BOTH_ON_ONE, ["rollout-0 and rollout-1", "--base-gpu-id"]),
    ],
)
def test_shared_gpus_are_refused(settings: list[str], parts: list[str], tmp_path: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        open_run(["rollout.engine=sglang", *settings, f"runs_dir={tmp_path}/runs"])
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    "settings",
    [
        [*SHARED, "rollout.sglang.args=--mem-fraction-static 0.3"],
        [*SHARED, "rollout.sglang.env.CUDA_VISIBLE_DEVICES=7"],
        [*SHARED, "rollout.sglang.url=http://127.0.0.1:1"],
        ["rollout.engine_device=cuda", "trainer.device=cpu"],
    ],
)
def test_a_gpu_may_be_shared_on_purpose(settings: list[str]) -> None:
    check_gpus_are_separate(config_of(*settings))


def test_engines_that_do_not_fit_are_refused() -> None:
    check_server_info({}, name="the engine", context_tokens=10)
    check_server_info(
        {"dp_size": 1, "pp_size": 1, "max_req_input_len": 94}, name="the engine", context_tokens=100
    )
    for info, part in (
        ({"dp_size": 2}, "the engine runs with dp_size=2"),
        ({"dp_size": 2, "enable_dp_attention": False}, "the engine runs with dp_size=2"),
        ({"pp_size": 4}, "the engine runs with pp_size=4"),
        ({"dp_size": 8, "enable_dp_attention": True, "pp_size": 2}, "the engine runs with pp_size=2"),
        ({"max_req_input_len": 93}, "the engine holds sequences of 99 tokens"),
    ):
        with pytest.raises(ConfigError, match=part):
            check_server_info(info, name="the engine", context_tokens=100)
    # Attention divided among the tensor-parallel ranks: pushes reach all of them.
    divided = {"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}
    check_server_info(divided, name="the engine", context_tokens=100)
    over_hosts = divided | {"tp_size": 16, "nnodes": 2}
    check_server_info(over_hosts, name="the engine", context_tokens=100, weights_host="10.0.0.5")
    with pytest.raises(ConfigError, match="the engine runs on 2 hosts"):
        check_server_info(over_hosts, name="the engine", context_tokens=100, weights_host="127.0.0.1")
    check_context_option("--context-length 100", context_tokens=100)
    with pytest.raises(ConfigError, match="--context-length 99 is shorter"):
        check_context_option("--context-length=99", context_tokens=100)


def test_an_engine_with_another_head_is_refused() -> None:
    bfloat16 = config_of("model.dtype=bfloat16")
    assert head_precision(bfloat16) is True
    assert head_precision(config_of("model.dtype=bfloat16", "model.fp32_head=false")) is False
    assert head_precision(config_of("model.dtype=float32", "model.fp32_head=true")) is None, "no difference"
    for has, wants in ((True, True), (False, False), (True, None), (False, None), (None, True)):
        info = {"enable_fp32_lm_head": has}
        check_server_info(info, name="the engine", context_tokens=9, fp32_head=wants)
    for has, message in (
        (False, "runs without --enable-fp32-lm-head.* start it with the option, or set model.*=false"),
        (True, "runs with --enable-fp32-lm-head.* start it without the option, or set model.*=true"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_server_info(
                {"enable_fp32_lm_head": has}, name="the engine", context_tokens=9, fp32_head=not has
            )


def test_a_tied_head_may_be_left_out_of_a_push(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    specs = [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()]
    for facts in ({"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}):
        (tmp_path / "config.json").write_text(json.dumps(facts))
        CheckpointShapes.of(str(tmp_path)).check(specs)
        CheckpointShapes.of(str(tmp_path)).check(specs[:1])
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    CheckpointShapes.of(str(tmp_path)).check(specs)
    with pytest.raises(WeightSyncError, match="missing: lm_head"):
        CheckpointShapes.of(str(tmp_path)).check(specs[:1])


def test_the_last_value_of_an_option_counts() -> None:
    with pytest.raises(ConfigError, match="No closing quotation"):
        words_of("'--tp")
    words = words_of("--tp 2 --x --tp-size=4 --tp")
    assert option(words, ("--x",)) == "--tp-size=4" and option(words, ("--y",)) is None
    assert option(words, ("--tp", "--tp-size")) == "", "an option without its value"
