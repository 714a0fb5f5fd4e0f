"""Agents that shorten their history, and that ask subagents: segments, rewards of turns, and budgets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI, BadRequestError

from areal_like.errors import EpisodeError
from areal_like.trajectory import FinishReason
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.policy.generation import Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.attempt import SampleRequest, SessionAttempt
from rollout_server.sessions.open_session import OpenSession
from rollout_server.tasks.base import Score
from tests.support.engine_harness import Engine, load_model
from tests.support.scripted_policy import Plane, check_logprobs, finished, segments, serving_plane
from tests.support.waiting import HANG_LIMIT_S

Messages = list[Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Agent:
    """Speaks to a session with the openai package."""

    def __init__(self, plane: Plane, session: OpenSession) -> None:
        self.client = AsyncOpenAI(
            base_url=plane.base_url(session), api_key=session.api_key, max_retries=0, timeout=None
        )

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def ask(self, messages: Messages) -> tuple[str, Messages]:
        """The completion's id, and the messages with the answer."""
        completion = await self.client.chat.completions.create(model="policy", messages=messages)
        message = completion.choices[0].message
        return completion.id, [*messages, message.model_dump(exclude_none=True)]


def test_summary_begins_a_segment(engine: Engine, models: tuple[Path, Path]) -> None:
    async def body() -> None:
        async with engine.client() as client, serving_plane() as plane:
            session = plane.script(client, ["one", "two", "summary of it", "three", "four"])
            async with Agent(plane, session) as agent:
                _, messages = await agent.ask([user("first question")])
                _, messages = await agent.ask([*messages, user("second question")])
                _, messages = await agent.ask([*messages, user("summarize")])
                summary = messages[-1]["content"]
                assert summary == "summary of it"
                third, messages = await agent.ask([user(f"so far: {summary}"), user("third question")])
                await agent.ask([*messages, user("fourth")])
                async with httpx.AsyncClient(base_url=plane.base_url(session)) as http:
                    await http.post("reward", json={"reward": 2.0, "completion_id": third})
                    await http.post("reward", json={"reward": 1.0})
                session.end()
                assert session.finish() == [0.0, 0.0, 0.0, 2.0, 0.0] and session.reward == 1.0
                trajectory = finished(session)
                parts = list(segments(trajectory))
                assert len(parts) == 2 and trajectory.num_turns == 5
                texts = [plane.renderer.decode(trajectory.tokens[part].tolist()) for part in parts]
                assert texts[0].endswith("summary of it<|end|>") and texts[1].startswith(
                    "<|user|>so far: summary"
                )
                # The summary in the second prompt is context: only what was sampled there is trained.
                mask = trajectory.loss_mask[parts[1]] == 1
                assert (
                    plane.renderer.decode(trajectory.tokens[parts[1]][mask].tolist())
                    == "three<|end|>four<|end|>"
                )
                check_logprobs(trajectory, load_model(models[0]))

    asyncio.run(body())


def test_subagents_at_the_same_time(engine: Engine, models: tuple[Path, Path]) -> None:
    def script(prompt: list[int], text: str) -> str:
        return "plan" if text.count("<|assistant|>") == 1 else f"answer {len(prompt)}"

    async def body() -> None:
        async with engine.client() as client, serving_plane() as plane:
            session = plane.script(client, script)
            async with Agent(plane, session) as agent:
                _, plan = await agent.ask([user("task")])
                # Two go on from the plan, and one knows nothing of it.
                (_, left), _, (_, alone) = await asyncio.gather(
                    agent.ask([*plan, user("left")]),
                    agent.ask([*plan, user("right")]),
                    agent.ask([{"role": "system", "content": "you help"}, user("look it up")]),
                )
                await agent.ask([*left, user(f"it said {alone[-1]['content']}")])
                trajectory = finished(session)
                assert trajectory.num_turns == 5 and len(list(segments(trajectory))) == 3
                trained = plane.renderer.decode(trajectory.tokens[trajectory.loss_mask == 1].tolist())
                whole = plane.renderer.decode(trajectory.tokens.tolist())
                # Two said so; what the first one said is context in the second branch.
                assert trained.count("plan<|end|>") == 2
                assert whole.count("<|assistant|>plan<|end|>") == 3
                check_logprobs(trajectory, load_model(models[0]))

    asyncio.run(body())


def test_budget_counts_all_segments(engine: Engine, models: tuple[Path, Path]) -> None:
    """The agent's last request is refused in the API's format; its sample is a truncated one."""

    async def body() -> None:
        async with engine.client() as client, serving_plane() as plane:
            session = plane.script(client, lambda prompt, text: "x" * 20, max_tokens=150)
            errors: list[BadRequestError] = []

            async def run(session: OpenSession, request: SampleRequest) -> Score | None:
                async with Agent(plane, session) as agent:
                    for number in range(20):  # each prompt is short, but begins a segment
                        try:
                            await agent.ask([user(f"summary {number}")])
                        except BadRequestError as error:
                            errors.append(error)
                            raise EpisodeError("agent() raised") from None
                    return None

            policy = PolicyClient(
                client, sampling=Sampling(max_new_tokens=1), rid="none", gate=GenerationGate()
            )
            request = SampleRequest(
                split="train",
                index=0,
                seed=0,
                is_greedy=False,
                policy=policy,
                on_move=lambda place: None,
                rewards=None,
            )
            attempt = SessionAttempt(
                request=request,
                turns=session.conversation,
                session=session,
                book=plane.book,
                idle_timeout_s=HANG_LIMIT_S,
                run_agent=run,
            )
            trajectory = await attempt.make()
            (error,) = errors
            assert error.code == "context_length_exceeded" and "episode.max_tokens" in error.message
            assert "of 150 left" in error.message
            assert trajectory.finish_reason is FinishReason.TOKENS
            lengths = [part.stop - part.start for part in segments(trajectory)]
            assert len(lengths) == trajectory.num_turns > 2 and sum(lengths) <= 150
            check_logprobs(trajectory, load_model(models[0]))

    asyncio.run(body())
