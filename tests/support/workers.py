"""Pools of worker processes for tests, with the process that starts their workers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from rollout_server.tasks.base import Split
from rollout_server.workers.environment_pool import EnvironmentPool
from rollout_server.workers.host import WorkerHost
from rollout_server.workers.reward_pool import RewardPool
from tests.support.waiting import HANG_LIMIT_S


@contextlib.asynccontextmanager
async def environment_pool(
    task: Mapping[str, Any],
    *,
    sandbox: str = "bwrap",
    step_timeout_s: float = HANG_LIMIT_S,
    memory_mb: int = 256,
) -> AsyncIterator[EnvironmentPool]:
    """The environments or agents of a task."""
    async with (
        WorkerHost(task, seed=0, sandbox=sandbox) as host,
        EnvironmentPool(host, step_timeout_s=step_timeout_s, memory_mb=memory_mb) as pool,
    ):
        yield pool


@contextlib.asynccontextmanager
async def reward_pool(
    task: Mapping[str, Any],
    *,
    sandbox: str = "bwrap",
    num_workers: int = 1,
    timeout_s: float = HANG_LIMIT_S,
    concurrency: int = 1,
    part_of: Callable[[Split, int], str] = lambda split, index: "",
) -> AsyncIterator[RewardPool]:
    """The rewards of a task."""
    async with (
        WorkerHost(task, seed=0, sandbox=sandbox) as host,
        RewardPool(
            host, num_workers=num_workers, timeout_s=timeout_s, concurrency=concurrency, part_of=part_of
        ) as pool,
    ):
        yield pool
