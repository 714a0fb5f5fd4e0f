"""Sources of tools: what has to be started before its tools are known, such as an MCP server.

check()                 once, when a rollout server starts
open() -> tools -> calls -> close()            in each episode
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from rollout_server.tools.tool import Tool


class OpenTools(Protocol):
    """The tools of a source in one episode."""

    @property
    def tools(self) -> Sequence[Tool]:
        """Returns the tools; they do not change in an episode."""

    @property
    def num_failures(self) -> int:
        """Returns the number of calls that the source failed so far, through no fault of the policy."""

    async def close(self) -> None:
        """Ends what the episode has started."""


class ToolSource(ABC):
    """Settings of a source, given to ToolEnvironment among its tools. One object serves many episodes."""

    def check(self) -> None:  # noqa: B027, a source may need nothing
        """Raises ConfigError if this machine does not have what the source needs."""

    @abstractmethod
    async def open(self) -> OpenTools:
        """Starts the source for one episode. Raises ToolServerError, which fails the sample."""
