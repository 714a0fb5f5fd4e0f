"""Runs one rank of the trainer as a process: everything before the first step and after the last.

log -> settings checked -> process group joined -> buffers registered with -> `Trainer.run` -> exit code
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time

import torch
import torch.distributed as dist

from areal_like.automatic_settings import recomputes_activations, resolved
from areal_like.config import Config
from areal_like.errors import UserError
from areal_like.paths import RunPaths
from areal_like.runtime.daemon import DrainSignals
from areal_like.security.binding import require_loopback_or_keys
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.checkpoints.directory import remove_partials
from trainer.daemon import Trainer
from trainer.distributed.process_group import device_of, joined_ranks
from trainer.metrics.gpu_memory import GpuMemory
from trainer.step.recipe import StepRecipe
from trainer.step.staleness_bounds import staleness_warning
from trainer.trackers import build_trackers
from trainer.weights.backend import check_nccl

log = logging.getLogger(__name__)

_CONTROL_TIMEOUT_S = 24 * 3600.0
"""Longest time that a rank lets the others wait in a control message: for groups and evaluations, while the
rollout servers make progress. A rank that stalls raises its own error, and a rank that dies closes its
connections: both end this wait at once."""


def run_rank(config: Config) -> bool:
    """Runs one rank from start to end. Returns True if the run is finished, False after a drain."""
    started_s = time.monotonic()
    config = resolved(config)
    require_loopback_or_keys(config.security, config.weights.host, setting="weights.host")
    recipe = StepRecipe.of(config)
    recipe.check_stream(config)  # reports a mistake in the settings before the model is loaded
    build_trackers(config.trackers)  # reports a missing package
    torch.set_num_threads(config.trainer.num_threads)
    device = device_of(config)
    activations = "recomputed" if recomputes_activations(config) else "kept"
    log.info("the forward is in %s, activations are %s", config.model.dtype, activations)
    if os.environ.get("RANK", "0") == "0":
        check_nccl(config, device)
        if text := staleness_warning(config, recipe.objective):
            log.warning("%s", text)
    with joined_ranks(
        config, device, control_timeout_s=_CONTROL_TIMEOUT_S, quiet=(UserError, StopRequestedError)
    ) as ranks:
        process = torch.tensor(list(secrets.token_bytes(16)), dtype=torch.int64)
        dist.broadcast(process, src=0)
        # Before the first request to the buffer: on a full disk the buffer replies only when there is space
        # again.
        if ranks.rank == 0:
            remove_partials(RunPaths.of(config).checkpoints)
        buffer = TrainerBufferClient(
            config,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=str(device),
            process=bytes(process.tolist()).hex(),
        )

        def on_drain() -> None:
            buffer.stop_requested.set()
            timer = threading.Timer(config.daemon.drain_timeout_s / 3, buffer.abandon_step.set)
            timer.daemon = True
            timer.start()

        DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=on_drain)
        try:
            with buffer:
                buffer.runtime.metrics.registry.register(GpuMemory(device))
                trainer = Trainer(config, buffer, ranks, started_s=started_s)
                trainer.run()
            return trainer.is_finished
        except StopRequestedError as stop:
            log.info("%s", stop)
            return False
