"""A rollout server: engine, rewards, weights and the stream to the buffer, put together. Holds nothing that matters.

    STARTING -> SERVING -> (engine lost) -> STARTING -> QUARANTINED -> (next push) -> SERVING
                    \\-> DRAINING (SIGTERM) -> exit 0

An engine begins with the run's newest checkpoint where that can be seen, under the version that the trainer gave it: the buffer then grants
what its age allows. A restarted engine that found none holds the run's first weights, and takes no leases until trainer rank 0, who sees
`quarantined` in the directory, has pushed the newest. Parts: `links` (buffers), `runner` (leases to samples), `weights`
(pushes), `rewards` (worker processes), `engine_process`. This file only connects them and decides what happens when one is lost.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from areal_like.config import Config
from areal_like.errors import ConfigError, EngineError
from areal_like.paths import model_path
from areal_like.runtime.daemon import Runtime, cancelled_on_exit
from areal_like.runtime.imports import torch_hidden, uncollected
from areal_like.weights.snapshots_on_disk import newest_snapshot
from areal_like.wire.addresses import buffer_addresses
from areal_like.wire.channel import tcp_address
from areal_like.wire.fingerprint import (
    dataset_fingerprint,
    model_fingerprint,
    shared_settings,
    tokenizer_fingerprint,
)
from areal_like.wire.messages.hello import Hello, Role
from areal_like.wire.messages.producer import Lease, ServerState
from areal_like.wire.records import BYTES_PER_TOKEN
from rollout_server.buffer_client.shards import BufferLinks
from rollout_server.episodes.base import GenerationGate, SingleTurn
from rollout_server.episodes.lease_runner import LeaseRunner
from rollout_server.episodes.prompt_renderer import PromptRenderer
from rollout_server.inference.client import EngineClient
from rollout_server.inference.process import EmbeddedProcess, Engine
from rollout_server.inference.sglang.checkpoint_shapes import ModelTensors
from rollout_server.inference.sglang.client import SglangClient
from rollout_server.inference.sglang.process import SglangAtUrl, SglangProcess
from rollout_server.metrics import ServerStats
from rollout_server.rewards.pool import RewardPool
from rollout_server.tasks.base import Task, make_task
from rollout_server.weight_sync.in_place import SglangWeightUpdate
from rollout_server.weight_sync.receiver import WeightReceiver

log = logging.getLogger(__name__)

_INITIAL_VERSION = 0
"""What the weights at `model.path` are called."""
_MAX_DEATHS_IN_A_ROW = 5
"""Engines that died within `_HEALTHY_AFTER_S`, one after the other; then the server ends and its launcher decides."""
_HEALTHY_AFTER_S = 30.0
_FIRST_BACKOFF_S = 0.5
_SAMPLE_OVERHEAD_BYTES = 4096
"""Of a message, a sample: its numbers, names, reward components and runs of versions."""
_SILENT_ENGINE_S = 60.0
"""An engine that is there but answers nothing for so long is replaced."""


async def main(runtime: Runtime) -> None:
    """The daemon's body: serves until `runtime.stopping`. Raises ConfigError for settings that cannot work together."""
    config = runtime.config
    task = make_task(config.task, seed=config.seed)
    if config.eval.num_prompts > task.num_eval:
        raise ConfigError(
            f"eval.num_prompts={config.eval.num_prompts}: the task holds out {task.num_eval} (task.num_eval)"
        )
    buffer_addresses(config)
    model = model_path(config)
    with torch_hidden(), uncollected():
        renderer = PromptRenderer(model)
    context_tokens = check_context(config, task, max_positions=renderer.max_positions)
    renderer.max_prompt_tokens = min(task.max_prompt_tokens, context_tokens - config.sampling.max_new_tokens)
    log.info("task %s, examples %s", config.task, task.fingerprint())
    rollout = config.rollout
    pool = RewardPool(
        config.task, seed=config.seed, num_workers=rollout.reward_workers, timeout_s=rollout.reward_timeout_s
    )
    engine, tensors = _engine(
        config, name=runtime.name, model=model, context_tokens=context_tokens, vocab_size=renderer.vocab_size
    )
    async with pool as rewards:
        server = RolloutServer(
            runtime,
            task=task,
            renderer=renderer,
            model=model,
            rewards=rewards,
            engine=engine,
            tensors=tensors,
        )
        try:
            await server.run()
        finally:
            await server.close()


