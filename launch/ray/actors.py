"""The actors of a run on Ray: each owns one child process, the daemon of its role, and carries no data."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.nodes.start import address_of_interface

_TICK_S = 0.2


class RoleActor:
    """Runs a role on the node that Ray has chosen. Its child ends with it (`die_with_parent`).

    Its methods are coroutines, so all run in one thread, which lives as long as the actor: the kernel signals
    a child whose parent's *thread* has ended.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    async def address(self, interface: str) -> str:
        """The numeric address of this node: of the interface or, if it is empty, the one Ray uses.

        Raises ConfigError.
        """
        if interface:
            return address_of_interface(interface)
        import ray.util

        return str(ray.util.get_node_ip_address())

    async def run(self, words: list[str], *, directory: str, log: str) -> int:
        """Runs `python -m launch.ray.node WORDS` to its end and returns its exit code (128 + signal)."""
        path = Path(log)
        with path.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "launch.ray.node", *words],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        while (code := self._child.poll()) is None:
            await asyncio.sleep(_TICK_S)
        return code if code >= 0 else 128 - code

    async def stop(self) -> None:
        """SIGTERM to the child, which drains."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.terminate()


class Started:
    """One start of one role: its actors, one for each node, and what they wait for."""

    def __init__(self, actors: list[Any], runs: list[Any]) -> None:
        """`runs`: the object reference of each actor's `run`."""
        self.actors = actors
        self.runs = runs
        self.codes: dict[Any, int | None] = {}
        """Reference -> exit code, or None if the actor is lost; of the nodes that have ended."""
        self.is_stopped = False

    @property
    def code(self) -> int | None:
        """Of the start as a whole, when all nodes have ended: that of a wrong setting, else a failure, a loss
        or a drain in this order, else 0."""
        codes = list(self.codes.values())
        for code in (2, *(c for c in codes if c not in (None, 0, 2, 75)), None, 75):
            if code in codes:
                return code
        return 0
