"""What may outlive an episode in an environment's process: tasks and child processes left there on purpose.

At the end of an episode the worker cancels every other task, and is not used again if it has other children.
"""

from __future__ import annotations

import asyncio
from typing import Any

tasks: set[asyncio.Task[Any]] = set()
"""Tasks that are not cancelled."""
pids: set[int] = set()
"""Children that may live on."""