def _engine(
    config: Config, *, name: str, model: str, context_tokens: int, vocab_size: int
) -> tuple[EmbeddedProcess | SglangProcess | SglangAtUrl, ModelTensors | None]:
    """The engine that the configuration asks for, and what a push into it is compared with where it does not compare itself."""
    if config.rollout.engine == "embedded":
        return EmbeddedProcess(config, name=name, model=model, context_tokens=context_tokens), None
    tensors = ModelTensors.of(model)
    if config.rollout.sglang.url:
        return SglangAtUrl(config, name=name, model=model, vocab_size=vocab_size), tensors
    return SglangProcess(
        config, name=name, model=model, context_tokens=context_tokens, vocab_size=vocab_size
    ), tensors


def check_context(config: Config, task: Task, *, max_positions: int) -> int:
    """Longest sequence that the engine has to hold, in tokens. Raises ConfigError if there is no room for a prompt."""
    wanted = config.rollout.max_context or task.max_prompt_tokens + config.sampling.max_new_tokens
    context = min(wanted, max_positions)
    if context > config.trainer.tokens_per_microbatch:
        raise ConfigError(
            f"sequences may have {context} tokens (task.max_prompt_tokens, sampling.max_new_tokens), which does not fit into "
            f"trainer.tokens_per_microbatch={config.trainer.tokens_per_microbatch}: raise it, or lower rollout.max_context"
        )
    if context <= config.sampling.max_new_tokens:
        raise ConfigError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} leaves no room for a prompt in a context of {context} tokens "
            f"(rollout.max_context={config.rollout.max_context}, the model ends at {max_positions}): lower it"
        )
    num_samples = config.sampling.group_size + config.sampling.greedy_baseline
    if (
        num_bytes := num_samples * (BYTES_PER_TOKEN * context + _SAMPLE_OVERHEAD_BYTES)
    ) > config.buffer.max_message_bytes:
        raise ConfigError(
            f"a group of {num_samples} samples of up to {context} tokens may take {num_bytes} bytes, and "
            f"buffer.max_message_bytes={config.buffer.max_message_bytes} is the most that travels in one message: raise it"
        )
    return context


