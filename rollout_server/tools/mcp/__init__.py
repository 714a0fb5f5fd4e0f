"""Tools of MCP servers (Model Context Protocol). Read `settings.py` first."""

from areal_like.errors import ConfigError

try:
    import mcp as _sdk  # noqa: F401
except ImportError as error:
    raise ConfigError(
        f"tools of MCP servers need an extra: pip install 'areal-like[mcp]' ({error})"
    ) from error

from rollout_server.tools.mcp.server import MCPServer

__all__ = ["MCPServer"]
