"""Runs work on large prompts (parsing, rendering, tokenizing) in a thread. A megabyte takes about a second.

One thread serves all conversations of the process, so the work delays neither heartbeats nor other samples.
Each conversation has at most one item of work in the thread at a time, so conversations take turns no matter
how much work one of them has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
LARGE_BYTES = 1 << 16
"""Smaller work takes a few hundredths of a second and runs directly in the event loop."""
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="large-prompts")


class LargeWork:
    """The large work of one conversation. Belongs to one event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def run(self, work: Callable[[], Result], *, size: int) -> Result:
        """Returns or raises what `work` does. `size`: approximate number of bytes that it processes."""
        if size < LARGE_BYTES:
            return work()
        async with self._lock:
            return await asyncio.get_running_loop().run_in_executor(_THREAD, work)
