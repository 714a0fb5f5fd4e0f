"""Conversations against a real engine: turns, branches, rewritten histories, stop texts, aborts and updates.

The chat format has token ids as text, so that any model of the engine's tests can be used with it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampleRewards
from rollout_server.environments.base import Message
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.rendering.base import ChatRenderer, ParsedReply, ToolSchema
from tests.support.engine_harness import (
    EOS,
    TOLERANCE,
    VOCAB,
    Engine,
    PieceTokenizer,
    Pusher,
    load_model,
    reference_logprobs,
    weights_of,
)

STOPS = ("é", "dab")
USER, ASSISTANT, END = 3, 4, 5


class IdRenderer(ChatRenderer):
    """Messages are token ids: `7 8 9`."""

    def __init__(self) -> None:
        super().__init__(None, stop_token_ids=[EOS], vocab_size=VOCAB, template_kwargs={})

    @property
    def supports_tools(self) -> bool:
        return False

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        tokens = []
        for message in messages:
            tokens += [ASSISTANT if message["role"] == "assistant" else USER]
            tokens += [*map(int, message["content"].split()), END]
        return [*tokens, ASSISTANT] if add_generation_prompt else tokens

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
    ) -> list[int] | None:
        return [END, *self.render(new_messages)]

    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        return ParsedReply(text=" ".join(map(str, completion_ids)))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return PieceTokenizer().text_of(token_ids)


class Talk:
    """One conversation, in which the user continues, goes back, or sums up."""

    def __init__(self, client: EngineClient, seed: int) -> None:
        self._rng = random.Random(seed)
        sampling = Sampling(max_new_tokens=24, stop=STOPS, temperature=1.5)
        policy = PolicyClient(client, sampling=sampling, rid=f"talk{seed}", gate=GenerationGate())
        self.conversation = Conversation(IdRenderer(), policy, context_tokens=512, max_tokens=4096)
        self._messages = [self._user()]
        self.reasons: list[FinishReason] = []

    async def say(self) -> None:
        reply = await self.conversation.say(self._messages)
        self.reasons.append(reply.finish_reason)
        self._messages = [*self._messages, reply.message, self._user()]
        kind = self._rng.random()
        if kind < 0.2 and len(self._messages) > 3:
            self._messages = [*self._messages[:-3], self._user()]
        elif kind < 0.35:
            self._messages = [self._user(), *self._messages[-2:]]

    def _user(self) -> Message:
        words = [str(self._rng.randrange(10, VOCAB)) for _ in range(self._rng.randint(3, 12))]
        return {"role": "user", "content": " ".join(words)}


async def conversations_are_exact(engine: Engine, models: tuple[Path, Path]) -> None:
    """Log-probs of every sampled token, in its segment and under its version; a push and an abort of all
    requests fall into turns, and later turns find what earlier ones computed."""
    references = [load_model(path) for path in models]
    async with engine.client() as client:
        client.stop_texts.tokenizer = PieceTokenizer()
        first_version = await client.weight_version() + 1
        async with Pusher(engine, client) as pusher:
            await pusher.push(weights_of(models[0]), version=first_version)
            talks = [Talk(client, seed) for seed in range(8)]
            for turn in range(5):
                saying = [asyncio.create_task(talk.say()) for talk in talks]
                if turn == 1:
                    await asyncio.sleep(0.03)
                    await client.abort()
                if turn == 3:
                    await asyncio.sleep(0.03)
                    await pusher.push(weights_of(models[1]), version=first_version + 1)
                await asyncio.gather(*saying)
            cached = (await client.load())["cached_prompt_tokens"]
            await pusher.push(weights_of(models[0]), version=first_version + 2)
    trajectories = [talk.conversation.to_trajectory(SampleRewards()) for talk in talks]
    assert cached > 500
    assert {len(trajectory.turns) for trajectory in trajectories} == {5}
    assert sum(len(trajectory.segments) > 1 for trajectory in trajectories) > 2
    assert {reason for talk in talks for reason in talk.reasons} == {FinishReason.STOP, FinishReason.LENGTH}
    versions = {int(v) for trajectory in trajectories for v in trajectory.versions if v >= 0}
    assert versions == {first_version, first_version + 1}
    for trajectory in trajectories:
        check_logprobs(trajectory, references, first_version=first_version)


def check_logprobs(trajectory: Trajectory, references: list[object], *, first_version: int) -> None:
    """Each segment alone, as the trainer sees it."""
    start = 0
    for length in trajectory.segments or (trajectory.num_tokens,):
        tokens = trajectory.tokens[start : start + length].tolist()
        versions = trajectory.versions[start : start + length]
        for version, reference in enumerate(references, first_version):
            chosen = np.flatnonzero(versions == version)
            if len(chosen):
                want = reference_logprobs(reference, tokens[:1], tokens[1:], temperature=1.5)[chosen - 1]
                got = trajectory.logprobs[start : start + length][chosen]
                np.testing.assert_allclose(got, want, atol=TOLERANCE)
        start += length
