"""The order of training prompts: each epoch is a pseudo-random permutation (areal_like/data/permutation.py).

Its whole state is one integer (the cursor), so resuming needs no stored permutation and replays nothing. No
library upgrade can change the order in a resumed run. A curriculum (`curriculum.py`) chooses among
neighboring prompts in this order: it changes which prompts are issued, never the order.

In a mixture, each task has its own order of epochs. The cursor then counts draws and alone determines which
task is drawn (`areal_like.data.mixture`), so every window of prompts has the tasks in proportion to their
weights, even after a resume. A curriculum chooses among the next prompts of the task that was drawn.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from areal_like.data.mixture import place_of
from areal_like.data.permutation import permuted
from areal_like.shards import WHOLE, Shard
from areal_like.splitmix64 import MASK_64, mix
from buffer.prompts.curriculum import Curriculum

_SOURCE_BITS = 40
"""The tasks of a mixture have their own seeds, far from those of shards."""


def sampling_seed(seed: int, ticket_id: int, num_failures: int) -> int:
    """30-bit sampling seed of a ticket.

    A lease that replaces a lost one gets the same seed. After a failed sample the seed changes, because the
    sampled text may have caused the failure.
    """
    return mix(mix(mix(seed & MASK_64) ^ ticket_id) ^ num_failures) >> 34


def evaluation_seed(seed: int, eval_set: str, prompt_index: int) -> int:
    """30-bit sampling seed of a prompt of an evaluation set, the same in every evaluation of a job.

    So two evaluations differ in their weights and not in their random numbers. It does not change after a
    failed sample either: an evaluation must not select the completions that its reward can process.
    """
    name = int.from_bytes(hashlib.sha256(eval_set.encode()).digest()[:8], "big")
    return mix(mix(mix(seed & MASK_64) ^ name) ^ prompt_index) >> 34


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt to issue; `parent` is the dropped ticket that it replaces (0: none)."""

    index: int
    parent: int = 0
    num_reissues: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """The prompts of one task of a mixture."""

    size: int
    weight: float


class PromptOrder:
    """Issues a shard's training prompts endlessly: returned prompts first, then the shuffled epochs."""

    def __init__(
        self, *, seed: int, num_prompts: int = 0, curriculum: Curriculum | None = None, shard: Shard = WHOLE
    ) -> None:
        self.num_prompts = num_prompts
        """Training prompts of the task over all shards; 0 until a server has registered and reported it."""
        self.sources: tuple[PromptSet, ...] = ()
        """The tasks of a mixture; their indices follow one another. Empty: no mixture."""
        self.curriculum = curriculum
        """Chooses among the next few prompts of an epoch; None: all prompts are issued, in order."""
        self._shard = shard
        # Each shard has its own seed. With a common seed, the shards would always issue neighboring prompts
        # at about the same time.
        self._seed = seed + shard.index
        self.cursor = 0
        """Prompts drawn from the epochs so far; for a mixture, the number of draws of a task."""
        self._returned: deque[Prompt] = deque()

    def next(self) -> Prompt:
        if self._returned:
            return self._returned.popleft()
        if self.sources:
            return self._next_of_mixture()
        if self.curriculum is None:
            return Prompt(index=self._draw())
        uniform = self._uniform()
        candidates = [
            self._draw() for _ in range(min(self.curriculum.settings.curriculum_pool, self.num_own))
        ]
        return Prompt(index=self.curriculum.choose(candidates, uniform=uniform))

    def give_back(self, prompt: Prompt) -> None:
        """Queues a prompt to be issued again: last among the returned ones, before the epoch continues."""
        self._returned.append(prompt)

    def _draw(self) -> int:
        epoch, index = divmod(self.cursor, self.num_own)
        self.cursor += 1
        return self._shard.number(permuted(index, size=self.num_own, seed=self._seed, epoch=epoch))

    def _next_of_mixture(self) -> Prompt:
        uniform = self._uniform()
        weights = [source.weight for source in self.sources]
        source, number = place_of(self.cursor, weights, phase=self._shard.index / self._shard.count)
        self.cursor += 1
        # This shard's prompts among those of the task: the local numbers first, ..., end - 1.
        before = sum(other.size for other in self.sources[:source])
        first, end = self._shard.share(before), self._shard.share(before + self.sources[source].size)
        pool = 1 if self.curriculum is None else min(self.curriculum.settings.curriculum_pool, end - first)
        candidates = []
        for draw in range(number * pool, (number + 1) * pool):
            epoch, index = divmod(draw, end - first)
            seed = self._seed + (source << _SOURCE_BITS)
            local = first + permuted(index, size=end - first, seed=seed, epoch=epoch)
            candidates.append(self._shard.number(local))
        if self.curriculum is None:
            return Prompt(index=candidates[0])
        return Prompt(index=self.curriculum.choose(candidates, uniform=uniform))

    def _uniform(self) -> float:
        return (mix(mix(self._seed & MASK_64) ^ self.cursor) >> 11) / 2**53

    @property
    def num_own(self) -> int:
        """Training prompts of this shard."""
        return self._shard.share(self.num_prompts)

    @property
    def returned(self) -> list[int]:
        """Indices of prompts that were given back and not issued again yet."""
        return [prompt.index for prompt in self._returned]

    def restore(self, *, cursor: int, returned: Iterable[Prompt]) -> None:
        """Continues an earlier run: first the prompts in `returned`, then the epochs from `cursor` on."""
        self.cursor = cursor
        self._returned = deque(returned)
