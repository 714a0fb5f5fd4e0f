"""Unpacks a peer's msgpack data with a limit on the memory that the result takes.

An empty list is one byte in a message and eighty bytes in memory, so a message of a few megabytes could
expand to hundreds of megabytes. Lists and maps are therefore counted as they are created, against a maximum
that the caller derives from its schema. In short messages nothing is counted: they cannot grow much, and they
are the most frequent. Numbers and strings are not counted either: they expand at most 24 times.
"""

from __future__ import annotations

from typing import Any

import msgpack

_UNCOUNTED_BYTES = 1 << 16


def unpack(data: bytes | memoryview, *, max_containers: int) -> Any:
    """The object packed in `data`.

    Raises ValueError for malformed data, and for more than `max_containers` lists and maps.
    """
    options: dict[str, Any] = {"strict_map_key": True, "ext_hook": _refuse_ext}
    if len(data) > _UNCOUNTED_BYTES:
        options["list_hook"] = options["object_hook"] = _Count(max_containers)
    try:
        return msgpack.unpackb(data, **options)
    except (RecursionError, msgpack.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from None


class _Count:
    """msgpack hook that raises ValueError after `max_containers` calls."""

    def __init__(self, max_containers: int) -> None:
        self._max_containers = self._num_left = max_containers

    def __call__(self, container: Any) -> Any:
        if not self._num_left:
            raise ValueError(f"more than {self._max_containers} lists and maps")
        self._num_left -= 1
        return container


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")
