"""Threads for blocking work (broadcasts, group set-up, file reads) that can all be abandoned at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from areal_like.errors import WeightSyncError
from areal_like.runtime.threads import in_thread

T = TypeVar("T")


class AbandonableThreads:
    """Runs each piece of work in a separate thread. All methods must be called on the event loop."""

    def __init__(self) -> None:
        self._pending: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`.

        Raises its exception, or WeightSyncError if `abandon` is called first.
        """

        def main() -> T:
            with torch.inference_mode():
                return work()

        future = in_thread(main, name="weights")
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return await future

    def abandon(self, reason: str) -> None:
        """Fails every pending `run` with WeightSyncError.

        The threads run to their end, and their results are discarded.
        """
        for future in list(self._pending):
            # The set may still contain a future that is done: the callback that removes it runs later.
            if not future.done():
                future.set_exception(WeightSyncError(reason))
