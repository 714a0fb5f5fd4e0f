"""Tasks with scripted agents, in a module that their processes import quickly."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rollout_server.agents.base import Session, complete_once
from rollout_server.tasks.base import Example, Score, Split, Task

SCRIPTS = (
    "three turns",
    "score",
    "posted",
    "raise",
    "exit",
    "die",
    "hang",
    "block",
    "nan",
    "no call",
    "branches",
    "endless",
    "endless quietly",
    "child",
    "thread",
    "nothing",
    "variables",
    "wrong turns",
    "one answer",
    "incomplete",
    "prepares",
)
"""What the agent of example `index % len(SCRIPTS)` does."""


def index_of(script: str) -> int:
    return SCRIPTS.index(script)


def post(path: str, body: Mapping[str, Any], *, base_url: str = "", api_key: str = "") -> Any:
    """A request as a program would make it that knows its model by the environment only."""
    url = urlsplit(base_url or os.environ["OPENAI_BASE_URL"])
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port)
    key = api_key or os.environ["OPENAI_API_KEY"]
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", f"{url.path}/{path}", json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {answer.decode()}")
    return json.loads(answer)


def chat(messages: list[dict[str, Any]]) -> str:
    """One turn; it is appended to the messages."""
    answer = post("chat/completions", {"model": "policy", "messages": messages})
    message = answer["choices"][0]["message"]
    messages.append(message)
    return str(message["content"])


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@dataclass(frozen=True, kw_only=True)
class AgentTask(Task):
    """The agent of an example does what SCRIPTS say."""

    def example(self, split: Split, index: int) -> Example:
        script = SCRIPTS[index % len(SCRIPTS)]
        return Example(prompt=script, answer=None, label=script.split()[0])

    async def agent(self, example: Example, session: Session) -> float | Mapping[str, float] | Score | None:
        messages = [said("go")]
        match example.prompt:
            case "three turns":
                for turn in range(3):
                    chat(messages)
                    messages.append(said(f"turn {turn}"))
                return 0.5
            case "score":
                chat(messages)
                return Score(value=1.0, parts={"form": 1.0}, metrics={"tries": 2.0}, turns=[0.25])
            case "posted":
                chat(messages)
                post("reward", {"reward": 0.75})
                return None
            case "raise":
                chat(messages)
                raise KeyError("no such door")
            case "exit":
                sys.exit(3)
            case "die":
                chat(messages)
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                chat(messages)
                await asyncio.sleep(3600)
            case "block":
                chat(messages)
                time.sleep(3600)
            case "prepares":
                await asyncio.sleep(3600)
            case "nan":
                chat(messages)
                return math.nan
            case "no call":
                return 1.0
            case "branches":
                chat(messages)
                with ThreadPoolExecutor(2) as threads:
                    branches = [[*messages, said(side)] for side in ("left", "right")]
                    list(threads.map(chat, branches))
                return 1.0
            case "endless" | "endless quietly":
                try:
                    while True:
                        chat(messages)
                        messages.append(said("more"))
                except RuntimeError:
                    if example.prompt == "endless":
                        raise
                return 1.0
            case "child":
                chat(messages)
                sleeper = [sys.executable, "-c", "import time; time.sleep(3600)"]
                child = subprocess.Popen(sleeper, start_new_session=True)
                return float(child.pid)
            case "thread":
                chat(messages)
                threading.Thread(target=time.sleep, args=(3600,)).start()
                return 1.0
            case "nothing":
                chat(messages)
                return None
            case "variables":
                assert os.environ["OPENAI_BASE_URL"] == session.base_url
                assert os.environ["OPENAI_API_BASE"] == session.base_url
                assert os.environ["OPENAI_API_KEY"] == session.api_key
                base_url = session.base_url.removesuffix("/v1")
                assert os.environ["ANTHROPIC_BASE_URL"] == session.anthropic_base_url == base_url
                assert os.environ["ANTHROPIC_API_KEY"] == session.api_key
                assert "ANTHROPIC_AUTH_TOKEN" not in os.environ
                assert "127.0.0.1" in os.environ["no_proxy"].split(",")
                chat(messages)
                return float(os.getpid())
            case "wrong turns":
                chat(messages)
                return Score(turns=[1.0, 2.0])
            case "incomplete":
                chat(messages)
                answer = post("responses", {"input": "go", "max_output_tokens": 2})
                raise RuntimeError(answer["status"])  # as openai-agents
            case "one answer":
                await complete_once(session, messages)
                return 1.0
        raise AssertionError(example.prompt)


@dataclass(frozen=True, kw_only=True)
class ChatterAgentTask(Task):
    """Agents of one to three turns; some of them fail, by their index. Rewards an even number of letters."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=f"say {index}", answer=None)

    async def agent(self, example: Example, session: Session) -> float | Mapping[str, float] | Score | None:
        number = int(str(example.prompt).split()[1])
        messages = [said(str(example.prompt))]
        for turn in range(1 + number % 3):
            text = chat(messages)
            if number % 7 == 3:
                raise KeyError("no such door")
            if number % 11 == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            messages.append(said(f"turn {turn}"))
        if number % 5 == 2:
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(chat, [[*messages, said(side)] for side in ("left", "right")]))
        return float(sum(map(str.isalpha, text)) % 2 == 0)