class RolloutServer:
    """One server. `run` until it returns or raises, then `close`."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        task: Task,
        renderer: PromptRenderer,
        model: str,
        rewards: RewardPool,
        engine: Engine,
        tensors: ModelTensors | None,
    ) -> None:
        """`tensors`: what the checkpoint holds, for an engine that loads in place; None for the embedded one."""
        config = runtime.config
        self._runtime = runtime
        self._task = task
        self._model = model
        self._fingerprints = (model_fingerprint(model), tokenizer_fingerprint(model))
        self._engine = engine
        self._rewards = rewards
        self._client: EngineClient | None = None
        turnstile = GenerationGate()
        self._in_place: SglangWeightUpdate | None = None
        if tensors is not None:
            self._in_place = SglangWeightUpdate(
                tensors=tensors,
                turnstile=turnstile,
                on_quarantine=self._on_quarantine,
                on_doubt=self._on_doubt,
            )
        self._receiver = WeightReceiver(
            host=config.rollout.host,
            max_message_bytes=config.buffer.max_message_bytes,
            turnstile=turnstile,
            on_version=self._on_version,
            on_doubt=self._on_doubt,
            in_place=self._in_place,
        )
        self._link = BufferLinks(
            config,
            capacity_samples=config.rollout.max_running + config.rollout.queue_samples,
            hello=self._hello,
            waits=runtime.waits,
            on_leases=self._on_leases,
            on_abort=lambda lease_ids: self._runner.cancel(lease_ids),
        )
        self._runner = LeaseRunner(
            config,
            task=task,
            tokenizer=renderer,
            stop_token_ids=tuple(renderer.stop_token_ids),
            episode=SingleTurn(),
            rewards=rewards,
            turnstile=turnstile,
            on_answer=self._link.deliver,
        )
        self._stats = ServerStats(
            runtime.metrics,
            link=self._link,
            runner=self._runner,
            rewards=rewards,
            receiver=self._receiver,
            engine=engine,
        )
        self._weights_address = tcp_address(
            config.rollout.advertise_host or config.rollout.host, self._receiver.port
        )
        runtime.status = self._status
        runtime.advertise(weights=self._weights_address)

    async def run(self) -> None:
        """Serves until told to stop, then drains. Raises what ended it otherwise."""
        tasks = [
            asyncio.create_task(self._link.run(), name="link"),
            asyncio.create_task(self._supervise(), name="engine"),
            asyncio.create_task(self._observe(), name="stats"),
        ]
        stopping = asyncio.create_task(self._runtime.stopping.wait(), name="stopping")
        watched: list[asyncio.Future[Any]] = [
            *tasks,
            stopping,
            self._receiver.serving,
            self._runner.failed,
            *self._rewards.serving,
        ]
        async with cancelled_on_exit(*tasks, stopping):
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
            await self._drain(supervision=tasks[1])

    async def close(self) -> None:
        """Ends everything that is left; safe after any failure."""
        await self._runner.close()
        await self._receiver.close()
        if self._client is not None:
            await self._client.close()
        await self._engine.stop()
        self._link.close()

    async def _drain(self, *, supervision: asyncio.Task[None]) -> None:
        """Not ready at once, generations aborted, leases returned. The engine is stopped by `close`."""
        self._link.announce(state=ServerState.DRAINING)
        supervision.cancel()
        await self._runner.close()
        with self._runtime.waits("buffer: goodbye"):
            await self._link.leave()

    async def _supervise(self) -> None:
        """Keeps an engine running. Raises EngineError if the first does not start, or if one after the other dies."""
        loop = asyncio.get_running_loop()
        num_failures = 0
        while True:
            started_s = loop.time()
            with self._runtime.waits("engine: ready"):
                client = await self._engine.start(version=_INITIAL_VERSION)
                path, version = await self._load_newest(client)
                if self._in_place is not None and isinstance(client, SglangClient):
                    await self._in_place.begin_with(client, path=path, version=version)
            self._on_engine(client, version=version)
            reason = await self._engine.died()
            await self._on_engine_lost(reason)
            num_failures = 1 if loop.time() - started_s > _HEALTHY_AFTER_S else num_failures + 1
            if num_failures >= _MAX_DEATHS_IN_A_ROW:
                raise EngineError(reason)
            await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (num_failures - 1))

    async def _observe(self) -> None:
        """Reads the engine's load every heartbeat, says whether we are ready, and notices an engine that is alive but silent."""
        loop = asyncio.get_running_loop()
        answered_s = loop.time()
        while True:
            await asyncio.sleep(self._runtime.config.daemon.heartbeat_s)
            load: dict[str, Any] = {}
            if self._client is not None:
                try:
                    load = await self._client.load()
                    answered_s = loop.time()
                except EngineError as error:
                    log.info("no load from the engine: %s", error)
                    if loop.time() - answered_s > _SILENT_ENGINE_S:
                        self._on_doubt(f"silent for {loop.time() - answered_s:.0f} s: {error}")
            else:
                answered_s = loop.time()
            self._link.tell(self._stats.update(load, now_s=loop.time()))
            problem = self._link.problem or (
                "" if self._link.state is ServerState.SERVING else self._link.state.value
            )
            if problem:
                self._runtime.unready(problem)
            else:
                self._runtime.ready()

    async def _load_newest(self, client: EngineClient) -> tuple[str, int]:
        """Loads the run's newest checkpoint, if it can be seen from here; the directory and version that the engine has then."""
        found = newest_snapshot(self._runtime.paths.checkpoints)
        if found is None:
            return self._model, _INITIAL_VERSION
        timeout_s = self._runtime.config.rollout.start_timeout_s
        try:
            await client.update_weights_from_disk(
                str(found.path), weight_version=found.version, timeout_s=timeout_s
            )
        except EngineError as error:
            log.warning(
                "%s was not loaded, the engine begins with the run's first weights: %s", found.path, error
            )
            if self._in_place is not None:  # half of it may be in
                await client.update_weights_from_disk(
                    self._model, weight_version=_INITIAL_VERSION, timeout_s=timeout_s
                )
            return self._model, _INITIAL_VERSION
        log.info("%s loaded as version %d", found.path, found.version)
        return str(found.path), found.version

    def _on_engine(self, client: EngineClient, *, version: int) -> None:
        restarted = (
            version == _INITIAL_VERSION
            and self._engine.num_starts > 1
            and self._link.newest_version > _INITIAL_VERSION
        )
        log.info(
            "engine ready, pid %d%s",
            self._engine.pid,
            ": it takes leases after the next push" if restarted else "",
        )
        self._client = self._runner.engine = client
        self._receiver.set_engine(client, version=version)
        state = ServerState.QUARANTINED if restarted else ServerState.SERVING
        self._link.announce(state=state, weights_version=version)

    async def _on_engine_lost(self, reason: str) -> None:
        log.error("engine lost: %s", reason)
        client, self._client, self._runner.engine = self._client, None, None
        self._receiver.set_engine(None)
        self._runner.cancel(self._link.give_back(reason="engine lost"))
        self._link.announce(state=ServerState.STARTING)
        self._stats.engine_lost()
        if client is not None:
            await client.close()

    def _on_version(self, version: int) -> None:
        if self._link.state is not ServerState.DRAINING:
            self._link.announce(state=ServerState.SERVING, weights_version=version)

    def _on_quarantine(self, reason: str, version: int) -> None:
        """The engine is about to be reloaded: what it holds is nobody's version, and no token of it may be delivered."""
        log.error("engine is quarantined: %s", reason)
        self._runner.cancel(self._link.give_back(reason="engine quarantined"))
        self._receiver.version = version
        if self._link.state is not ServerState.DRAINING:
            self._link.announce(state=ServerState.QUARANTINED, weights_version=version)

    def _on_doubt(self, reason: str) -> None:
        log.error("engine is replaced: %s", reason)
        self._engine.kill()  # `_supervise` sees it die

    def _on_leases(self, leases: list[Lease]) -> None:
        if leases:
            self._runner.start(leases)

    def _hello(self) -> Hello:
        config = self._runtime.config
        return Hello(
            role=Role.ROLLOUT,
            name=self._runtime.name,
            incarnation=self._runtime.incarnation,
            job=config.name,
            model=self._fingerprints[0],
            tokenizer=self._fingerprints[1],
            dataset=dataset_fingerprint(config),
            settings=shared_settings(config, Role.ROLLOUT),
            http_address=f"{config.daemon.http_host}:{self._runtime.http_port}",
            weights_address=self._weights_address,
            weights_version=self._receiver.version,
            device=config.rollout.engine_device,
            num_train_prompts=self._task.num_train,
            num_eval_prompts=self._task.num_eval,
        )

    def _status(self) -> dict[str, Any]:
        return {
            "state": self._link.state.value,
            "engine_pid": self._engine.pid,
            "engine_url": self._client.base_url if self._client is not None else "",
            "leases": self._link.lease_ids,
            "refused_samples": self._link.num_refused,
            "stats": self._stats.values,
        }
