"""Tools by name, from a task's settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from areal_like.errors import ConfigError
from areal_like.registry import Registry
from rollout_server.tools.source import ToolSource
from rollout_server.tools.tool import Tool


class NamedTool(ABC):
    """Settings of a tool, in a task's settings: `tools: [calculator, {name: python, timeout_s: 5}]`.

    Like a task, a named tool is a frozen dataclass whose fields are its settings. A tool of your own needs no
    registration: `{_target_: my_module.MyTool}`, or a plain function given to ToolEnvironment.
    """

    @abstractmethod
    def tool(self) -> Tool | ToolSource:
        """Returns the tool, or the source of tools, with these settings."""


TOOLS = Registry[NamedTool](
    "tools",
    NamedTool,  # type: ignore[type-abstract]
    elsewhere={
        "calculator": "rollout_server.tools.calculator.Calculator",
        "mcp": "rollout_server.tools.mcp.MCPServer",
        "python": "rollout_server.tools.python.Python",
        "search": "rollout_server.tools.search.Search",
    },
)
"""Tools are registered by path and imported on use."""


def make_tools(settings: Sequence[str | Mapping[str, Any]], *, sandbox: str) -> tuple[Tool | ToolSource, ...]:
    """Creates the tools in a list of names, or of sections with `name` or `_target_`.

    `sandbox`: the job's `rewards.sandbox`. Raises ConfigError.
    """
    if isinstance(settings, str | Mapping):
        raise ConfigError(f"tools: want a list, such as [calculator], got {settings!r}")
    sections = [{"name": one} if isinstance(one, str) else one for one in settings]
    return tuple(made.tool() for made in TOOLS.build_list(sections, job={"sandbox": sandbox}))
