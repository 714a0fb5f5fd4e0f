"""msgpack that a peer wrote, without what a few bytes of it can become in memory.

An empty list is one byte in a message and eighty here, so a message of some megabytes could take hundreds. Lists and maps are therefore
counted as they are made, and whoever knows the schema says how many it can hold. What is short is not counted: it cannot become much,
and it is the hot path. Numbers and strings are not counted either: of them msgpack makes 24 bytes a byte at most.
"""

from __future__ import annotations

from typing import Any

import msgpack

_UNCOUNTED_BYTES = 1 << 16


def unpack(data: bytes | memoryview, *, max_containers: int) -> Any:
    """The object that `data` is. Raises ValueError when it is none, or holds more lists and maps than `max_containers`."""
    options: dict[str, Any] = {"strict_map_key": True, "ext_hook": _refuse_ext}
    if len(data) > _UNCOUNTED_BYTES:
        options["list_hook"] = options["object_hook"] = _Count(max_containers)
    try:
        return msgpack.unpackb(data, **options)
    except (RecursionError, msgpack.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from None


class _Count:
    """Lets a number of containers pass."""

    def __init__(self, max_containers: int) -> None:
        self._max_containers = self._num_left = max_containers

    def __call__(self, container: Any) -> Any:
        if not self._num_left:
            raise ValueError(f"more than {self._max_containers} lists and maps")
        self._num_left -= 1
        return container


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")
