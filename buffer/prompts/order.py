"""Which prompt comes next: every epoch is a permutation that is computed index by index, so there is nothing to store or to replay.

The permutation is a Feistel network with cycle walking: a pure function of (seed, epoch, index) in constant memory, which matters for
synthetic tasks with billions of prompts, and one that no library upgrade can change under a resumed run. Its place is one integer.
A curriculum (`curricula.py`) chooses among neighbours in that order; it changes what is issued, never the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from areal_like.shards import WHOLE, Shard
from buffer.prompts.curriculum import Curriculum

_NUM_ROUNDS = 6
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64: a fixed, well-spread function of 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permuted(index: int, *, size: int, seed: int, epoch: int) -> int:
    """Where a shuffle of 0..size-1 puts `index`. A bijection for every (seed, epoch)."""
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    key = _mix(_mix(seed & _MASK) ^ epoch)
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_ in range(_NUM_ROUNDS):
            left, right = right, left ^ (_mix(key ^ (right << 8) ^ round_) & half_mask)
        index = left << half_bits | right
        if (
            index < size
        ):  # the network permutes a power of four; walking its cycle back into range keeps it a bijection
            return index


def sampling_seed(seed: int, ticket_id: int, num_failures: int) -> int:
    """30 bits. The same when a lost lease is repeated; another one after a failure, which may lie in the very text that was sampled."""
    return _mix(_mix(_mix(seed & _MASK) ^ ticket_id) ^ num_failures) >> 34


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt to issue, with the ticket it replaces."""

    index: int
    parent: int = 0
    num_reissues: int = 0


class PromptOrder:
    """Hands out a shard's training prompts: those that came back first, then the shuffled epochs, forever."""

    def __init__(
        self, *, seed: int, num_prompts: int = 0, curriculum: Curriculum | None = None, shard: Shard = WHOLE
    ) -> None:
        self.num_prompts = num_prompts
        """Training prompts of the task, those of other shards too; 0 until it is known."""
        self.curriculum = curriculum
        """Who chooses among the next few of an epoch; None: each is issued in its turn."""
        self._shard = shard
        self._seed = seed + shard.index  # or neighbours would always come together
        self.cursor = 0
        """Prompts drawn from the epochs so far."""
        self._returned: deque[Prompt] = deque()

    def next(self) -> Prompt:
        """The next prompt to issue."""
        if self._returned:
            return self._returned.popleft()
        if self.curriculum is None:
            return Prompt(index=self._draw())
        luck = (_mix(_mix(self._seed & _MASK) ^ self.cursor) >> 11) / 2**53
        candidates = [self._draw() for _ in range(min(self.curriculum.settings.pool, self.num_own))]
        return Prompt(index=self.curriculum.choose(candidates, luck=luck))

    def give_back(self, prompt: Prompt) -> None:
        """Puts a prompt before the next epoch index and behind those given back earlier."""
        self._returned.append(prompt)

    def _draw(self) -> int:
        epoch, index = divmod(self.cursor, self.num_own)
        self.cursor += 1
        return self._shard.number(permuted(index, size=self.num_own, seed=self._seed, epoch=epoch))

    @property
    def num_own(self) -> int:
        """Training prompts of this shard."""
        return self._shard.share(self.num_prompts)

    @property
    def returned(self) -> list[int]:
        """Indices given back and not issued again yet."""
        return [prompt.index for prompt in self._returned]

    def resume(self, *, cursor: int, returned: Iterable[Prompt]) -> None:
        """Goes on in a ledger that remembers whom each prompt replaces."""
        self.cursor = cursor
        self._returned = deque(returned)

    def restore(self, *, cursor: int, pending: Iterable[int]) -> None:
        """Goes on from an earlier run: `pending` first, then from `cursor`."""
        self.cursor = cursor
        self._returned = deque(Prompt(index=index) for index in pending)
