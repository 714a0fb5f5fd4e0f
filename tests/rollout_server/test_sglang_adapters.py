"""Adapters for SGLang: received by the server, loaded from its folders, named in requests, unloaded again.

SGLang is played (tests/support/played_sglang.py); the weight groups and their broadcasts are real. A real
SGLang loads adapters in tests/sglang/test_sglang_adapters.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason
from rollout_server.policy.engines.sglang.process import adapter_targets, launch_options
from rollout_server.policy.generation import Generation
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.sglang_client import SglangClient
from rollout_server.weights.adapter_folder import SglangAdapterUpdate
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from tests.support.adapter_pushes import Server, Spoiled, held, push, pushing, serving
from tests.support.adapters import ALPHA, RANK, TARGETS, PeftAdapter, make_adapter
from tests.support.engine_harness import VOCAB, load_model, sample, save_model
from tests.support.lazily import lazily
from tests.support.played_sglang import PlayedSglang
from trainer.weights.broadcaster import Broadcaster

peft = lazily("peft")


@dataclass(frozen=True)
class Scene:
    """A played SGLang, its server, and the trainer's end."""

    sglang: PlayedSglang
    server: Server
    broadcaster: Broadcaster
    gate: GenerationGate
    directory: Path

    def sample(self) -> asyncio.Future[Generation]:
        """Starts a request as the server's samples do."""

        async def inside_gate() -> Generation:
            async with self.gate:
                return await sample(self.server.client, [5], 3)

        return asyncio.ensure_future(inside_gate())

    async def running(self, *names: str | None) -> None:
        """Waits until the engine's requests have these adapters."""
        while sorted(str(request.lora_path) for request in self.sglang.requests) != sorted(map(str, names)):
            await asyncio.sleep(0.001)

    async def loaded(self, *names: str) -> None:
        """Waits until these adapters are loaded and have folders, and no other has."""
        while [*self.sglang.loaded] != [*names] or {p.name for p in self.directory.iterdir()} != set(names):
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def adapters(path: Path) -> list[PeftAdapter]:
    return [make_adapter(path, seed=seed) for seed in (1, 2, 3, 4)]


def run(
    path: Path,
    directory: Path,
    body: Callable[[Scene], Awaitable[None]],
    *,
    num_slots: int = 3,
    **settings: object,
) -> None:
    async def main() -> None:
        gate = GenerationGate()
        async with PlayedSglang(max_loaded=num_slots).running() as sglang:
            shapes = CheckpointShapes.of(str(path))
            strategy = SglangAdapterUpdate(
                model=str(path), shapes=shapes, directory=directory, num_slots=num_slots, dtype="float32",
                gate=gate,
            )  # fmt: skip
            base = make_adapter(path, seed=1).header.base
            async with (
                SglangClient(sglang.url, vocab_size=VOCAB) as client,
                serving(client, strategy, base=base) as server,
                pushing(**settings) as broadcaster,
            ):
                await body(Scene(sglang, server, broadcaster, gate, directory))

    asyncio.run(main())


def test_a_push_reaches_requests_and_old_adapters_are_unloaded(
    path: Path, adapters: list[PeftAdapter], tmp_path: Path
) -> None:
    """`drain`: nothing waits. Each request has the adapter, version and salt of the time when it began."""

    async def body(scene: Scene) -> None:
        sglang, server = scene.sglang, scene.server
        samples = {0: scene.sample()}
        await scene.running(None)
        for number in (1, 2):
            outcome = await push(scene.broadcaster, held(adapters[number]), server, version=number)
            assert outcome.activated["rollout-0"].stall_seconds == 0.0
            assert server.versions[-1] == number
            samples[number] = scene.sample()
            await scene.running(None, *(f"v{n}" for n in range(1, number + 1)))
        assert len({request.cache_salt for request in sglang.requests}) == 3
        for number in (1, 2):
            assert sglang.loaded[f"v{number}"].keys() == adapters[number].tensors.keys()
            for name, tensor in adapters[number].tensors.items():
                assert torch.equal(sglang.loaded[f"v{number}"][name], tensor)
        # peft reads the folder too, and computes what the trainer computes.
        loaded = peft.PeftModel.from_pretrained(load_model(path), str(scene.directory / "v2"))
        tokens = torch.arange(3, 20)[None]
        with torch.inference_mode():
            assert torch.allclose(loaded(tokens).logits, adapters[2].model(tokens).logits, atol=1e-5)
        config = sglang.configs["v2"]
        assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
        assert sorted(config["target_modules"]) == list(TARGETS) and config["use_dora"] is False
        await server.client.score([5, 6, 7], first=1)
        assert sglang.scored[0]["lora_path"] == "v2"

        sglang.running_with("v1")[0].end.set_result("length")
        assert set((await samples[1]).versions.tolist()) == {1}
        await scene.loaded("v2")
        for request in list(sglang.requests):
            request.end.set_result("length")
        assert set((await samples[0]).versions.tolist()) == {0}
        assert set((await samples[2]).versions.tolist()) == {2}
        await scene.loaded("v2")  # it samples the next request

    run(path, tmp_path / "adapters", body, update_mode="drain")


