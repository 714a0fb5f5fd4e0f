"""ToolEnvironment, and tools by name: calculator, python in a sandbox, search at a server of the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason
from rollout_server.environments.base import Environment, Reply, Step, ToolCall
from rollout_server.tasks.base import Example, Split, make_task
from rollout_server.tasks.tools import ToolTask
from rollout_server.tools import Tool, ToolEnvironment, calculator, make_tools
from tests.support.waiting import HANG_LIMIT_S
from tests.support.workers import environment_pool


def reply(text: str = "", *calls: tuple[str, Any]) -> Reply:
    return Reply(
        text=text,
        raw_text=text,
        tool_calls=tuple(
            ToolCall(id=f"call{n}", name=name, arguments=args if isinstance(args, str) else json.dumps(args))
            for n, (name, args) in enumerate(calls)
        ),
        finish_reason=FinishReason.STOP,
        num_tokens=1,
    )


class Counter(ToolEnvironment):
    """A number that tools change; the reward is 1 if the answer is that number."""

    max_calls = 4

    def __init__(self) -> None:
        super().__init__("Count.", [self.add, self.slow, Tool.of(calculator)])
        self.total = 0

    def add(self, number: int) -> int:
        """Adds to the total."""
        self.total += number
        return self.total

    async def slow(self, seconds: float) -> str:
        """Waits."""
        await asyncio.sleep(seconds)
        return "done"

    async def final(self, reply: Reply) -> float | Step:
        if reply.text == "again":
            return Step(messages=[{"role": "user", "content": "Go on."}], metrics={"again": 1.0})
        return float(reply.text == str(self.total))


class Hasty(Counter):
    reply_timeout_s = 0.1


def run(environment: Environment, *replies: Reply) -> list[Step]:
    async def episode() -> list[Step]:
        await environment.reset()
        steps = [await environment.step(one) for one in replies]
        await environment.close()
        return steps

    return asyncio.run(episode())


def contents(step: Step) -> list[str]:
    return [message["content"] for message in step.messages]


def test_an_episode_with_tools() -> None:
    environment = Counter()
    assert [tool["function"]["name"] for tool in environment.tools] == ["add", "slow", "calculator"]
    assert asyncio.run(environment.reset()) == [{"role": "user", "content": "Count."}]
    both, again, last = run(
        environment,
        reply("", ("add", {"number": 2}), ("add", {"number": 3}), ("calculator", {"expression": "6*7"})),
        reply("again"),
        reply("5"),
    )
    assert both.messages == [
        {"role": "tool", "tool_call_id": "call0", "name": "add", "content": "2"},
        {"role": "tool", "tool_call_id": "call1", "name": "add", "content": "5"},
        {"role": "tool", "tool_call_id": "call2", "name": "calculator", "content": "42"},
    ]
    assert (both.reward, both.done, both.metrics["tool_calls"]) == (0.0, False, 3.0)
    assert not again.done and again.metrics == {
        "again": 1.0,
        "tool_calls": 0.0,
        "tool_errors": 0.0,
        "unknown_tools": 0.0,
    }
    assert last.done and last.reward == 1.0


def test_mistakes_of_the_policy_are_answers() -> None:
    (step,) = run(
        Counter(), reply("", ("sub", {}), ("add", "{number: 1}"), ("add", {"number": "one"}), ("", {}))
    )
    assert contents(step)[0] == 'Error: there is no tool "sub". Tools: add, slow, calculator'
    assert contents(step)[1].startswith("Error: the arguments are not a JSON object")
    assert contents(step)[2] == "Error: argument number: want an integer, got 'one'"
    assert contents(step)[3].startswith('Error: there is no tool "".')
    assert step.metrics == {"tool_calls": 4.0, "tool_errors": 4.0, "unknown_tools": 2.0}


def test_calls_of_one_reply_are_limited() -> None:
    (many,) = run(Counter(), reply("", *[("add", {"number": 1})] * 6))
    assert contents(many)[:4] == ["1", "2", "3", "4"]
    assert contents(many)[4:] == ["Error: not run: one reply may have at most 4 calls"] * 2
    (slow,) = run(Hasty(), reply("", ("slow", {"seconds": 60}), ("add", {"number": 1})))
    assert contents(slow)[0].startswith("Error: no result within 0.")
    assert contents(slow)[1] == "Error: not run: earlier calls of this reply took 0.1 s"


def test_two_tools_of_one_name() -> None:
    class Twice(Counter):
        def __init__(self) -> None:
            ToolEnvironment.__init__(self, "", [calculator, calculator])

    with pytest.raises(ConfigError, match="two tools have the same name"):
        Twice()


@dataclass(frozen=True, kw_only=True)
class Sums(ToolTask):
    """A task whose tools are settings."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=f"{index} + 1?", answer=index + 1)

    def environment(self, example: Example) -> Environment:
        return OneSum(example.prompt, self.make_tools())  # type: ignore[arg-type]


