"""One score server as a daemon: loads the model, serves scores until it is told to end.

STARTING (the model is read) -> READY -> DRAINING (texts that still wait fail) -> exit
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from areal_like.errors import ConfigError
from areal_like.runtime.daemon import Runtime, cancelled_on_exit
from areal_like.runtime.threads import in_thread
from areal_like.security.binding import require_loopback_or_keys
from rollout_server.policy.engines.sglang.process import server_index
from rollout_server.scoring.directory import ModelDirectory, checked_directory
from rollout_server.scoring.http import ScorePlane, ScoreRoutes
from rollout_server.scoring.service import ScoreService, longest_text

if TYPE_CHECKING:
    from rollout_server.scoring.model import RewardModel

log = logging.getLogger(__name__)


async def main(runtime: Runtime) -> None:
    """Serves until `runtime.stopping`. Raises ConfigError for a model that cannot be served."""
    config, settings = runtime.config, runtime.config.scorer
    if not settings.path:
        raise ConfigError("scorer.path is not set: name the directory of a reward model")
    require_loopback_or_keys(config.security, settings.host, setting="scorer.host")
    directory = checked_directory(settings.path)
    index = server_index(runtime.name)
    with runtime.waits("reward model: load"):
        stopping = asyncio.ensure_future(runtime.stopping.wait())
        loading = in_thread(_loading(directory, runtime, index=index), name="load")
        either: set[asyncio.Future[Any]] = {stopping, loading}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            return
        model, identity = loading.result()
    service = ScoreService(
        model,
        runtime.metrics,
        identity=identity,
        max_length=longest_text(settings.max_length, of_model=model.max_length),
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting=settings.max_waiting,
    )
    routes = ScoreRoutes(
        service=service,
        tokenizer=model.tokenizer,
        pad_token_id=model.pad_token_id,
        template_kwargs=settings.chat_template_kwargs,
        path=str(directory.path),
        is_well=lambda: not runtime.not_ready_because,
    )
    plane = ScorePlane(
        config=config,
        routes=routes,
        keyring=runtime.keyring,
        index=index,
        on_refused=runtime.count_refused,
    )
    runtime.status = lambda: {"model": identity, "path": str(directory.path), "scores": plane.url}
    runtime.trouble = service.trouble
    runtime.waits.sources.append(service.waits)
    plane.start()
    assert plane.serving is not None
    running = asyncio.create_task(service.run(), name="scoring")
    stopping = asyncio.ensure_future(runtime.stopping.wait())
    try:
        async with cancelled_on_exit(running):
            runtime.advertise(scores=plane.url, model=identity)
            runtime.ready()
            log.info("reward model %s, %s, ready at %s", identity, model.model_type, plane.url)
            watched: set[asyncio.Future[Any]] = {stopping, running, service.failed, plane.serving}
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
    finally:
        stopping.cancel()
        await service.close()
        await plane.close()


def _loading(
    directory: ModelDirectory, runtime: Runtime, *, index: int
) -> Callable[[], tuple[RewardModel, str]]:
    """Returns a function that loads the model and its identity."""
    settings = runtime.config.scorer

    def load() -> tuple[RewardModel, str]:
        # Imported here, because torch and transformers take seconds to import.
        from rollout_server.scoring.model import RewardModel

        model = RewardModel(
            directory,
            device=settings.device_of(index),
            dtype=settings.dtype,
            num_threads=settings.num_threads,
        )
        return model, directory.identity

    return load
