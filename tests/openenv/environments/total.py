"""Reach a total with tools: an MCP environment, whose rewards are those of its calls."""

from __future__ import annotations

import random
from typing import Any

from fastmcp import FastMCP
from openenv.core.env_server import MCPEnvironment, Observation, State
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation


class Asked(Observation):
    task: str


class Total(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("total")
        self._total = self._wanted = 0
        self._is_submitted = False

        @server.tool
        def add(amount: int) -> int:
            """Adds to the total, and returns it."""
            if not 0 < amount < 100:
                raise ValueError("the amount is from 1 to 99")
            self._total += amount
            return self._total

        @server.tool
        def submit() -> str:
            """Ends the episode with the present total."""
            self._is_submitted = True
            return "submitted"

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Observation:
        self._total, self._is_submitted = 0, False
        self._wanted = random.Random(seed).randrange(10, 20)
        return Asked(task=f"Make the total {self._wanted}.")

    async def step_async(self, action: Any, timeout_s: float | None = None, **more: Any) -> Observation:
        observation = await super().step_async(action, timeout_s, **more)
        if self._is_submitted:
            observation.reward, observation.done = float(self._total == self._wanted), True
        return observation

    def _step_impl(self, action: Any, timeout_s: float | None = None, **_: Any) -> Observation:
        raise NotImplementedError

    @property
    def state(self) -> State:
        return State()


ENVIRONMENT, ACTION, OBSERVATION = Total, CallToolAction, CallToolObservation
