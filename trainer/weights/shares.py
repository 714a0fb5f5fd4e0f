"""Which ranks send the buckets of a push, and which buckets each of them sends (`weights.senders`). Pure."""

from __future__ import annotations

from areal_like.errors import ConfigError


def sender_ranks(num: int, *, num_ranks: int, num_buckets: int | None = None) -> tuple[int, ...]:
    """The ranks that send, at most one for each bucket: rank 0, and others at equal distances.

    Ranks of one machine have consecutive numbers, so senders at equal distances are on as many machines as
    possible. `num_ranks`: those of a replica, which has all senders. `num_buckets`: None if there are enough
    of them. Raises ConfigError if `num` is above the number of ranks.
    """
    if num > num_ranks:
        raise ConfigError(
            f"weights.senders={num} is above the number of trainer ranks (of a replica), {num_ranks}: "
            f"set it to at most {num_ranks}"
        )
    num = min(num, num if num_buckets is None else num_buckets)
    return tuple(number * num_ranks // num for number in range(num))


def share_of_sender(number: int, *, num_senders: int, num_buckets: int) -> range:
    """Indices of the buckets that sender `number` sends: those whose index mod `num_senders` is `number`."""
    return range(number, num_buckets, num_senders)
