"""Work on large prompts: parsing, rendering, tokenizing. A megabyte takes a second.

It is done in one thread for all conversations of the process, so that it delays neither heartbeats nor other
samples. A conversation has one piece of work there at a time: however much one has, others take turns with
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
LARGE_BYTES = 1 << 16
"""Less takes a few hundredths of a second, and is done at once."""
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="large-prompts")


class LargeWork:
    """That of one conversation. Belongs to one event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def run(self, work: Callable[[], Result], *, size: int) -> Result:
        """What `work` returns or raises. `size`: bytes that it works on, about."""
        if size < LARGE_BYTES:
            return work()
        async with self._lock:
            return await asyncio.get_running_loop().run_in_executor(_THREAD, work)
