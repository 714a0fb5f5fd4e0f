"""A real rollout server on an SGLang that is slow, and then stands still: only the second is replaced."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from areal_like.wire.messages.producer import ReturnLeases, SampleDone, SampleFailed
from tests.support.rollout_harness import PlayedBuffer, job, serving
from trainer.models.tiny import build_tiny_model

STALL_S = 2.0
"""`rollout.generate_timeout_s` of the test."""
ANSWER_S = 4.0
"""Time of one answer: longer than the limit, as an answer of 32k tokens is longer than ten minutes."""


class SlowSglang:
    """Speaks SGLang's API; sends an answer as one chunk, and shows its tokens only in /v1/loads."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_resets = 0
        self.stands_still = False
        self.port = 0
        self._loop = asyncio.new_event_loop()

    @contextmanager
    def running(self) -> Iterator[SlowSglang]:
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        thread.start()
        assert started.wait()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_post("/update_weights_from_disk", self._load)
        app.router.add_route("*", "/{path:.*}", self._other)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        self.port = runner.addresses[0][1]
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _other(self, _: web.Request) -> web.Response:
        return web.json_response({"per_engine_checksum": "x", "weight_version": "0"})

    async def _load(self, _: web.Request) -> web.Response:
        self.num_resets += 1
        self.stands_still = False
        return web.json_response({"success": True})

    async def _loads(self, _: web.Request) -> web.Response:
        # SGLang publishes its last snapshot again and again, also while its scheduler stands still.
        load = {"timestamp": time.time(), "num_running_reqs": 1, "num_waiting_reqs": 0}
        return web.json_response({"loads": [load | {"num_used_tokens": self.num_tokens}]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        rids = (await request.json())["rid"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        ends_s = time.monotonic() + ANSWER_S
        while self.stands_still or time.monotonic() < ends_s:
            await asyncio.sleep(0.1)
            self.num_tokens += not self.stands_still
        for index in range(len(rids)):
            meta: dict[str, Any] = {
                "finish_reason": {"type": "length", "length": 2},
                "output_token_logprobs": [[-0.5, 7, None]] * 2,
                "weight_version": "0",
            }
            event = {"index": index, "output_ids": [7, 7], "meta_info": meta}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.mark.chaos
def test_a_slow_engine_is_kept_and_a_still_one_replaced(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "model", seed=0, warm_start_steps=0, swap_prob=0.5)
    with SlowSglang().running() as engine, PlayedBuffer() as buffer:
        rollout = {
            "engine": "sglang",
            "generate_timeout_s": STALL_S,
            "max_running": 16,
            "sglang": {"url": f"http://127.0.0.1:{engine.port}"},
        }
        config = job(tmp_path, port=buffer.port, model_dir=tmp_path / "model", rollout=rollout)
        with serving(config) as server:
            server.wait_serving(buffer)
            assert engine.num_resets == 1
            before = buffer.expect_beat(lambda beat: "progress" in beat.stats).stats["progress"]
            buffer.grant(buffer.lease(1, samples=3))
            done = buffer.expect(SampleDone, count=3)
            assert min(sample.record.num_sampled for sample in done) == 2
            beat = buffer.expect_beat(lambda beat: not beat.leases)
            assert beat.stats["progress"] >= before + 5, "heartbeats every 0.1 s saw tokens"
            assert (engine.num_resets, beat.stats["samples_failed"]) == (1, 0)

            engine.stands_still = True
            still_s = time.monotonic()
            buffer.grant(buffer.lease(2, samples=3))
            (returned,) = buffer.expect(ReturnLeases)
            assert time.monotonic() - still_s > STALL_S / 2  # counted from the heartbeat before
            assert (returned.leases, returned.reason) == ([2], "engine lost")
            server.wait_until(lambda: engine.num_resets == 2, what="reset of the engine")
            server.wait_serving(buffer)
            buffer.grant(buffer.lease(3, samples=1))
            assert isinstance(buffer.expect((SampleDone, SampleFailed))[0], SampleDone)
            log = (server.paths.logs / "rollout-0.log").read_text()
            assert "requests have made no progress for 2 s (rollout.generate_timeout_s)" in log
            assert server.terminate()[0] == 0
