"""Servers of tools for tests, and an environment that calls them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rollout_server.environments.base import Environment, Reply
from rollout_server.environments.scripted import Episode, call, play, say
from rollout_server.tasks.base import Example, Split
from rollout_server.tasks.tools import ToolTask
from rollout_server.tools import ToolEnvironment
from rollout_server.tools.mcp import MCPServer
from tests.support.waiting import HANG_LIMIT_S

GOOD = str(Path(__file__).with_name("mcp_good.py"))
HOSTILE = str(Path(__file__).with_name("mcp_hostile.py"))
PATIENT = {"start_timeout_s": HANG_LIMIT_S, "list_timeout_s": HANG_LIMIT_S, "timeout_s": HANG_LIMIT_S}


class Asking(ToolEnvironment):
    """Any final reply is right."""

    reply_timeout_s = HANG_LIMIT_S

    async def final(self, reply: Reply) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class AskingTask(ToolTask):
    """Its tools are settings."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="Ask.", answer=index)

    def environment(self, example: Example) -> Environment:
        return Asking(example.prompt, self.make_tools())  # type: ignore[arg-type]


@cache
def sandbox() -> str:
    """The strongest sandbox that works here."""
    bwrap = shutil.which("bwrap")
    works = bwrap and subprocess.run(
        [bwrap, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, check=False
    )
    return "bwrap" if works and works.returncode == 0 else "rlimits"


def good(**settings: Any) -> MCPServer:
    given = {"sandbox": sandbox(), **PATIENT, **settings}
    return MCPServer(server="good", command=[sys.executable, GOOD], readable=[GOOD], **given)


def hostile_settings(*how: str, **settings: Any) -> dict[str, Any]:
    command = [sys.executable, "-I", "-S", HOSTILE, *how]
    return {"server": "hostile", "command": command, "readable": [HOSTILE], **PATIENT, **settings}


def hostile(*how: str, **settings: Any) -> MCPServer:
    return MCPServer(**hostile_settings(*how, **{"sandbox": sandbox(), **settings}))


def answers(server: MCPServer, *calls: tuple[str, dict[str, Any]]) -> tuple[list[str], Episode]:
    """What the policy reads after each call, and the episode."""
    episode = play(Asking("Ask.", [server]), [*(call(name, **given) for name, given in calls), say("done")])
    assert episode.is_done and episode.reward == 1.0
    return [one["content"] for one in episode.messages if one["role"] == "tool"], episode


def said(server: MCPServer, *texts: str) -> tuple[list[str], float]:
    """What the policy reads after it has called `say` with each text, and how often the server failed."""
    contents, episode = answers(server, *[("say", {"text": text}) for text in texts])
    return contents, episode.metrics["tool_server_failures"]


def names(tools: Sequence[dict[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]
