"""One sample of a group computes a long prompt first; the others then find it in the engine's prefix cache.

    samples of one lease: leader at the engine -> its first token (or its end) -> the others at the engine

An engine that gets all samples of a group in one turn computes their prompt once for each of them: SGLang's
`lpm` order puts those with an equal prompt last, but still into the same batch while there is room. For short
prompts the wait costs more than it saves, and every sample starts at once.
"""

from __future__ import annotations

import asyncio

LONG_PROMPT_TOKENS = 512
"""Prompts of at least this length are computed by a leader."""


def needs_leader(*, num_prompt_tokens: int, num_samples: int, caches_prefixes: bool) -> bool:
    """True if the samples of a lease should wait for the first of them. Tokens are those of the prompt."""
    return caches_prefixes and num_samples > 1 and num_prompt_tokens >= LONG_PROMPT_TOKENS


class PromptLeader:
    """The samples of one lease in the order above; belongs to one event loop."""

    def __init__(self, leader: int | None) -> None:
        """`leader`: index of the sample that goes first; None: no sample waits."""
        self._leader = leader
        self._computed = asyncio.Event()
        if leader is None:
            self._computed.set()

    async def wait_turn(self, sample_index: int) -> None:
        """Returns when the sample may be sent to the engine."""
        if sample_index != self._leader:
            await self._computed.wait()

    def prompt_computed(self) -> None:
        """Call at the leader's first token, and at its end in any case. Later calls do nothing."""
        self._computed.set()
