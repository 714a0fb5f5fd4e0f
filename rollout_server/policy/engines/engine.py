"""The interface between the rollout server and its inference engine, and the choice of the engine."""

from __future__ import annotations

from typing import Protocol

from areal_like.config import Config
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.process import EmbeddedProcess
from rollout_server.policy.engines.sglang.process import SglangAtUrl, SglangProcess
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.strategy import OnQuarantine, OnUntrusted, WeightUpdateStrategy


class Engine(Protocol):
    """Starts, stops and updates one engine, which this server runs itself or finds at a URL."""

    num_starts: int

    @property
    def pid(self) -> int:
        """Process id; 0 if this server has started no process."""

    def weight_update_strategy(
        self, *, gate: GenerationGate, on_quarantine: OnQuarantine, on_untrusted: OnUntrusted
    ) -> WeightUpdateStrategy:
        """Returns the strategy that updates this engine's weights. Raises ConfigError."""

    async def start(self, *, version: int) -> EngineClient:
        """Starts the engine; returns a client once it is ready with the weights at `model.path` as `version`.

        Raises EngineError.
        """

    async def died(self) -> str:
        """Waits until the engine is lost; returns the reason."""

    async def stop(self) -> None:
        """Stops the engine if this server started it."""

    def kill(self) -> None:
        """Makes `died` return, in any state of the engine."""


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
