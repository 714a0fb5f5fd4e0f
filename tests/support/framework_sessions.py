"""A session for an agent framework, with scripted replies behind the real engine, and what is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout_server.sessions.open_session import OpenSession
from tests.support.engine_harness import Engine
from tests.support.scripted_policy import (
    CONTEXT,
    Plane,
    ScriptedPolicy,
    check_logprobs,
    finished,
    segments,
    serving_plane,
)


@dataclass(frozen=True, kw_only=True)
class FrameworkSession:
    """One session. Its `base_url` and `api_key` are all that a framework is told."""

    plane: Plane
    policy: ScriptedPolicy
    session: OpenSession

    @property
    def base_url(self) -> str:
        """For the framework."""
        return self.plane.base_url(self.session)

    @property
    def api_key(self) -> str:
        """For the framework."""
        return self.session.api_key

    @property
    def prompts(self) -> list[str]:
        """What the policy has read before each turn."""
        return [self.plane.renderer.decode(prompt) for prompt, _ in self.policy.generations]

    def check_segments(self, *want: list[int], reference: Any) -> None:
        """The sample is complete: its segments have these turns, by their numbers in the script.

        What is trained on are exactly the sampled tokens, each turn once, after exactly the tokens that the
        policy had read; the log-probs are those of `reference`.
        """
        trajectory = finished(self.session)
        check_logprobs(trajectory, reference)
        parts = list(segments(trajectory))
        assert len(parts) == len(want), f"{len(parts)} segments"
        for part, turns in zip(parts, want, strict=True):
            tokens, trained = trajectory.tokens[part], np.zeros(part.stop - part.start, np.uint8)
            for prompt, sampled in (self.policy.generations[turn] for turn in turns):
                end = len(prompt) + len(sampled.output_ids)
                assert tokens[:end].tolist() == [*prompt, *sampled.output_ids.tolist()]
                trained[len(prompt) : end] = 1
            assert len(tokens) == end and trajectory.loss_mask[part].tolist() == trained.tolist()
        assert sorted(turn for turns in want for turn in turns) == list(range(len(self.policy.generations)))


@contextlib.asynccontextmanager
async def framework_session(
    engine: Engine, *replies: str, context: int = CONTEXT, max_new_tokens: int = 256
) -> AsyncIterator[FrameworkSession]:
    """Serves a session whose policy says `replies`, in the order of the requests."""
    async with engine.client() as client, serving_plane() as plane:
        policy = ScriptedPolicy(client, list(replies), plane.renderer.tokenizer)
        session = plane.open(
            policy, max_new_tokens=max_new_tokens, context_tokens=context, max_tokens=20 * context
        )
        yield FrameworkSession(plane=plane, policy=policy, session=session)
