"""Ray's queue and TransferQueue under load, in a Ray cluster: a driver starts it, and actors run the load.

`python -m benchmarks.stream_peers.ray_cluster queue|queue_batch|transfer_queue SECONDS PLAN` prints the
tallies. Both systems keep everything in memory: an acknowledged trajectory does not survive the actor's
process.

    queue           `ray.util.queue.Queue`: one trajectory per `put_async`, with one call per slot of the
                    window running concurrently
    queue_batch     the same queue with `put_nowait_batch` of a whole window at a time: the fastest way to
                    write to it, but a stream of single samples cannot use it
    transfer_queue  `TransferQueueClient.put` of a whole window at a time as a TensorDict, in one thread per
                    producer; read by `get_meta` and `get_data`, cleared when read; two SimpleStorage units,
                    as in its default configuration
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import threading
import time
from typing import Any

import ray  # installed below --peers only
from ray.util.queue import Empty, Full, Queue

from benchmarks.report import ROOT
from benchmarks.stream_peers.load import (
    NUM_PROCESSES,
    WARM_UP_S,
    Pacer,
    Plan,
    Tally,
    packed,
    trajectories,
    unpacked,
)

_BATCH = 256


class Queued:
    """The load of Ray's queue, as an actor."""

    def __init__(self, plan: Plan, queue: Queue, *, batched: bool) -> None:
        self._plan, self._queue, self._batched = plan, queue, batched
        self._tally, self._pacer = Tally(plan=plan), Pacer(plan.rate_per_s)
        self._samples = trajectories(plan.num_tokens)
        self._num_sent = 0

    async def run(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Runs until `end_s` and returns the tally. `end_s` 0 returns at once: a check of the actor."""
        self._tally = Tally(plan=dataclasses.replace(self._plan, begin_s=begin_s, end_s=end_s))
        if self._plan.role == "consumer":
            await asyncio.to_thread(self._consume)
        elif self._batched:
            await asyncio.gather(*(asyncio.to_thread(self._put_batches) for _ in self._plan.names))
        else:
            await asyncio.gather(*(self._put() for _ in range(self._plan.window * len(self._plan.names))))
        return dict(json.loads(self._tally.dumps()))

    def _next(self) -> bytes:
        self._num_sent += 1
        return packed(self._samples[self._num_sent % len(self._samples)], self._num_sent)

    async def _put(self) -> None:
        while not self._tally.is_over:
            if not self._pacer.may_send():
                await asyncio.sleep(0.001)
                continue
            self._pacer.sent()
            sent_s = time.monotonic()
            await self._queue.put_async(self._next())
            self._tally.acked(sent_s)

    def _put_batches(self) -> None:
        while not self._tally.is_over:
            sent_s = time.monotonic()
            try:
                self._queue.put_nowait_batch([self._next() for _ in range(self._plan.window)])
            except Full:
                time.sleep(0.002)
                continue
            for _ in range(self._plan.window):
                self._tally.acked(sent_s)

    def _consume(self) -> None:
        while not self._tally.is_over:
            try:
                batch = self._queue.get_nowait_batch(max(1, min(_BATCH, self._queue.qsize())))
            except Empty:
                time.sleep(0.001)
                continue
            for record in batch:
                unpacked(record)
            self._tally.consumed(len(batch))


class Transferred:
    """The load of TransferQueue, as an actor."""

    def __init__(self, plan: Plan) -> None:
        import torch
        import transfer_queue
        from tensordict import TensorDict

        torch.set_num_threads(1)
        transfer_queue.init()
        self._client = transfer_queue.get_client()
        self._plan, self._tally = plan, Tally(plan=plan)
        self._lock = threading.Lock()
        fields = ("tokens", "loss_mask", "logprobs", "versions")
        samples = trajectories(plan.num_tokens, count=plan.window)
        self._batch = TensorDict(
            {
                name: torch.stack([torch.from_numpy(getattr(sample, name).copy()) for sample in samples])
                for name in fields
            },
            batch_size=[plan.window],
        )

    async def run(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Runs until `end_s` and returns the tally. `end_s` 0 returns at once: a check of the actor."""
        self._tally = Tally(plan=dataclasses.replace(self._plan, begin_s=begin_s, end_s=end_s))
        if self._plan.role == "consumer":
            await asyncio.to_thread(self._consume)
        else:
            await asyncio.gather(*(asyncio.to_thread(self._put) for _ in self._plan.names))
        return dict(json.loads(self._tally.dumps()))

    def _put(self) -> None:
        while not self._tally.is_over:
            sent_s = time.monotonic()
            self._client.put(data=self._batch.clone(), partition_id="train")
            with self._lock:
                for _ in range(self._plan.window):
                    self._tally.acked(sent_s)

    def _consume(self) -> None:
        while not self._tally.is_over:
            meta = self._client.get_meta(
                data_fields=list(self._batch.keys()),
                batch_size=_BATCH,
                partition_id="train",
                mode="fetch",
                task_name="train",
            )
            if not meta.size:
                time.sleep(0.002)
                continue
            batch = self._client.get_data(meta)
            self._tally.consumed(batch.batch_size[0])
            self._client.clear_samples(meta)


def main() -> None:
    """The driver: starts everything, prints one JSON list of tallies."""
    mode, seconds, raw = sys.argv[1:]
    plan = Plan(**json.loads(raw))
    environment = {"env_vars": {"PYTHONPATH": ":".join([str(ROOT), *filter(None, sys.path)])}}
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env=environment,
    )
    plans = [dataclasses.replace(plan, role="producers", index=index) for index in range(NUM_PROCESSES)]
    plans.append(dataclasses.replace(plan, role="consumer"))
    if mode == "transfer_queue":
        import transfer_queue
        from omegaconf import OmegaConf

        transfer_queue.init(OmegaConf.create({"controller": {"polling_mode": True}}))
        actors = [ray.remote(Transferred).remote(each) for each in plans]
    else:
        queue = Queue(maxsize=plan.backlog)
        actors = [
            ray.remote(Queued).options(max_concurrency=4).remote(each, queue, batched=mode == "queue_batch")
            for each in plans
        ]
    ray.get([actor.run.remote(0.0, 0.0) for actor in actors])
    begin_s = time.monotonic() + WARM_UP_S
    print(json.dumps(ray.get([actor.run.remote(begin_s, begin_s + float(seconds)) for actor in actors])))
    ray.shutdown()


if __name__ == "__main__":
    main()
