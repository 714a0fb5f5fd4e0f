"""Weight pushes by both strategies into a fake engine that may fail around activation; real sockets."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from aiohttp import web

from areal_like.weights.buckets import Manifest
from areal_like.wire.channel import Link, tcp_address
from areal_like.wire.messages.weights import (
    Alive,
    AskAlive,
    PushChecksums,
    ReadyToReceive,
    WeightsFailed,
    WeightsOk,
)
from rollout_server.policy.client import EmbeddedClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.sglang_client import SglangClient
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from rollout_server.weights.in_place import SglangWeightUpdate
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.weights.shadow import ShadowWeightUpdate
from rollout_server.weights.strategy import WeightUpdateStrategy
from tests.rollout_server.test_weight_socket import FORM, PUSH
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.served_app import served
from tests.support.snapshots import Held
from tests.support.waiting import HANG_LIMIT_S

LIMIT_S = 100.0
"""Time limit of a push."""


class PlayedEngine:
    """Receives nothing and reports success; silent at `silent_at`, an error at `failing_at`."""

    def __init__(self) -> None:
        self.version = 0
        self.silent_at = self.failing_at = ""
        self.ready: list[ReadyToReceive] = []
        """The messages that rank 0 got."""
        self.num_ready = 0
        """Number of them without which nothing is received."""
        self.called: list[str] = []
        self.digests = ["initial"]
        """Of the weights, one for each time that it is read; the last one stays."""
        self.rank_digests: list[list[str]] = []
        """Of each rank's weights, in the order of its reply; one list for each time that they are read."""
        self.quarantined: list[int] = []

    async def answer(self, request: web.Request) -> web.Response:
        path, body = request.path.strip("/"), await request.json() if request.can_read_body else {}
        if "skip_tensor_list" in body:
            path = "synchronize"
        self.called.append(path)
        if path == "end_weight_update" and "weight_version" in body:
            self.version = int(body["weight_version"])
        if path == "update_weight_version":
            self.version = int(body["new_version"])
        digest = self.digests[0]
        if path == "weights_checker" and len(self.digests) > 1:
            del self.digests[0]
        ranks = self.rank_digests.pop(0) if path == "weights_checker" and self.rank_digests else []
        if path in ("receive_weights", "update_weights_from_distributed"):
            while len(self.ready) < self.num_ready:
                await asyncio.sleep(0.01)
        if path == self.silent_at:
            advance(LIMIT_S)
            await asyncio.sleep(2 * HANG_LIMIT_S)
        if path == self.failing_at:
            return web.json_response({"error": {"message": "cannot"}}, status=500)
        return web.json_response(
            {
                "success": True,
                "checksums": [],
                "weight_version": str(self.version),
                "stall_s": 0.0,
                "per_engine_checksum": " ".join(ranks) or digest,
                "ranks": [{"per_gpu_checksum": each} for each in ranks],
            }
        )


