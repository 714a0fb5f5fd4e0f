"""An event loop whose clock a test moves, for code that reads `loop.time()` and sleeps in the loop.

    async def body() -> None:
        answer = asyncio.create_task(ask(timeout_s=60))
        await event
        advance(60)
        with pytest.raises(TimeoutError):
            await answer

    run(body())

Without `advance` it is the usual clock, so sockets and processes work as they always do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class MovedLoop(asyncio.SelectorEventLoop):
    """The usual loop; its clock is ahead by `moved_s`."""

    moved_s = 0.0

    def time(self) -> float:
        return super().time() + self.moved_s


def run(body: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, with a clock that `advance` moves."""
    with asyncio.Runner(loop_factory=MovedLoop) as runner:
        return runner.run(body)


def advance(seconds: float) -> None:
    """Moves the clock of the running loop: whatever is due by then happens in its next turn."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, MovedLoop), "start the test with moved_clock.run"
    loop.moved_s += seconds
