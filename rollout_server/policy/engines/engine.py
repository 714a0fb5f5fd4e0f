"""The choice of a rollout server's inference engine."""

from __future__ import annotations

from areal_like.config import Config
from rollout_server.policy.engines.process import EmbeddedProcess
from rollout_server.policy.engines.sglang.process import SglangAtUrl, SglangProcess

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
