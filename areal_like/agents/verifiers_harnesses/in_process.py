"""The harness `in_process`: the chat loop of verifiers' `null` harness, without a process for each rollout.

The loop calls the model until it responds without a tool call; the tools are those of the environment. The
`null` harness installs the same loop with uv and starts an interpreter for each rollout.
"""

from __future__ import annotations

import argparse
import asyncio
import types
from contextlib import AsyncExitStack
from typing import Any

from openai import AsyncOpenAI
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.launch import CHAT_PROGRAM_SOURCE
from verifiers.v1.runtimes import ProgramResult

__all__ = ["InProcessHarness"]

_CONNECT_TOOLS_S = 60.0
# The modules of that loop use each other's names: they work only joined, as the program that `null` runs.
_LOOP: Any = types.ModuleType("verifiers_chat_program")
exec(compile(CHAT_PROGRAM_SOURCE, _LOOP.__name__, "exec"), _LOOP.__dict__)


class InProcessHarnessConfig(HarnessConfig):  # type: ignore[misc]
    """The settings that every harness has, and no others."""


class InProcessHarness(Harness[InProcessHarnessConfig]):  # type: ignore[misc]
    """Offers no tools of its own, so it runs no code that the model writes."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
    ) -> Any:
        """Plays the rollout in this process; arguments and result are those of `Harness.launch`."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        # No retries of our own: a request that was sampled once must not be sampled again.
        async with (
            AsyncExitStack() as stack,
            AsyncOpenAI(base_url=endpoint, api_key=secret, timeout=None, max_retries=0) as client,
        ):
            tools: list[dict[str, Any]] = []
            dispatch: dict[str, Any] = {}
            connections: dict[str, Any] = {}
            if servers:
                async with asyncio.timeout(_CONNECT_TOOLS_S):
                    tools, dispatch, connections = await _LOOP.connect_mcp(
                        {"mcpServers": servers}, stack, set()
                    )
            options = argparse.Namespace(bash=False, edit=False, search=False, tool_interception_url="")
            compactor = _LOOP.Compactor(client, ctx.model, tools, False, None)
            try:
                await _LOOP.run_chat_loop(options, compactor, messages, dispatch, connections, None)
            except SystemExit as error:  # the loop was written for a process of its own
                return ProgramResult(exit_code=int(error.code or 1), stdout="", stderr="no answer")
        return ProgramResult(exit_code=0, stdout="", stderr="")