@pytest.mark.parametrize("mode", ["recompute", "abort_resume"])
def test_running_requests_are_interrupted(
    path: Path, adapters: list[PeftAdapter], tmp_path: Path, mode: str
) -> None:
    async def body(scene: Scene) -> None:
        await push(scene.broadcaster, held(adapters[0]), scene.server, version=1)
        interrupted = scene.sample()
        await scene.running("v1")
        await push(scene.broadcaster, held(adapters[1]), scene.server, version=2)
        generation = await interrupted
        assert generation.finish_reason is FinishReason.ABORT  # the sample continues with another request
        assert set(generation.versions.tolist()) == {1}
        await scene.loaded("v2")
        continued = scene.sample()
        await scene.running("v2")
        scene.sglang.requests[0].end.set_result("length")
        assert set((await continued).versions.tolist()) == {2}

    run(path, tmp_path / "adapters", body, update_mode=mode)


def test_keep_is_refused(path: Path, adapters: list[PeftAdapter], tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        outcome = await push(scene.broadcaster, held(adapters[0]), scene.server, version=1)
        assert "cannot keep the KV" in outcome.failed["rollout-0"]

    run(path, tmp_path / "adapters", body, update_mode="keep")


def test_the_oldest_is_interrupted_if_all_are_in_use(
    path: Path, adapters: list[PeftAdapter], tmp_path: Path
) -> None:
    async def body(scene: Scene) -> None:
        samples = []
        for number in (1, 2):
            await push(scene.broadcaster, held(adapters[number]), scene.server, version=number)
            samples.append(scene.sample())
            await scene.running(*(f"v{n}" for n in range(1, number + 1)))
        await push(scene.broadcaster, held(adapters[3]), scene.server, version=3)
        assert (await samples[0]).finish_reason is FinishReason.ABORT
        await scene.loaded("v2", "v3")
        await scene.running("v2")
        scene.sglang.requests[0].end.set_result("length")
        assert set((await samples[1]).versions.tolist()) == {2}

    run(path, tmp_path / "adapters", body, num_slots=2, update_mode="drain")


def test_a_failed_push_leaves_the_old_adapter(
    path: Path, adapters: list[PeftAdapter], tmp_path: Path
) -> None:
    """A corrupted bucket, one that SGLang refuses, and one that cannot be written are not used."""

    async def body(scene: Scene) -> None:
        await push(scene.broadcaster, held(adapters[0]), scene.server, version=1)
        spoiled = Spoiled(adapters[1], changes="bytes and checksum")
        outcome = await push(scene.broadcaster, spoiled, scene.server, version=2)
        assert "SHA-256 is wrong" in outcome.failed["rollout-0"]
        scene.sglang.refuses_loads = True
        async with pushing(update_mode="drain") as successor:
            outcome = await push(successor, held(adapters[1]), scene.server, version=3)
            assert "already loaded" in outcome.failed["rollout-0"]
        (scene.directory / "v5").mkdir()  # stands for a disk that cannot be written to
        async with pushing(update_mode="drain") as successor:
            outcome = await push(successor, held(adapters[1]), scene.server, version=5)
            assert "cannot be written" in outcome.failed["rollout-0"]
        assert await scene.server.client.weight_version() == scene.server.receiver.version == 1
        running = scene.sample()
        await scene.running("v1")
        scene.sglang.refuses_loads = False
        async with pushing(update_mode="drain") as successor:
            outcome = await push(successor, held(adapters[1]), scene.server, version=6)
            assert outcome.activated.keys() == {"rollout-0"}
        scene.sglang.requests[0].end.set_result("length")
        await running
        await scene.loaded("v6")

    run(path, tmp_path / "adapters", body, update_mode="drain")


def test_options_that_sglang_starts_with(path: Path, tmp_path: Path) -> None:
    def config(**changes: object) -> dict[str, object]:
        return {
            "runs_dir": str(tmp_path), "max_staleness": 2,
            "model": {"path": str(path), "lora": {"rank": 16}},
            "rollout": {"engine": "sglang"}, "weights": {"lora": "adapter", **changes},
        }  # fmt: skip

    def words(settings: dict[str, object]) -> str:
        made = from_mapping(settings)
        return " ".join(
            launch_options(
                made, model=str(path), port=1, version=0, index=0, context_length=100,
                targets=adapter_targets(made, model=str(path)),
            )
        )  # fmt: skip

    options = words(config())
    assert f"--lora-target-modules {' '.join(TARGETS)} --" in options + " --"
    for option in (
        "--enable-lora", "--max-lora-rank 16", "--max-loras-per-batch 5", "--max-loaded-loras 5",
        "--lora-backend torch_native",
    ):  # fmt: skip
        assert option in options
    assert "lora" not in words(config(lora="merged"))
    with pytest.raises(ConfigError, match=r"model\.lora\.rank"):
        from_mapping({**config(), "model": {"path": str(path)}})
    with pytest.raises(ConfigError, match="update_mode=keep"):
        from_mapping(config(update_mode="keep"))
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.url"):
        from_mapping({**config(), "rollout": {"engine": "sglang", "sglang": {"url": "http://127.0.0.1:1"}}})
    assert from_mapping(config(integrity="sha256")).num_adapters == 4
