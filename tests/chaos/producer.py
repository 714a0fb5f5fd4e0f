"""A rollout server without an engine, as a process: real buffer client, made-up trajectories.

`python -m tests.chaos.producer NAME CAPACITY SECONDS_PER_SAMPLE TOKENS --config FILE key=value ...` runs
until it is killed, or says Goodbye and ends on SIGTERM as a real server does. A trajectory is a function of
(ticket, sample), so that a test which reads one back can check every byte.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from areal_like.config import Config
from areal_like.errors import ArealError
from areal_like.paths import model_path
from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import die_with_parent
from areal_like.runtime.waits import PendingWaits
from areal_like.trajectory import NOT_SAMPLED, TOKEN_REWARDS, FinishReason, Trajectory
from areal_like.wire.fingerprint import dataset_fingerprint, model_fingerprint, tokenizer_fingerprint
from areal_like.wire.messages.hello import Hello, Role
from areal_like.wire.messages.producer import Lease, SampleDone, ServerState
from areal_like.wire.records import Record
from rollout_server.leases import client as client_module
from rollout_server.leases.client import ShardedBufferClient
from tests.support.routes import routed

RESEND_AFTER_S = 0.5


def synthetic(ticket_id: int, sample_index: int, *, num_tokens: int, version: int) -> Trajectory:
    """The trajectory of this sample; only the version may differ between calls.

    Every second one of at least 8 tokens is a conversation: two segments, of which the first has two turns.
    """
    rng = np.random.default_rng([ticket_id, sample_index])
    num_prompt = max(1, num_tokens // 8)
    mask = np.arange(num_tokens) >= num_prompt
    parts: dict[str, Any] = {}
    if num_tokens >= 8 and (ticket_id + sample_index) % 2:
        quarter, half = num_tokens // 4, num_tokens // 2
        mask[quarter] = False
        mask[half : half + num_prompt] = False
        parts = {
            "segments": (half, num_tokens - half),
            "turns": ((quarter, 0.25), (half, 0.0), (num_tokens, -0.5)),
            "metrics": {"tool_calls": 2.0},
            "label": "conversation",
            "arrays": {TOKEN_REWARDS: np.where(mask, 0.125, 0).astype(np.float32)},
        }
    return Trajectory(
        tokens=rng.integers(0, 40, num_tokens).astype(np.int32),
        loss_mask=mask.astype(np.uint8),
        logprobs=np.where(mask, -rng.random(num_tokens), 0).astype(np.float32),
        versions=np.where(mask, version, NOT_SAMPLED).astype(np.int32),
        reward=float(ticket_id % 7 + sample_index),
        **parts,
        finish_reason=FinishReason.STOP,
    )


def is_synthetic(trajectory: Trajectory, *, ticket_id: int, sample_index: int) -> bool:
    """True when the trajectory is the one that `synthetic` made."""
    original = synthetic(
        ticket_id, sample_index, num_tokens=trajectory.num_tokens, version=trajectory.newest_version
    )
    arrays = ("tokens", "loss_mask", "logprobs", "versions")
    return (
        all(np.array_equal(getattr(trajectory, n), getattr(original, n)) for n in arrays)
        and all(
            getattr(trajectory, n) == getattr(original, n)
            for n in ("reward", "segments", "turns", "metrics", "label")
        )
        and trajectory.arrays.keys() == original.arrays.keys()
        and all(np.array_equal(trajectory.arrays[n], array) for n, array in original.arrays.items())
    )


def hello(config: Config, name: str) -> Hello:
    """The registration of a rollout server of this job."""
    return Hello(
        role=Role.ROLLOUT,
        name=name,
        process=secrets.token_hex(16),
        job=config.name,
        model=model_fingerprint(model_path(config)),
        tokenizer=tokenizer_fingerprint(model_path(config)),
        dataset=dataset_fingerprint(config),
        http_address="",
        num_train_prompts=1_000_000,
        eval_sets={"eval": 64},
    )


class Producer:
    """Finishes each sample some time after it was leased, with the newest weight version, and with
    `model.router_replay` routes for the tests' mixture of experts."""

    def __init__(self, config: Config, name: str, *, capacity: int, sample_s: float, num_tokens: int) -> None:
        self._sample_s, self._num_tokens = sample_s, num_tokens
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        self._version = 0
        self._has_routes = config.model.router_replay
        registration = hello(config, name)
        client_module._RESEND_AFTER_S = RESEND_AFTER_S
        client_module._HELLO_TIMEOUT_S = 1.0
        self._client = ShardedBufferClient(
            config,
            engine_samples=capacity,
            max_episodes=capacity,
            hello=lambda: replace(registration, weights_version=self._version),
            waits=PendingWaits(),
            on_leases=self._take,
            on_abort=lambda leases: None,
        )

    async def run(self) -> None:
        """Serves until SIGTERM, or until the buffer refuses this server."""
        self._client.announce(state=ServerState.SERVING)
        serving = asyncio.create_task(self._client.run())
        while not self._stopping.is_set() and not serving.done():
            if self._client.newest_version > self._version:
                self._version = self._client.newest_version
                self._client.announce(weights_version=self._version)
            await asyncio.sleep(0.02)
        serving.cancel()
        if self._stopping.is_set():
            await self._client.leave()
        self._client.close()

    def _take(self, leases: list[Lease]) -> None:
        for lease in leases:
            for index in lease.sample_indices:
                self._loop.call_later(
                    self._sample_s * (1 + (lease.ticket_id + index) % 4), self._finish, lease, index
                )

    def _finish(self, lease: Lease, index: int) -> None:
        trajectory = synthetic(lease.ticket_id, index, num_tokens=self._num_tokens, version=self._version)
        if self._has_routes:
            trajectory = routed(trajectory, np.random.default_rng([lease.ticket_id, index]))
        self._client.deliver(
            SampleDone(lease_id=lease.lease_id, record=Record.of(lease.ticket_id, index, trajectory))
        )


async def _main() -> None:
    name, capacity, sample_s, num_tokens, *settings = sys.argv[1:]
    config = load_config(settings)
    await Producer(
        config, name, capacity=int(capacity), sample_s=float(sample_s), num_tokens=int(num_tokens)
    ).run()


if __name__ == "__main__":
    die_with_parent()
    try:
        asyncio.run(_main())
    except ArealError as error:
        sys.exit(f"{error}")
