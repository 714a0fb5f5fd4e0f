"""The engine process: wrong options, signals, the death of the engine and of its parent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_like.errors import EngineError
from areal_like.trajectory import FinishReason
from areal_like.weights.buckets import cut_buckets, spec_of
from areal_like.weights.weight_group import WeightGroup
from areal_like.wire.sockets import bound_socket
from rollout_server.policy.client import EmbeddedClient
from rollout_server.policy.engines.supervisor import EngineSupervisor
from tests.support import engine_conformance as conformance
from tests.support import moved_clock, warm_start
from tests.support.engine_conformance import until_running
from tests.support.engine_harness import API_KEY, Models, engine_process, form_group, key_file, sample
from tests.support.moved_clock import advance
from tests.support.waiting import is_alive

PROMPT = conformance.PROMPT


def test_death_of_the_engine_fails_all_requests_at_once(models: Models) -> None:
    async def body() -> None:
        with engine_process(models[0]) as (process, url):
            async with EmbeddedClient(url, api_key=API_KEY) as client:
                waiting = [asyncio.ensure_future(sample(client, PROMPT, 2000)) for _ in range(20)]
                await until_running(client, 1)
                process.kill()
                for task in waiting:
                    with pytest.raises(EngineError):
                        await task
                with pytest.raises(EngineError):
                    await sample(client, PROMPT, 5)
                assert not await client.health()

    asyncio.run(body())


def test_an_engine_that_another_program_paused_is_reported(models: Models) -> None:
    nothing: Any = None  # the engine is neither started nor replaced

    async def body(url: str) -> None:
        supervisor = EngineSupervisor(
            engine=nothing, strategy=nothing, model="", checkpoints=models[0], load_timeout_s=1,
            stall_timeout_s=60,
            starting=nothing, on_ready=nothing, on_lost=nothing,
        )  # fmt: skip

        async def waits() -> list[str]:
            advance(0.25)
            await supervisor.load()
            return list(supervisor.waits())

        async with (
            EmbeddedClient(url, api_key=API_KEY) as client,
            EmbeddedClient(url, api_key=API_KEY) as other,
        ):
            supervisor.client = client
            running = asyncio.ensure_future(sample(client, PROMPT, 2000))
            await until_running(client, 1)
            assert await waits() == []
            await other.pause("in_place")
            while not (seen := await waits()):
                pass
            assert seen == ["engine: paused"]
            await other.resume()
            await running
            assert await waits() == []

    with engine_process(models[0]) as (_, url):
        moved_clock.run(body(url))


def test_sigterm_returns_partial_outputs_and_exits_0(models: Models) -> None:
    """Also while a broadcast hangs: its thread must not keep the process alive."""

    async def body() -> None:
        with (
            engine_process(models[0]) as (process, url),
            WeightGroup.create(world_size=2, group_name="w", timeout_s=3600) as group,
        ):
            async with EmbeddedClient(url, api_key=API_KEY) as client:
                joining = client.init_weights_group(form_group("w", port=group.port, timeout_s=3600))
                await asyncio.gather(joining, asyncio.to_thread(group.connect))
                await client.begin_weight_update()
                (bucket,) = cut_buckets([spec_of("lm_head.weight", torch.zeros(4))], bucket_bytes=100)
                hanging = asyncio.ensure_future(
                    client.update_weights_from_distributed(bucket, group_name="w", timeout_s=3600)
                )
                running = asyncio.ensure_future(sample(client, PROMPT, 2000))
                await until_running(client, 1)
                process.terminate()
                generation = await running
                assert generation.finish_reason is FinishReason.ABORT and len(generation.output_ids) > 0
                assert await asyncio.to_thread(process.wait) == 0
                with pytest.raises(EngineError):
                    await hanging

    asyncio.run(body())


PARENT = """
import os, runpy, sys, time
if (pid := os.fork()) == 0:
    sys.argv[0] = "rollout_server.engine"
    runpy.run_module("rollout_server.engine", run_name="__main__", alter_sys=True)
print(pid, flush=True)
time.sleep(3600)
"""


def test_engine_dies_with_its_parent(models: Models, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    arguments = ["--model-path", str(models[0]), "--api-key-file", str(key_file(tmp_path))]
    arguments += ["--port", "0", "--port-file", str(port_file)]
    parent = warm_start.Popen([sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not port_file.exists():
        time.sleep(0.05)
    parent.kill()
    parent.communicate()
    while is_alive(pid):
        time.sleep(0.05)


def test_port_in_use_is_one_message_and_exit_2(models: Models, tmp_path: Path) -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        arguments = ["--model-path", str(models[0]), "--port", str(taken.getsockname()[1])]
        test_wrong_option_gives_one_message_and_exit_2(models, arguments, "cannot bind", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "/does/not/exist"], "no config.json there"),
        (["--model-path", "MODEL", "--api-key-file", "/does/not/exist"], "no such file"),
        (["--model-path", "MODEL", "--api-key-file", "/etc/passwd"], "chmod 600"),
        (["--model-path", "MODEL", "--max-running-requests", "0"], "at least 1"),
    ],
)
def test_wrong_option_gives_one_message_and_exit_2(
    models: Models, arguments: list[str], message: str, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "rollout_server.engine",
        "--api-key-file",
        str(key_file(tmp_path)),
        *(str(models[0]) if a == "MODEL" else a for a in arguments),
    ]
    done = warm_start.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
