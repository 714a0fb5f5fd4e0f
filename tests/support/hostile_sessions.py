"""Plays hostile clients against sessions over HTTP, and checks what is recorded of each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.conversation.turns import SampleRewards
from rollout_server.rendering.base import ChatRenderer
from tests.support.engine_harness import Engine, load_model
from tests.support.hostile_client import TEXTS, WAYS, HostileClient, Script, check_record, steps
from tests.support.scripted_policy import (
    CONTEXT,
    ScriptedPolicy,
    check_logprobs,
    segments,
    serving_plane,
)
from tests.support.waiting import HANG_LIMIT_S

Actions = Sequence[tuple[tuple[str, str, int], str]]
BUDGETS = ((CONTEXT, 10 * CONTEXT), (CONTEXT, 10 * CONTEXT), (CONTEXT, 600), (150, CONTEXT))
"""Tokens of a sequence, and of all segments."""


class HostileSessions:
    """Sessions of one engine, which alternates between two models."""

    def __init__(self, engine: Engine, models: tuple[Path, Path]) -> None:
        self.seen: Counter[str] = Counter()
        """Of all sessions: turns, segments, refusals, ..."""
        self._engine = engine
        self._models = models
        self._references = [load_model(path) for path in models]
        self._version = 0

    def play(self, renderer: ChatRenderer, *, num_examples: int, seed: int | None) -> None:
        """Plays many clients. `seed`: None for the same ones each time."""

        @settings(max_examples=num_examples, database=None, derandomize=seed is None)
        @given(texts=st.lists(TEXTS, min_size=4, max_size=9), number=st.integers(0, (1 << 32) - 1))
        def one(texts: list[str], number: int) -> None:
            budgets = BUDGETS[number % len(BUDGETS)]
            asyncio.run(self._converse(renderer, steps(texts, number), budgets, number))

        if seed is not None:
            from hypothesis import seed as seeded

            seeded(seed)(one)()
        else:
            one()

    async def _converse(
        self, renderer: ChatRenderer, actions: Actions, budgets: tuple[int, int], number: int
    ) -> None:
        async with self._engine.client() as client, serving_plane(renderer=renderer) as plane:
            self._version = await client.weight_version()

            async def push() -> None:
                self._version += 1
                path = self._models[self._version % 2]
                await client.update_weights_from_disk(
                    str(path), weight_version=self._version, timeout_s=HANG_LIMIT_S
                )

            script = Script(number, renderer.tokenizer)
            policy = ScriptedPolicy(client, script, renderer.tokenizer)
            session = plane.open(
                policy, max_new_tokens=24, context_tokens=budgets[0], max_tokens=budgets[1], max_turns=16
            )
            async with httpx.AsyncClient(base_url=plane.base_url(session), timeout=None) as http:
                hostile = HostileClient(http=http, session=session, policy=policy, script=script, push=push)
                for rewrite, way in actions:
                    self.seen[way] += 1
                    await hostile.act(rewrite, way)
            self._check(hostile, budgets)

    def _check(self, hostile: HostileClient, budgets: tuple[int, int]) -> None:
        session = hostile.session
        assert session.failure is None
        session.end()
        rewards = session.finish()
        self.seen.update(sessions=1, refused=hostile.num_refused, lost=hostile.num_lost)
        if not session.conversation.turns:
            assert not any(sampled for _, sampled in hostile.read.values())
            return
        trajectory = session.conversation.to_trajectory(SampleRewards())
        num_turns = check_record(trajectory, hostile)
        assert num_turns == trajectory.num_turns == len(rewards)
        lengths = [part.stop - part.start for part in segments(trajectory)]
        assert max(lengths) <= budgets[0] and trajectory.num_tokens <= budgets[1]
        versions = {int(version) for version in trajectory.versions[trajectory.loss_mask == 1]}
        for version in versions:
            check_logprobs(trajectory, self._references[version % 2], version=version)
        self.seen.update(
            turns=num_turns,
            segments=len(lengths),
            joined=num_turns - len(lengths),
            versions=len(versions) - 1,
        )


def check_seen(seen: Any) -> None:
    """The clients were hostile, and the sessions went on."""
    names = ("refused", "lost", "versions", "joined", *WAYS)
    assert all(seen[name] > 0 for name in names), seen
