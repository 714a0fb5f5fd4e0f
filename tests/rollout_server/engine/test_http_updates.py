"""Weight updates of the embedded engine over real HTTP and real weight groups."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from areal_like.errors import EngineError
from areal_like.weights.buckets import checksum, cut_buckets, flatten, spec_of
from tests.support import engine_conformance as conformance
from tests.support import warm_start
from tests.support.engine_harness import (
    Engine,
    Models,
    Pusher,
    error_of,
    form_group,
    load_model,
    sample,
    save_model,
    weights_of,
)
from tests.support.waiting import HANG_LIMIT_S

PROMPT = conformance.PROMPT


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
        ("shape", "must have shape"),
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
                if how != "missing":  # the update is still open, and `end` reports its first error
                    with pytest.raises(EngineError, match=message):
                        await client.end_weight_update(weight_version=version + 2, timeout_s=HANG_LIMIT_S)
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
            await client.update_weights_from_disk(
                str(models[1]), weight_version=version, timeout_s=HANG_LIMIT_S
            )
            generation = await sample(client, PROMPT, 20)
            assert set(generation.versions.tolist()) == {version}
            assert error_of(load_model(models[1]), PROMPT, generation) < conformance.TOLERANCE
            other = save_model(models[0].parent / "gpt2-0", "gpt2")
            (models[0].parent / "link").symlink_to(tmp_path)
            for path, message in (
                (other, "unknown to the model"),
                (models[0].parent / "absent", "cannot read weights"),
                (tmp_path, "neither the engine's model nor below"),
                (models[0].parent / "link", "neither the engine's model nor below"),
            ):
                with pytest.raises(EngineError, match=message):
                    await client.update_weights_from_disk(
                        str(path), weight_version=version + 1, timeout_s=HANG_LIMIT_S
                    )
            assert await client.weight_version() == version
            await client.update_weights_from_disk(
                str(models[0]), weight_version=version + 2, timeout_s=HANG_LIMIT_S
            )

    asyncio.run(body())


SENDER = """
import sys, torch
from areal_like.weights.weight_group import WeightGroup
group = WeightGroup.create(world_size=2, group_name="doomed", timeout_s=3600)
print(group.port, flush=True)
group.connect()
print("connected", flush=True)
sys.stdin.readline()
"""


def test_sender_killed_in_mid_broadcast_keeps_old_weights(engine: Engine, models: Models) -> None:
    async def body() -> None:
        sender = warm_start.Popen(
            [sys.executable, "-c", SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert sender.stdout is not None
        port = int(await asyncio.to_thread(sender.stdout.readline))
        async with engine.client() as client:
            version = await client.weight_version()
            before = await sample(client, PROMPT, 12, temperature=0)
            await client.init_weights_group(form_group("doomed", port=port, timeout_s=3600))
            await client.begin_weight_update()
            (bucket,) = cut_buckets(
                [spec_of(n, t) for n, t in weights_of(models[1]).items()], bucket_bytes=1 << 24
            )
            receiving = asyncio.ensure_future(
                client.update_weights_from_distributed(bucket, group_name="doomed", timeout_s=3600)
            )
            await asyncio.sleep(0.3)
            assert len((await sample(client, PROMPT, 5)).output_ids) == 5, (
                "decoding continues while the broadcast hangs"
            )
            sender.send_signal(signal.SIGKILL)
            with pytest.raises(EngineError, match="broadcast failed"):
                await receiving
            sender.communicate()
            with pytest.raises(EngineError, match="broadcast failed"):
                await client.end_weight_update(weight_version=version + 1, timeout_s=HANG_LIMIT_S)
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
                    client.receive_weights(buckets, group_name="whole", timeout_s=HANG_LIMIT_S)
                )
                flats = [flatten(bucket, tensors) for bucket in buckets]
                for flat in flats:
                    await asyncio.to_thread(pusher.group.broadcast, flat)
                assert (await receiving).checksums == list(map(checksum, flats))

            await push(weights_of(models[1]))
            assert await client.weight_version() == version, "received, not active"
            await client.end_weight_update(weight_version=version + 1, timeout_s=HANG_LIMIT_S)
            want = load_model(models[1])
            for parameter in want.parameters():
                parameter.data = parameter.data.to(getattr(torch, dtype)).float()
            assert error_of(want, PROMPT, await sample(client, PROMPT, 20)) < conformance.TOLERANCE
            for how, message in (
                ("nan", "not finite"),
                ("shape", "must have shape"),
                ("unknown", "is unknown"),
            ):
                with pytest.raises(EngineError, match=message):
                    await push(broken(weights_of(models[0]), how))
                with pytest.raises(EngineError, match=message):
                    await client.end_weight_update(weight_version=version + 2, timeout_s=HANG_LIMIT_S)
                assert await client.weight_version() == version + 1
            assert error_of(want, PROMPT, await sample(client, PROMPT, 20)) < conformance.TOLERANCE
            await push(weights_of(models[0]))
            await client.end_weight_update(weight_version=version + 2, timeout_s=HANG_LIMIT_S)

    asyncio.run(body())
