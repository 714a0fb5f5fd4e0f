"""One prompt and one completion."""

from __future__ import annotations

import asyncio

from rollout_server.conversation.turns import Turns
from rollout_server.sample.attempt import Attempt, Played, SampleRequest
from rollout_server.sample.prompt_leader import PromptLeader
from rollout_server.sample.prompt_loader import Prompt
from rollout_server.sources import Renderer


class SingleTurn(Attempt):
    """A sample of one turn."""

    def __init__(
        self, request: SampleRequest, *, prompt: Prompt, leader: PromptLeader, renderer: Renderer
    ) -> None:
        """`leader`: is told when the prompt is computed."""
        super().__init__(request, Turns(request.policy), label=prompt.example.label)
        self._prompt = prompt
        self._leader = leader
        self._renderer = renderer

    async def play(self) -> Played:
        """Samples the turn. Raises EngineError."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        generation, _ = await self._turns.sample(self._prompt.tokens_P)
        self._leader.prompt_computed()  # a completion of one token was not reported before
        return Played(
            finish_reason=generation.finish_reason,
            generation_s=loop.time() - started_s,
            text=self._renderer.decode(generation.output_ids),
            raw_text=self._renderer.text_of(generation.output_ids.tolist()),
        )
