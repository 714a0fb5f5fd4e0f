"""Trajectories of episodes that are interrupted, resumed, or use a tool; and the generation gate."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from areal_like.errors import EngineError
from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampleRewards, Turns
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.tasks.base import Example
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S

EOS = 99
EXAMPLE = Example(prompt="7=", answer=None)


class CountingEngine:
    """A deterministic engine: the token after t is t + 1, up to EOS.

    Request i is interrupted after `interrupt_after[i]` tokens, and every interruption is a weight update. The
    log-prob is a function of the token, so that the tests detect misaligned arrays.
    """

    cache_salt = ""

    def __init__(self, *, interrupt_after: Sequence[int] = (), eos_at: int = EOS) -> None:
        self.interruptions = list(interrupt_after)
        self.version = 0
        self.eos_at = eos_at
        self.requests: list[tuple[list[int], Sampling, str]] = []
        self.caches_prefixes = False

    async def generate(
        self, input_ids: Sequence[int], *, sampling: Sampling, rid: str | None = None, **options: Any
    ) -> Generation:
        self.requests.append((list(input_ids), sampling, rid or ""))
        limit = self.interruptions.pop(0) if self.interruptions else None
        tokens: list[int] = []
        while len(tokens) < sampling.max_new_tokens:
            if limit is not None and len(tokens) == limit:
                break
            last = (tokens or list(input_ids))[-1]
            tokens.append(EOS if last + 1 >= self.eos_at else last + 1)
            if tokens[-1] == EOS:
                break
        interrupted = limit is not None and len(tokens) == limit and tokens[-1:] != [EOS]
        reason = (
            FinishReason.ABORT
            if interrupted
            else FinishReason.STOP
            if tokens[-1] == EOS
            else FinishReason.LENGTH
        )
        generation = Generation(
            output_ids=np.array(tokens, np.int32),
            logprobs=-np.array(tokens, np.float32) / 100,
            versions=np.full(len(tokens), self.version, np.int32),
            finish_reason=reason,
        )
        self.version += int(interrupted)
        await asyncio.sleep(0)
        return generation


@dataclass(frozen=True, kw_only=True)
class Digits:
    """A renderer whose tokens are digits. `chat`: for conversations."""

    stop_token_ids: Sequence[int] = ()
    chat: Any = None

    def encode(self, example: Example) -> np.ndarray:
        return np.array([ord(char) - ord("0") for char in str(example.prompt).removesuffix("=")], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return ",".join(str(token) for token in tokens if token != EOS)

    def text_of(self, tokens: Sequence[int]) -> str:
        return ",".join(map(str, tokens))


def play(
    engine: CountingEngine, *, max_new_tokens: int = 8, tool: Sequence[int] | None = None
) -> tuple[Trajectory, str]:
    """A sample of one turn, or of two with the tokens of `tool` between them."""

    async def body() -> tuple[Trajectory, str]:
        sampling = Sampling(max_new_tokens=max_new_tokens, sampling_seed=5)
        policy = PolicyClient(engine, sampling=sampling, rid="1.0", gate=GenerationGate())
        turns = Turns(policy)
        _, turn = await turns.sample(Digits().encode(EXAMPLE))
        if tool is not None:
            assert turn is not None
            await turns.sample(np.array([*turn.tokens, *tool], np.int32), turn)
        return turns.to_trajectory(SampleRewards(reward=1)), Digits().decode(turns.token_ids)

    return asyncio.run(body())


def test_single_turn_has_its_eos_inside_the_mask() -> None:
    trajectory, text = play(CountingEngine(eos_at=10))
    assert trajectory.tokens.tolist() == [7, 8, 9, EOS]
    assert trajectory.loss_mask.tolist() == [0, 1, 1, 1]
    assert trajectory.versions.tolist() == [NOT_SAMPLED, 0, 0, 0]
    assert trajectory.finish_reason is FinishReason.STOP and text == "8,9"


@pytest.mark.parametrize("interrupt_after", [[2], [0, 3], [1, 1, 1], [8]])
def test_interrupted_generation_is_continued(interrupt_after: list[int]) -> None:
    whole, _ = play(CountingEngine())
    engine = CountingEngine(interrupt_after=interrupt_after)
    trajectory, text = play(engine)
    assert trajectory.tokens.tolist() == whole.tokens.tolist() == [7, *range(8, 16)]
    np.testing.assert_allclose(trajectory.logprobs[1:], -trajectory.tokens[1:] / 100)
    versions = [version for version, count in enumerate(interrupt_after) for _ in range(count)]
    assert trajectory.versions[1:].tolist() == (versions + [len(interrupt_after)] * 8)[:8]
    assert trajectory.finish_reason is FinishReason.LENGTH and text == "8,9,10,11,12,13,14,15"
    assert len({rid for _, _, rid in engine.requests}) == len(engine.requests)
    assert len({sampling.sampling_seed for _, sampling, _ in engine.requests}) == len(engine.requests)
    assert sum(interrupt_after) >= 8 or engine.requests[-1][1].max_new_tokens == 8 - sum(interrupt_after)


def test_endless_aborts_are_an_engine_error() -> None:
    with pytest.raises(EngineError, match="without a token"):
        play(CountingEngine(interrupt_after=[0] * 1000))


def test_tool_tokens_are_outside_the_mask() -> None:
    trajectory, text = play(CountingEngine(interrupt_after=[1]), max_new_tokens=2, tool=[40, 41])
    assert trajectory.tokens.tolist() == [7, 8, 9, 40, 41, 42, 43]
    assert trajectory.loss_mask.tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert trajectory.versions.tolist() == [-1, 0, 1, -1, -1, 1, 1]
    assert trajectory.logprobs[[0, 3, 4]].tolist() == [0, 0, 0]
    assert text == "8,9,42,43"


def test_gate_holds_new_requests_and_waits_for_those_inside() -> None:
    async def body() -> None:
        gate = GenerationGate()
        leave = asyncio.Event()
        seen: list[str] = []

        async def visit(name: str) -> None:
            async with gate:
                seen.append(name)
                await leave.wait()

        first = asyncio.create_task(visit("first"))
        await asyncio.sleep(0)
        gate.hold()
        second = asyncio.create_task(visit("second"))
        empty = asyncio.create_task(gate.wait_empty())
        await asyncio.sleep(0.01)
        assert seen == ["first"] and not empty.done()
        leave.set()
        await asyncio.gather(first, empty)
        assert seen == ["first"] and gate.num_inside == 0
        gate.release()
        await second
        assert seen == ["first", "second"]

    asyncio.run(body())


def test_a_slow_tool_holds_no_place_at_the_engine() -> None:
    async def body() -> None:
        gate, answer = GenerationGate(), asyncio.Event()
        gate.set_limit(1)

        num_in_tools = 0

        async def episode(name: str) -> None:
            nonlocal num_in_tools
            sampling, prompt = Sampling(max_new_tokens=2), Digits().encode(EXAMPLE)
            policy = PolicyClient(CountingEngine(), sampling=sampling, rid=name, gate=gate)
            await policy.sample(prompt)
            num_in_tools += 1
            await answer.wait()  # the tool
            await policy.sample(prompt)
            assert policy.num_sampled == 4

        slow = [asyncio.create_task(episode(str(i))) for i in range(3)]
        while num_in_tools < 3:
            await asyncio.sleep(0.001)
        assert gate.num_inside == 0, "all wait for their tools, and none for the engine"
        answer.set()
        await asyncio.gather(*slow)

    asyncio.run(asyncio.wait_for(body(), HANG_LIMIT_S))


def test_the_time_limit_goes_on_when_a_turn_is_sent_again() -> None:
    class Interrupted(CountingEngine):
        """Each request takes 50 s of the limit and is interrupted after a token."""

        limits: list[float]

        async def generate(
            self, input_ids: Sequence[int], *, timeout_s: float = math.inf, **options: Any
        ) -> Generation:
            self.limits.append(timeout_s)
            advance(50)
            return await super().generate(input_ids, timeout_s=timeout_s, **options)

    async def body() -> None:
        engine = Interrupted(interrupt_after=[1] * 100, eos_at=1000)
        engine.limits = []
        policy = PolicyClient(
            engine, sampling=Sampling(max_new_tokens=100), rid="1", gate=GenerationGate(), timeout_s=220
        )
        generation = await policy.sample(Digits().encode(EXAMPLE))
        assert generation.finish_reason is FinishReason.TIMEOUT
        assert policy.num_sampled == len(generation.output_ids) == 5
        assert engine.limits == pytest.approx([220, 170, 120, 70, 20], abs=10)

    moved_clock.run(body())
