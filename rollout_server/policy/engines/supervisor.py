"""Chooses the engine and keeps it running: starts it, and replaces it when it dies or stalls.

    STARTING -> on_ready -> RUNNING -> (died, or replaced) -> on_lost -> pause -> STARTING ...
                                          `-> too many deaths in a row -> EngineError

An engine starts with the run's newest checkpoint if this machine can see it, under the version that the
trainer gave it; otherwise with the weights at `model.path`. The checkpoints of a run with a LoRA adapter have
only the adapter, so its engines always start with `model.path`, the base.

An engine is stalled when it does not respond, or when it has requests and none of the counts in its load
change. The limit applies to the engine and not to each request: a request advances with the engine, and
waiting in the engine's queue is not a stall. While a push or a load of weights holds the engine, neither
timer runs: those calls have limits of their own, and the engine may not respond meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from areal_like.automatic_settings import compute_dtype, start_limit_s
from areal_like.config import Config
from areal_like.errors import EngineError
from areal_like.paths import RunPaths
from areal_like.runtime.progress import ProgressClock
from areal_like.runtime.restarts import RestartLimits, Restarts, RestartState
from areal_like.weights.snapshots_on_disk import newest_snapshot
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.process import EmbeddedProcess
from rollout_server.policy.engines.sglang.process import SglangAtUrl, SglangProcess
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from rollout_server.weights.in_place import SglangWeightUpdate
from rollout_server.weights.shadow import ShadowWeightUpdate
from rollout_server.weights.strategy import OnQuarantine, OnUntrusted, WeightUpdateStrategy

log = logging.getLogger(__name__)

INITIAL_VERSION = 0
"""Version of the weights at `model.path`."""
_LIMITS = RestartLimits(max_failures=4)
"""Consecutive deaths that are tolerated; after one more the server exits."""
_LATE_S = 2.0
"""An engine that takes longer than this to respond or advance is listed among the waits."""
_MAX_SILENCE_S = 60.0
"""A running engine that has not responded for this long is replaced, unless it is loading weights."""


Engine = EmbeddedProcess | SglangProcess | SglangAtUrl
"""Starts, stops and updates one engine, which this server runs itself or finds at a URL."""


def make_engine(
    config: Config, *, name: str, model: str, context_tokens: int, max_positions: int, vocab_size: int
) -> Engine:
    """Creates the engine chosen by `rollout.engine` and `rollout.sglang.url`, not started yet.

    `context_tokens`: longest sequence of the job; `max_positions`: longest sequence of the model. Raises
    ConfigError.
    """
    if config.rollout.engine == "embedded":
        return EmbeddedProcess(config, name=name, model=model, context_tokens=context_tokens)
    if config.rollout.sglang.url:
        return SglangAtUrl(
            config, name=name, model=model, context_tokens=context_tokens, vocab_size=vocab_size
        )
    return SglangProcess(
        config,
        name=name,
        model=model,
        context_tokens=context_tokens,
        max_positions=max_positions,
        vocab_size=vocab_size,
    )


def make_update_strategy(
    config: Config,
    *,
    name: str,
    model: str,
    gate: GenerationGate,
    on_quarantine: OnQuarantine,
    on_untrusted: OnUntrusted,
) -> WeightUpdateStrategy:
    """Creates the strategy that updates the engine's weights: the embedded engine receives into shadow
    weights, and SGLang is paused and loads in place, or loads adapters from folders of the server `name`.
    Raises ConfigError without readable safetensors."""
    if config.rollout.engine == "embedded":  # activates only verified updates, so it needs no quarantine
        return ShadowWeightUpdate(gate=gate, on_untrusted=on_untrusted)
    if config.num_adapters:
        # Imported here, because torch takes seconds to import, and no other server needs it.
        from rollout_server.weights.adapter_folder import SglangAdapterUpdate

        return SglangAdapterUpdate(
            model=model,
            shapes=CheckpointShapes.of(model),
            directory=RunPaths.of(config).adapters / name,
            num_slots=config.num_adapters,
            dtype=compute_dtype(config),
            gate=gate,
        )
    return SglangWeightUpdate(
        shapes=CheckpointShapes.of(model),
        gate=gate,
        on_quarantine=on_quarantine,
        on_untrusted=on_untrusted,
        reload_timeout_s=start_limit_s(config),
    )


@dataclass(kw_only=True)
class EngineSupervisor:
    """Supervises one engine at a time. `run` is its task; `load` is called every heartbeat."""

    engine: Engine
    strategy: WeightUpdateStrategy
    model: str
    checkpoints: Path
    load_timeout_s: float
    stall_timeout_s: float
    """Longest time that an engine with requests may go without progress."""
    starting: Callable[[], AbstractContextManager[None]]
    """Returns a context in which each start runs."""
    on_ready: Callable[[EngineClient, int], None]
    """Called with the client and the loaded version."""
    on_lost: Callable[[], None]
    """Called when `client` is already None but its connections are still open."""
    client: EngineClient | None = field(default=None, init=False)
    """Client of the running engine; None while there is none."""
    _is_paused: bool = field(default=False, init=False)
    """True if the engine reported in its last response that it is paused."""

    def __post_init__(self) -> None:
        self._responded_s = asyncio.get_running_loop().time()
        self._progress = ProgressClock(now_s=self._responded_s)

    async def run(self) -> None:
        """Runs until cancelled.

        Raises EngineError or ConfigError if a start fails, and EngineError if engines keep dying.
        """
        loop = asyncio.get_running_loop()
        restarts = Restarts(_LIMITS, now_s=loop.time())
        while True:
            restarts.started(now_s=loop.time())
            with self.starting():
                client = await self.engine.start(version=INITIAL_VERSION)
                path, version = await self._load_newest(client)
                await self.strategy.engine_started(client, path=path, version=version)
            self.client = client
            self.on_ready(client, version)
            reason = await self.engine.died()
            await self._lose(reason)
            restarts.failed(now_s=loop.time())
            if restarts.state is RestartState.GIVEN_UP:
                raise EngineError(reason)
            await asyncio.sleep(restarts.due_s - loop.time())

    def waits(self) -> dict[str, float]:
        """Returns what the engine has owed for longer than `_LATE_S` -> seconds. Empty while a push holds
        it."""
        client = self.client
        if client is None or client.is_held:
            return {}
        now_s = asyncio.get_running_loop().time()
        found = {}
        if (silent_s := now_s - self._responded_s) > _LATE_S:
            found["engine: a response"] = silent_s
        if client.num_generating and (stalled_s := now_s - self._progress.last_s) > _LATE_S:
            found["engine: paused" if self._is_paused else "engine: a token"] = stalled_s
        return {name: round(seconds, 3) for name, seconds in found.items()}

    async def load(self) -> dict[str, Any]:
        """Returns the engine's load, or {} if it does not respond. Replaces an engine that has stalled too
        long."""
        loop = asyncio.get_running_loop()
        load: dict[str, Any] = {}
        client = self.client
        if client is None or client.is_held:
            self._responded_s = loop.time()
            self._progress.advance(now_s=loop.time())
        if client is None:
            return load
        try:
            load = await client.load()
            self._responded_s = loop.time()
            self._is_paused = bool(load.get("paused"))
        except EngineError as error:
            log.info("the engine did not report its load: %s", error)
            silent_s = loop.time() - self._responded_s
            if silent_s > _MAX_SILENCE_S and not client.is_held:
                self.replace(f"no response for {silent_s:.0f} s: {error}")
            return load
        if client is self.client and not client.is_held:
            self._watch(client, now_s=loop.time())
        return load

    def _watch(self, client: EngineClient, *, now_s: float) -> None:
        """Replaces an engine that has requests and has made no progress for `stall_timeout_s`."""
        if not client.num_generating:
            self._progress.advance(now_s=now_s)
        self._progress.observe("engine", client.progress, now_s=now_s)
        stalled_s = now_s - self._progress.last_s
        if stalled_s > self.stall_timeout_s:
            self._progress.advance(now_s=now_s)  # for the next engine
            self.replace(
                f"{client.num_generating} requests have made no progress for {stalled_s:.0f} s "
                "(rollout.generate_timeout_s)"
            )

    def replace(self, reason: str) -> None:
        """Kills the engine; `run` then starts another."""
        log.error("replacing the engine: %s", reason)
        self.engine.kill()

    async def close(self) -> None:
        """Stops the engine. Cancel `run` first."""
        if self.client is not None:
            await self.client.close()
        await self.engine.stop()

    async def _lose(self, reason: str) -> None:
        log.error("engine lost: %s", reason)
        client, self.client = self.client, None
        self.on_lost()
        if client is not None:
            await client.close()

    async def _load_newest(self, client: EngineClient) -> tuple[str, int]:
        """Loads the newest checkpoint, if there is one; returns the loaded directory and version."""
        newest = newest_snapshot(self.checkpoints)
        if newest is None:
            return self.model, INITIAL_VERSION
        try:
            await client.update_weights_from_disk(
                str(newest.path), weight_version=newest.version, timeout_s=self.load_timeout_s
            )
        except EngineError as error:
            log.warning(
                "%s was not loaded, the engine starts with the run's first weights: %s", newest.path, error
            )
            await self.strategy.restore_after_failed_load(
                client, path=self.model, version=INITIAL_VERSION, timeout_s=self.load_timeout_s
            )
            return self.model, INITIAL_VERSION
        log.info("%s loaded as version %d", newest.path, newest.version)
        return str(newest.path), newest.version
