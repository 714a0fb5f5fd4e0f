"""Tools that the policy calls, and the environment that runs them. Read `environment.py` first."""

from areal_like.errors import ToolError
from rollout_server.tools.calculator import calculator
from rollout_server.tools.environment import ToolEnvironment
from rollout_server.tools.named import make_tools
from rollout_server.tools.source import ToolSource
from rollout_server.tools.tool import Tool

__all__ = ["Tool", "ToolEnvironment", "ToolError", "ToolSource", "calculator", "make_tools"]