def push(
    engine: PlayedEngine,
    *,
    update_mode: str = "recompute",
    in_place: bool = False,
    integrity: str = "none",
) -> tuple[Any, list[str]]:
    """Pushes version 1; returns the answer and reasons to replace the engine.

    `in_place`: with SGLang's strategy and a tensor to push; quarantines are recorded in `engine.quarantined`.
    """
    untrusted: list[str] = []
    tensors = {"weight": torch.zeros(4)} if in_place else {}

    def make_strategy() -> WeightUpdateStrategy:
        if not in_place:
            return ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=untrusted.append)
        return SglangWeightUpdate(
            shapes=CheckpointShapes({"weight": (4,)}),
            gate=GenerationGate(),
            on_quarantine=lambda _, version: engine.quarantined.append(version),
            on_untrusted=untrusted.append,
        )

    async def body() -> Any:
        strategy = make_strategy()
        receiver = WeightReceiver(
            host="127.0.0.1",
            max_message_bytes=1 << 20,
            strategy=strategy,
            on_version=lambda _: None,
            on_untrusted=untrusted.append,
        )
        asked: list[asyncio.Task[Any]] = []

        def on_message(message: Any) -> None:
            assert isinstance(message, ReadyToReceive)
            engine.ready.append(message)
            if len(engine.ready) < engine.num_ready:
                asked.append(asyncio.create_task(link.call(AskAlive(), timeout_s=HANG_LIMIT_S)))

        link = Link(tcp_address("127.0.0.1", receiver.port), handler=on_message)
        async with (
            served(engine.answer) as url,
            SglangClient(url, vocab_size=1) if in_place else EmbeddedClient(url) as client,
        ):
            await strategy.engine_started(client, path="model", version=0)
            receiver.set_engine(client)
            assert isinstance(await link.call(FORM, timeout_s=HANG_LIMIT_S), WeightsOk)
            manifest = Manifest(version=1, buckets=Held(tensors, bucket_bytes=64).buckets).to_dict()
            request = replace(
                PUSH,
                update_mode=update_mode,
                manifest=manifest,
                integrity=integrity,
                timeout_s=LIMIT_S,
            )
            link.send(PushChecksums(version=1, checksums=[], digests=[]))
            answer = await link.call(request, timeout_s=HANG_LIMIT_S)
            for alive in await asyncio.gather(*asked):
                assert isinstance(alive, Alive)
            num_ready = len(engine.ready)
            await link.call(AskAlive(), timeout_s=HANG_LIMIT_S)
            assert len(engine.ready) == num_ready, "it no longer receives"
            await receiver.close()
        link.close()
        return answer

    async def bounded(work: Callable[[], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(HANG_LIMIT_S):
            return await work()

    return moved_clock.run(bounded(body)), untrusted


@pytest.mark.parametrize("in_place", [False, True])
def test_rank_0_hears_that_the_engine_receives_now(in_place: bool) -> None:
    """Before the engine is asked to receive, and again with each Alive, because a message may be lost."""
    engine = PlayedEngine()
    engine.num_ready, engine.digests = 3, ["initial", "new"]
    answer, _ = push(engine, in_place=in_place)
    assert isinstance(answer, WeightsOk)
    assert engine.ready == [ReadyToReceive(version=1)] * 3


def test_activated_version_counts_though_the_push_timed_out() -> None:
    engine = PlayedEngine()
    engine.silent_at = "continue_generation"
    answer, _ = push(engine, update_mode="abort_resume")
    assert isinstance(answer, WeightsOk) and answer.version == 1


def test_timed_out_receiver_leaves_the_group() -> None:
    engine = PlayedEngine()
    engine.silent_at = "receive_weights"
    answer, untrusted = push(engine)
    assert isinstance(answer, WeightsFailed) and f"not active within {LIMIT_S:g} s" in answer.reason
    assert engine.called[-1] == "destroy_weights_update_group" and not untrusted


def test_an_engine_that_stays_paused_is_reported_untrusted() -> None:
    engine = PlayedEngine()
    engine.failing_at = "continue_generation"
    _, untrusted = push(engine, update_mode="abort_resume")
    assert engine.version == 1 and len(untrusted) == 1 and "stays paused" in untrusted[0]


def test_loading_in_place_pauses_and_sets_the_version_last() -> None:
    for update_mode in ("recompute", "keep"):
        engine = PlayedEngine()
        engine.digests = ["initial", "new"]
        answer, untrusted = push(engine, in_place=True, update_mode=update_mode)
        assert isinstance(answer, WeightsOk) and answer.version == engine.version == 1
        assert engine.called[2:] == [
            "pause_generation",
            *(["synchronize"] if update_mode == "keep" else []),
            "begin_weight_update",
            "update_weights_from_distributed",
            "synchronize",
            "end_weight_update",
            "weights_checker",
            *(["flush_cache"] if update_mode == "recompute" else []),
            "update_weight_version",
            "continue_generation",
        ]
        assert not untrusted and not engine.quarantined


def test_failed_load_in_place_keeps_the_old_version() -> None:
    engine = PlayedEngine()
    engine.failing_at = "update_weights_from_distributed"
    answer, untrusted = push(engine, in_place=True)
    assert isinstance(answer, WeightsFailed) and engine.version == 0
    assert "continue_generation" in engine.called and "update_weights_from_disk" not in engine.called
    assert engine.called[-1] == "destroy_weights_update_group"
    assert not untrusted and not engine.quarantined


@pytest.mark.parametrize("is_partial", [False, True])
def test_ranks_of_an_engine_may_report_digests_in_any_order(is_partial: bool) -> None:
    """With attention divided by requests each part of the engine replies on its own."""
    engine = PlayedEngine()
    engine.failing_at = "update_weights_from_distributed"
    engine.rank_digests = [["a", "b", "c"], ["c", "a", "d" if is_partial else "b"], ["b", "a", "c"]]
    _, untrusted = push(engine, in_place=True)
    assert engine.quarantined == ([0] if is_partial else []) and not untrusted


def test_partial_load_in_place_is_reloaded_from_disk() -> None:
    engine = PlayedEngine()
    engine.failing_at = "update_weights_from_distributed"
    engine.digests = ["initial", "partial", "initial"]
    answer, untrusted = push(engine, in_place=True)
    assert isinstance(answer, WeightsFailed) and engine.quarantined == [0] and not untrusted
    reloaded = engine.called.index("update_weights_from_disk")
    assert engine.called[reloaded - 3 : reloaded] == [
        "pause_generation",
        "abort_request",
        "end_weight_update",
    ]
    assert "continue_generation" in engine.called[reloaded:]


def test_engine_that_cannot_be_reloaded_is_reported_untrusted() -> None:
    engine = PlayedEngine()
    engine.failing_at = "update_weights_from_distributed"
    engine.digests = ["initial", "partial", "still partial"]
    _, untrusted = push(engine, in_place=True)
    assert engine.quarantined == [0] and len(untrusted) == 1 and "still partial" in untrusted[0]
    assert "continue_generation" not in engine.called


def test_loading_in_place_refuses_to_be_asked_for_digests() -> None:
    engine = PlayedEngine()
    answer, untrusted = push(engine, in_place=True, integrity="sha256")
    assert isinstance(answer, WeightsFailed) and "SGLang cannot verify" in answer.reason
    assert "pause_generation" not in engine.called and not untrusted
