"""Engines are killed during a broadcast, at random moments, while all of them generate.

Every token carries the version of the weights that sampled it, and its log-prob is recomputed under these
weights. After a partial update the log-prob would match no version.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path

import pytest
import torch

from areal_like.config import WeightsConfig, from_mapping
from areal_like.errors import EngineError
from areal_like.wire.messages.consumer import ServerEntry
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.process import EmbeddedProcess
from rollout_server.policy.generation import Generation
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.weights.shadow import ShadowWeightUpdate
from tests.support.engine_harness import load_model, reference_logprobs, sample, save_model, weights_of
from tests.support.snapshots import Held
from trainer.weights.broadcaster import Broadcaster, PushOutcome

PROMPT = [5, 17, 3]
DEADLINE_S = 20.0
NUM_CHECKED = 40
"""Number of generations whose log-probs are recomputed, those of several versions first."""


class Server:
    """The engine and the weight receiver of a rollout server, with a constant load of requests."""

    def __init__(self, name: str, model: Path, folder: Path) -> None:
        config = from_mapping(
            {
                "runs_dir": str(folder),
                "name": name,
                "model": {"path": str(model)},
                "rollout": {"max_running": 4},
            }
        )
        self.name = name
        self.state = "starting"
        self.incarnation = 1
        self.engine = EmbeddedProcess(config, name=name, model=str(model), context_tokens=64)
        self.receiver = WeightReceiver(
            host="127.0.0.1",
            max_message_bytes=1 << 20,
            strategy=ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=lambda _: self.engine.kill()),
            on_version=self.serve,
            on_untrusted=lambda _: self.engine.kill(),
        )
        self.generations: list[Generation] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def entry(self) -> ServerEntry:
        """The server as the buffer would list it."""
        return ServerEntry(
            name=self.name,
            incarnation=self.incarnation,
            weights_address=f"tcp://127.0.0.1:{self.receiver.port}",
            device="cpu",
            state=self.state,
            weights_version=self.receiver.version,
        )

    def serve(self, version: int) -> None:
        self.state = "serving"

    async def start(self) -> None:
        """Starts an engine with the first weights, and its load."""
        client = await self.engine.start(version=0)
        self.receiver.set_engine(client)
        self.state = "quarantined" if self.engine.num_starts > 1 else "serving"
        self._tasks = [asyncio.create_task(self._generate(client)) for _ in range(4)] + [
            asyncio.create_task(self._watch(client))
        ]

    async def close(self) -> None:
        await self.receiver.close()
        self.engine.kill()
        await asyncio.gather(*self._tasks)

    async def start_again(self) -> None:
        """Starts another engine, after the requests to the killed engine have failed."""
        await asyncio.gather(*self._tasks)
        self.incarnation += 1
        await self.start()

    async def generated_with(self, version: int) -> None:
        """Waits for a whole generation under this version."""
        while not any(set(generation.versions.tolist()) == {version} for generation in self.generations):
            await asyncio.sleep(0.01)

    async def _watch(self, client: EngineClient) -> None:
        await self.engine.died()
        self.state = "starting"
        self.receiver.set_engine(None)
        await client.close()

    async def _generate(self, client: EngineClient) -> None:
        with contextlib.suppress(EngineError):  # the engine was killed
            while True:
                self.generations.append(await sample(client, PROMPT, 40))


async def kill_in_mid_broadcast(
    folder: Path, *, seeds: range, changed: float
) -> tuple[list[Generation], int]:
    """Returns all generations, and the number of pushes that failed because an engine died."""
    model = save_model(folder / "model", "llama")
    servers = [Server(name, model, folder) for name in ("one", "two")]
    await asyncio.gather(*(server.start() for server in servers))
    broadcaster = Broadcaster(WeightsConfig(push_deadline_s=DEADLINE_S), device="cpu")
    version, num_broken = 0, 0
    snapshot: Held | None = None

    async def push() -> PushOutcome:
        nonlocal version, snapshot
        version += 1
        if snapshot is not None:
            snapshot._pushed_before = None  # its memory
        before = snapshot if changed < 1 else None
        snapshot = Held(weights(model, version, changed), bucket_bytes=2048, pushed_before=before)
        return await broadcaster.push(
            snapshot, version=version, step=version, servers=[server.entry for server in servers]
        )

    async def push_to_all() -> float:
        started_s = time.monotonic()
        outcome = await push()
        took_s = time.monotonic() - started_s
        assert set(outcome.activated) == {"one", "two"}, outcome.failed
        for server in servers:
            await server.generated_with(version)
        return took_s

    try:
        await push_to_all()
        dead: list[Server] = []
        for seed in seeds:
            rng = random.Random(seed)
            await asyncio.gather(*(server.start_again() for server in dead))
            usual_s = await push_to_all()
            victim, survivor = rng.sample(servers, 2)
            assert all(session.base for session in broadcaster._sessions.values()), "the next is a delta"
            pushing = asyncio.create_task(push())
            await asyncio.sleep(rng.uniform(0, usual_s))
            victim.engine.kill()
            dead = [victim]
            outcome = await pushing
            num_broken += "broadcast" in outcome.failed
            while survivor.name not in outcome.activated:  # the publisher would push again at once
                outcome = await push()
            await survivor.generated_with(version)
    finally:
        await broadcaster.close()
        for server in servers:
            await server.close()
    return [generation for server in servers for generation in server.generations], num_broken


def weights(model: Path, version: int, changed: float) -> dict[str, torch.Tensor]:
    """The weights of a version; version 0 is the model's own. `changed`: share of the numbers that differ
    from those of the model."""
    generator = torch.Generator().manual_seed(version)
    return {
        name: tensor
        + (0.05 * bool(version) / changed**0.5)
        * torch.randn(tensor.shape, generator=generator)
        * (torch.rand(tensor.shape, generator=generator) < changed)
        for name, tensor in weights_of(model).items()
    }


def check(model: Path, generations: list[Generation], changed: float) -> None:
    """Compares log-probs with those under the weights of each token's version.

    Those of the generations with most versions, and of one generation of each version.
    """
    versions_of = [(set(generation.versions.tolist()), generation) for generation in generations]
    versions_of.sort(key=lambda pair: len(pair[0]), reverse=True)
    one_of_each = {version: generation for versions, generation in versions_of for version in versions}
    models = {}
    for generation in (*(pair[1] for pair in versions_of[:NUM_CHECKED]), *one_of_each.values()):
        for version in set(generation.versions.tolist()):
            if version not in models:
                models[version] = load_model(model)
                models[version].load_state_dict(weights(model, version, changed), strict=False)
            expected = reference_logprobs(models[version], PROMPT, generation.output_ids.tolist())
            chosen = generation.versions == version
            assert abs(expected - generation.logprobs)[chosen].max() < 1e-3, version
    assert len(models) > 2


def run(folder: Path, *, seeds: range, changed: float) -> None:
    generations, num_broken = asyncio.run(kill_in_mid_broadcast(folder, seeds=seeds, changed=changed))
    check(folder / "model", generations, changed)
    print(f"{len(generations)} generations, {num_broken} of {len(seeds)} pushes broken")


@pytest.mark.chaos
def test_killed_engines_serve_no_partial_update(tmp_path: Path) -> None:
    """Long, because engines are killed and started again."""
    run(tmp_path, seeds=range(2), changed=1.0)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("changed", [1.0, 0.05], ids=["whole", "delta"])
def test_twenty_engines_killed_in_mid_broadcast(tmp_path: Path, changed: float) -> None:
    """`delta`: the pushes in which they are killed send what differs from the push before."""
    run(tmp_path, seeds=range(100, 120), changed=changed)
