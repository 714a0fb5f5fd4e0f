"""One connection to a server, with the session of the official SDK on it.

    OPENING -> OPEN -> CLOSED (`problem`: why)

A request without a response within its time, or whose response breaks a limit or the protocol, closes the
connection: nobody knows what the server still does. A task of its own holds the session, because the SDK's
scopes have to be left where they were entered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import mcp_types
from mcp import ClientSession, MCPError
from mcp.client.streamable_http import streamable_http_client

from areal_like.errors import ToolError, ToolServerError
from rollout_server.environments import lasting
from rollout_server.sandbox.running import RunningProgram
from rollout_server.tools.mcp.budget import Budget
from rollout_server.tools.mcp.http import client_for
from rollout_server.tools.mcp.settings import MCPSettings
from rollout_server.tools.mcp.stdio import ProgramStreams

_CLOSE_TIMEOUT_S = 1.0
"""Time to end an HTTP session in order."""
_CLIENT = mcp_types.Implementation(name="areal-like", version="1")

# A server could make the SDK log a line for each of its bytes. What it does is reported by exceptions.
for _name in ("mcp", "httpx2", "httpcore2"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class Connection:
    """A connection. After `open`, `request` until `problem` is set, and `close` in any case."""

    def __init__(self, settings: MCPSettings) -> None:
        self.problem = ""
        """Why it is closed; empty while it is open."""
        self.tools: Any = None
        """The server's list of tools, kept by the session that asked for it."""
        self._settings = settings
        self._budget = Budget(settings.max_response_bytes, self.abort)
        self._program: RunningProgram | None = None
        self._streams: ProgramStreams | None = None
        self._session: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._has_ended = asyncio.Event()
        """Set when the server sends no more messages."""
        self._serving: asyncio.Task[None] | None = None
        """The task that holds the session."""
        self._tasks: set[asyncio.Task[Any]] = set()
        """This task, and requests in progress."""
        self._others: set[asyncio.Task[Any]] = set()
        """Tasks that were there before it was opened."""

    async def open(self) -> None:
        """Starts the server and makes the handshake. Raises ToolServerError."""
        limit_s = self._settings.start_timeout_s
        self._others = asyncio.all_tasks()
        if self._settings.command:
            self._start_program()
        self._serving = asyncio.create_task(self._serve(), name=f"mcp-{self._settings.server}")
        self._hold(self._serving)
        await self._wait(self._session, limit_s, late=f"it did not start within {limit_s:g} s")
        if self.problem:
            raise ToolServerError(self.problem)

    async def request(self, request: Any, result: type[Any], *, timeout_s: float, renew: bool = True) -> Any:
        """Returns the server's response to a request, of the SDK's type `result`.

        `renew`: False if this is a part of the request before, such as the next page. Raises ToolServerError
        if the connection is closed, also because of this request; ToolError if the server responded with an
        error.
        """
        if self.problem:
            raise ToolServerError(self.problem)
        if renew:
            self._budget.renew()
        sent = asyncio.create_task(self._session.result().send_request(request, result))
        self._hold(sent)
        await self._wait(sent, timeout_s, late=f"no response within {timeout_s:.3g} s")
        if self.problem:
            raise ToolServerError(self.problem)
        try:
            return sent.result()
        except MCPError as error:
            if error.code == mcp_types.PARSE_ERROR:  # also of the SDK, for a body that is no message
                self.abort("its response is not valid")
            elif error.code != mcp_types.CONNECTION_CLOSED:
                raise ToolError(f"{error.message:.400}") from None
            elif self._tasks:  # the task that holds the session knows why
                await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
            self.abort("it closed the connection")
        except ValueError:  # pydantic's
            self.abort("its response is not valid")
        raise ToolServerError(self.problem)

    def abort(self, problem: str) -> None:
        """Closes the connection because of `problem`, at once and also in the middle of a request."""
        if not self.problem:
            self.problem = problem
        if self._program is not None:
            self._program.kill()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Closes the connection; its program, and what that started, has ended."""
        self.abort("it is closed")
        for _ in range(2):  # the second time, what ends an HTTP session is cancelled too
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
            for task in self._tasks:
                task.cancel()
        if self._program is not None:
            lasting.pids.discard(self._program.process.pid)
            self._program.end()

    def keep(self) -> None:
        """Lets the connection outlive the episode: its program, and the tasks that its opening started."""
        for task in asyncio.all_tasks() - self._others:
            lasting.tasks.add(task)
            task.add_done_callback(lasting.tasks.discard)
        if self._program is not None:
            lasting.pids.add(self._program.process.pid)

    def _hold(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may be gone

    async def _wait(self, awaited: asyncio.Future[Any], timeout_s: float, *, late: str) -> None:
        """Waits until `awaited` is done or the connection is closed; closes it after `timeout_s`."""
        assert self._serving is not None
        ends = {awaited, self._serving}
        try:
            await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the caller's own limit
            self.abort(late)
            raise
        if not awaited.done() or awaited.cancelled():
            self.abort(f"{late}{self._streams.note if self._streams else ''}")

    def _start_program(self) -> None:
        settings = self._settings
        try:
            self._program = settings.make_sandbox().start(
                settings.command,
                limits=settings.limits,
                environment=settings.variables(),
                readable=settings.readable,
            )
        except OSError as error:
            raise ToolServerError(f"it cannot be started: {error}") from error
        self._streams = ProgramStreams(self._program, self._budget)

    async def _serve(self) -> None:
        """Holds the session until the connection is closed."""
        problem = "it closed the connection"
        try:
            async with self._opened() as (incoming, outgoing):
                came, relayed = anyio.create_memory_object_stream[Any](0)
                async with (
                    anyio.create_task_group() as group,
                    ClientSession(relayed, outgoing, client_info=_CLIENT) as session,
                ):
                    group.start_soon(self._relay, incoming, came)
                    try:
                        await session.initialize()
                        self._session.set_result(session)
                        await self._has_ended.wait()
                    except MCPError as error:
                        problem = f"the handshake failed: {error.message:.200}"
                    except (ValueError, RuntimeError) as error:
                        problem = f"the handshake failed: {error!s:.200}"
                    if self._streams is not None and self._has_ended.is_set() and not self.problem:
                        problem = await self._streams.how_it_ended()
                    group.cancel_scope.cancel()
        # A transport of the SDK may raise anything; a group holds what its tasks raised.
        except Exception as error:
            problem = f"the connection failed: {_first_of(error)}"
        finally:
            self.abort(problem)
            if not self._session.done():
                self._session.cancel()

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[tuple[Any, Any]]:
        settings = self._settings
        if self._streams is not None:
            async with self._streams.opened() as streams:
                yield streams
            return
        longest_s = max(settings.start_timeout_s, settings.list_timeout_s, settings.timeout_s)
        client = client_for(settings.url, key=settings.key(), timeout_s=longest_s, budget=self._budget)
        async with (
            client,
            streamable_http_client(
                settings.url, http_client=client, max_sse_event_size=settings.max_response_bytes
            ) as streams,
        ):
            yield streams

    async def _relay(self, incoming: Any, came: Any) -> None:
        """Passes on what the session needs: not the server's notifications, nor what was no message."""
        with came, contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for item in incoming:
                self._budget.take_message()
                if isinstance(item, Exception) or isinstance(item.message, mcp_types.JSONRPCNotification):
                    continue
                await came.send(item)
        self._has_ended.set()


def _first_of(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
