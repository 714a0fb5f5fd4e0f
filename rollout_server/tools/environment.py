"""An environment in which the policy calls tools until it has the final answer.

    prompt -> [reply with calls -> their outputs]* -> reply without a call -> final(reply) -> done

A task's author writes `final`, the reward of the reply without calls:

    class Product(ToolEnvironment):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"How much is {a} times {b}? Answer with the number.", [calculator])
            self.answer = a * b

        async def final(self, reply: Reply) -> float:
            return float(reply.text.strip() == str(self.answer))

The calls of a reply run one after the other, because tools may share state. Malformed calls, unknown tools
and exceptions of tools are reported to the policy. `episode.step_timeout_s` limits all calls of a reply:
beyond it the process is killed and the sample fails. To prevent that, calls due after `reply_timeout_s` are
not run, and the policy is told.

Sources of tools, such as MCP servers, are opened by `reset` and closed by `close`: a subclass with a `reset`
or `close` of its own calls `super()`.
"""

from __future__ import annotations

import asyncio
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from areal_like.errors import ConfigError, EpisodeError
from rollout_server.environments.base import Environment, Message, Reply, Step, ToolCall, messages_of
from rollout_server.environments.exchange import awaitable
from rollout_server.tools.source import OpenTools, ToolSource
from rollout_server.tools.tool import Tool, ToolOutput


class ToolEnvironment(Environment):
    """Base of environments with tools. A subclass implements `final`."""

    max_calls: ClassVar[int] = 16
    """Maximum number of calls that are run per reply."""
    reply_timeout_s: ClassVar[float] = 25.0
    """Time for all calls of one reply, in seconds: below `episode.step_timeout_s`."""

    def __init__(
        self, prompt: str | Sequence[Message], tools: Sequence[Callable[..., Any] | Tool | ToolSource] = ()
    ) -> None:
        """`prompt`: the user's message, or several messages. `tools`: functions, methods, Tools, or sources.

        Raises ConfigError if a tool's schema cannot be made.
        """
        self._prompt = prompt
        self._sources = [tool for tool in tools if isinstance(tool, ToolSource)]
        self._opened: list[OpenTools] = []
        own = [tool for tool in tools if not isinstance(tool, ToolSource)]
        self._own = [tool if isinstance(tool, Tool) else Tool.of(tool) for tool in own]
        self._offer(self._own)

    def _offer(self, tools: Sequence[Tool]) -> None:
        """Sets the tools that the policy may call. Raises ConfigError."""
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = [tool.name for tool in tools]
            twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
            raise ConfigError(
                f"two tools have the same name ({twice}): leave one out, or give a server's tools a `prefix`"
            )
        self.tools = [tool.schema for tool in tools]

    @abstractmethod
    async def final(self, reply: Reply) -> float | Step:
        """Returns the reward of a reply without calls, which ends the episode; a Step may continue it."""

    async def reset(self) -> list[Message]:
        """Opens the sources. Raises ToolServerError, or ConfigError for two tools of one name."""
        for source in self._sources[len(self._opened) :]:
            self._opened.append(await source.open())
        if self._sources:
            self._offer([*self._own, *(tool for opened in self._opened for tool in opened.tools)])
        return messages_of(self._prompt)

    async def close(self) -> None:
        """Closes the sources."""
        while self._opened:
            await self._opened.pop().close()

    def check(self) -> None:
        for tool in self._own:
            tool.check()
        for source in self._sources:
            source.check()

    async def step(self, reply: Reply) -> Step:
        """Runs the calls of a reply. Metrics: `tool_calls`, `tool_errors`, `unknown_tools`; with sources also
        `tool_server_failures`."""
        if len(self._opened) < len(self._sources):
            raise EpisodeError("the servers of tools are not started: call super().reset() in reset()")
        failures = self._num_failures
        step = await self._step(reply)
        if not self._sources:
            return step
        counted = {"tool_server_failures": float(self._num_failures - failures)}
        return replace(step, metrics={**counted, **step.metrics})

    @property
    def _num_failures(self) -> int:
        return sum(opened.num_failures for opened in self._opened)

    async def _step(self, reply: Reply) -> Step:
        metrics = {"tool_calls": float(len(reply.tool_calls)), "tool_errors": 0.0, "unknown_tools": 0.0}
        if not reply.tool_calls:
            last = await awaitable(self.final(reply), call="final")
            if last is None:
                raise EpisodeError("final() returned None: return the reward, a number, or a Step")
            if isinstance(last, Step):
                return replace(last, metrics={**metrics, **last.metrics})
            return Step(reward=float(last), done=True, metrics=metrics)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.reply_timeout_s
        messages = []
        for place, call in enumerate(reply.tool_calls):
            if place >= self.max_calls:
                output = _refused(f"not run: one reply may have at most {self.max_calls} calls")
            else:
                output = await self._output_of(call, timeout_s=deadline - loop.time())
            metrics["tool_errors"] += output.is_error
            metrics["unknown_tools"] += call.name not in self._tools
            messages.append(_message(call, output))
        return Step(messages=messages, metrics=metrics)

    async def _output_of(self, call: ToolCall, *, timeout_s: float) -> ToolOutput:
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return _refused(f"there is no tool {json.dumps(call.name):.80}. Tools: {known}")
        if timeout_s <= 0:
            return _refused(f"not run: earlier calls of this reply took {self.reply_timeout_s:g} s")
        return await tool.call(call.arguments, timeout_s=timeout_s)


def _refused(problem: str) -> ToolOutput:
    return ToolOutput(text=f"Error: {problem}", is_error=True)


def _message(call: ToolCall, output: ToolOutput) -> Message:
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": output.text}
