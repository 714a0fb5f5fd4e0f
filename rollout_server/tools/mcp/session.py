"""An MCP server in one episode: its tools, its calls, and how often it is started again.

    start() -> tools -> [call]* -> close()
                         `-> failed -> the next call starts it again, up to `max_restarts` times

With `keep`, the connection stays open for later episodes of this process (`_kept`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import mcp_types

from areal_like.errors import ToolError, ToolServerError
from rollout_server.tools.mcp.connection import Connection
from rollout_server.tools.mcp.schemas import accepted
from rollout_server.tools.mcp.settings import MCPSettings
from rollout_server.tools.tool import TOOL_NAME, ServerTool, Tool

log = logging.getLogger(__name__)

_MAX_PAGES = 32
"""Pages of a list of tools."""

_kept: dict[MCPSettings, Connection] = {}
"""Connections that outlive an episode."""


class MCPSession:
    """A server in one episode."""

    def __init__(self, settings: MCPSettings) -> None:
        self.num_failures = 0
        """Calls that failed because of the server."""
        self._settings = settings
        self._num_calls = 0
        self._connection: Connection | None = None
        self._tools: tuple[ServerTool, ...] = ()

    @classmethod
    async def start(cls, settings: MCPSettings) -> MCPSession:
        """Starts the server, or continues with one that was kept.

        Raises ToolServerError, or ConfigError if this machine lacks what the settings name.
        """
        session = cls(settings)
        try:
            connection = await session._connected()
            if connection.tools is None:
                connection.tools = await session._list(connection)
            session._tools = tuple(map(session._tool, session._chosen(connection.tools)))
        except (ToolServerError, ToolError) as error:
            await session._drop()
            raise session._failed(str(error)) from None
        except BaseException:  # most likely the caller was cancelled
            await session._drop()
            raise
        return session

    @property
    def tools(self) -> Sequence[Tool]:
        return self._tools

    async def close(self) -> None:
        connection = self._connection
        if connection is None or (self._settings.keep and not connection.problem):
            return
        await self._drop()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Calls the server's tool `name`; returns the text of the result.

        Raises ToolError for the policy, and ToolServerError, which fails the sample, if the server has failed
        too often.
        """
        settings = self._settings
        if self._num_calls >= settings.max_calls:
            raise ToolError(
                f"not run: an episode may have at most {settings.max_calls} calls of {settings.server}"
            )
        self._num_calls += 1
        if (
            self._connection is not None
            and self._connection.problem
            and self.num_failures > settings.max_restarts
        ):
            raise self._failed(
                f"{self.num_failures} failures in one episode; the last: {self._connection.problem}"
            )
        request = mcp_types.CallToolRequest(
            params=mcp_types.CallToolRequestParams(name=name, arguments=dict(arguments))
        )
        answered = False
        try:
            connection = await self._connected()
            result = await connection.request(request, mcp_types.CallToolResult, timeout_s=settings.timeout_s)
            answered = True
        except ToolError:
            answered = True
            raise
        except ToolServerError as error:
            log.warning("MCP server %s failed a call: %s", settings.server, error)
            raise ToolError(
                f"the server of this tool failed ({error}); the next call starts it again, without its state"
            ) from None
        finally:
            self.num_failures += not answered  # also if the time limit of the call came first
        return text_of(result)

    async def _connected(self) -> Connection:
        """Returns an open connection."""
        keep = self._settings.keep
        connection = self._connection or (_kept.get(self._settings) if keep else None)
        if connection is not None and connection.problem:
            self._connection = connection
            await self._drop()
            connection = None
        if connection is None:
            connection = Connection(self._settings)
            self._connection = connection
            await connection.open()
            if keep:
                _kept[self._settings] = connection
                connection.keep()
        self._connection = connection
        return connection

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if _kept.get(self._settings) is connection:
                del _kept[self._settings]
            await connection.close()

    async def _list(self, connection: Connection) -> list[Any]:
        """Returns the server's tools, of all pages."""
        settings, tools, cursor = self._settings, list[Any](), None
        for page in range(_MAX_PAGES):
            result = await connection.request(
                mcp_types.ListToolsRequest(params=mcp_types.PaginatedRequestParams(cursor=cursor)),
                mcp_types.ListToolsResult,
                timeout_s=settings.list_timeout_s,
                renew=page == 0,
            )
            tools += result.tools
            cursor = result.next_cursor
            if cursor is None:
                return tools
            if not settings.tools and len(tools) > settings.max_tools:
                return tools  # which are too many already
        raise ToolServerError(f"its list of tools has more than {_MAX_PAGES} pages")

    def _chosen(self, listed: Sequence[Any]) -> Sequence[Any]:
        settings = self._settings
        chosen = [tool for tool in listed if not settings.tools or tool.name in settings.tools]
        if missing := sorted(set(settings.tools) - {tool.name for tool in chosen}):
            names = ", ".join(sorted(tool.name for tool in listed))
            raise ToolServerError(f"it has no tool {', '.join(missing)}; it lists: {names:.300}")
        if len(chosen) > settings.max_tools:
            raise ToolServerError(
                f"it lists {len(chosen)} tools: max_tools={settings.max_tools}; choose some with `tools`"
            )
        if not chosen:
            raise ToolServerError("it lists no tools")
        return chosen

    def _tool(self, listed: Any) -> ServerTool:
        settings = self._settings
        name, description = f"{settings.prefix}{listed.name}", listed.description or ""
        if not TOOL_NAME.fullmatch(name):
            raise ToolServerError(
                f"the name of its tool {name!r:.100} may have only letters, digits, _ and -"
            )
        if len(description) > settings.max_description_chars:
            raise ToolServerError(
                f"the description of its tool {name} has {len(description)} characters: more than "
                f"max_description_chars={settings.max_description_chars}"
            )
        try:
            check = accepted(
                listed.input_schema, max_bytes=settings.max_schema_bytes, max_depth=settings.max_schema_depth
            )
        except ToolServerError as error:
            raise ToolServerError(f"the schema of its tool {name} {error}") from None

        async def call(**arguments: Any) -> str:
            return await self.call(listed.name, arguments)

        return ServerTool(
            name=name,
            description=description.encode(errors="replace").decode(),
            function=call,
            timeout_s=settings.timeout_s,
            max_chars=settings.max_chars,
            input_schema=listed.input_schema,
            check_arguments=check.check,
            max_argument_chars=settings.max_argument_chars,
        )

    def _failed(self, problem: str) -> ToolServerError:
        return ToolServerError(f"MCP server {self._settings.server}: {problem}")


def text_of(result: Any) -> str:
    """Returns the text of a call's result. Raises ToolError if it has other content, or is an error."""
    if others := sorted({block.type for block in result.content if block.type != "text"}):
        raise ToolError(f"the result has content of type {', '.join(others)}; only text is supported")
    text = "\n".join(block.text for block in result.content)
    if not result.content and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    if result.is_error:
        raise ToolError(text or "the tool failed")
    return text
