"""An MCP server as a source of tools. Read `settings.py` first."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.tools.mcp.session import MCPSession
from rollout_server.tools.mcp.settings import MCPSettings
from rollout_server.tools.named import NamedTool
from rollout_server.tools.source import ToolSource


@dataclass(frozen=True, kw_only=True)
class MCPServer(MCPSettings, NamedTool, ToolSource):
    """`{name: mcp, server: files, command: [/opt/files/server]}`, or an object among the tools of a
    ToolEnvironment."""

    def tool(self) -> ToolSource:
        return self

    async def open(self) -> MCPSession:
        return await MCPSession.start(self)
