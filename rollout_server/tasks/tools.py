"""Base of tasks whose tools are a setting: `task: {_target_: my_tasks.Research, tools: [python]}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.tasks.base import Task
from rollout_server.tools import Tool, ToolSource, make_tools


@dataclass(frozen=True, kw_only=True)
class ToolTask(Task):
    """A task whose `environment` passes `self.make_tools()` to a ToolEnvironment."""

    tools: Sequence[str | Mapping[str, Any]] = ()
    """Names of tools (calculator, mcp, python, search), or mappings of
    `name` or `_target_` and settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_tools()  # raises ConfigError for an unknown tool or setting

    def make_tools(self) -> tuple[Tool | ToolSource, ...]:
        """Creates the tools, and the sources of tools, of one environment, in the job's sandbox."""
        return make_tools(self.tools, sandbox=self.sandbox)
