"""CPU time in units of the machine that the tests run on, for bounds that hold on a slow one too."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def cpu_units(work: Callable[[], object], *, num_rounds: int = 5) -> float:
    """Least CPU time of `work` over that of a fixed loop, which takes about 10 ms on a server of 2024.

    The two take turns. Garbage collection is off meanwhile: its time depends on what other tests have left.
    """
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        rounds = [(_cpu_s(work), _cpu_s(_fixed_loop)) for _ in range(num_rounds)]
    finally:
        if is_collecting:
            gc.enable()
    work_s, loop_s = zip(*rounds, strict=True)
    return min(work_s) / min(loop_s)


def _cpu_s(work: Callable[[], object]) -> float:
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


def _fixed_loop() -> None:
    table: dict[int, tuple[int, str]] = {}
    for index in range(100_000):
        table[index % 1000] = (index, "x")
