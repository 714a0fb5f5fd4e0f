"""The streams between the SDK's session and a program: one JSON message a line.

The SDK's own transport passes six variables of this process on, reads lines of any length, and starts the
program outside a sandbox. Lines that are no message are counted and dropped, because programs print banners.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

import anyio
import mcp_types
from mcp.shared.message import SessionMessage

from rollout_server.sandbox.running import RunningProgram
from rollout_server.tools.mcp.budget import Budget

_MAX_ERROR_BYTES = 16 << 20
"""A program that writes more to stderr is ended, because reading it costs CPU time."""
_TAIL_BYTES = 2000
_EXIT_TIMEOUT_S = 1.0
"""Time for a program that has closed its stdout to end, so that a message can say how."""
_POLL_S = 0.01
_QUEUED = 64
"""Messages to a program that does not read; whoever sends them need not wait."""


class ProgramStreams:
    """A running server of tools as a pair of streams."""

    def __init__(self, program: RunningProgram, budget: Budget) -> None:
        self._program = program
        self._budget = budget
        self._errors = b""
        """The end of what it wrote to stderr."""
        self._num_dropped = 0

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[Any, Any]]:
        """Yields the streams of messages from and to the program, which is killed at the end."""
        loop = asyncio.get_running_loop()
        process = self._program.process
        transports: list[asyncio.BaseTransport] = []
        try:
            output, errors = (asyncio.StreamReader(limit=self._budget.max_bytes) for _ in range(2))
            for reader, pipe in ((output, process.stdout), (errors, process.stderr)):
                protocol = functools.partial(asyncio.StreamReaderProtocol, reader)
                transports.append((await loop.connect_read_pipe(protocol, pipe))[0])
            to_program, flow = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, process.stdin)
            transports.append(to_program)
            writer = asyncio.StreamWriter(to_program, flow, None, loop)
            came, incoming = anyio.create_memory_object_stream[Any](0)
            outgoing, to_send = anyio.create_memory_object_stream[Any](_QUEUED)
            async with anyio.create_task_group() as group:
                group.start_soon(self._read, output, came)
                group.start_soon(self._read_errors, errors)
                group.start_soon(self._write, to_send, writer)
                try:
                    with came, incoming, outgoing, to_send:
                        yield incoming, outgoing
                finally:
                    group.cancel_scope.cancel()
        finally:
            self._program.kill()
            for transport in transports:
                if not transport.is_closing():
                    getattr(transport, "abort", transport.close)()
            self._program.end()

    async def how_it_ended(self) -> str:
        """Returns the exit code and the last words of a program that has closed its stdout."""
        process = self._program.process
        for _ in range(round(_EXIT_TIMEOUT_S / _POLL_S)):
            if process.poll() is not None:
                break
            await asyncio.sleep(_POLL_S)
        ended = (
            "it closed its stdout" if (code := process.poll()) is None else f"it ended with exit code {code}"
        )
        await asyncio.sleep(_POLL_S)  # its last words may still have to be read
        words = self._errors.decode(errors="replace").strip().splitlines()
        return f"{ended}{self.note}" + (f": {words[-1]:.300}" if words else "")

    @property
    def note(self) -> str:
        """Returns how many lines were no messages; empty without any."""
        return f" ({self._num_dropped} lines on its stdout were no messages)" if self._num_dropped else ""

    async def _read(self, output: asyncio.StreamReader, came: Any) -> None:
        with came:
            while True:
                try:
                    line = await output.readuntil(b"\n")
                except asyncio.IncompleteReadError:
                    return
                except asyncio.LimitOverrunError:
                    self._budget.take(self._budget.max_bytes + 1)
                    return
                self._budget.take(len(line))
                try:
                    message = mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    self._num_dropped += 1
                    continue
                with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                    await came.send(SessionMessage(message))

    async def _read_errors(self, errors: asyncio.StreamReader) -> None:
        num_bytes = 0
        while data := await errors.read(1 << 16):
            num_bytes += len(data)
            self._errors = (self._errors + data)[-_TAIL_BYTES:]
            if num_bytes > _MAX_ERROR_BYTES:
                self._budget.refuse(f"it wrote more than {_MAX_ERROR_BYTES} bytes to stderr")

    async def _write(self, to_send: Any, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # the end of its stdout follows
            async for item in to_send:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                writer.write(text.encode() + b"\n")
                await writer.drain()
