"""A task whose import starts a thread, as a library may: it does not survive a fork."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from rollout_server.tasks.base import Completion, Example, Split, Task

THREAD = threading.Thread(target=threading.Event().wait, daemon=True)
THREAD.start()


@dataclass(frozen=True, kw_only=True)
class Threaded(Task):
    """The reward is 1 if the thread runs and no limit of threads is left over."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="", answer=None)

    def reward(self, example: Example, completion: Completion) -> float:
        return float(THREAD.is_alive() and "OMP_NUM_THREADS" not in os.environ)
