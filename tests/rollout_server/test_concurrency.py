"""The limit of samples at an engine: its rules, its effect on a small model of an engine, and the gate."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config
from rollout_server.policy.concurrency import ConcurrencyController, EngineLoad
from rollout_server.policy.generation_gate import GenerationGate

loads = st.builds(
    EngineLoad,
    num_samples=st.integers(0, 200),
    num_running=st.integers(0, 100),
    kv_usage=st.floats(0, 1),
    num_retractions=st.integers(0, 5),
)


@given(most=st.integers(1, 300), observed=st.lists(st.tuples(loads, st.floats(0, 10)), max_size=40))
def test_limit_stays_in_bounds_and_changes_for_a_reason(
    most: int, observed: list[tuple[EngineLoad, float]]
) -> None:
    controller, now_s, num_retractions = ConcurrencyController(most=most), 0.0, 0
    for load, after_s in observed:
        before, now_s = controller.limit, now_s + after_s
        limit = controller.observe(load, now_s=now_s)
        is_pressed = load.num_retractions > num_retractions or load.kv_usage > 0.99
        num_retractions = load.num_retractions
        assert 1 <= limit <= most
        assert limit >= before or is_pressed
        assert limit <= before or (not is_pressed and load.num_samples >= before)


def load_of(*, samples: int, kv_usage: float, retractions: int = 0, running: int = -1) -> EngineLoad:
    return EngineLoad(
        num_samples=samples,
        num_running=samples if running < 0 else running,
        kv_usage=kv_usage,
        num_retractions=retractions,
    )


def test_one_burst_of_retractions_counts_once() -> None:
    controller = ConcurrencyController(most=100)
    assert controller.observe(load_of(samples=100, running=90, kv_usage=1), now_s=0) == 81
    assert controller.observe(load_of(samples=95, kv_usage=1, retractions=9), now_s=1) == 81, (
        "samples above the limit have not ended yet"
    )
    assert controller.observe(load_of(samples=81, kv_usage=0.6, retractions=9), now_s=2) == 81
    assert controller.observe(load_of(samples=81, kv_usage=0.6, retractions=9), now_s=9) == 82
    assert controller.observe(load_of(samples=81, kv_usage=0.6, retractions=9), now_s=20) == 82, "not used"
    assert controller.observe(load_of(samples=82, kv_usage=0.6, retractions=11), now_s=30) == 73
    restarted = load_of(samples=73, kv_usage=0.6, retractions=0)
    assert controller.observe(restarted, now_s=40) == 74, "a new engine counts from zero"


@dataclass(kw_only=True)
class ModelOfAnEngine:
    """Sequences that grow by a token a tick in a KV cache of `room` tokens. The youngest are retracted, and
    400 tokens of theirs are computed again in a tick, in which nothing else is."""

    room: int
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    running: list[list[int]] = field(default_factory=list)
    """[tokens so far, tokens at the end]."""
    waiting: list[list[int]] = field(default_factory=list)
    num_retractions: int = 0
    num_done: int = 0
    num_computed: int = 0
    num_stalled: int = 0

    def tick(self, limit: int) -> EngineLoad:
        while len(self.running) + len(self.waiting) < limit:
            self.waiting.append([0, int(self.rng.integers(100, 600))])
        while self.waiting and self._used() + self.waiting[0][0] < 0.9 * self.room:
            self.running.append(self.waiting.pop(0))
            self.num_computed += self.running[-1][0]
        if self.num_computed >= 400 * (self.num_stalled + 1):
            self.num_stalled += 1
        else:
            for sequence in self.running:
                sequence[0] += 1
        self.num_done += sum(tokens == end for tokens, end in self.running)
        self.running = [sequence for sequence in self.running if sequence[0] < sequence[1]]
        while self._used() > self.room:
            self.waiting.insert(0, self.running.pop())
            self.num_retractions += 1
        return EngineLoad(
            num_samples=len(self.running) + len(self.waiting),
            num_running=len(self.running),
            kv_usage=self._used() / self.room,
            num_retractions=self.num_retractions,
        )

    def _used(self) -> int:
        return sum(tokens for tokens, _ in self.running)


def test_retractions_fall_and_work_does_not() -> None:
    """Twenty thousand ticks of 0.05 s: an engine whose KV holds about 50 sequences of the mean length."""
    free, limited = ModelOfAnEngine(room=9000), ModelOfAnEngine(room=9000)
    controller = ConcurrencyController(most=256)
    for tick in range(20_000):
        free.tick(256)
        controller.observe(limited.tick(controller.limit), now_s=tick / 20)
    assert limited.num_retractions < free.num_retractions / 4
    assert limited.num_done > 0.9 * free.num_done
    assert limited.num_computed < free.num_computed / 2, "KV that is computed again"
    assert 20 < controller.limit < 100


def test_requests_enter_the_gate_in_turn_up_to_its_limit() -> None:
    async def body() -> None:
        gate, entered, may_leave = GenerationGate(), list[int](), asyncio.Event()

        async def request(number: int) -> None:
            async with gate:
                entered.append(number)
                await may_leave.wait()

        gate.set_limit(2)
        tasks = [asyncio.create_task(request(number)) for number in range(6)]
        await asyncio.sleep(0)
        assert entered == [0, 1] and gate.num_inside == 2
        tasks[2].cancel()
        gate.set_limit(3)
        tasks[3].cancel()  # it was let in, and is cancelled before it runs
        await asyncio.sleep(0.01)
        assert entered == [0, 1, 4] and gate.num_inside == 3
        gate.hold()
        gate.set_limit(None)
        await asyncio.sleep(0.01)
        assert entered == [0, 1, 4]
        may_leave.set()
        await gate.wait_empty()
        gate.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert entered == [0, 1, 4, 5] and gate.num_inside == 0

    asyncio.run(body())


def test_limit_adapts_where_kv_memory_is_shared() -> None:
    on_gpu = ["rollout.engine=sglang", "rollout.engine_device=cuda"]
    for settings, adapts in (
        ([], False),
        (on_gpu, True),
        (on_gpu[:1], False),
        ([*on_gpu, "rollout.adaptive_concurrency=false"], False),
        ([on_gpu[0], "rollout.adaptive_concurrency=true"], True),
    ):
        assert load_config(settings).rollout.adapts_concurrency is adapts
    with pytest.raises(ConfigError, match=r"needs rollout\.engine=sglang"):
        load_config(["rollout.adaptive_concurrency=true"])