class OneSum(ToolEnvironment):
    async def final(self, reply: Reply) -> float:
        return 1.0


def sums(tools: Any, **settings: Any) -> ToolTask:
    task = make_task({"_target_": f"{__name__}.Sums", "tools": tools}, seed=0, **settings)
    assert isinstance(task, ToolTask)
    return task


def test_tools_by_name() -> None:
    task = sums(["calculator", {"name": "python", "timeout_s": HANG_LIMIT_S}], sandbox="rlimits")
    environment = task.environment(task.example("train", 1))
    assert environment is not None
    (step,) = run(
        environment,
        reply("", ("calculator", {"expression": "1/0"}), ("python", {"code": "print(sum(range(10)))"})),
    )
    assert contents(step) == ["Error: division by zero", "45"]


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        (["calculater"], "tools.name=calculater: choose one of calculator, mcp, python, search"),
        ("calculator", "want a list"),
        ([{"name": "search"}], "needs url"),
        ([{"name": "search", "url": "file:///etc/passwd"}], "want http://"),
        ([{"name": "search", "url": "http://x", "method": "PUT"}], "tools.method"),
        ([{"name": "python", "timeout_s": 0}], "timeout_s"),
        ([{"name": "python", "time": 3}], "unknown key `tools.time`"),
    ],
)
def test_wrong_settings_of_tools(tools: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        sums(tools)


def refusal(sandbox: str, *tools: str) -> str:
    """What a rollout server says at its start, if it does not accept the task's environments."""

    async def check() -> str:
        settings = {"_target_": f"{__name__}.Sums", "tools": list(tools)}
        async with environment_pool(settings, sandbox=sandbox, memory_mb=1024) as pool:
            try:
                await pool.check()
            except ConfigError as error:
                return str(error)
        return ""

    return asyncio.run(check())


def test_job_without_a_working_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At the start, in the environment's process; a task without a tool that needs it is not."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert refusal("bwrap", "calculator") == ""
    assert refusal("rlimits", "python") == ""
    problem = refusal("bwrap", "python")
    assert "No permissions to create a new namespace" in problem
    assert "set rewards.sandbox=rlimits, which gives up isolation" in problem


class Hanging(ToolTask):
    """Its tool blocks."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="", answer=index)

    def environment(self, example: Example) -> Environment:
        return OneSum("Wait.", [Tool.of(hang, timeout_s=0.1)])


def hang() -> str:
    """Blocks longer than its time limit."""
    threading.Event().wait(60)
    return ""


def test_process_with_a_hanging_tool_is_not_used_again() -> None:
    async def episode() -> tuple[list[str], int, int]:
        settings = {"_target_": f"{__name__}.Hanging"}
        async with environment_pool(settings, memory_mb=1024) as pool:
            idle = []
            for replies in ([reply("done")], [reply("", ("hang", {})), reply("done")]):
                environment = await pool.open(split="train", index=0, seed=0)
                await environment.reset()
                steps = [await environment.step(one) for one in replies]
                environment.close()
                while pool._closing:
                    await asyncio.sleep(0.01)
                idle.append(len(pool._idle))
        return contents(steps[0]), idle[0], idle[1]

    assert asyncio.run(episode()) == (["Error: no result within 0.1 s"], 1, 0)


def python(code: str, **settings: Any) -> str:
    (tool,) = make_tools([{"name": "python", **settings}], sandbox="rlimits")
    return asyncio.run(tool.call(json.dumps({"code": code}))).text


def test_what_python_answers() -> None:
    assert python("print('a'); print('b')") == "a\nb"
    assert python("x = 1") == "(no output)"
    failed = python("print(1); 1 / 0")
    assert failed.startswith("1\nTraceback") and failed.endswith("division by zero\n[exit code 1]")
    for limit_s in (1, 10, 100):  # a busy machine starts it late
        killed = python("import time; print(1); time.sleep(3600)", timeout_s=limit_s)
        if killed.startswith("1"):
            break
    assert killed == f"1\n[killed after {limit_s} s]"
    assert (
        python("print('x' * 5000)", max_output_bytes=100)
        == "x" * 100 + "\n[the output is cut after 100 bytes]"
    )


class Service(BaseHTTPRequestHandler):
    """A search service, and ways in which one can misbehave."""

    asked: ClassVar[list[tuple[str, str, str | None]]] = []

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query).get("q", [""])[0]
        self.asked.append((parts.path, query, self.headers.get("Authorization")))
        found: Any = {"results": [{"title": f"About {query}", "text": "t" * 50, "id": 1}, "plain", 7]}
        match parts.path:
            case "/search":
                self._send(200, json.dumps(found).encode())
            case "/empty":
                self._send(200, b"[]")
            case "/failing":
                self._send(503, b"")
            case "/moved":
                self.send_response(302)
                self.send_header("Location", "/search")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case "/html":
                self._send(200, b"<html>")
            case "/odd":
                self._send(200, b'{"results": "none"}')
            case "/huge":
                with contextlib.suppress(ConnectionError):
                    self._send(200, b"x" * (4 << 20))
            case "/slow":
                threading.Event().wait(10)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(200, json.dumps([f"you asked {body}"]).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def search(url: str, query: str = "red cat & dog", **settings: Any) -> str:
    (tool,) = make_tools([{"name": "search", "url": url, **settings}], sandbox="bwrap")
    return asyncio.run(tool.call(json.dumps({"query": query}))).text


def test_search(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("SEARCH_KEY", "k")
    found = search(f"{service}/search", max_results=2, max_result_chars=30, key_variable="SEARCH_KEY")
    assert found == "[1] About red cat & dog\ntttttttttt...\n[2] plain"
    assert Service.asked[-1] == ("/search", "red cat & dog", "Bearer k")
    assert search(f"{service}/search", method="POST", query_key="words").startswith("[1] you asked {'words'")
    assert search(f"{service}/empty") == "no results"


def test_search_services_that_misbehave(service: str) -> None:
    problems = {path: search(f"{service}/{path}") for path in ("failing", "moved", "html", "odd")}
    assert problems == {
        "failing": "Error: the search service responded with HTTP status 503",
        "moved": "Error: the search service responded with HTTP status 302",
        "html": "Error: the search service sent no JSON",
        "odd": "Error: the search service sent no list of results under 'results'",
    }
    assert search(f"{service}/slow", timeout_s=0.3) == "Error: no result within 0.3 s"
    assert search(f"{service}/huge") == "Error: the search service sent more than 1048576 bytes"
    unreachable = search("http://127.0.0.1:1/search")
    assert unreachable == "Error: the search service cannot be reached (ClientConnectorError)"


def test_missing_key_of_a_search_service() -> None:
    (tool,) = make_tools([{"name": "search", "url": "http://x", "key_variable": "NO_KEY"}], sandbox="bwrap")
    with pytest.raises(ConfigError, match="NO_KEY is not set"):
        tool.check()
