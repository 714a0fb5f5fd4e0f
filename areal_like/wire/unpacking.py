"""Unpacks a peer's msgpack data with a limit on the time and memory that it takes.

An empty list is one byte in a message, eighty bytes in memory and a quarter of a microsecond, so a message of
a few megabytes could expand to hundreds of megabytes and occupy the event loop for seconds. Lists and maps
are therefore counted as they are created, with their entries. Data of up to 64 KiB are not counted: they take
at most 15 ms, and most messages are that small.
"""

from __future__ import annotations

from typing import Any

import msgpack

_UNCOUNTED_BYTES = 1 << 16
_CONTAINER_COST = 10
"""Entries of a list that take as long as a list, a map or an entry of a map. An entry of a list (a number, a
short string) takes about 20 ns."""
MAX_COST = 600_000
"""30 ms. The largest message is the `PushWeights` of a mixture of experts: 40,000 tensors of two dimensions
cost 600,000. The `StartTraining` of a curriculum that remembers 100,000 prompts costs 400,000."""


def unpack(data: bytes | memoryview, *, max_cost: int = MAX_COST) -> Any:
    """The object packed in `data`.

    Raises ValueError for malformed data, and for lists and maps that cost more than `max_cost`.
    """
    try:
        if len(data) <= _UNCOUNTED_BYTES:
            return msgpack.unpackb(data, strict_map_key=True, ext_hook=_refuse_ext)
        budget = _Budget(max_cost)
        return msgpack.unpackb(
            data,
            strict_map_key=True,
            ext_hook=_refuse_ext,
            list_hook=budget.take_list,
            object_hook=budget.take_map,
            max_array_len=max_cost,
            max_map_len=max_cost // _CONTAINER_COST,
        )
    except (RecursionError, msgpack.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from None


class _Budget:
    """msgpack hooks that raise ValueError when the containers cost more than `max_cost`."""

    def __init__(self, max_cost: int) -> None:
        self._num_left = max_cost

    def take_list(self, entries: list[Any]) -> list[Any]:
        self._take(_CONTAINER_COST + len(entries))
        return entries

    def take_map(self, entries: dict[str, Any]) -> dict[str, Any]:
        self._take(_CONTAINER_COST * (1 + len(entries)))
        return entries

    def _take(self, cost: int) -> None:
        self._num_left -= cost
        if self._num_left < 0:
            raise ValueError("too many lists, maps and entries")


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")
