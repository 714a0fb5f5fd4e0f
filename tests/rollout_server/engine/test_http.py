"""The embedded engine as a process, over real HTTP and weight groups: the conformance suite and more."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from areal_like.errors import EngineError
from areal_like.trajectory import FinishReason
from areal_like.weights.buckets import checksum, cut_buckets, flatten, spec_of
from areal_like.weights.collective import WeightGroup
from rollout_server.inference.client import EngineClient
from rollout_server.inference.types import Sampling
from tests.support import engine_conformance as conformance
from tests.support.engine_harness import (
    Engine,
    Pusher,
    engine_process,
    error_of,
    load_model,
    running_engine,
    sample,
    save_model,
    weights_of,
)

pytestmark = pytest.mark.timeout(90)
PROMPT = conformance.PROMPT

Models = tuple[Path, Path]


def make_models(directory: Path, kind: str) -> Models:
    return save_model(directory / f"{kind}-0", kind, seed=0), save_model(
        directory / f"{kind}-1", kind, seed=1
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[Engine]:
    with running_engine(models[0]) as engine:
        yield engine


def test_logprobs_and_greedy_match_transformers(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.logprobs_and_greedy_match_transformers(engine, models))


@pytest.fixture(scope="module")
def gpt2_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"), "gpt2")


@pytest.fixture(scope="module")
def gpt2_engine(gpt2_models: Models) -> Iterator[Engine]:
    """The generic path, with streaming, a body limit and no prefix cache."""
    with running_engine(
        gpt2_models[0], stream_interval=4, max_body_bytes=4000, prefix_cache_tokens=0
    ) as engine:
        yield engine


def test_generic_path_matches_transformers(gpt2_engine: Engine, gpt2_models: Models) -> None:
    asyncio.run(conformance.logprobs_and_greedy_match_transformers(gpt2_engine, gpt2_models))


def test_stop_and_length(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.stop_and_length(engine, models[0]))


def test_abort_returns_partial_tokens(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.abort_returns_partial_tokens(engine, models[0]))


def test_pause_modes(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.pause_modes(engine, models[0]))


def test_groups_are_made_destroyed_and_made_again(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.groups_are_made_destroyed_and_made_again(engine, models[0]))


def test_recompute_in_flight_is_exact(engine: Engine, models: Models) -> None:
    error = asyncio.run(conformance.versions_across_an_update_in_flight(engine, models, running="recompute"))
    assert error < conformance.TOLERANCE


def test_keep_in_flight_records_versions_and_has_an_error(engine: Engine, models: Models) -> None:
    error = asyncio.run(conformance.versions_across_an_update_in_flight(engine, models, running="keep"))
    assert error > conformance.TOLERANCE, (
        "new weights over old KV give wrong log-probs; if not, KV was recomputed"
    )


def test_bad_requests_are_refused(engine: Engine) -> None:
    asyncio.run(conformance.bad_requests_are_refused(engine))


def test_update_calls_need_an_open_update_and_a_group(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.update_calls_need_an_open_update_and_a_group(engine, models[0]))


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "unknown":
        return {**tensors, "model.layers.9.weight": torch.zeros(3)}
    if how == "missing":
        return {n: t for n, t in tensors.items() if n != name}
    if how == "shape":
        return {**tensors, name: tensors[name].T.contiguous()}
    return {**tensors, name: torch.full_like(tensors[name], float("nan"))}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown", "model.layers.9.weight is unknown"),
        ("missing", "missing: model.layers.1.mlp.up_proj.weight"),
        ("shape", "want shape"),
        ("nan", "not finite"),
        ("checksum", "checksum"),
    ],
)
def test_invalid_update_leaves_the_old_weights(
    engine: Engine, models: Models, how: str, message: str
) -> None:
    async def body() -> None:
        async with engine.client() as client:
            version = await client.weight_version()
            async with Pusher(engine, client) as pusher:
                await pusher.push(weights_of(models[0]), version=version + 1)
                with pytest.raises(EngineError, match=message):
                    tensors = weights_of(models[1])
                    wrong = how == "checksum"
                    await pusher.push(
                        tensors if wrong else broken(tensors, how), version=version + 2, wrong_checksum=wrong
                    )
                if how != "missing":  # the update is still open, and `end` gives its first error
                    with pytest.raises(EngineError, match=message):
                        await client.end_weight_update(weight_version=version + 2, timeout_s=5)
                assert await client.weight_version() == version + 1
                generation = await sample(client, PROMPT, 20)
                assert set(generation.versions.tolist()) == {version + 1}
                assert error_of(load_model(models[0]), PROMPT, generation) < conformance.TOLERANCE
                await pusher.push(weights_of(models[0]), version=version + 3)

    asyncio.run(body())


def test_push_in_bfloat16_with_tied_name_in_one_bucket(engine: Engine, models: Models) -> None:
    async def body() -> None:
        async with engine.client() as client:
            version = await client.weight_version() + 1
            tensors = weights_of(models[1])
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            async with Pusher(engine, client) as pusher:
                await pusher.push(tensors, version=version, dtype="bfloat16", bucket_bytes=1 << 24)
            rounded = load_model(models[1])
            for parameter in rounded.parameters():
                parameter.data = parameter.data.bfloat16().float()
            assert error_of(rounded, PROMPT, await sample(client, PROMPT, 20)) < conformance.TOLERANCE

    asyncio.run(body())


def test_weights_from_disk(engine: Engine, models: Models, tmp_path: Path) -> None:
    async def body() -> None:
        async with engine.client() as client:
            version = await client.weight_version() + 1
            await client.update_weights_from_disk(str(models[1]), weight_version=version, timeout_s=20)
            generation = await sample(client, PROMPT, 20)
            assert set(generation.versions.tolist()) == {version}
            assert error_of(load_model(models[1]), PROMPT, generation) < conformance.TOLERANCE
            other = save_model(tmp_path / "gpt2", "gpt2")
            for path, message in (
                (other, "unknown to the model"),
                (tmp_path / "absent", "cannot read weights"),
            ):
                with pytest.raises(EngineError, match=message):
                    await client.update_weights_from_disk(str(path), weight_version=version + 1, timeout_s=20)
            assert await client.weight_version() == version
            await client.update_weights_from_disk(str(models[0]), weight_version=version + 2, timeout_s=20)

    asyncio.run(body())


SENDER = """
import sys, torch
from areal_like.weights.collective import WeightGroup
group = WeightGroup.create(world_size=2, group_name="doomed", timeout_s=30)
print(group.port, flush=True)
group.connect()
print("connected", flush=True)
sys.stdin.readline()
"""


def test_sender_killed_in_mid_broadcast_keeps_old_weights(engine: Engine, models: Models) -> None:
    async def body() -> None:
        sender = subprocess.Popen(
            [sys.executable, "-c", SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert sender.stdout is not None
        port = int(await asyncio.to_thread(sender.stdout.readline))
        async with engine.client() as client:
            version = await client.weight_version()
            before = await sample(client, PROMPT, 12, temperature=0)
            await client.init_weights_group(
                master_address="127.0.0.1", master_port=port, rank_offset=1, world_size=2,
                group_name="doomed", backend="gloo", timeout_s=30,
            )  # fmt: skip
            await client.begin_weight_update()
            (bucket,) = cut_buckets(
                [spec_of(n, t) for n, t in weights_of(models[1]).items()], bucket_bytes=1 << 24
            )
            receiving = asyncio.ensure_future(
                client.update_weights_from_distributed(bucket, group_name="doomed", timeout_s=30)
            )
            await asyncio.sleep(0.3)
            assert len((await sample(client, PROMPT, 5)).output_ids) == 5, (
                "decoding goes on while the broadcast hangs"
            )
            sender.send_signal(signal.SIGKILL)
            killed_s = time.monotonic()
            with pytest.raises(EngineError, match="broadcast failed"):
                await receiving
            assert time.monotonic() - killed_s < 5
            sender.communicate()
            with pytest.raises(EngineError, match="broadcast failed"):
                await client.end_weight_update(weight_version=version + 1, timeout_s=5)
            await client.destroy_weights_group(group_name="doomed")
            assert await client.weight_version() == version
            after = await sample(client, PROMPT, 12, temperature=0)
            assert after.output_ids.tolist() == before.output_ids.tolist() and set(
                after.versions.tolist()
            ) == {version}
            async with Pusher(engine, client, name="doomed") as pusher:
                await pusher.push(weights_of(models[0]), version=version + 2)

    asyncio.run(body())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_buckets_of_a_push_in_one_call(engine: Engine, models: Models, dtype: str) -> None:
    """Received in place if the engine has the wire's dtype, through buffers if not.

    A wrong bucket does not keep the remaining ones from being received.
    """

    async def body() -> None:
        async with engine.client() as client, Pusher(engine, client, name="whole") as pusher:
            version = await client.weight_version()
            assert pusher.group is not None

            async def push(tensors: dict[str, torch.Tensor]) -> None:
                assert pusher.group is not None
                buckets = cut_buckets(
                    [spec_of(n, t, dtype=dtype) for n, t in tensors.items()], bucket_bytes=1 << 14
                )
                assert len(buckets) > 2
                receiving = asyncio.ensure_future(
                    client.receive_weights(buckets, group_name="whole", timeout_s=20)
                )
                flats = [flatten(bucket, tensors) for bucket in buckets]
                for flat in flats:
                    await asyncio.to_thread(pusher.group.broadcast, flat)
                assert await receiving == list(map(checksum, flats))

            await push(weights_of(models[1]))
            assert await client.weight_version() == version, "received, not active"
            await client.end_weight_update(weight_version=version + 1, timeout_s=5)
            want = load_model(models[1])
            for parameter in want.parameters():
                parameter.data = parameter.data.to(getattr(torch, dtype)).float()
            assert error_of(want, PROMPT, await sample(client, PROMPT, 20)) < conformance.TOLERANCE
            for how, message in (("nan", "not finite"), ("shape", "want shape"), ("unknown", "is unknown")):
                with pytest.raises(EngineError, match=message):
                    await push(broken(weights_of(models[0]), how))
                with pytest.raises(EngineError, match=message):
                    await client.end_weight_update(weight_version=version + 2, timeout_s=5)
                assert await client.weight_version() == version + 1
            assert error_of(want, PROMPT, await sample(client, PROMPT, 20)) < conformance.TOLERANCE
            await push(weights_of(models[0]))
            await client.end_weight_update(weight_version=version + 2, timeout_s=5)

    asyncio.run(body())


def test_closing_a_client_fails_unsent_requests(engine: Engine) -> None:
    async def body() -> None:
        client = engine.client()
        waiting = asyncio.create_task(sample(client, PROMPT, 5))
        while not client._batcher._tasks:  # until the task exists; it has not run yet
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(EngineError, match="client was closed"):
            await asyncio.wait_for(waiting, timeout=5)

    asyncio.run(body())


def test_seeded_sample_does_not_depend_on_the_batch(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as client:
            alone = await sample(client, PROMPT, 20, sampling_seed=11)
            crowd = await asyncio.gather(
                *(sample(client, [7 + i], 30) for i in range(20)),
                sample(client, PROMPT, 20, sampling_seed=11),
            )
            assert crowd[-1].output_ids.tolist() == alone.output_ids.tolist()
            other = await sample(client, PROMPT, 20, sampling_seed=12)
            unseeded = [await sample(client, PROMPT, 20) for _ in range(2)]
            assert len({tuple(g.output_ids.tolist()) for g in (alone, other, *unseeded)}) == 4

    asyncio.run(body())


async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
    async with session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def test_single_and_batched_responses_are_sglangs(engine: Engine) -> None:
    async def body() -> None:
        async with aiohttp.ClientSession() as session:
            url = f"{engine.url}/generate"
            params = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}
            one = await post(
                session,
                url,
                {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "rid": "r"},
            )
            meta = one["meta_info"]
            assert len(one["output_ids"]) == 3 and meta["id"] == "r" and meta["prompt_tokens"] == 4
            assert meta["finish_reason"] == {"type": "length", "length": 3}
            assert [entry[1:] for entry in meta["output_token_logprobs"]] == [
                [token, None] for token in one["output_ids"]
            ]
            assert [(s["start"], s["end"]) for s in meta["weight_versions"]] == [(0, 3)]
            many = await post(
                session, url, {"input_ids": [PROMPT, [9]], "sampling_params": [{**params, "n": 2}, params]}
            )
            assert [a["output_ids"] for a in many[:2]] == [one["output_ids"]] * 2 and len(many) == 3
            assert "output_token_logprobs" not in many[0]["meta_info"]

    asyncio.run(body())


def test_stream_interval_sends_cumulative_chunks(gpt2_engine: Engine) -> None:
    async def body(engine: Engine) -> None:
        body = {
            "input_ids": PROMPT,
            "sampling_params": {"max_new_tokens": 10, "ignore_eos": True},
            "stream": True,
            "return_logprob": True,
        }
        events = []
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{engine.url}/generate", json=body) as response,
        ):
            async for line in response.content:
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
        lengths = [len(event["output_ids"]) for event in events]
        assert lengths == [4, 8, 10]
        final = events[-1]["output_ids"]
        assert all(event["output_ids"] == final[: len(event["output_ids"])] for event in events)
        assert [event["meta_info"]["finish_reason"] is None for event in events] == [True, True, False]
        async with engine.client() as client:
            assert len((await sample(client, PROMPT, 11)).output_ids) == 11

    asyncio.run(body(gpt2_engine))


async def until_empty(client: EngineClient) -> None:
    deadline_s = time.monotonic() + 5
    while (load := (await client.server_info())["load"])["running"] + load["waiting"]:
        assert time.monotonic() < deadline_s, "sequences of a disconnected client are still running"
        await asyncio.sleep(0.02)


def test_disconnect_aborts_the_clients_sequences(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as watcher:
            client = engine.client()
            tasks = [asyncio.ensure_future(sample(client, PROMPT, 2000)) for _ in range(4)]
            await asyncio.sleep(0.1)
            tasks[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            await asyncio.sleep(0.1)
            assert (await watcher.server_info())["load"]["running"] == 3
            await client.close()
            for task in tasks[1:]:
                with pytest.raises(EngineError):
                    await task
            await until_empty(watcher)
            body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.1)) as session:
                with pytest.raises(TimeoutError):
                    await session.post(f"{engine.url}/generate", json=body)
            await until_empty(watcher)

    asyncio.run(body())


def test_server_info_metrics_and_idle_time(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as client:
            assert await client.health()
            await client.flush_cache()
            before = (await client.server_info())["load"]
            await asyncio.sleep(0.3)
            idle = (await client.server_info())["load"]
            assert idle["idle_s"] - before["idle_s"] >= 0.29 and idle["busy_s"] == before["busy_s"]
            await asyncio.gather(*(sample(client, [5, 6, 7], 10) for _ in range(8)))
            after = (await client.server_info())["load"]
            assert after["generated_tokens"] - idle["generated_tokens"] == 80
            assert after["prefilled_tokens"] - idle["prefilled_tokens"] == 2, (
                "a group's prompt is computed once"
            )
            assert after["busy_s"] > idle["busy_s"]
            async with aiohttp.ClientSession() as session, session.get(f"{engine.url}/metrics") as response:
                text = await response.text()
            assert f"areal_engine_generated_tokens_total {after['generated_tokens']}.0" in text
            assert "areal_engine_kv_rows_used 0.0" in text

    asyncio.run(body())


def test_death_of_the_engine_fails_all_requests_at_once(models: Models) -> None:
    async def body() -> None:
        with engine_process(models[0]) as (process, url):
            async with EngineClient(url) as client:
                waiting = [asyncio.ensure_future(sample(client, PROMPT, 2000)) for _ in range(20)]
                await asyncio.sleep(0.3)
                process.kill()
                killed_s = time.monotonic()
                for task in waiting:
                    with pytest.raises(EngineError):
                        await task
                assert time.monotonic() - killed_s < 3
                with pytest.raises(EngineError):
                    await sample(client, PROMPT, 5)
                assert not await client.health()

    asyncio.run(body())


def test_sigterm_returns_partial_outputs_and_exits_0(models: Models) -> None:
    """Also while a broadcast hangs: its thread must not keep the process alive."""

    async def body() -> None:
        with (
            engine_process(models[0]) as (process, url),
            WeightGroup.create(world_size=2, group_name="w", timeout_s=60) as group,
        ):
            async with EngineClient(url) as client:
                joining = client.init_weights_group(
                    master_address=group.address, master_port=group.port, rank_offset=1, world_size=2,
                    group_name="w", backend="gloo", timeout_s=60,
                )  # fmt: skip
                await asyncio.gather(joining, asyncio.to_thread(group.connect))
                await client.begin_weight_update()
                (bucket,) = cut_buckets([spec_of("lm_head.weight", torch.zeros(4))], bucket_bytes=100)
                hanging = asyncio.ensure_future(
                    client.update_weights_from_distributed(bucket, group_name="w", timeout_s=60)
                )
                running = asyncio.ensure_future(sample(client, PROMPT, 2000))
                await asyncio.sleep(0.3)
                process.terminate()
                generation = await running
                assert generation.finish_reason is FinishReason.ABORT and len(generation.output_ids) > 0
                assert await asyncio.to_thread(process.wait, 10) == 0
                with pytest.raises(EngineError):
                    await hanging

    asyncio.run(body())


PARENT = """
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-m", "rollout_server.engine", *sys.argv[1:]])
print(process.pid, flush=True)
time.sleep(60)
"""


def test_engine_dies_with_its_parent(models: Models, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    arguments = ["--model-path", str(models[0]), "--port", "0", "--port-file", str(port_file)]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not port_file.exists():
        time.sleep(0.05)
    parent.kill()
    parent.communicate()
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline_s, "the engine outlived its parent"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "/does/not/exist"], "no config.json there"),
        (["--model-path", "MODEL", "--host", "192.0.2.1"], "cannot bind"),
        (["--model-path", "MODEL", "--max-running-requests", "0"], "at least 1"),
    ],
)
def test_wrong_option_gives_one_message_and_exit_2(
    models: Models, arguments: list[str], message: str
) -> None:
    command = [
        sys.executable,
        "-m",
        "rollout_server.engine",
        "--port",
        "0",
        *(str(models[0]) if a == "MODEL" else a for a in arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_body_above_the_limit_is_413(gpt2_engine: Engine) -> None:
    async def body(engine: Engine) -> None:
        body = {"input_ids": [5] * 2000}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{engine.url}/generate", json=body) as response,
        ):
            assert response.status == 413
        async with engine.client() as client:
            await client.generate(PROMPT, sampling=Sampling(max_new_tokens=2))

    asyncio.run(body(gpt2_engine))
