"""The parts of a rollout server that make samples: tasks, their worker processes and sessions, the engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from areal_like.automatic_settings import compute_dtype
from areal_like.paths import model_path
from areal_like.runtime.daemon import Runtime
from areal_like.runtime.imports import torch_hidden, uncollected
from areal_like.security.binding import require_loopback_or_keys
from areal_like.wire.addresses import buffer_addresses
from rollout_server.job_tasks import make_tasks, sequence_lengths, without_long_prompts
from rollout_server.policy.engines.engine import Engine, make_engine
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.plane import SessionPlane
from rollout_server.sessions.serving import served_sessions
from rollout_server.sources import SampleSource, running_sources
from rollout_server.workers.environment_pool import EnvironmentPool
from rollout_server.workers.reward_pool import RewardPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts, running. The engine is started by its supervisor."""

    sources: Mapping[str, SampleSource]
    """Sources of samples for training (empty name) and for each evaluation set."""
    renderer: PromptRenderer
    model: str
    book: SessionBook
    """The sessions of all tasks."""
    plane: SessionPlane | None
    """The HTTP servers of the sessions; None if no task has sessions."""
    engine: Engine

    @property
    def reward_pools(self) -> list[RewardPool]:
        """The reward pools of the job's task and of the evaluation sets."""
        return list(dict.fromkeys(one.rewards for one in self.sources.values()))

    @property
    def environment_pools(self) -> list[EnvironmentPool]:
        """Processes of environments and agents, of the job's task and of the evaluation sets."""
        pools = dict.fromkeys(one.environments for one in self.sources.values())
        return [pool for pool in pools if pool is not None]


@contextlib.asynccontextmanager
async def running_parts(runtime: Runtime) -> AsyncIterator[Parts]:
    """Creates the parts and starts their processes. Raises ConfigError for contradictory settings."""
    config, waits = runtime.config, runtime.waits
    tasks = make_tasks(config)
    require_loopback_or_keys(config.security, config.rollout.host, setting="rollout.host")
    if config.buffer.discovery == "address":
        buffer_addresses(config)  # raises before the slow imports if the buffer's port is not set
    model = model_path(config)
    with torch_hidden(), uncollected():
        renderer = PromptRenderer(model, settings=config.model)
    contexts = sequence_lengths(config, tasks, max_positions=renderer.max_positions)
    renderer.max_prompt_tokens = min(
        tasks[""].max_prompt_tokens, contexts[""] - config.sampling.max_new_tokens
    )
    tasks = without_long_prompts(config, tasks, renderer, contexts=contexts)
    log.info("task %s, examples %s, %s", config.task, tasks[""].fingerprint(), compute_dtype(config))
    context_tokens = max(contexts.values())
    engine = make_engine(
        config,
        name=runtime.name,
        model=model,
        context_tokens=context_tokens,
        max_positions=renderer.max_positions,
        vocab_size=renderer.vocab_size,
    )
    book = SessionBook()
    async with (
        running_sources(config, tasks, renderer, contexts=contexts, waits=waits) as sources,
        served_sessions(
            runtime, book, tasks=list(tasks.values()), model=model, context_tokens=context_tokens
        ) as plane,
    ):
        yield Parts(sources=sources, renderer=renderer, model=model, book=book, plane=plane, engine=engine)
