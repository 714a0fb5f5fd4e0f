"""What a real SGLang has or lacks beside the embedded engine, behind the same client.

Guarded here, because SGLang itself does not: a token id outside the vocabulary kills the whole server, so it is refused before it is
sent; `/health` generates a token and hangs while the engine is paused, so readiness is asked of `/ready`. SGLang tells no cumulative
load, so what it generated is counted from its answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from areal_like.errors import EngineError
from rollout_server.inference.client import EngineClient, Generation, Sampling


class SglangClient(EngineClient):
    """Asynchronous client of one SGLang (0.5.23 and what is compatible with it)."""

    def __init__(self, base_url: str, *, vocab_size: int, **options: Any) -> None:
        """`vocab_size`: rows of the model's embedding; `options`: as of EngineClient."""
        super().__init__(base_url, **options)
        self._vocab_size = vocab_size
        self._num_inside = 0
        self._num_tokens = 0
        self._created_s = self._since_s = asyncio.get_running_loop().time()
        self._busy_s = 0.0

    async def generate(
        self, input_ids: Sequence[int], *, sampling: Sampling, rid: str | None = None
    ) -> Generation:
        """See EngineClient.generate. Raises EngineError for ids that are none, which SGLang would die of."""
        for what, ids in (("input_ids", input_ids), ("stop_token_ids", sampling.stop_token_ids)):
            if any(not 0 <= token < self._vocab_size for token in ids):
                outside = next(token for token in ids if not 0 <= token < self._vocab_size)
                raise EngineError(
                    f"{what}: token id {outside} is outside the vocabulary of {self._vocab_size}"
                )
        self._account(entering=1)
        try:
            generation = await super().generate(input_ids, sampling=sampling, rid=rid)
        finally:
            self._account(entering=-1)
        self._num_tokens += len(generation.output_ids)
        return generation

    async def health(self) -> bool:
        """Whether the engine has started and takes requests; not while it is paused."""
        try:
            await self._call("GET", "/ready", timeout_s=self._connect_timeout_s)
        except EngineError:
            return False
        return True

    async def load(self) -> dict[str, float]:
        """Sequences in the engine as it says; tokens, busy and idle seconds as seen from here."""
        queues = (await self._call("GET", "/v1/loads"))["loads"]
        self._account(entering=0)
        return {
            "running": sum(queue["num_running_reqs"] for queue in queues),
            "waiting": sum(queue["num_waiting_reqs"] for queue in queues),
            "generated_tokens": self._num_tokens,
            "busy_s": self._busy_s,
            "idle_s": self._since_s - self._created_s - self._busy_s,
        }

    async def set_weight_version(self, version: int) -> None:
        """Names the weights that are loaded; tokens sampled from now on carry it."""
        await self._call(
            "POST", "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}
        )

    async def weights_checksum(self) -> str:
        """A digest of every parameter that the engine holds, over all its ranks; answers while paused."""
        answer = await self._call("POST", "/weights_checker", {"action": "checksum"})
        return str(answer["per_engine_checksum"])

    def _account(self, *, entering: int) -> None:
        """Time passes between changes of the number of requests under way: busy if there were any."""
        now_s = asyncio.get_running_loop().time()
        if self._num_inside:
            self._busy_s += now_s - self._since_s
        self._since_s = now_s
        self._num_inside += entering
